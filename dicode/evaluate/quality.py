"""Structural similarity, Inception Score and other measures that need more than a subtraction."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray

from dicode.features.metrics import Clips, Interval, bootstrap_interval, motion
from dicode.tokenizer.config import TokenizerConfig
from dicode.video.timed import Video

DYNAMIC_SHARE = 0.25  # of the real clips' median motion: a clip that moves less is called still


@dataclass(frozen=True)
class InceptionScore:
    """exp of the mean divergence of a sample's class probabilities from all samples': 1 to the number of classes."""

    mean: float  # over splits, as published
    deviation: float  # over splits
    splits: int
    n: int


@dataclass(frozen=True)
class DynamicShare:
    """Share (0…1) of clips that move at least a quarter as much as the median real clip.

    Not VBench's dynamic degree, which thresholds RAFT's optical flow.
    """

    share: float
    interval: Interval  # 95 %, over clips
    of_real: float  # the same share of the real clips
    least_motion: float  # the threshold, in steps of 0…255
    n: int


@dataclass(frozen=True)
class TokenRate:
    """What a language model has to write for a second of video, and what that is in bits against raw frames."""

    tokens: float  # deep tokens a second
    floats: float  # numbers a second
    bits: float  # as float16, the precision that tokens are cached in
    compression: float  # bits of uint8 RGB frames over `bits`


def ssim(reference: Video, candidate: Video) -> Float64[ndarray, "f"]:
    """Structural similarity of every frame, −1…1 (Wang et al. 2004: Gaussian window of 11, deviation 1.5, peak 255).

    From `torchmetrics`, which mirrors frames at their edges, where the authors left edges out. Raises `ImportError`
    where it is not installed, `ValueError` for clips of different shapes.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ModuleNotFoundError as error:
        raise ImportError("SSIM needs torchmetrics, which is not installed: pip install 'dicode[evaluate]'") from error
    if reference.shape != candidate.shape:
        raise ValueError(f"expected clips of one shape, got {reference.shape} and {candidate.shape}")
    a, b = (torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).double() for x in (candidate, reference))
    made = structural_similarity_index_measure(a, b, data_range=255.0, reduction="none")
    return np.asarray(made, dtype=np.float64)


def inception_score(probabilities: Float[ndarray, "n classes"], splits: int = 10) -> InceptionScore:
    """Salimans et al. 2016, equation in section 4: mean over `splits` equal parts of exp E KL(p(y|x) ‖ p(y)).

    Raises `ValueError` for rows that are no probabilities, and for fewer samples than splits.
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
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), splits, len(rows))


def dynamic_share(generated: Clips, real: Clips, seed: int = 0) -> DynamicShare:
    """How many clips move; both sides of one resolution and frame rate.

    Raises `ValueError` where more than half of the real clips are still.
    """
    moves, real_moves = (np.array([motion(clip) for clip in clips]) for clips in (generated, real))
    least = DYNAMIC_SHARE * float(np.median(real_moves))
    if least == 0:
        raise ValueError(
            f"more than half of the {len(real_moves)} real clips are still; there is nothing to compare with"
        )
    moving = moves >= least
    return DynamicShare(
        share=float(moving.mean()),
        interval=bootstrap_interval(np.mean, moving, seed=seed),
        of_real=float((real_moves >= least).mean()),
        least_motion=least,
        n=len(moves),
    )


def token_rate(config: TokenizerConfig) -> TokenRate:
    """Of a tokenizer, in the long run: one key frame a clip."""
    tokens = config.resampler.queries / config.clip_s
    floats = tokens * config.resampler.token_width
    raw_bits = config.size**2 * 3 * 8 * config.fps
    return TokenRate(tokens, floats, 16 * floats, raw_bits / (16 * floats))
