"""A minute of video: does it hold together from clip to clip and to its end?"""

from collections.abc import Callable, Mapping, Sequence
from operator import truediv
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from PIL import Image
from torch import Tensor

from dicode.evaluate.generation import draw_prompts
from dicode.evaluate.samples import MOST_VIDEOS, Samples, split_videos
from dicode.evaluate.scores import Score, frechet_score, kernel_score, mean_score
from dicode.evaluate.speed import cost_of_length
from dicode.features.extract import EfficientNetLite0Features, mean_and_change
from dicode.features.metrics import (
    Clips,
    at_joins,
    bootstrap_interval,
    frame_steps,
    frechet_distance,
    kernel_distance,
)
from dicode.pipeline import DiCoDe
from dicode.seeds import generator_for
from dicode.stopwatch import tracked
from dicode.tokenizer.config import Joins, TokenizerConfig
from dicode.video.sheet import contact_sheet
from dicode.video.timed import Video

JOINS: tuple[Joins, ...] = get_args(Joins)
WINDOW_SHARE = 0.15  # of a video, at its beginning and its end; in whole clips ten seconds of a minute
# What of a frame `h w 3` is compared at both ends of a video, in steps of 0…255
FRAME_MEASURES: Mapping[str, Callable[[Video], ndarray]] = {
    "brightness": lambda frames: frames.mean((1, 2, 3)),
    "contrast": lambda frames: frames.mean(3).std((1, 2)),
    "saturation": lambda frames: (frames.max(3).astype(float) - frames.min(3)).mean((1, 2)),
    "sharpness": lambda frames: np.abs(np.diff(frames.mean(3), axis=2)).mean((1, 2)),
}
DISTANCES = {"FVD": (frechet_distance, frechet_score), "MMD": (kernel_distance, kernel_score)}


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
    extractor, real = samples.extractor, real_videos(samples, seconds, count)
    figures_of = {"real": frames_compared(real, frame_features(extractor, real), model.tokenizer.config.fps, seed)}
    kinds = kinds_of_joins(model.tokenizer.config)
    for joins in kinds:
        numbered = enumerate(tracked(prompts, f"videos, {joins}", "video"))
        videos = [long_video(model, prompt, seconds, seed, i, joins) for i, prompt in numbered]
        features = frame_features(extractor, videos)
        by_joins[joins] = over_time(model, videos, features, extractor.name, seed)
        figures_of[joins] = frames_compared(videos, features, model.tokenizer.config.fps, seed)
        rows[joins] = [video[:: round(model.tokenizer.config.fps)] for video in videos]
    figures = {
        "seconds": seconds,
        "frames_asked": model.num_frames(seconds),
        "prompts": prompts,
        "joins": by_joins,
        **{key: {kind: own[key] for kind, own in figures_of.items() if own} for key in figures_of[kinds[0]]},
        "cost": cost_of_length(model, folder, prompts[0], seconds, repeats),
    }
    labels = [f"{joins}: {prompt}" for prompt in prompts for joins in kinds]
    shown = [rows[joins][i] for i in range(count) for joins in kinds]
    return figures, contact_sheet(shown, labels, columns=max(map(len, shown)))


def kinds_of_joins(config: TokenizerConfig) -> list[Joins]:
    """Those that a model has: latents of several frames are not blended."""
    return [joins for joins in JOINS if joins != "parallel" or config.first_stage.frames_a_latent == 1]


def long_video(model: DiCoDe, prompt: str, seconds: float, seed: int, sample_index: int, joins: Joins) -> Video:
    """All frames of one video in memory."""
    clips = model.generate(prompt, seconds=seconds, seed=seed, sample_index=sample_index, joins=joins)
    return np.concatenate(list(clips))


def frame_features(extractor: EfficientNetLite0Features, videos: Sequence[Video]) -> list[Tensor]:
    """Of every frame of these videos."""
    return [extractor.frame_features(frames) for frames in tracked(videos, "features", "video")]


def over_time(
    model: DiCoDe, videos: Sequence[Video], features: Sequence[Tensor], network: str, seed: int = 0
) -> dict[str, Any]:
    """Join score, drift and motion of long videos of one length, with a network's `features` of their frames."""
    config = model.tokenizer.config
    clip = {"clip_frames": config.clip_frames, "repeated_frames": config.repeated_frames}
    clips = np.stack([mean_and_change(clips_of(own, **clip)) for own in features])
    window = max(1, int(clips.shape[1] * WINDOW_SHARE + 0.5))
    return {
        "frames": [len(video) for video in videos],
        "window_s": window * config.clip_s,
        "join_score": join_score(videos, **clip, seed=seed),
        "drift": {f"{name}-{network}": drift(clips, window, name, seed=seed) for name in DISTANCES},
        "motion": motion_over_time(videos, window * config.tail_frame, **clip, seed=seed),
    }


