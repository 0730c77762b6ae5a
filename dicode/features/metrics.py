"""The measures themselves, on plain arrays: Fréchet distance, PSNR, motion, retrieval, ranks, bootstrap intervals."""

import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, UInt8
from numpy import ndarray

from dicode.seeds import generator_for
from dicode.video.timed import Video

Interval = tuple[float, float]
Similarity = Literal["cosine", "euclidean"]
Clips = Iterable[UInt8[ndarray, "_ _ _ _"]]  # clips `f h w c`, each of its own length


class FrechetStatistics:
    """Mean and covariance of a set of feature vectors, accumulated in float64 batch by batch.

    Instead of the covariance it keeps rows F with FᵀF = Σ(x-μ)(x-μ)ᵀ, at most twice as many as features are wide: the
    distance then needs no matrix square root, is cheap where samples are fewer than dimensions, and loses no precision
    by squaring.
    """

    def __init__(self, width: int) -> None:
        self.width, self.count = width, 0
        self.mean, self.factor = np.zeros(width), np.zeros((0, width))

    @classmethod
    def of(cls, features: Float[ndarray, "n width"]) -> "FrechetStatistics":
        """Statistics of features already in memory."""
        statistics = cls(features.shape[1])
        statistics.update(features)
        return statistics

    @property
    def covariance(self) -> Float64[ndarray, "width width"]:
        """The unbiased covariance (divided by n-1), as `numpy.cov` gives it."""
        return self.factor.T @ self.factor / (self.count - 1)

    def update(self, features: Float[ndarray, "n width"]) -> None:
        """Add samples. Raises `ValueError` for another width or non-finite values."""
        if features.ndim != 2 or features.shape[1] != self.width:
            raise ValueError(f"expected features `n {self.width}`, got shape {features.shape}")
        if not np.isfinite(features).all():
            bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
            raise ValueError(f"features of {len(bad)} of {len(features)} samples hold NaN or infinity, first: {bad[0]}")
        if len(features) == 0:
            return
        features = features.astype(np.float64)
        mean = features.mean(axis=0)
        self._add(len(features), mean, features - mean)

    def merge(self, other: "FrechetStatistics") -> None:
        """Add what another accumulator (another process, another part of the data) has seen."""
        if other.width != self.width:
            raise ValueError(f"expected statistics of width {self.width}, got width {other.width}")
        self._add(other.count, other.mean, other.factor)

    def compressed_factor(self) -> Float64[ndarray, "rows width"]:
        """The factor with at most `width` rows."""
        return np.asarray(np.linalg.qr(self.factor, mode="r")) if len(self.factor) > self.width else self.factor

    def _add(self, count: int, mean: ndarray, factor: ndarray) -> None:
        # Chan, Golub, LeVeque 1983: the scatter about the joint mean is both scatters plus one row for the shift.
        total = self.count + count
        if total == 0:
            return
        shift = mean - self.mean
        self.factor = np.concatenate([self.factor, factor, np.sqrt(self.count * count / total) * shift[None]])
        if len(self.factor) > 2 * self.width:
            self.factor = self.compressed_factor()
        self.mean = self.mean + shift * (count / total)
        self.count = total


def frechet_distance(a: FrechetStatistics, b: FrechetStatistics) -> float:
    """|μa-μb|² + Tr(Σa + Σb - 2(ΣaΣb)^½), the squared Fréchet distance of two Gaussians (as in FID: not its root).

    With Σ = FᵀF the last trace is the sum of singular values of Fa Fbᵀ: exact for singular covariances, where
    `scipy.linalg.sqrtm` is not. Biased upwards for small n: compare only sets of the same n. Warns below n = width.
    """
    if a.width != b.width:
        raise ValueError(f"expected features of one width, got {a.width} and {b.width}")
    count = min(a.count, b.count)
    if count < 2:
        raise ValueError(f"expected at least 2 samples on either side, got {a.count} and {b.count}")
    if count < a.width:
        warnings.warn(
            f"Fréchet distance of {a.width} features from {count} samples is biased upwards; compare it only with"
            " figures from as many samples",
            stacklevel=2,
        )
    normal_a = a.compressed_factor() / np.sqrt(a.count - 1)
    normal_b = b.compressed_factor() / np.sqrt(b.count - 1)
    cross = np.linalg.svd(normal_a @ normal_b.T, compute_uv=False).sum()
    distance = ((a.mean - b.mean) ** 2).sum() + (normal_a**2).sum() + (normal_b**2).sum() - 2 * cross
    return max(0.0, float(distance))  # rounding may leave -1e-12 for equal sets


def frechet_of_sets(one: Float[ndarray, "*n width"], other: Float[ndarray, "*m width"]) -> float:
    """`frechet_distance` of two sets of feature vectors; axes before the last are samples: clips, or frames of them."""
    return frechet_distance(*(FrechetStatistics.of(rows.reshape(-1, rows.shape[-1])) for rows in (one, other)))


def psnr(reference: Video, candidate: Video) -> Float64[ndarray, "f"]:
    """Peak signal-to-noise ratio of every frame in dB, peak 255; infinite where a frame is equal."""
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / squared_error(reference, candidate))


