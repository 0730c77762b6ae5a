"""Draw docs/world-instructions.webp and docs/world-rollouts.webp with a model of recipes/world.py; seed 0.

    python studies/world/pictures.py world cache/world

First images are made by the model itself: frames of the real clips are not ours to show.
"""

import sys
from pathlib import Path

import numpy as np

from dicode.data.cache import FrameCache
from dicode.evaluate.generation import draw_prompts
from dicode.pipeline import DiCoDe
from dicode.video.sheet import contact_sheet
from dicode.video.timed import Video

DOCS = Path(__file__).parents[2] / "docs"
IMAGES, INSTRUCTIONS, ROLLOUTS = 4, 3, 6
ROLLOUT_S = 10.0


def main(folder: str, cache: str) -> None:
    """Both pictures, of training captions drawn with seed 0."""
    model = DiCoDe.from_pretrained(folder)
    known = [v.captions[0] for v in FrameCache.load(cache).subset(validation=False).videos if v.captions]
    drawn = draw_prompts(known, IMAGES * (INSTRUCTIONS + 1) + ROLLOUTS, seed=0)
    clips: list[Video] = []
    labels = []
    for number in range(IMAGES):
        prompts = drawn[number * (INSTRUCTIONS + 1) :][: INSTRUCTIONS + 1]
        image = next(model.generate(prompts[0], seconds=2, sample_index=number))[:1]
        for instruction in prompts[1:]:
            made = model.generate(instruction, seconds=4, sample_index=number, given=model.given(image=image))
            clips.append(np.concatenate(list(made)))
            labels.append(instruction)
    contact_sheet(clips, labels, columns=9).save(DOCS / "world-instructions.webp")
    prompts = drawn[-ROLLOUTS:]
    videos = [np.concatenate(list(model.generate(p, seconds=ROLLOUT_S, sample_index=i))) for i, p in enumerate(prompts)]
    contact_sheet(videos, prompts, columns=11).save(DOCS / "world-rollouts.webp")


if __name__ == "__main__":
    main(*sys.argv[1:])
