"""Values with intervals: means over clips, statistics of whole sets of clips, and networks that are blind to some."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray

from dicode.features.extract import Features, Network, TextNetwork
from dicode.features.metrics import (
    Interval,
    bootstrap_interval,
    frechet_distance,
    kernel_distance,
    percentile_rank,
)
from dicode.seeds import generator_for

LEAST_CLIPS = 4  # whose halves have a covariance
LEAST_A_SPLIT = 20  # clips of a half in each split of an Inception Score; of ten an interval is a third too narrow
LEAST_REPEATS = 5  # the range of so many holds the median 94 times in a hundred
CHANCE_RANK = 50  # of the right caption among all, in percent
HALVES = 100  # their deviation is then known to 7 %


@dataclass(frozen=True)
class Score:
    """One figure with an interval over the choice of clips."""

    value: float
    interval: Interval | None  # 95 %; None where n is too small for one
    n: int  # clips, videos or repeats of a measurement


def mean_score(values: Sequence[float] | Float[ndarray, "n"], seed: int = 0) -> Score:
    """Mean of one value a clip with its bootstrap interval. `seed` is the bootstrap's."""
    values = np.asarray(values, dtype=np.float64)
    return Score(float(values.mean()), bootstrap_interval(np.mean, values, seed=seed), len(values))


def repeats_score(statistic: Callable[[ndarray], float], repeats: ndarray) -> Score:
    """A statistic of repeated measurements, one row each, with its bootstrap interval, from LEAST_REPEATS on."""
    interval = bootstrap_interval(statistic, repeats) if len(repeats) >= LEAST_REPEATS else None
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
    Inception Score smaller, so that the interval may not hold the value. Every half has the same bias, so the standard
    deviation over halves estimates the standard error of the full set (an overestimate for Fréchet distances of fewer
    clips than features). The interval is the value ± 1.96 of it, not below `least`; fewer than LEAST_CLIPS clips have
    none. Value and interval are those of so many clips: compare only with sets of as many.

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
        warnings.filterwarnings("ignore", "Fréchet distance of")  # warned of once, for the whole set
        for _ in range(halves):
            kept = [half(n)] * len(sets) if paired else [half(count) for count in counts]
            of_halves.append(statistic(*(rows[those] for rows, those in zip(sets, kept, strict=True))))
    error = float(np.std(of_halves)) * np.sqrt((n - n // 2) / (n // 2))
    return Score(value, (float(max(least, value - 1.96 * error)), float(value + 1.96 * error)), n)


def frechet_score(real: ndarray, candidate: ndarray, seed: int = 0, paired: bool = True) -> Score:
    """Squared Fréchet distance of two sets of clips, of vectors `n width` or of all frames' `n f width`.

    Clip i of one belongs to clip i of the other, or, where they are not `paired`, to none, and there may be more.
    """
    return set_score(frechet_distance, real, candidate, paired=paired, seed=seed)


def kernel_score(
    real: ndarray, candidate: ndarray, seed: int = 0, paired: bool = True, degree: int = 2, constant: float = 0.0
) -> Score:
    """`kernel_distance` of two sets, which may be negative; as `frechet_score` otherwise."""
    distance = partial(kernel_distance, degree=degree, constant=constant)
    return set_score(distance, real, candidate, paired=paired, least=-np.inf, seed=seed)


def class_score(probabilities: Float[ndarray, "n classes"], seed: int = 0, splits: int = 1) -> Score:
    """Inception Score, of one split by default: a few hundred clips cannot fill the ten of the literature.

    Without an interval where a half would have fewer than LEAST_A_SPLIT clips in a split.
    """
    if len(probabilities) < 2 * LEAST_A_SPLIT * splits:
        return Score(float(inception_scores(probabilities, splits).mean()), None, len(probabilities))
    return set_score(lambda rows: inception_scores(rows, splits).mean(), probabilities, least=1.0, seed=seed)


def inception_scores(probabilities: Float[ndarray, "n classes"], splits: int = 10) -> Float64[ndarray, "splits"]:
    """exp E KL(p(y|x) ‖ p(y)) of each of `splits` equal parts (Salimans et al. 2016, section 4): 1 to the classes.

    Raises `ValueError` for rows that are no probabilities, and for fewer samples than splits. `torchmetrics` shuffles
    the samples by the global seed, and takes logits.
    """
    rows = probabilities.astype(np.float64)
    if not 1 <= splits <= len(rows):
        raise ValueError(f"splits: expected 1 to the {len(rows)} samples, got {splits}")
    if (rows < 0).any() or not np.allclose(rows.sum(axis=1), 1, atol=1e-3):
        raise ValueError("expected rows of probabilities, which are not negative and sum to 1")
    scores = []
    for part in np.array_split(rows, splits):
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(part > 0, part * (np.log(part) - np.log(part.mean(axis=0))), 0.0)
        scores.append(np.exp(terms.sum(axis=1).mean()))
    return np.array(scores)


def caption_cosines(network: Network, clips: Features, captions: Sequence[str]) -> tuple[ndarray, ndarray] | None:
    """Cosines `n texts` of the clips that have a caption with all different captions, and the number of the right one.

    None for a network without texts, and where fewer than two captions differ.
    """
    rows = [i for i, caption in enumerate(captions) if caption]
    different = sorted({captions[i] for i in rows})
    if not isinstance(network, TextNetwork) or len(different) < 2:
        return None
    right = np.array([different.index(captions[i]) for i in rows])
    return network.similarities(clips.vectors[rows], different), right


def alignment(network: Network, clips: Features, captions: Sequence[str], seed: int = 0) -> Score | None:
    """Mean cosine of clip and caption; None as `caption_cosines`."""
    if (found := caption_cosines(network, clips, captions)) is None:
        return None
    cosines, right = found
    return mean_score(cosines[np.arange(len(right)), right], seed)


def caption_rank(network: Network, clips: Features, captions: Sequence[str], seed: int = 0) -> Score | None:
    """Mean percentile rank of the right caption among all different ones (chance 50); None as `caption_cosines`."""
    found = caption_cosines(network, clips, captions)
    return None if found is None else mean_score(percentile_rank(*found), seed)


def blindness(network: Network, real: Features, captions: Sequence[str], seed: int = 0) -> str | None:
    """Why figures of a network mean nothing for these real clips: it ranks their captions no better than chance.

    None for a network that can distinguish them, and where there is no such rank.
    """
    rank = caption_rank(network, real, captions, seed)
    if rank is None or rank.interval is None or rank.interval[0] > CHANCE_RANK:
        return None
    low, high = rank.interval
    return (
        f"{network.name} is blind here: it ranks the captions of this cache's real clips at {rank.value:.1f} "
        f"({low:.1f} to {high:.1f}, {rank.n} clips; chance is {CHANCE_RANK}). Its figures say nothing of these clips."
    )


def with_blindness(figures: Mapping[str, Any], blind: Mapping[str, str]) -> dict[str, Any]:
    """The figures, `blind: true` beside each score of a blind network, and the reasons under the key `blind`."""
    marked, reasons = dict(figures), {}
    for metric, (name, reason) in product(figures, blind.items()):
        if metric.endswith(f"-{name}") or metric.startswith(f"{name}SIM-"):
            marked[metric] = {case: {**asdict(score), "blind": True} for case, score in figures[metric].items()}
            reasons[name] = reason
    return {**marked, "blind": reasons} if reasons else marked
