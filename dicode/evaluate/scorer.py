"""A user's own scorer: a function of a video's frames, whose answers are compared with the keys of its caption line."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from dicode.evaluate.clips import BATCH, MadeClips, caption_of, split_rows, spread
from dicode.evaluate.metrics import Interval
from dicode.evaluate.scores import Score
from dicode.progress import tracked
from dicode.recipe_files import RecipeError, load_function, run_own
from dicode.video.columns import CachedVideo, Videos
from dicode.video.sheet import contact_sheet
from dicode.video.timed import Video

ALL = "all keys"
MOST_CLIPS = 4  # of a video: longer ones are scored by their beginning
NEAR = 0.1  # of a number that is no integer: an answer so near to it, relatively, is right

Answers = Mapping[str, Any]


@dataclass(frozen=True)
class Accuracy:
    """Share of videos (0…1) whose answer is right, and what answers about other videos would have got."""

    value: float
    interval: Interval  # 95 %, over videos (Wilson)
    chance: float  # of the same answers, each compared with the caption lines of all other videos
    n: int


class Scorer:
    """FILE.py:FUNCTION, a function of uint8 frames `f h w c` that returns a dict of what it finds in them."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        form = "FILE.py:FUNCTION, a function of frames that returns a dict"
        self.function: Callable[[Video], Any] = load_function(spec, "scorer", form, "evaluate")

    def __call__(self, frames: Video) -> dict[str, Any]:
        """What it finds. Raises `RecipeError` for what the function raises, and where it returns no dict."""
        found = run_own(self.function, self.spec, np.array(frames))  # a copy, which it may write to
        if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
            raise RecipeError(f"{self.spec}: expected it to return a dict with names for keys, got {found!r:.80}")
        return {key: value.item() if isinstance(value, np.generic) else value for key, value in found.items()}


def scorer_metrics(scorer: Scorer, videos: Iterable[Video], truths: Sequence[Answers]) -> dict[str, Accuracy]:
    """Accuracy of each key that both the scorer and the caption lines (`truth_of`) have, and of all together.

    Video i is compared with `truths[i]`, and is left out of a key that this lacks. Raises `RecipeError` where they
    share no key. A run may take its best weights by any of these.
    """
    found = [scorer(frames) for frames in videos]
    if len(found) != len(truths):
        raise ValueError(f"expected as many videos as caption lines, got {len(found)} and {len(truths)}")
    answered, written = ({key for one in those for key in one} for those in (found, truths))
    keys = sorted(answered & written)
    if not keys:
        raise RecipeError(
            f"{scorer.spec}: expected a key of the caption lines, which have {', '.join(sorted(written)) or 'none'}; "
            f"it returned {', '.join(sorted(answered)) or 'none'}"
        )
    asked = {key: [key] for key in keys} | ({ALL: keys} if len(keys) > 1 else {})
    made = {}
    for name, own in asked.items():
        rows = [i for i, truth in enumerate(truths) if all(key in truth for key in own)]
        if rows:
            right = np.array([[all(agrees(found[i].get(k), truths[j][k]) for k in own) for j in rows] for i in rows])
            made[name] = accuracy(right)
    return made


def accuracy(right: np.ndarray) -> Accuracy:
    """Of a table: whether the answers about video i (row) are right of video j (column)."""
    from scipy.stats import binomtest

    n, hits = len(right), int(np.trace(right))
    others = right[~np.eye(n, dtype=bool)]
    low, high = binomtest(hits, n).proportion_ci(method="wilson")
    return Accuracy(hits / n, (float(low), float(high)), float(others.mean()) if others.size else 0.0, n)


def agrees(found: Any, true: Any) -> bool:
    """Whether an answer is right: equal, text without case and outer spaces, numbers with a fraction to a tenth."""
    if isinstance(true, str) and isinstance(found, str):
        return found.strip().casefold() == true.strip().casefold()
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (found, true))
    if numbers and not float(true).is_integer():
        return math.isclose(found, true, rel_tol=NEAR)
    return bool(found == true) and isinstance(found, bool) == isinstance(true, bool)


