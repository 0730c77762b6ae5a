"""The README's picture: videos of the first validation prompts of `blocks`, with seed 0.

python tools/blocks_picture.py cache/blocks docs/blocks.webp
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from dicode.data.cache import FrameCache
from dicode.evaluate.events import generated, scripted_of
from dicode.pipeline import DiCoDe
from dicode.video.sheet import save_sheet

SETS = ("seen", "combinations", "orders", "swaps", "within")
OF_EACH = 2  # scripts


def main(argv: Sequence[str]) -> None:
    """One row a video."""
    cache, output = argv
    model, videos, prompts = DiCoDe.from_pretrained("blocks"), [], []
    own = [one for one in scripted_of(FrameCache.load(cache), OF_EACH) if one.name in SETS]
    for number, one in enumerate(own):
        videos.append(generated(model, [one.prompt], one.script.clips, 0, [number])[0])
        prompts.append(str(one.prompt))
    save_sheet(Path(output), videos, prompts, columns=10)


if __name__ == "__main__":
    main(sys.argv[1:])
