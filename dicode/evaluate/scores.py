"""Figures with intervals: means over clips, and Fréchet distances and Inception Scores of whole sets of clips."""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from dicode.evaluate.quality import inception_score
from dicode.features.extract import ClipFeatures, EfficientNetLite0Features, Network, features_of_clips
from dicode.features.metrics import (
    Interval,
    bootstrap_interval,
    frechet_of_sets,
    percentile_rank,
)
from dicode.features.networks import C3D, I3D, Clip, Inception
from dicode.features.tinyvt import TinyVT
from dicode.seeds import generator_for
from dicode.video.timed import Video

LEAST_CLIPS = 4  # whose halves have a covariance
LEAST_A_SPLIT = 20  # clips of a half in each split of an Inception Score; of ten an interval is a third too narrow
LEAST_REPEATS = 5  # from the least to the greatest of as many lies a median 94 times in a hundred
CHANCE_RANK = 50  # of the right caption among all, in percent
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

    `alignment-TinyVT`: mean cosine of clip and caption. `caption rank-TinyVT`: see `caption_rank`. Nothing where fewer
    than two captions differ.
    """
    ranks = {name: caption_rank(network, own, captions, seed) for name, own in candidates.items()}
    rows = [i for i, caption in enumerate(captions) if caption]
    texts = [captions[i] for i in rows]
    alignment = {
        name: mean_score(np.diagonal(cosines(network, own, texts, rows)), seed)
        for name, own in candidates.items()
        if ranks[name]
    }
    known = {name: rank for name, rank in ranks.items() if rank}
    return {f"alignment-{network.name}": alignment, f"caption rank-{network.name}": known} if known else {}


def cosines(
    network: TinyVT | Clip, clips: Seen, texts: Sequence[str], rows: Sequence[int] | None = None
) -> Float[ndarray, "n texts"]:
    """Of clips, by what `seen` gives of them, or some rows of it, with texts: of CLIP means over frames (CLIPSIM)."""
    assert clips.clips is not None  # as `seen` gives of these
    vectors = clips.clips if rows is None else clips.clips[list(rows)]
    if isinstance(network, TinyVT):
        return network.similarities(vectors, texts)
    return vectors[:, : network.width] @ network.text_features(texts).double().cpu().numpy().T


def caption_rank(network: TinyVT | Clip, clips: Seen, captions: Sequence[str], seed: int = 0) -> Score | None:
    """Mean percentile rank of the right caption among all different ones (chance 50); None where fewer than two are."""
    rows = [i for i, caption in enumerate(captions) if caption]
    different = sorted({captions[i] for i in rows})
    if len(different) < 2:
        return None
    right = np.array([different.index(captions[i]) for i in rows])
    return mean_score(percentile_rank(cosines(network, clips, different, rows), right), seed)


def blindness(network: Network, real: Seen, captions: Sequence[str], seed: int = 0) -> str | None:
    """Why figures of a network say nothing of these real clips: it ranks their captions no better than chance.

    None for a network that tells them apart, for one that reads nothing, and where fewer than two captions differ.
    """
    if not isinstance(network, TinyVT | Clip):
        return None
    rank = caption_rank(network, real, captions, seed)
    if rank is None or rank.interval is None or rank.interval[0] > CHANCE_RANK:
        return None
    low, high = rank.interval
    return (
        f"{network.name} is blind here: it ranks the captions of this cache's real clips at {rank.value:.1f} "
        f"({low:.1f} to {high:.1f}, {rank.n} clips; chance is {CHANCE_RANK}). Its figures say nothing of these clips."
    )


def marked_blind(values: Any, blind: Collection[str], own: bool = False) -> Any:
    """The figures with `blind: true` beside each that one of these networks made."""
    if is_dataclass(values) and not isinstance(values, type):
        values = asdict(values)
    if not isinstance(values, Mapping):
        return values
    theirs = {key: own or any(made_by(str(key), name) for name in blind) for key in values}
    marked = {key: marked_blind(value, blind, theirs[key]) for key, value in values.items()}
    return {**marked, "blind": True} if own and "value" in values else marked


def made_by(metric: str, network: str) -> bool:
    """Whether a metric's name says that this network made it."""
    return metric.endswith(f"-{network}") or metric.startswith(f"{network}SIM-")
