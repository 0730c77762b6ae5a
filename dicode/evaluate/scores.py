"""Figures with intervals: means over clips, and Fréchet distances and Inception Scores of whole sets of clips."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from dicode.evaluate.features import ClipFeatures, EfficientNetLite0Features, Network, features_of_clips
from dicode.evaluate.metrics import (
    Interval,
    bootstrap_interval,
    frechet_of_sets,
    percentile_rank,
)
from dicode.evaluate.networks import C3D, I3D, Clip, Inception
from dicode.evaluate.quality import inception_score
from dicode.evaluate.video_text import TinyVT
from dicode.seeds import generator_for
from dicode.shapes import Video

LEAST_CLIPS = 4  # whose halves have a covariance
LEAST_A_SPLIT = 20  # clips of a half in each split of an Inception Score; of ten an interval is a third too narrow
LEAST_REPEATS = 5  # from the least to the greatest of as many lies a median 94 times in a hundred
HALVES = 100  # their deviation is then known to 7 %


@dataclass(frozen=True)
class Score:
    """One figure, with what the choice of clips alone leaves open."""

    value: float
    interval: Interval | None  # 95 %; None where there is too little to tell it from
    n: int  # clips, videos or repeats of a measurement


class Seen(NamedTuple):
    """What one network makes of each clip of a set; None where it does not give that."""

    clips: Float[ndarray, "n width"] | None  # of which the Fréchet video distance is made
    frames: Float[ndarray, "n f width"] | None  # of which the Fréchet distance of single frames is made (FID)
    probabilities: Float[ndarray, "n classes"] | None  # of which the Inception Score is made


def mean_score(values: Sequence[float] | Float[ndarray, "n"], seed: int = 0) -> Score:
    """Mean of one value a clip with its bootstrap interval. `seed` is the bootstrap's."""
    values = np.asarray(values, dtype=np.float64)
    return Score(float(values.mean()), bootstrap_interval(np.mean, values, seed=seed), len(values))


def repeats_score(statistic: Callable[[ndarray], float], repeats: ndarray, seed: int = 0) -> Score:
    """A statistic of measurements that were repeated, one row each, with its bootstrap interval over them.

    Fewer than LEAST_REPEATS have no interval.
    """
    enough = len(repeats) >= LEAST_REPEATS
    interval = bootstrap_interval(statistic, repeats, seed=seed) if enough else None
    return Score(float(statistic(repeats)), interval, len(repeats))


