"""Clips decoded from their own tokens, against the real ones and against two baselines that need no model."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, UInt8
from numpy import ndarray

from dicode.evaluate.scores import Score, mean_score
from dicode.features.metrics import (
    Clips,
    Interval,
    bootstrap_interval,
    squared_error,
)
from dicode.video.timed import Video

# Mean PSNR counts a frame at most this much. Rounding to uint8 alone leaves 59 dB, so more says nothing; without a
# ceiling one frame that is all white in both clips would make the mean infinite.
PSNR_CEILING_DB = 60.0


@dataclass(frozen=True)
class PsnrScore:
    """How near clips are to the real ones, pixel by pixel."""

    mean_db: float  # mean over frames, each at most PSNR_CEILING_DB, then over clips
    interval_db: Interval  # 95 %, over clips
    of_mean_error_db: float  # PSNR of the mean squared error of all frames: hard clips weigh more, no ceiling
    of_mean_error_interval_db: Interval
    n: int


def hold_head(clip: Video) -> Video:
    """Baseline: the clip's first frame, the head key frame, repeated."""
    return np.repeat(clip[:1], len(clip), axis=0)


def cross_fade(
    head: UInt8[ndarray, "h w c"], tail: UInt8[ndarray, "h w c"], num_frames: int, tail_at: int | None = None
) -> Video:
    """Baseline: head key frame fading linearly into the tail key frame.

    The tail is the frame after the clip's last, at position `num_frames`; in the published arrangement it is the last
    one: give `tail_at=num_frames - 1`.
    """
    tail_at = num_frames if tail_at is None else tail_at
    if head.shape != tail.shape or tail_at < 1:
        raise ValueError(f"expected key frames of one shape and tail_at ≥ 1, got {head.shape}, {tail.shape}, {tail_at}")
    weights = np.minimum(np.arange(num_frames) / tail_at, 1.0)[:, None, None, None]
    return np.rint((1 - weights) * head + weights * tail).astype(np.uint8)


def psnr_score(real: Clips, candidates: Clips, seed: int = 0) -> PsnrScore:
    """PSNR of clips against the real clips they reconstruct, in the same order. `seed` is the bootstrap's."""
    errors = [squared_error(clip, candidate) for clip, candidate in zip(real, candidates, strict=True)]
    if not errors:
        raise ValueError("expected at least one clip, got none")
    floor = 255**2 / 10 ** (PSNR_CEILING_DB / 10)
    per_clip = np.array([(10 * np.log10(255**2 / np.maximum(error, floor))).mean() for error in errors])
    sums_and_counts = np.array([(error.sum(), len(error)) for error in errors])

    def of_mean_error(drawn: Float64[ndarray, "n 2"]) -> float:
        total, frames = drawn.sum(axis=0)
        return float(10 * np.log10(255**2 / max(total / frames, floor)))

    return PsnrScore(
        mean_db=float(per_clip.mean()),
        interval_db=bootstrap_interval(np.mean, per_clip, seed=seed),
        of_mean_error_db=of_mean_error(sums_and_counts),
        of_mean_error_interval_db=bootstrap_interval(of_mean_error, sums_and_counts, seed=seed),
        n=len(per_clip),
    )


def psnr_in_motion(real: Clips, candidates: Clips, seed: int = 0) -> Score | None:
    """PSNR in dB inside what moves in the real clip: squared errors weighted by how far it is from its mean frame.

    The weight of a pixel is its squared deviation from the clip's mean, so that noise of a still background counts
    little and a small object that moves counts as a large one. Mean over clips, each at most PSNR_CEILING_DB; still
    clips are left out, None where all are.
    """
    values = []
    for clip, candidate in zip(real, candidates, strict=True):
        if clip.shape != candidate.shape:
            raise ValueError(f"expected clips of one shape, got {clip.shape} and {candidate.shape}")
        frames = clip.astype(np.float64)
        weights = np.square(frames - frames.mean(axis=0)).mean(axis=-1)
        if weights.any():
            error = (np.square(frames - candidate).mean(axis=-1) * weights).sum() / weights.sum()
            values.append(min(PSNR_CEILING_DB, float(10 * np.log10(255**2 / max(error, 1e-9)))))
    return mean_score(values, seed) if values else None
