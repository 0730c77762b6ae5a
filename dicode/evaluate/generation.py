"""Does a generated clip show what its prompt says, and does it move? Measured against banks of real clips."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from dicode.evaluate.metrics import Clips, bootstrap_interval, motion, percentile_rank, retrieval, similarities
from dicode.seeds import generator_for

Captions = Sequence[str | Sequence[str]]  # one entry a clip: its caption, or all captions that are true of it
Interval = tuple[float, float]


@dataclass(frozen=True)
class TextControl:
    """Share of prompts (0…1) whose generated clip is nearest to a real clip that carries the prompt as its caption."""

    share: float  # by cosine of features centred on the bank's mean
    interval: Interval  # 95 %, over prompts
    share_euclidean: float  # the same by plain distance, to show how much hangs on that choice
    chance: float  # a bank clip drawn at random
    n: int
    bank: int
    nearest: tuple[int, ...]  # per prompt the nearest bank clip, for a contact sheet


@dataclass(frozen=True)
class TrueClipRank:
    """Mean percentile rank of the true clip among the pool, seen from the clip generated for its caption; chance 50."""

    mean: float
    interval: Interval
    mean_euclidean: float
    ranks: tuple[float, ...]
    n: int
    pool: int


@dataclass(frozen=True)
class MotionRatio:
    """Mean absolute frame difference of generated over real clips, both in steps of 0…255."""

    ratio: float
    interval: Interval
    generated: float
    real: float
    n: int


def draw_prompts(captions: Iterable[str], count: int, seed: int) -> list[str]:
    """`count` distinct captions; depends on the set of captions and the seed, not on the order they are listed in."""
    distinct = sorted(set(captions))
    if count > len(distinct):
        raise ValueError(f"expected at most the {len(distinct)} distinct captions, got a count of {count}")
    order = torch.randperm(len(distinct), generator=generator_for(seed, "prompts"))
    return [distinct[i] for i in order[:count].tolist()]


def text_control(
    generated_features: Float[ndarray, "q width"],
    prompts: Sequence[str],
    bank_features: Float[ndarray, "n width"],
    bank_captions: Captions,
    seed: int = 0,
) -> TextControl:
    """Look up every generated clip among the real ones by its mean features and compare captions.

    A clip with several captions stands in the bank once, with all of them. Captions are compared without case and
    surplus spaces. Bank clips must be read at the generated ones' size and rate. `seed` is the bootstrap's.
    """
    _check_length("prompts", prompts, "generated clips", generated_features)
    _check_length("captions", bank_captions, "bank clips", bank_features)
    carried = [{_plain(c) for c in ([entry] if isinstance(entry, str) else entry)} for entry in bank_captions]
    carries = np.array([[_plain(prompt) in captions for captions in carried] for prompt in prompts])
    orphans = [prompt for prompt, row in zip(prompts, carries, strict=True) if not row.any()]
    if orphans:
        raise ValueError(f"no bank clip carries {len(orphans)} of the prompts, the first being {orphans[0]!r}")
    rows = np.arange(len(prompts))
    nearest = retrieval(generated_features, bank_features)
    hit = carries[rows, nearest]
    return TextControl(
        share=float(hit.mean()),
        interval=bootstrap_interval(np.mean, hit, seed=seed),
        share_euclidean=float(carries[rows, retrieval(generated_features, bank_features, "euclidean")].mean()),
        chance=float(carries.mean()),
        n=len(prompts),
        bank=len(bank_features),
        nearest=tuple(nearest.tolist()),
    )


def percentile_of_true_clip(
    generated_features: Float[ndarray, "q width"],
    pool_features: Float[ndarray, "n width"],
    true_index: Int[ndarray, "q"] | None = None,
    seed: int = 0,
) -> TrueClipRank:
    """Rank the true clip of every caption among the whole pool by similarity of mean features to the generated clip.

    `true_index` places the q-th prompt's clip in the pool; left out, they stand in the same order. Other clips of the
    same caption (an emoji's skin tones) stay in the pool and may rank before it: the stricter reading.
    """
    if true_index is None:
        _check_length("generated clips", generated_features, "pool clips", pool_features)
        true_index = np.arange(len(pool_features))
    _check_length("true indices", true_index, "generated clips", generated_features)

    ranks = percentile_rank(similarities(generated_features, pool_features), true_index)
    euclidean_ranks = percentile_rank(similarities(generated_features, pool_features, "euclidean"), true_index)
    return TrueClipRank(
        mean=float(ranks.mean()),
        interval=bootstrap_interval(np.mean, ranks, seed=seed),
        mean_euclidean=float(euclidean_ranks.mean()),
        ranks=tuple(ranks.tolist()),
        n=len(ranks),
        pool=len(pool_features),
    )


def motion_ratio(generated: Clips, real: Clips, seed: int = 0) -> MotionRatio:
    """Compare how much generated and real clips move. Both must have one resolution and one frame rate.

    Resolution is checked; the rate is not in the arrays, so the caller answers for it.
    """
    generated, real = list(generated), list(real)
    if not generated or not real:
        raise ValueError(f"expected clips on both sides, got {len(generated)} generated and {len(real)} real")
    sizes = {clip.shape[1:] for clip in (*generated, *real)}
    if len(sizes) > 1:
        raise ValueError(f"expected clips of one size, got {sorted(sizes)}: motion depends on resolution")
    moves, real_moves = np.array([motion(c) for c in generated]), np.array([motion(c) for c in real])
    if real_moves.mean() == 0:
        raise ValueError(f"the {len(real)} real clips are all still; there is no motion to compare with")
    return MotionRatio(
        ratio=float(moves.mean() / real_moves.mean()),
        interval=bootstrap_interval(lambda a, b: a.mean() / b.mean(), moves, real_moves, seed=seed),
        generated=float(moves.mean()),
        real=float(real_moves.mean()),
        n=len(moves),
    )


def _plain(caption: str) -> str:
    return " ".join(caption.casefold().split())


def _check_length(
    name: str, values: Sequence[object] | ndarray, other: str, others: Sequence[object] | ndarray
) -> None:
    if len(values) != len(others) or len(values) == 0:
        raise ValueError(f"expected as many {name} as {other} and at least one, got {len(values)} and {len(others)}")
