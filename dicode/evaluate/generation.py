"""Does a generated clip show what its prompt says, and does it move? Does a long video stay as it began?"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dicode.evaluate.scores import frechet_score
from dicode.features.metrics import (
    Clips,
    Interval,
    at_joins,
    bootstrap_interval,
    frame_steps,
    frechet_of_sets,
    motion,
    percentile_rank,
    retrieval,
    similarities,
)
from dicode.seeds import generator_for

Captions = Sequence[str | Sequence[str]]  # one entry a clip: its caption, or all captions that are true of it


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


@dataclass(frozen=True)
class JoinScore:
    """Mean frame difference across joins over that inside clips: 1 where a join cannot be told from motion."""

    score: float
    interval: Interval  # 95 %, over videos
    across: float  # across joins, in steps of 0…255
    inside: float  # inside clips
    n: int  # videos measured
    still: int  # further videos without any motion inside their clips, which are left out


@dataclass(frozen=True)
class MotionOverTime:
    """Mean frame difference inside clips at a video's end over that at its beginning: 1 where motion lasts."""

    ratio: float  # of the means over videos
    interval: Interval  # 95 %, over videos
    ratios: tuple[float, ...]  # of each video measured
    share_below_half: float  # of these: videos that come to rest
    first: float  # at the beginning, in steps of 0…255
    last: float
    n: int  # videos measured
    still: int  # further videos that do not move at their beginning, which are left out


@dataclass(frozen=True)
class Drift:
    """How far the clips at a video's end are from those at its beginning: squared Fréchet distances.

    Read `distance` against `chance`, what small samples alone give, and `by_window`, whose first entry is the distance
    of neighbouring windows: without drift it does not grow.
    """

    distance: float  # of the last window's clips to the first's
    interval: Interval | None  # 95 %, over videos (`frechet_score`); None for fewer than LEAST_CLIPS of them
    by_window: tuple[float, ...]  # of every further window's to the first's, in order; the last is `distance`
    chance: float  # between two sets as large, to which each video's clips of both windows are dealt at random: mean
    chance_interval: Interval  # and 95 % of such splits
    clips: int  # on either side


def draw_prompts(captions: Iterable[str], count: int, seed: int) -> list[str]:
    """`count` distinct captions; depends on the set of captions and the seed, not on the order they are listed in."""
    distinct = sorted(set(captions))
    if not 1 <= count <= len(distinct):
        raise ValueError(f"expected 1 to the {len(distinct)} distinct captions, got a count of {count}")
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
    carried = [{plain_caption(c) for c in ([entry] if isinstance(entry, str) else entry)} for entry in bank_captions]
    carries = np.array([[plain_caption(prompt) in captions for captions in carried] for prompt in prompts])
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


def join_score(videos: Clips, clip_frames: int, repeated_frames: int = 0, seed: int = 0) -> JoinScore:
    """Compare the steps across joins with those inside clips, pooled over videos (see `at_joins`).

    A video that is still inside its clips has no measure for its joins: it is counted, not scored. Raises `ValueError`
    where a video has no join, and where all are still. `seed` is the bootstrap's.
    """
    rows = []
    for number, frames in enumerate(videos):
        joins, steps = at_joins(len(frames), clip_frames, repeated_frames), frame_steps(frames)
        if not joins.any():
            raise ValueError(f"video {number}: expected more frames than a clip's {clip_frames}, got {len(frames)}")
        rows.append([steps[joins].sum(), joins.sum(), steps[~joins].sum(), (~joins).sum()])
    sums = np.array(rows)
    moving = _moving(sums[:, 2] if rows else np.zeros(0), "inside its clips")
    sums = sums[moving]
    across, across_count, inside, inside_count = sums.sum(axis=0)

    def ratio(drawn: ndarray) -> float:
        across, across_count, inside, inside_count = drawn.sum(axis=0)
        return float((across / across_count) / (inside / inside_count))

    return JoinScore(
        score=ratio(sums),
        interval=bootstrap_interval(ratio, sums, seed=seed),
        across=float(across / across_count),
        inside=float(inside / inside_count),
        n=len(sums),
        still=int((~moving).sum()),
    )


