"""A picture of the example prompts that the page of `dicode serve` shows for a model: videos of 4 s, seed 0.

python tools/examples_picture.py sprites docs/sprites.webp
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import dicode
from dicode.pipeline import DiCoDe
from dicode.video.sheet import save_sheet

PAGE = Path(dicode.__file__).parent / "serve/page/app.js"


def main(argv: Sequence[str]) -> None:
    """One row a prompt."""
    name, output = argv
    prompts = re.findall(r'"([^"]+)"', re.findall(rf"^  {name}: \[([^\]]+)\]", PAGE.read_text(), re.MULTILINE)[0])
    model = DiCoDe.from_pretrained(name)
    clips = torch.cat(list(model.generate_batch(prompts, seconds=4.0, seed=0)), dim=1)
    save_sheet(Path(output), list(clips.numpy()), prompts, columns=10)


if __name__ == "__main__":
    main(sys.argv[1:])