def set_score(
    statistic: Callable[..., float],
    *sets: ndarray,
    paired: bool = True,
    least: float = 0.0,
    halves: int = HALVES,
    seed: int = 0,
) -> Score:
    """A statistic of whole sets, with 95 % by the delete-half jackknife (Shao & Wu 1989, section 2).

    Why no bootstrap: a set drawn with replacement holds clips twice, which makes a Fréchet distance larger and an
    Inception Score smaller, so that the interval may not hold the value. Halves drawn without replacement are biased
    too, but all alike: their deviation is the standard error of the whole set, rather more of Fréchet distances of
    fewer clips than features, and the interval is the value ± 1.96 of it, not below `least`. Fewer than LEAST_CLIPS
    clips have no interval. Value and interval are those of so many clips: compare only with sets of as many.

    Row i of every set belongs to one clip or prompt, and is left out with it; raises `ValueError` where sets differ in
    length. Where they are not `paired` each is halved on its own, the error is exact for even or large sets, and n is
    the smallest. `seed` draws the halves.
    """
    counts = [len(rows) for rows in sets]
    n = min(counts)
    if paired and n != max(counts):
        raise ValueError(f"expected sets of equally many clips, got {counts}")
    value = float(statistic(*sets))
    if n < LEAST_CLIPS:
        return Score(value, None, n)
    generator, of_halves = generator_for(seed, "halves"), []

    def half(count: int) -> ndarray:
        return torch.randperm(count, generator=generator)[: count - count // 2].numpy()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Fréchet distance of")  # halves are smaller still; said once, of the whole
        for _ in range(halves):
            kept = [half(n)] * len(sets) if paired else [half(count) for count in counts]
            of_halves.append(statistic(*(rows[those] for rows, those in zip(sets, kept, strict=True))))
    error = float(np.std(of_halves)) * np.sqrt((n - n // 2) / (n // 2))
    return Score(value, (float(max(least, value - 1.96 * error)), float(value + 1.96 * error)), n)


def frechet_score(real: ndarray, made: ndarray, seed: int = 0, paired: bool = True) -> Score:
    """Squared Fréchet distance of two sets of clips, of vectors `n width` or of all frames' `n f width`.

    Clip i of one belongs to clip i of the other, or, where they are not `paired`, to none, and there may be more.
    """
    return set_score(frechet_of_sets, real, made, paired=paired, seed=seed)


def class_score(probabilities: Float[ndarray, "n classes"], seed: int = 0, splits: int = 1) -> Score:
    """Inception Score, of one split by default: a few hundred clips cannot fill the ten of the literature.

    Without an interval where a half would have fewer than LEAST_A_SPLIT clips in a split.
    """
    if len(probabilities) < 2 * LEAST_A_SPLIT * splits:
        return Score(inception_score(probabilities, splits).mean, None, len(probabilities))
    return set_score(lambda rows: inception_score(rows, splits).mean, probabilities, least=1.0, seed=seed)


def seen(network: Network, clips: Sequence[Video]) -> Seen:
    """Run a network over clips, as the literature does for the metrics that carry its name."""
    if isinstance(network, I3D | TinyVT):
        return Seen(np.stack([network.clip_vector(clip) for clip in clips]), None, None)
    if isinstance(network, C3D):
        return Seen(None, None, np.stack([network.clip_vector(clip) for clip in clips]))
    if isinstance(network, Inception):
        frames = np.stack([network.frame_features(clip).numpy() for clip in clips])
        return Seen(None, frames, np.stack([network.frame_probabilities(clip).mean(0).numpy() for clip in clips]))
    features = features_of_clips(network, clips)
    return Seen(features.joined(), None, None) if isinstance(network, Clip) else seen_by_efflite(network, features)


def seen_by_efflite(network: EfficientNetLite0Features, features: ClipFeatures) -> Seen:
    """The same of EffLite0's features at hand."""
    return Seen(features.joined(), None, network.class_probabilities(features.mean))


def scores_of_sets(name: str, real: Seen, candidates: Mapping[str, Seen], seed: int = 0) -> dict[str, dict[str, Score]]:
    """`FVD-name` and `FID-name` of each candidate set against the real one, and `IS-name` of all of them.

    A candidate called "real" takes the real set's place in the latter.
    """
    made: dict[str, dict[str, Score]] = {}
    for metric, kind in (("FVD", "clips"), ("FID", "frames")):
        truth = getattr(real, kind)
        if truth is not None:
            made[f"{metric}-{name}"] = {
                candidate: frechet_score(truth, getattr(own, kind), seed) for candidate, own in candidates.items()
            }
    if real.probabilities is not None:
        made[f"IS-{name}"] = {
            candidate: class_score(own.probabilities, seed)
            for candidate, own in {"real": real, **candidates}.items()
            if own.probabilities is not None
        }
    return made


def alignment_scores(
    network: TinyVT, candidates: Mapping[str, Seen], captions: Sequence[str], seed: int = 0
) -> dict[str, dict[str, Score]]:
    """How well clips fit their captions: clip i of every set belongs to caption i, and is left out where it has none.

    `alignment-TinyVT`: mean cosine of clip and caption. `caption rank-TinyVT`: mean percentile rank of the right
    caption among all different ones (chance 50). Nothing where fewer than two differ.
    """
    rows = [i for i, caption in enumerate(captions) if caption]
    different = sorted({captions[i] for i in rows})
    if len(different) < 2:
        return {}
    right = np.array([different.index(captions[i]) for i in rows])
    alignment, rank = {}, {}
    for name, own in candidates.items():
        assert own.clips is not None  # as `seen` gives of TinyVT
        cosines = network.similarities(own.clips[rows], different)
        alignment[name] = mean_score(cosines[np.arange(len(rows)), right], seed)
        rank[name] = mean_score(percentile_rank(cosines, right), seed)
    return {f"alignment-{network.name}": alignment, f"caption rank-{network.name}": rank}