def squared_error(reference: Video, candidate: Video) -> Float64[ndarray, "f"]:
    """Mean squared error of every frame, in squared steps of 0…255."""
    if reference.shape != candidate.shape:
        raise ValueError(f"expected clips of one shape, got {reference.shape} and {candidate.shape}")
    if not reference.dtype == candidate.dtype == np.uint8:
        raise ValueError(f"expected uint8 frames in 0…255, got {reference.dtype} and {candidate.dtype}")
    return ((reference.astype(np.float64) - candidate.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))


def motion(frames: Video) -> float:
    """Mean absolute difference of consecutive frames in steps of 0…255: it depends on frame rate and resolution."""
    return float(frame_steps(frames).mean())


def frame_steps(frames: Video) -> Float64[ndarray, "steps"]:
    """Mean absolute difference of every frame to the next, in steps of 0…255: one number fewer than frames."""
    if len(frames) < 2:
        raise ValueError(f"expected at least 2 frames in a clip, got {len(frames)}: one frame has no motion")
    # One pair at a time: the whole of a long video as int16 is twice its memory, and its differences are as much again.
    steps = [np.abs(after.astype(np.int16) - before).mean(dtype=np.float64) for before, after in pairwise(frames)]
    return np.array(steps)


def at_joins(num_frames: int, clip_frames: int, repeated_frames: int = 0) -> Bool[ndarray, "steps"]:
    """Which of a video's `frame_steps` lead from one clip into the next.

    All clips but the first come without their first `repeated_frames`, which the clip before has shown.
    """
    if repeated_frames < 0 or clip_frames - repeated_frames < 2:
        raise ValueError(f"expected 2 or more new frames a clip, got {clip_frames} less {repeated_frames} repeated")
    opens = np.arange(1, num_frames)
    return (opens >= clip_frames) & ((opens - repeated_frames) % (clip_frames - repeated_frames) == 0)


def mean_pair_distance(points: Float[ndarray, "n width"]) -> float:
    """Mean Euclidean distance over all pairs of different points: the unbiased estimate of E‖X-X'‖."""
    if len(points) < 2:
        raise ValueError(f"expected at least 2 points, got {len(points)}: one has no distance to another")
    points = points.astype(np.float64)
    rows = [np.linalg.norm(points[i + 1 :] - point, axis=1) for i, point in enumerate(points[:-1])]
    return float(np.concatenate(rows).mean())


def similarities(
    queries: Float[ndarray, "q width"], bank: Float[ndarray, "n width"], kind: Similarity = "cosine"
) -> Float64[ndarray, "q n"]:
    """How near each query is to each entry of the bank, larger is nearer.

    `cosine` subtracts the bank's mean from both sides first: features after a ReLU share a large positive mean, and
    without centring every cosine is close to 1. `euclidean` is the plain distance, negated.
    """
    queries, bank = queries.astype(np.float64), bank.astype(np.float64)
    if kind == "euclidean":
        squares = (queries**2).sum(1)[:, None] + (bank**2).sum(1) - 2 * queries @ bank.T
        return -np.sqrt(np.maximum(squares, 0))
    queries, bank = queries - bank.mean(axis=0), bank - bank.mean(axis=0)
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(bank, axis=1)
    return queries @ bank.T / np.maximum(lengths, 1e-12)


def retrieval(
    queries: Float[ndarray, "q width"], bank: Float[ndarray, "n width"], kind: Similarity = "cosine"
) -> Int[ndarray, "q"]:
    """Position of the nearest bank entry of every query; of equally near ones the first."""
    return similarities(queries, bank, kind).argmax(axis=1)


def percentile_rank(scores: Float[ndarray, "q n"], true_index: Int[ndarray, "q"]) -> Float64[ndarray, "q"]:
    """Share of the other bank entries that are farther than the true one, in percent: 100 nearest, chance 50.

    Entries exactly as near as the true one count half, so that a query that cannot tell anything scores 50, not 100.
    """
    if scores.shape[1] < 2:
        raise ValueError(f"expected a bank of at least 2 entries to rank in, got {scores.shape[1]}")
    true = np.take_along_axis(scores, true_index[:, None], axis=1)
    farther, tied = (scores < true).sum(axis=1), (scores == true).sum(axis=1) - 1
    return 100 * (farther + 0.5 * tied) / (scores.shape[1] - 1)


def bootstrap_interval(
    statistic: Callable[..., Any],
    *samples: ndarray,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of `statistic(*samples)`; every sample is resampled on its own.

    It covers the choice of clips or prompts only, not training. Paired data: pass one sample of differences.
    """
    if any(len(sample) == 0 for sample in samples):
        raise ValueError("expected samples that are not empty")
    generator = generator_for(seed, "bootstrap")

    def resampled(sample: ndarray) -> ndarray:
        # As a numpy array: numpy takes a tensor of one number for a number, and would return a row, not a sample of one
        return sample[torch.randint(len(sample), (len(sample),), generator=generator).numpy()]

    first = samples[0]
    if len(samples) == 1 and first.ndim == 1 and statistic is np.mean:  # the same draws and means, all at once
        drawn = torch.randint(len(first), (resamples, len(first)), generator=generator).numpy()
        values = first[drawn].mean(axis=1)
    else:
        values = np.array([statistic(*map(resampled, samples)) for _ in range(resamples)], dtype=np.float64)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
