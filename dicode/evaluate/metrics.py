"""The metrics of clips beside real ones. This is the place to add one: a function, and its entry in one of two tables.

`PAIR_METRICS` compare each clip with the real clip that it reconstructs; `SET_METRICS` whole sets, by the features of a
network. All parts of `dicode evaluate` and the report read these tables (docs/extend.md).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from numpy import ndarray

from dicode.config import missing_extra
from dicode.evaluate.scores import Score, alignment, caption_rank, class_score, frechet_score, kernel_score, mean_score
from dicode.features.extract import (
    EfficientNetLite0Features,
    FeatureMaps,
    Features,
    Network,
    TextNetwork,
    perceptual_distance,
)
from dicode.features.metrics import check_pair, squared_error
from dicode.video.timed import Video

# Mean PSNR counts a frame at most this much. Rounding to uint8 alone leaves 59 dB, so more says nothing; without a
# ceiling one frame that is all white in both clips would make the mean infinite.
PSNR_CEILING_DB = 60.0
MOVES = 24  # of 255: more than noise of a camera
LEAST_BOX = 16  # pixels a side
PERCEPTUAL = f"perceptual-{EfficientNetLite0Features.name}"  # not LPIPS: another network, without learned weights


@dataclass(frozen=True)
class PairMetric:
    """A metric of one clip: real clip, candidate and EffLite0 → a value, or None where the real clip has none."""

    meaning: str  # a sentence for the report, which way is better included
    value: Callable[[Video, Video, EfficientNetLite0Features], float | None]


class SetComparison(NamedTuple):
    """A set of clips beside the real ones, by features of one network."""

    network: Network
    real: Features
    candidate: Features
    captions: Sequence[str]  # of clip i of the candidate; empty where they have none
    seed: int  # of the interval


@dataclass(frozen=True)
class SetMetric:
    """A metric of a set of clips, called `NAME-NETWORK`, or None where the network does not give its features."""

    meaning: str
    score: Callable[[SetComparison], Score | None]
    of_real: bool = True  # whether the real clips have a score: none has their distance to themselves


def scores_of_pairs(
    real: Sequence[Video],
    candidates: Mapping[str, Sequence[Video]],
    extractor: EfficientNetLite0Features,
    seed: int = 0,
) -> dict[str, dict[str, Score] | None]:
    """Means of the `PAIR_METRICS` of each candidate's clips, in the order of the real ones; None without a value."""
    scores: dict[str, dict[str, Score] | None] = {}
    for name, metric in PAIR_METRICS.items():
        own = {}
        for candidate, clips in candidates.items():
            found = [metric.value(*pair, extractor) for pair in zip(real, clips, strict=True)]
            if values := [value for value in found if value is not None]:
                own[candidate] = mean_score(values, seed)
        scores[name] = own or None
    return scores


def scores_of_sets(
    network: Network, real: Features, candidates: Mapping[str, Features], captions: Sequence[str] = (), seed: int = 0
) -> dict[str, dict[str, Score]]:
    """The `SET_METRICS` of each candidate set against the real one: feature → distance → interval.

    Clip i of every set belongs to caption i. A candidate called "real" takes the real set's place.
    """
    scores: dict[str, dict[str, Score]] = {}
    for name, metric in SET_METRICS.items():
        sets = {"real": real, **candidates} if metric.of_real else candidates
        found = {key: metric.score(SetComparison(network, real, own, captions, seed)) for key, own in sets.items()}
        if own := {key: score for key, score in found.items() if score is not None}:
            alias = network.alignment if name == "alignment" and isinstance(network, TextNetwork) else None
            scores[alias or f"{name}-{network.name}"] = own
    return scores


def psnr_db(error: float | Float64[ndarray, "*n"]) -> Float64[ndarray, "*n"]:
    """PSNR of mean squared errors, in dB, peak 255, at most PSNR_CEILING_DB."""
    floor = 255**2 / 10 ** (PSNR_CEILING_DB / 10)
    return np.asarray(10 * np.log10(255**2 / np.maximum(error, floor)))


def psnr_in_motion(real: Video, candidate: Video, _: EfficientNetLite0Features) -> float | None:
    """PSNR in dB inside what moves in the real clip: squared errors weighted by how far it is from its mean frame.

    The weight of a pixel is its squared deviation from the clip's mean, so that noise of a still background counts
    little and a small object that moves counts as a large one. At most PSNR_CEILING_DB; None for a still clip.
    """
    check_pair(real, candidate)
    frames = real.astype(np.float64)
    weights = np.square(frames - frames.mean(axis=0)).mean(axis=-1)
    if not weights.any():
        return None
    return float(psnr_db((np.square(frames - candidate).mean(axis=-1) * weights).sum() / weights.sum()))