def motion_over_time(
    videos: Clips, window_frames: int, clip_frames: int, repeated_frames: int = 0, seed: int = 0
) -> MotionOverTime:
    """Compare motion in the last `window_frames` with that in the first, inside clips: a jump at a join is no motion.

    A video that is still at its beginning has no ratio: it is counted, not scored. Raises `ValueError` where all are,
    and where a video has fewer frames than two windows. `seed` is the bootstrap's.
    """
    rows = []
    for number, frames in enumerate(videos):
        if window_frames < 3 or len(frames) < 2 * window_frames:  # of two steps one at least is inside a clip
            raise ValueError(
                f"video {number}: expected two windows of at least 3 frames, "
                f"got windows of {window_frames} in {len(frames)} frames"
            )
        steps, inside = frame_steps(frames), ~at_joins(len(frames), clip_frames, repeated_frames)
        first, last = slice(None, window_frames - 1), slice(1 - window_frames, None)
        rows.append([steps[first][inside[first]].mean(), steps[last][inside[last]].mean()])
    means = np.array(rows).reshape(-1, 2)
    moving = _moving(means[:, 0], "at its beginning")
    means = means[moving]
    ratios = means[:, 1] / means[:, 0]
    return MotionOverTime(
        ratio=float(means[:, 1].sum() / means[:, 0].sum()),
        interval=bootstrap_interval(lambda drawn: drawn[:, 1].sum() / drawn[:, 0].sum(), means, seed=seed),
        ratios=tuple(ratios.tolist()),
        share_below_half=float((ratios < 0.5).mean()),
        first=float(means[:, 0].mean()),
        last=float(means[:, 1].mean()),
        n=len(means),
        still=int((~moving).sum()),
    )


def drift(features: Float[ndarray, "videos clips width"], window: int, splits: int = 200, seed: int = 0) -> Drift:
    """Compare the clips of later windows of `window` clips with those of the first, all videos together.

    All distances are of equally many clips, so their small-sample bias is alike; it falls with more videos. `seed`
    deals the splits of `chance`.
    """
    videos, clips, _ = features.shape
    if not 1 <= window <= clips // 2:
        raise ValueError(f"window: expected 1 to {clips // 2} of {clips} clips a video, got {window}")
    starts = [*range(window, clips - window, window), clips - window]
    by_window = [frechet_of_sets(features[:, :window], features[:, start : start + window]) for start in starts]
    ends = np.concatenate([features[:, :window], features[:, -window:]], axis=1)
    generator, dealt = generator_for(seed, "splits"), []
    for _ in range(splits):
        order = torch.rand(videos, 2 * window, generator=generator).argsort(dim=1).numpy()
        shuffled = np.take_along_axis(ends, order[:, :, None], axis=1)
        dealt.append(frechet_of_sets(shuffled[:, :window], shuffled[:, window:]))
    low, high = np.quantile(dealt, [0.025, 0.975])
    end = frechet_score(features[:, :window], features[:, -window:], seed)
    return Drift(
        distance=end.value,
        interval=end.interval,
        by_window=tuple(by_window),
        chance=float(np.mean(dealt)),
        chance_interval=(float(low), float(high)),
        clips=videos * window,
    )


def _moving(motion_of_video: Float[ndarray, "v"], where: str) -> Bool[ndarray, "v"]:
    """Which videos move at all; raises `ValueError` where none does."""
    moving = motion_of_video > 0
    if not moving.any():
        raise ValueError(f"expected a video that moves {where}, got {len(moving)} videos, all still there")
    return moving


def plain_caption(caption: str) -> str:
    """A caption without case and surplus spaces, as captions are compared."""
    return " ".join(caption.casefold().split())


def _check_length(
    name: str, values: Sequence[object] | ndarray, other: str, others: Sequence[object] | ndarray
) -> None:
    if len(values) != len(others) or len(values) == 0:
        raise ValueError(f"expected as many {name} as {other} and at least one, got {len(values)} and {len(others)}")
