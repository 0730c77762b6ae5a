"""The measures themselves, on plain arrays: Fréchet distance, motion, similarity, ranks, bootstrap intervals."""

import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, UInt8
from numpy import ndarray

from dicode.seeds import generator_for
from dicode.video.timed import Video

Interval = tuple[float, float]
Clips = Iterable[UInt8[ndarray, "_ _ _ _"]]  # clips `f h w c`, each of its own length


def frechet_distance(one: Float[ndarray, "*n width"], other: Float[ndarray, "*m other_width"]) -> float:
    """|μa-μb|² + Tr(Σa + Σb - 2(ΣaΣb)^½), the squared Fréchet distance of two Gaussians (as in FID: not its root).

    Of two sets of feature vectors; axes before the last are samples: clips, or frames of clips. With Σ = FᵀF the last
    trace is the sum of singular values of Fa Fbᵀ: exact for singular covariances, where `scipy.linalg.sqrtm` is not.
    Biased upwards for small sets: compare only sets of equally many. Warns where samples are fewer than features.
    """
    sets = _comparable(one, other)
    width, count = one.shape[-1], min(map(len, sets))
    if count < width:
        warnings.warn(
            f"Fréchet distance of {width} features from {count} samples is biased upwards; compare it only with"
            " figures from as many samples",
            stacklevel=2,
        )
    (mean, factor), (other_mean, other_factor) = map(_mean_and_factor, sets)
    cross = np.linalg.svd(factor @ other_factor.T, compute_uv=False).sum()
    distance = ((mean - other_mean) ** 2).sum() + (factor**2).sum() + (other_factor**2).sum() - 2 * cross
    return max(0.0, float(distance))  # rounding may leave -1e-12 for equal sets


def _mean_and_factor(rows: Float[ndarray, "n width"]) -> tuple[ndarray, ndarray]:
    """The mean, and at most `width` rows F such that FᵀF is the unbiased covariance."""
    mean = rows.mean(axis=0)
    factor = rows - mean
    if len(factor) > factor.shape[1]:
        factor = np.asarray(np.linalg.qr(factor, mode="r"))
    return mean, factor / np.sqrt(len(rows) - 1)


def _comparable(one: ndarray, other: ndarray) -> list[Float64[ndarray, "_ width"]]:
    """Both sets of features, a row a sample. Raises `ValueError` where they cannot be compared."""
    if one.shape[-1] != other.shape[-1]:
        raise ValueError(f"expected features of one width, got {one.shape[-1]} and {other.shape[-1]}")
    sets = [rows.reshape(-1, rows.shape[-1]).astype(np.float64) for rows in (one, other)]
    if min(map(len, sets)) < 2:
        raise ValueError(f"expected at least 2 samples on either side, got shapes {one.shape} and {other.shape}")
    for rows in sets:
        if len(bad := np.flatnonzero(~np.isfinite(rows).all(axis=1))):
            raise ValueError(f"features of {len(bad)} of {len(rows)} samples hold NaN or infinity, first: {bad[0]}")
    return sets


def kernel_distance(
    one: Float[ndarray, "*n width"], other: Float[ndarray, "*m other_width"], degree: int = 2, constant: float = 0.0
) -> float:
    """The unbiased squared maximum mean discrepancy by the polynomial kernel (x·y/width + constant)^degree.

    Of two sets of feature vectors, as `frechet_distance`. The default is JEDi's kernel (arXiv 2410.05203; its code is
    biased: it takes the mean over all pairs, those of a sample with itself included); KID's has degree 3 and constant 1
    (arXiv 1801.01401). Its expectation does not depend on the numbers of samples, and is 0, with values on either
    side, for two sets of one distribution. Raises `ValueError` as `frechet_distance`.
    """
    sets = _comparable(one, other)

    def kernel(a: ndarray, b: ndarray) -> ndarray:
        return np.asarray((a @ b.T / one.shape[-1] + constant) ** degree)

    within = [(k := kernel(rows, rows)).sum() - np.trace(k) for rows in sets]
    a, b = (total / (len(rows) * (len(rows) - 1)) for total, rows in zip(within, sets, strict=True))
    return float(a + b - 2 * kernel(*sets).mean())


def check_pair(reference: Video, candidate: Video) -> None:
    """Raise `ValueError` for clips of other shapes, or of floats: values of 0…1 taken for 0…255 would have no error."""
    kinds = [f"{clip.dtype} {clip.shape}" for clip in (reference, candidate)]
    if {reference.dtype, candidate.dtype} != {np.dtype(np.uint8)} or reference.shape != candidate.shape:
        raise ValueError(f"expected clips of uint8 (0…255) and of one shape, got {' and '.join(kinds)}")


def squared_error(reference: Video, candidate: Video) -> Float64[ndarray, "f"]:
    """Mean squared error of every frame, in squared steps of 0…255."""
    check_pair(reference, candidate)
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

    All clips but the first come without their first `repeated_frames`, which the previous clip ends with.
    """
    opens = np.arange(1, num_frames)
    return (opens >= clip_frames) & ((opens - repeated_frames) % (clip_frames - repeated_frames) == 0)


def similarities(queries: Float[ndarray, "q width"], references: Float[ndarray, "n width"]) -> Float64[ndarray, "q n"]:
    """Cosine of each query with each reference, both centred on the references' mean.

    Features after a ReLU share a large positive mean: without centring every cosine is close to 1.
    """
    queries, references = queries.astype(np.float64), references.astype(np.float64)
    queries, references = queries - references.mean(axis=0), references - references.mean(axis=0)
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(references, axis=1)
    return queries @ references.T / np.maximum(lengths, 1e-12)


def percentile_rank(scores: Float[ndarray, "q n"], true_index: Int[ndarray, "q"]) -> Float64[ndarray, "q"]:
    """Share of the other references that are farther than the true one, in percent: 100 nearest, chance 50.

    References exactly as near as the true one count half, so that equal scores for all give 50, not 100.
    """
    if scores.shape[1] < 2:
        raise ValueError(f"expected at least 2 references to rank, got {scores.shape[1]}")
    true = np.take_along_axis(scores, true_index[:, None], axis=1)
    farther, tied = (scores < true).sum(axis=1), (scores == true).sum(axis=1) - 1
    return 100 * (farther + 0.5 * tied) / (scores.shape[1] - 1)


def bootstrap_interval(
    statistic: Callable[..., Any], *samples: ndarray, resamples: int = 1000, seed: int = 0
) -> Interval:
    """95 % percentile bootstrap interval of `statistic(*samples)`; every sample is resampled by rows, on its own.

    It covers the choice of clips or prompts only, not training. Paired data: pass one sample of differences. Not
    `scipy.stats.bootstrap`, which resamples no rows of a matrix and no sample of one, and would draw other intervals
    than those in `results/`.
    """
    if any(len(sample) == 0 for sample in samples):
        raise ValueError("expected samples that are not empty")
    generator = generator_for(seed, "bootstrap")

    def resampled(sample: ndarray) -> ndarray:
        # As a numpy array: numpy takes a tensor of one number for a number, and would return a row, not a sample of one
        return sample[torch.randint(len(sample), (len(sample),), generator=generator).numpy()]

    values = np.array([statistic(*map(resampled, samples)) for _ in range(resamples)], dtype=np.float64)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
