"""A minute of video: does it hold together from clip to clip and to its end?"""

from collections.abc import Sequence
from operator import truediv
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image

from dicode.evaluate.generation import draw_prompts
from dicode.evaluate.samples import MOST_VIDEOS, Samples, split_videos
from dicode.evaluate.scores import frechet_score
from dicode.evaluate.speed import cost_of_length
from dicode.features.extract import EfficientNetLite0Features
from dicode.features.metrics import Clips, at_joins, bootstrap_interval, frame_steps, frechet_distance
from dicode.pipeline import DiCoDe
from dicode.seeds import generator_for
from dicode.stopwatch import tracked
from dicode.tokenizer.config import Joins
from dicode.video.sheet import contact_sheet
from dicode.video.timed import Video

JOINS: tuple[Joins, ...] = get_args(Joins)
WINDOW_SHARE = 1 / 6  # of a video, at its beginning and its end: ten seconds of a minute


def measure_long(
    samples: Samples, folder: Path, count: int, seconds: float, repeats: int
) -> tuple[dict[str, Any], Image.Image]:
    """Joins, drift and motion of `count` training captions' videos, from the same deep tokens for every kind of joins.

    Also time and memory of such a video, measured `repeats` times; `folder` is where the model was loaded from. Returns
    the figures and a contact sheet, a frame a second, the kinds of joins beneath each other. See `check_length`.
    """
    model, seed = samples.model, samples.seed
    training = split_videos(samples.cache, False, captioned=True, most=MOST_VIDEOS)
    prompts = draw_prompts({video.caption for video in training} - {""}, count, seed)
    by_joins: dict[str, Any] = {}
    rows: dict[str, list[Video]] = {}
    for joins in JOINS:
        numbered = enumerate(tracked(prompts, f"videos, {joins}", "video"))
        videos = [long_video(model, prompt, seconds, seed, i, joins) for i, prompt in numbered]
        by_joins[joins] = over_time(model, videos, samples.extractor, seed)
        rows[joins] = [video[:: round(model.tokenizer.config.fps)] for video in videos]
    figures = {
        "seconds": seconds,
        "frames_asked": model.num_frames(seconds),
        "prompts": prompts,
        "joins": by_joins,
        "cost": cost_of_length(model, folder, prompts[0], seconds, repeats),
    }
    labels = [f"{joins}: {prompt}" for prompt in prompts for joins in JOINS]
    shown = [rows[joins][i] for i in range(count) for joins in JOINS]
    return figures, contact_sheet(shown, labels, columns=max(map(len, shown)))


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
        "join_score": join_score(videos, **clip, seed=seed),
        "drift": {f"FVD-{extractor.name}": drift(np.stack(features), window, seed=seed)},
        "motion": motion_over_time(videos, window * config.tail_frame, **clip, seed=seed),
    }


def clips_of(video: Video, clip_frames: int, repeated_frames: int = 0) -> list[UInt8[ndarray, "_ h w c"]]:
    """The clips of a video without repeated frames; a lone last frame is left out, for it has no motion."""
    joins = np.flatnonzero(at_joins(len(video), clip_frames, repeated_frames)) + 1
    return [clip for clip in np.split(video, joins) if len(clip) > 1]


def join_score(videos: Clips, clip_frames: int, repeated_frames: int = 0, seed: int = 0) -> dict[str, Any]:
    """Mean step `across` joins over that `inside` clips, pooled over videos: 1 where a join looks like motion.

    A video that is still inside its clips has no measure for its joins (`ratio_of_steps`). Raises `ValueError` also
    where a video has no join.
    """
    rows = []
    for number, frames in enumerate(videos):
        joins, steps = at_joins(len(frames), clip_frames, repeated_frames), frame_steps(frames)
        if not joins.any():
            raise ValueError(f"video {number}: expected more frames than a clip's {clip_frames}, got {len(frames)}")
        rows.append([steps[joins].sum(), joins.sum(), steps[~joins].sum(), (~joins).sum()])
    return ratio_of_steps(np.array(rows), ("score", "across", "inside"), "inside its clips", seed)


def motion_over_time(
    videos: Clips, window_frames: int, clip_frames: int, repeated_frames: int = 0, seed: int = 0
) -> dict[str, Any]:
    """Mean step inside clips in the `last` `window_frames` over that in the `first`: 1 where motion lasts.

    A jump at a join is no motion; a video that is still at its beginning has no ratio (`ratio_of_steps`). Raises
    `ValueError` also where a video has fewer frames than two windows.
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
        rows.append([steps[last][inside[last]].mean(), 1, steps[first][inside[first]].mean(), 1])
    return ratio_of_steps(np.array(rows), ("ratio", "last", "first"), "at its beginning", seed)


def ratio_of_steps(
    sums: Float[ndarray, "videos 4"], names: tuple[str, str, str], where: str, seed: int
) -> dict[str, Any]:
    """The ratio of two mean steps, with 95 % over videos, and both in steps of 0…255, under these names.

    Rows are the sum and number of a video's steps of either kind. A video without motion of the second kind is counted
    (`still`), not measured (`n`). Raises `ValueError` where all are still. `seed` is the bootstrap's.
    """
    moving = sums[:, 2] > 0
    if not moving.any():
        raise ValueError(f"expected a video that moves {where}, got {len(moving)} videos, all still there")

    def means(drawn: ndarray) -> tuple[float, float]:
        above, above_count, below, below_count = drawn.sum(axis=0)
        return float(above / above_count), float(below / below_count)

    values = sums[moving]
    return {
        names[0]: truediv(*means(values)),
        "interval": bootstrap_interval(lambda drawn: truediv(*means(drawn)), values, seed=seed),
        **dict(zip(names[1:], means(values), strict=True)),
        "n": len(values),
        "still": int((~moving).sum()),
    }


def drift(
    features: Float[ndarray, "videos clips width"], window: int, splits: int = 200, seed: int = 0
) -> dict[str, Any]:
    """Squared Fréchet distances of the clips of later windows of `window` clips to those of the first.

    Of all videos together; `distance` is the last window's (95 % over videos, `frechet_score`), `by_window` those of
    all in order. All are of equally many `clips` on either side, so their small-sample bias is alike; it falls with
    more videos. `chance` is the mean over random splits of each video's clips of both windows into two sets as large,
    drawn by `seed`, and `chance_interval` 95 % of these: what small samples alone cause. Without drift `by_window`
    does not grow from its first entry, the distance of neighbouring windows.
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
    return {
        "distance": end.value,
        "interval": end.interval,
        "by_window": by_window,
        "chance": float(np.mean(by_chance)),
        "chance_interval": (float(low), float(high)),
        "clips": videos * window,
    }