def truth_of(video: CachedVideo) -> dict[str, Any]:
    """What a scorer's answers are compared with: the further keys of a video's caption line, and its caption."""
    return {"caption": caption_of(video), **{key: value for key, value in video.extra.items() if value is not None}}


def evaluate_scorer(made: MadeClips, scorer: Scorer, count: int = 100) -> tuple[dict[str, Any], Image.Image]:
    """Accuracy for real videos, which no model can be expected to exceed, their reconstructions, and generated ones.

    Of up to `count` videos of each split that have a caption. `…, shuffled` is chance: the same answers compared with
    the caption lines of all other videos.
    """
    clips = clips_of_videos(made)
    figures: dict[str, Any] = {"seconds": shown_frames(made, clips) / made.model.tokenizer.config.fps}
    rows, labels, total = [], [], 0
    for split, held in (("training", False), ("validation", True)):
        rows_of_split = spread(split_rows(made.cache, held, captioned=True), count)
        videos = [made.cache.videos[row] for row in rows_of_split]
        if not videos:
            continue
        total += len(videos)
        truths = [truth_of(video) for video in videos]
        cases = videos_of(made, videos, clips)
        for case, frames in cases.items():
            for key, own in scorer_metrics(scorer, tracked(frames, f"scoring {split}: {case}"), truths).items():
                metric = figures.setdefault(f"accuracy of {key}", {})
                metric[f"{split}: {case}"] = Score(own.value, own.interval, own.n)
                metric[f"{split}: {case}, shuffled"] = Score(own.chance, None, own.n)
        for i in range(min(4, len(videos))):
            rows += [frames[i] for frames in cases.values()]
            labels += [f"{split}, {case}: {caption_of(videos[i])}" for case in cases]
    return {**figures, "n": total}, contact_sheet(rows, labels)


def clips_of_videos(made: MadeClips) -> int:
    """Clips that hold the median video of a cache, at most `MOST_CLIPS` and what the language model holds."""
    length_s = float(np.median(Videos.of(made.cache.videos).column("period_s")))
    most = min(MOST_CLIPS, made.model.lm.config.keyframe_limit - 1)
    return max(1, min(most, round(length_s / made.model.tokenizer.config.clip_s)))


def shown_frames(made: MadeClips, clips: int) -> int:
    """Frames of so many clips in a row."""
    config = made.model.tokenizer.config
    return clips * config.tail_frame + config.repeated_frames


def videos_of(made: MadeClips, videos: Sequence[CachedVideo], clips: int) -> dict[str, list[Video]]:
    """The beginnings of videos, of so many clips: real, through tokens and back, generated of their captions."""
    model, cache, config = made.model, made.cache, made.model.tokenizer.config
    shown, cases = shown_frames(made, clips), ("real", "reconstruction", "generated")
    made_of: dict[str, list[Video]] = {case: [] for case in cases}
    for first in tracked(range(0, len(videos), BATCH), "videos to score", "batch"):
        part = videos[first : first + BATCH]
        indices = list(range(first, first + len(part)))
        rows = [cache.clip_rows(video, 0.0, clips * config.tail_frame + 1, config.fps) for video in part]
        real = torch.stack([cache.frames[own] for own in rows])
        decoded = model.tokenizer.decode(model.tokenizer.encode(real), seed=made.seed, sample_indices=indices)
        prompts = [caption_of(video) for video in part]
        options = {"seconds": shown / config.fps, "seed": made.seed + 3, "sample_indices": indices, **made.options}
        generated = model.generate_batch(prompts, **options)
        for case, frames in zip(cases, ([real], decoded, generated), strict=True):
            made_of[case] += list(torch.cat([own.cpu() for own in frames], dim=1)[:, :shown].numpy())
    return made_of
