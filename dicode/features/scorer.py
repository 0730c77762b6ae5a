"""A user's own scorer: a function of a video's frames, whose answers are compared with the keys of its caption line."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dicode.config.user_code import RecipeError, load_function, run_own
from dicode.data.columns import CachedVideo
from dicode.video.timed import Video

ALL = "all keys"
RELATIVE_TOLERANCE = 0.1  # of answers, where the true number is no integer

Answers = Mapping[str, Any]


class Accuracy(NamedTuple):
    """Share of videos (0…1) whose answer is right, beside chance."""

    value: float
    interval: tuple[float, float]  # 95 %, over videos (Wilson)
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
    from scipy.stats import binomtest

    found = [scorer(frames) for frames in videos]
    answered, written = ({key for one in those for key in one} for those in (found, truths))
    keys = sorted(answered & written)
    if not keys:
        raise RecipeError(
            f"{scorer.spec}: expected a key of the caption lines, which have {', '.join(sorted(written)) or 'none'}; "
            f"it returned {', '.join(sorted(answered)) or 'none'}"
        )
    accuracies = {}
    for name, own in [*((key, [key]) for key in keys), *([(ALL, keys)] if len(keys) > 1 else [])]:
        rows = [i for i, truth in enumerate(truths) if all(key in truth for key in own)]
        if not rows:
            continue
        # whether the answers about video i (row) are right of video j (column)
        right = np.array([[all(agrees(found[i].get(k), truths[j][k]) for k in own) for j in rows] for i in rows])
        n, hits = len(rows), int(np.trace(right))
        low, high = binomtest(hits, n).proportion_ci(method="wilson")
        chance = (right.sum() - hits) / max(1, n * (n - 1))
        accuracies[name] = Accuracy(hits / n, (float(low), float(high)), float(chance), n)
    return accuracies


def agrees(found: Any, true: Any) -> bool:
    """Whether an answer is right: equal, text without case and outer spaces, numbers with a fraction to a tenth."""
    if isinstance(true, str) and isinstance(found, str):
        return found.strip().casefold() == true.strip().casefold()
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (found, true))
    if numbers and not float(true).is_integer():
        return math.isclose(found, true, rel_tol=RELATIVE_TOLERANCE)
    return bool(found == true) and isinstance(found, bool) == isinstance(true, bool)


def truth_of(video: CachedVideo) -> dict[str, Any]:
    """What a scorer's answers are compared with: the further keys of a video's caption line, and its caption."""
    extra = {key: value for key, value in video.extra.items() if value is not None}
    return {"caption": video.caption, **extra}
