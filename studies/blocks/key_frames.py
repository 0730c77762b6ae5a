"""Objects in the key frames that a language model of `blocks` writes, against those of the real key frames.

It measures the language model alone: key frames are decoded by linear code and first stage, which are exact enough,
and no frame between them is rendered.

    python studies/blocks/key_frames.py MODEL CACHE OUT.json --guidance 3 --sheet sheet.png

`--lm` takes the language model of a run, such as runs/blocks-lm/best, in place of the model's own. `SET, chance` are
the same key frames against those of another script of that set and length.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from dicode.data.blocks.script import CLIP_FRAMES
from dicode.data.cache import FrameCache
from dicode.evaluate.events import SIZE, Scripted, scripted_of
from dicode.features.events.tracks import Patch, patches_of, shape_of
from dicode.lm.deep_lm import DeepTokenLM
from dicode.pipeline import DiCoDe
from dicode.provenance import write_result
from dicode.stopwatch import tracked
from dicode.train.cached import pixels_to_frames
from dicode.video.sheet import contact_sheet

SETS = ("seen", "combinations", "orders", "paraphrases", "swaps")
NEAR, ALIKE = 10.0, 1.35  # pixels, and ratio of areas: in the same third of the picture, and of the same size
ON_SHEET = 4  # scripts of each set


def main(argv: Sequence[str] | None = None) -> None:
    """Write key frames of up to `--count` scripts of each set from their captions, and count what they show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--lm", type=Path)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--variance-scale", type=float)
    parser.add_argument("--sheet", type=Path)
    asked = parser.parse_args(argv)
    model, cache = DiCoDe.from_pretrained(asked.model), FrameCache.load(asked.cache)
    if asked.lm:
        model.lm = DeepTokenLM.from_pretrained(asked.lm)
    text, length = model.lm.text, model.lm.config.text_length
    if text is None:
        parser.error(f"{asked.lm or asked.model}: the language model has no vocabulary")
    sampling = model.sampling.changed(guidance=asked.guidance, variance_scale=asked.variance_scale)
    groups: dict[tuple[str, int], list[Scripted]] = defaultdict(list)
    for one in scripted_of(cache, asked.count):
        if one.name in SETS:
            groups[one.name, one.script.clips].append(one)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    shown: dict[str, list[tuple[ndarray, str]]] = defaultdict(list)
    for (name, clips), own in tracked([*groups.items()], "writing", "group"):
        ids = text.encode([one.video.caption for one in own], length)
        written = torch.stack([*model.lm.generate(ids, clips + 1, sampling=sampling)], dim=1)
        reals = [cache.frames[one.video.first : one.video.first + one.video.count : CLIP_FRAMES].numpy() for one in own]
        for i, (one, made) in enumerate(zip(own, decoded(model, written), strict=True)):
            real, other = reals[i], reals[i - 1]
            for k in range(clips + 1):
                found = patches_of(made[k])
                counts[name] += (same := compared(patches_of(real[k]), found))
                counts[f"{name}, key frame {k}"] += same
                if len(own) > 1:
                    counts[f"{name}, chance"] += compared(patches_of(other[k]), found)
            if len(shown[name]) < 2 * ON_SHEET:
                shown[name] += [(real, f"{name}, real: {one.video.caption}"), (made, "written")]
    values = {name: shares(own) for name, own in sorted(counts.items())}
    command = f"python studies/blocks/key_frames.py {' '.join(argv or [])}"
    write_result(
        asked.output, "objects in written key frames of blocks", values, sum(map(len, groups.values())), 0, command
    )
    if asked.sheet:
        rows = [row for own in shown.values() for row in own]
        longest = max(len(frames) for frames, _ in rows)
        padded = [np.pad(frames, ((0, longest - len(frames)), *[(0, 0)] * 3)) for frames, _ in rows]
        contact_sheet(padded, [label for _, label in rows], columns=longest).save(asked.sheet)


@torch.no_grad()
def decoded(model: DiCoDe, tokens: Tensor) -> ndarray:
    """Key frames of deep tokens `b k n d`, uint8 `b k h w 3`."""
    latents = model.tokenizer.key_latents(tokens.flatten(0, 1).float())
    return pixels_to_frames(model.tokenizer.first_stage.decode(latents)).unflatten(0, tokens.shape[:2]).numpy()


def compared(real: Sequence[Patch], made: Sequence[Patch]) -> Counter[str]:
    """What of a real key frame's objects is in the one that was written.

    The shape of an object that the edge cuts is not asked for. Where a caption leaves a place open, both may differ.
    """
    found: Counter[str] = Counter(key_frames=1, objects=len(real), objects_written=len(made))
    found["colours"] = sorted(own.colour for own in real) == sorted(own.colour for own in made)
    alike = 0
    for own in real:
        same = [other for other in made if other.colour == own.colour]
        found["colour"] += bool(same)
        shaped = [other for other in same if is_cut(own) or shape_of([other]) == shape_of([own])]
        alike += bool(shaped)
        found["place"] += any(abs(other.x - own.x) < NEAR for other in same)
        found["size"] += any(1 / ALIKE < other.area / own.area < ALIKE for other in same)
    found["colour_and_shape"] = alike
    found["all"] = found["colours"] and alike == len(real)
    return found


def is_cut(patch: Patch) -> bool:
    """Whether the picture's edge cuts an object."""
    return min(patch.left, patch.top) == 0 or max(patch.right, patch.bottom) == SIZE


def shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Of key frames: `colours` exactly the real one's, and `all`, with shapes. Of objects: the others."""
    frames, objects = counts["key_frames"], max(1, counts["objects"])
    of_frames = {key: round(counts[key] / frames, 4) for key in ("colours", "all")}
    of_objects = ("colour", "colour_and_shape", "place", "size", "objects_written")
    return {"key_frames": frames, **of_frames, **{key: round(counts[key] / objects, 4) for key in of_objects}}


if __name__ == "__main__":
    main()