def moving_box(clip: Video) -> tuple[slice, slice] | None:
    """Rows and columns of all pixels that change by `MOVES` or more over a clip, `LEAST_BOX` or more of either.

    None for a clip in which nothing does.
    """
    least, most = clip.min(axis=0).astype(np.int16), clip.max(axis=0).astype(np.int16)
    moved = (most - least).max(axis=-1) >= MOVES
    if not moved.any():
        return None
    sides = []
    for axis in (1, 0):
        (places,), size = np.nonzero(moved.any(axis=axis)), moved.shape[1 - axis]
        more = max(0, LEAST_BOX - (places[-1] + 1 - places[0]))
        start = int(np.clip(places[0] - more // 2, 0, max(0, size - LEAST_BOX)))
        sides.append(slice(start, max(int(places[-1]) + 1, min(size, start + LEAST_BOX))))
    return sides[0], sides[1]


def in_moving_box(
    real: Video,
    candidate: Video,
    extractor: EfficientNetLite0Features,
    metric: Callable[[Video, Video, EfficientNetLite0Features], float],
) -> float | None:
    """A metric of the frames after a clip's first, inside its `moving_box`; None where nothing moves."""
    check_pair(real, candidate)
    if (box := moving_box(real)) is None:
        return None
    one, other = (np.ascontiguousarray(clip[1:, box[0], box[1]]) for clip in (real, candidate))
    return metric(one, other, extractor)


def ssim(reference: Video, candidate: Video) -> Float64[ndarray, "f"]:
    """Structural similarity of every frame, −1…1 (Wang et al. 2004: Gaussian window of 11, deviation 1.5, peak 255).

    From `torchmetrics`, which mirrors frames at their edges, where the authors left edges out.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ModuleNotFoundError as error:
        raise missing_extra(error, "evaluate") from error
    check_pair(reference, candidate)
    a, b = (torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).double() for x in (candidate, reference))
    return np.asarray(structural_similarity_index_measure(a, b, data_range=255.0, reduction="none"), dtype=np.float64)


def two_frames(clip: Video) -> UInt8[ndarray, "2 h w c"]:
    """The frames at a quarter and three quarters: SSIM of all sixteen takes a second of processor time."""
    return clip[[len(clip) // 4, 3 * len(clip) // 4]]


@torch.no_grad()
def perceptual(real: Video, candidate: Video, extractor: EfficientNetLite0Features) -> float:
    """`perceptual_distance` of two frames."""
    feature_maps = FeatureMaps(extractor)
    pixels, target = (
        feature_maps(torch.from_numpy(two_frames(clip)).permute(0, 3, 1, 2).float().to(extractor.device) / 127.5 - 1)
        for clip in (candidate, real)
    )
    return float(perceptual_distance(pixels, target))


def distance_of(kind: str, score: Callable[..., Score], sets: SetComparison) -> Score | None:
    """A distance of these `Features`, where a network gives them."""
    real, candidate = getattr(sets.real, kind), getattr(sets.candidate, kind)
    return None if real is None else score(real, candidate, sets.seed)


def inception_score(sets: SetComparison) -> Score | None:
    """Inception Score in one split."""
    probabilities = sets.candidate.probabilities
    return None if probabilities is None else class_score(probabilities, sets.seed)


PAIR_METRICS = {
    "psnr_in_motion": PairMetric(
        "PSNR in dB inside what moves in the real clip: errors weighted by its squared deviation from the clip's mean "
        "frame. Higher is better.",
        psnr_in_motion,
    ),
    "SSIM": PairMetric(
        "Structural similarity, two frames a clip. Higher is better.",
        lambda real, candidate, _: float(ssim(two_frames(real), two_frames(candidate)).mean()),
    ),
    PERCEPTUAL: PairMetric(
        "Distance of EfficientNet-lite0's feature maps, two frames a clip. Not LPIPS. Lower is better.", perceptual
    ),
    "squared error in the moving box": PairMetric(
        "Mean squared error (peak 255) of the frames after the first, in the smallest box of all that moves. Lower is "
        "better.",
        partial(in_moving_box, metric=lambda real, candidate, _: squared_error(real, candidate).mean()),
    ),
    f"{PERCEPTUAL} in the moving box": PairMetric(
        f"{PERCEPTUAL} inside the same box. Lower is better.", partial(in_moving_box, metric=perceptual)
    ),
}
SET_METRICS = {
    "FVD": SetMetric(
        "Squared Fréchet distance to the real clips of the same number. Lower is better.",
        partial(distance_of, "clips", frechet_score),
        of_real=False,
    ),
    "MMD": SetMetric(
        "Unbiased squared maximum mean discrepancy to the real clips, polynomial kernel of degree 2 (JEDi): unlike FVD "
        "its expectation does not depend on the number of clips; 0 for clips of one distribution. Lower is better.",
        partial(distance_of, "clips", kernel_score),
        of_real=False,
    ),
    "FID": SetMetric(
        "Squared Fréchet distance of single frames to those of the real clips. Lower is better.",
        partial(distance_of, "frames", frechet_score),
        of_real=False,
    ),
    "KID": SetMetric(
        "The same as MMD of single frames, by a kernel of degree 3. Lower is better.",
        partial(distance_of, "frames", partial(kernel_score, degree=3, constant=1.0)),
        of_real=False,
    ),
    "IS": SetMetric("Inception Score in one split; grows with the number of clips. Higher is better.", inception_score),
    "alignment": SetMetric(
        "Mean cosine of clip and caption. Higher is better; the real clips' own says what is high.",
        lambda sets: alignment(sets.network, sets.candidate, sets.captions, sets.seed),
    ),
    "caption rank": SetMetric(
        "Percentile rank of the right caption among all different ones; chance 50. Higher is better.",
        lambda sets: caption_rank(sets.network, sets.candidate, sets.captions, sets.seed),
    ),
}
