"""A minute of video: does it hold together from clip to clip and to its end?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray
from PIL import Image

from dicode.data.cache import FrameCache
from dicode.evaluate.generation import draw_prompts
from dicode.evaluate.samples import MOST_VIDEOS, caption_of, split_rows, spread
from dicode.evaluate.scores import frechet_score
from dicode.evaluate.speed import check_length, cost_of_length
from dicode.features.extract import EfficientNetLite0Features
from dicode.features.metrics import Clips, Interval, at_joins, bootstrap_interval, frame_steps, frechet_distance
from dicode.pipeline import DiCoDe
from dicode.seeds import generator_for
from dicode.stopwatch import tracked
from dicode.tokenizer.config import Joins
from dicode.video.sheet import contact_sheet
from dicode.video.timed import Video

JOINS: tuple[Joins, ...] = get_args(Joins)
LONG_S = 60.0
WINDOW_SHARE = 1 / 6  # of a video, at its beginning and its end: ten seconds of a minute


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
    first: float  # at the beginning, in steps of 0…255
    last: float
    n: int  # videos measured
    still: int  # further videos that do not move at their beginning, which are left out


@dataclass(frozen=True)
class Drift:
    """How far the clips at a video's end are from those at its beginning: squared Fréchet distances.

    Read `distance` against `chance`, the distance that small samples alone cause, and `by_window`, whose first entry is
    the distance of neighbouring windows: without drift it does not grow.
    """

    distance: float  # of the last window's clips to the first's
    interval: Interval | None  # 95 %, over videos (`frechet_score`); None for fewer than LEAST_CLIPS of them
    by_window: tuple[float, ...]  # of every further window's to the first's, in order; the last is `distance`
    chance: float  # mean over random splits of each video's clips of both windows into two sets as large
    chance_interval: Interval  # and 95 % of such splits
    clips: int  # on either side


def measure_long(
    model: DiCoDe,
    cache: FrameCache,
    folder: Path,
    count: int = 8,
    seed: int = 0,
    seconds: float = LONG_S,
    repeats: int = 5,
) -> tuple[dict[str, Any], Image.Image]:
    """Joins, drift and motion of `count` training captions' videos, from the same deep tokens for every kind of joins.

    Also time and memory of such a video, measured `repeats` times; `folder` is where the model was loaded from. Returns
    the figures and a contact sheet, a frame a second, the kinds of joins beneath each other.
    """
    check_length(model, seconds)
    training = spread(split_rows(cache, False, captioned=True), MOST_VIDEOS)
    prompts = draw_prompts({caption_of(cache.videos[row]) for row in training} - {""}, count, seed)
    extractor = EfficientNetLite0Features(device=model.tokenizer.device)
    by_joins: dict[str, Any] = {}
    rows: dict[tuple[int, str], Video] = {}
    for joins in JOINS:
        videos = [
            long_video(model, p, seconds, seed, i, joins)
            for i, p in enumerate(tracked(prompts, f"videos, {joins}", "video"))
        ]
        by_joins[joins] = over_time(model, videos, extractor, seed)
        rows |= {(i, joins): video[:: round(model.tokenizer.config.fps)] for i, video in enumerate(videos)}
    figures = {
        "seconds": seconds,
        "frames_asked": model.num_frames(seconds),
        "prompts": prompts,
        "joins": by_joins,
        "cost": cost_of_length(model, folder, prompts[0], seconds, repeats),
    }
    order = sorted(rows, key=lambda row: row[0])
    labels = [f"{joins}: {prompts[i]}" for i, joins in order]
    return figures, contact_sheet([rows[row] for row in order], labels, columns=max(map(len, rows.values())))


def long_video(model: DiCoDe, prompt: str, seconds: float, seed: int, sample_index: int, joins: Joins) -> Video:
    """All frames of one video in memory."""
    clips = model.generate(prompt, seconds=seconds, seed=seed, sample_index=sample_index, joins=joins)
    return np.concatenate(list(clips))


def over_time(
    model: DiCoDe, videos: Sequence[Video], extractor: EfficientNetLite0Features, seed: int = 0
) -> dict[str, Any]:
    """Join score, drift and motion of long videos of one length."""
    config = model.tokenizer.config
    clip = {"clip_frames": config.clip_frames, "repeated_frames": config.repeated_frames}
    clips = [clips_of(video, **clip) for video in videos]
    window = max(1, round(len(clips[0]) * WINDOW_SHARE))
    features = [extractor.features(own).vectors for own in tracked(clips, "features", "video")]
    return {
        "frames": [len(video) for video in videos],
        "window_s": window * config.clip_s,
        "join_score": asdict(join_score(videos, **clip, seed=seed)),
        "drift": {f"FVD-{extractor.name}": asdict(drift(np.stack(features), window, seed=seed))},
        "motion": asdict(motion_over_time(videos, window * config.tail_frame, **clip, seed=seed)),
    }


def clips_of(video: Video, clip_frames: int, repeated_frames: int = 0) -> list[UInt8[ndarray, "_ h w c"]]:
    """The clips of a video without repeated frames; a lone last frame is left out, for it has no motion."""
    joins = np.flatnonzero(at_joins(len(video), clip_frames, repeated_frames)) + 1
    return [clip for clip in np.split(video, joins) if len(clip) > 1]


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
    moving = _moving(sums[:, 2], "inside its clips")
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
        if window_frames < 3 or len(frames) < 2 * window_frames:  # at least one of two steps is inside a clip
            raise ValueError(
                f"video {number}: expected two windows of at least 3 frames, "
                f"got windows of {window_frames} in {len(frames)} frames"
            )
        steps, inside = frame_steps(frames), ~at_joins(len(frames), clip_frames, repeated_frames)
        first, last = slice(None, window_frames - 1), slice(1 - window_frames, None)
        rows.append([steps[first][inside[first]].mean(), steps[last][inside[last]].mean()])
    means = np.array(rows)
    moving = _moving(means[:, 0], "at its beginning")
    means = means[moving]
    return MotionOverTime(
        ratio=float(means[:, 1].sum() / means[:, 0].sum()),
        interval=bootstrap_interval(lambda drawn: drawn[:, 1].sum() / drawn[:, 0].sum(), means, seed=seed),
        first=float(means[:, 0].mean()),
        last=float(means[:, 1].mean()),
        n=len(means),
        still=int((~moving).sum()),
    )


def drift(features: Float[ndarray, "videos clips width"], window: int, splits: int = 200, seed: int = 0) -> Drift:
    """Compare the clips of later windows of `window` clips with those of the first, all videos together.

    All distances are of equally many clips, so their small-sample bias is alike; it falls with more videos. `seed`
    draws the splits of `chance`.
    """
    videos, clips, _ = features.shape
    if not 1 <= window <= clips // 2:
        raise ValueError(f"window: expected 1 to {clips // 2} of {clips} clips a video, got {window}")
    starts = [*range(window, clips - window, window), clips - window]
    by_window = [frechet_distance(features[:, :window], features[:, start : start + window]) for start in starts]
    ends = np.concatenate([features[:, :window], features[:, -window:]], axis=1)
    generator, by_chance = generator_for(seed, "splits"), []
    for _ in range(splits):
        order = torch.rand(videos, 2 * window, generator=generator).argsort(dim=1).numpy()
        mixed = np.take_along_axis(ends, order[:, :, None], axis=1)
        by_chance.append(frechet_distance(mixed[:, :window], mixed[:, window:]))
    low, high = np.quantile(by_chance, [0.025, 0.975])
    end = frechet_score(features[:, :window], features[:, -window:], seed)
    return Drift(
        distance=end.value,
        interval=end.interval,
        by_window=tuple(by_window),
        chance=float(np.mean(by_chance)),
        chance_interval=(float(low), float(high)),
        clips=videos * window,
    )


def _moving(motion_of_video: Float[ndarray, "v"], where: str) -> Bool[ndarray, "v"]:
    """Which videos move at all; raises `ValueError` where none does."""
    moving = motion_of_video > 0
    if not moving.any():
        raise ValueError(f"expected a video that moves {where}, got {len(moving)} videos, all still there")
    return moving