def real_videos(samples: Samples, seconds: float, count: int) -> list[Video]:
    """Validation videos that last so long, if there are any."""
    fps = samples.model.tokenizer.config.fps
    frames = samples.model.num_frames(seconds)
    found = split_videos(samples.cache, True, lasting_s=seconds, most=count)
    return [samples.cache.frames[samples.cache.clip_rows(video, 0.0, frames, fps)].numpy() for video in found]


def frames_compared(videos: Sequence[Video], features: Sequence[Tensor], fps: float, seed: int = 0) -> dict[str, Score]:
    """`end_contrast` and `similarity_over_time`; nothing of no videos."""
    return end_contrast(videos, seed) | similarity_over_time(features, fps, seed) if videos else {}


def end_contrast(videos: Sequence[Video], seed: int = 0) -> dict[str, Score]:
    """Mean over videos of |a measure of the first − of the last WINDOW_SHARE of frames|, with 95 % (bootstrap).

    As the drift of FramePack (arXiv 2504.12626) for measures that need no reference. A still video has
    none: read it beside motion.
    """
    scores = {}
    for name, measure in FRAME_MEASURES.items():
        values = []
        for frames in videos:
            count = max(1, round(len(frames) * WINDOW_SHARE))
            values.append(abs(measure(frames[:count]).mean() - measure(frames[-count:]).mean()))
        scores[f"end_contrast of {name}"] = mean_score(values, seed)
    return scores


def similarity_over_time(features: Sequence[Tensor], fps: float, seed: int = 0) -> dict[str, Score]:
    """Mean cosine of two frames' features `f width`, centred on all frames' mean, by their distance.

    Distances are a frame, 1 s, 2 s, 4 s, …. It falls slowly where a video keeps what it shows, at once where frames
    have nothing to do with each other; never in a still video. 95 % over videos.
    """
    centred = [(own - torch.cat([*features]).mean(0)).double().numpy() for own in features]
    unit = [own / np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-12) for own in centred]
    shortest = min(map(len, unit))
    lags = [1]
    while (lag := round(fps * 2 ** (len(lags) - 1))) < shortest:
        lags.append(lag)
    return {
        f"similarity of frames {lag / fps:g} s apart": mean_score(
            [float((own[:-lag] * own[lag:]).sum(axis=1).mean()) for own in unit], seed
        )
        for lag in lags
        if lag < shortest
    }


def clips_of(video: Tensor, clip_frames: int, repeated_frames: int = 0) -> list[Tensor]:
    """A video's frames or their features by clip, without repeated frames; a lone last one is left out: no motion."""
    joins = np.flatnonzero(at_joins(len(video), clip_frames, repeated_frames)) + 1
    return [clip for clip in video.tensor_split(torch.from_numpy(joins)) if len(clip) > 1]


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
    features: Float[ndarray, "videos clips width"], window: int, distance: str = "FVD", splits: int = 200, seed: int = 0
) -> dict[str, Any]:
    """Distances (of DISTANCES) of the clips of later windows of `window` clips to those of the first.

    Of all videos together; `distance` is the last window's (95 % over videos, `frechet_score`), `by_window` those of
    all in order. All are of equally many `clips` on either side, so the bias of a Fréchet distance is alike; it falls
    with more videos. `chance` is the mean over random splits of each video's clips of both windows into two sets as
    large, drawn by `seed`, and `chance_interval` 95 % of these: what small samples alone cause. Without drift
    `by_window` does not grow from its first entry, the distance of neighbouring windows.
    """
    videos, clips, _ = features.shape
    measure, score = DISTANCES[distance]
    if not 1 <= window <= clips // 2:
        raise ValueError(f"window: expected 1 to {clips // 2} of {clips} clips a video, got {window}")
    starts = [*range(window, clips - window, window), clips - window]
    by_window = [measure(features[:, :window], features[:, start : start + window]) for start in starts]
    ends = np.concatenate([features[:, :window], features[:, -window:]], axis=1)
    generator, by_chance = generator_for(seed, "splits"), []
    for _ in range(splits):
        order = torch.rand(videos, 2 * window, generator=generator).argsort(dim=1).numpy()
        mixed = np.take_along_axis(ends, order[:, :, None], axis=1)
        by_chance.append(measure(mixed[:, :window], mixed[:, window:]))
    low, high = np.quantile(by_chance, [0.025, 0.975])
    end = score(features[:, :window], features[:, -window:], seed)
    return {
        "distance": end.value,
        "interval": end.interval,
        "by_window": by_window,
        "chance": float(np.mean(by_chance)),
        "chance_interval": (float(low), float(high)),
        "clips": videos * window,
    }
