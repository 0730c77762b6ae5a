"""A minute of video: does it hold together from clip to clip and to its end, and what does it cost beside a clip?"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from numpy import ndarray
from PIL import Image

from dicode.data.cache import FrameCache
from dicode.evaluate.generation import draw_prompts, drift, join_score, motion_over_time
from dicode.evaluate.samples import MOST_VIDEOS, caption_of, split_rows, spread
from dicode.evaluate.scores import Score, repeats_score
from dicode.evaluate.speed import memory_score, whole_process
from dicode.features.extract import EfficientNetLite0Features, features_of_clips
from dicode.features.metrics import at_joins
from dicode.pipeline import DiCoDe
from dicode.stopwatch import Stopwatch, tracked
from dicode.tokenizer.config import Joins
from dicode.video.sheet import contact_sheet
from dicode.video.timed import Video

JOINS: tuple[Joins, ...] = get_args(Joins)
LONG_S = 60.0
WINDOW_SHARE = 1 / 6  # of a video, at its beginning and its end: ten seconds of a minute
SHORT_CLIPS = (1, 2, 3, 4)  # lengths from which the time that one more clip takes is fitted


@dataclass(frozen=True)
class VideoTime:
    """Seconds that one video took, once the model was loaded."""

    total_s: float
    language_model_s: float  # those of them spent on deep tokens
    processor_s: float  # of all threads of this process: what others on the machine take is not in it
    frames: int


def check_length(model: DiCoDe, seconds: float) -> None:
    """Raise `ValueError` now where the model does not hold such a video, or where it is too short to be called long."""
    model.generate("any prompt", seconds=seconds)  # makes nothing yet
    clips = model.tokenizer.config.num_clips(model.num_frames(seconds))
    if clips <= SHORT_CLIPS[1]:
        least_s = (SHORT_CLIPS[1] + 1) * model.tokenizer.config.clip_s
        raise ValueError(f"seconds: expected at least {least_s:g}, to compare with shorter videos, got {seconds:g}")


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

    Also what such a video costs in time and memory, measured `repeats` times; `folder` is where the model was loaded
    from. Returns the figures and a contact sheet, a frame a second, the kinds of joins beneath each other.
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
    features = [features_of_clips(extractor, own).joined() for own in tracked(clips, "features", "video")]
    return {
        "frames": [len(video) for video in videos],
        "window_s": window * config.clip_s,
        "join_score": asdict(join_score(videos, **clip, seed=seed)),
        "drift": {f"FVD-{extractor.name}": asdict(drift(np.stack(features), window, seed=seed))},
        "motion": asdict(motion_over_time(videos, window * config.tail_frame, **clip, seed=seed)),
    }


def clips_of(video: Video, clip_frames: int, repeated_frames: int = 0) -> list[UInt8[ndarray, "_ h w c"]]:
    """The clips that a video was made of, as shown; a lone last frame is left out, for it has no motion."""
    joins = np.flatnonzero(at_joins(len(video), clip_frames, repeated_frames)) + 1
    return [clip for clip in np.split(video, joins) if len(clip) > 1]


def cost_of_length(model: DiCoDe, folder: Path, prompt: str, seconds: float, repeats: int) -> dict[str, Any]:
    """Time and memory of one video of this length beside one clip, with the model's own options.

    Times are of the model loaded, after one video to warm up, the lengths taking turns so that another job on the
    machine weighs on all. Memory is that of a whole `dicode generate`. Medians of as many repeats, with intervals.
    """
    config = model.tokenizer.config
    lengths = [clips * config.clip_s for clips in SHORT_CLIPS if clips * config.clip_s < seconds] + [seconds]
    timed_video(model, prompt, lengths[-2])
    times: dict[float, list[VideoTime]] = {length: [] for length in lengths}
    for _ in tracked(range(repeats), "timing"):
        for length in lengths:
            times[length].append(timed_video(model, prompt, length))
    memory = np.array(
        [
            [whole_process(model, folder, prompt, length).peak_memory_gib for length in (seconds, config.clip_s)]
            for _ in tracked(range(repeats), "memory")
        ]
    )
    return {
        "joins": model.sampling.joins,
        **time_figures(times, seconds, config.clip_s),
        "peak_memory_gib": memory_score(np.median, memory[:, 0]),
        "one_clip_peak_memory_gib": memory_score(np.median, memory[:, 1]),
        "memory_ratio": memory_score(lambda drawn: np.median(drawn[:, 0]) / np.median(drawn[:, 1]), memory),
        "threads": torch.get_num_threads(),
    }


def time_figures(times: Mapping[float, Sequence[VideoTime]], seconds: float, clip_s: float) -> dict[str, Any]:
    """What a video of this length takes against as many times the marginal clip.

    The marginal clip is the slope of a least-squares line through the median times of the other lengths, all short:
    what one more clip takes where there are few. The ratio is 1 where later clips take no longer than early ones. On
    a machine with other work believe the ratio of processor time; on an accelerator it is the host's alone. Intervals
    are over the repeats, each of which has all lengths.
    """
    long, clips = list(times).index(seconds), np.array(list(times)) / clip_s
    short = clips != clips[long]
    total = np.array([[one.total_s for one in own] for own in times.values()]).T
    processor = np.array([[one.processor_s for one in own] for own in times.values()]).T
    shares = np.array([one.language_model_s / one.total_s for one in times[seconds]])

    def line(repeats: Float64[ndarray, "n lengths"]) -> Float64[ndarray, "2"]:
        return np.polyfit(clips[short], np.median(repeats, axis=0)[short], 1)  # slope, value at no clips

    def ratio(repeats: Float64[ndarray, "n lengths"]) -> float:
        return float(np.median(repeats[:, long]) / (clips[long] * line(repeats)[0]))

    scores: dict[str, Score] = {
        "median_s": repeats_score(np.median, total[:, long]),
        "marginal_clip_s": repeats_score(lambda repeats: line(repeats)[0], total),
        "start_s": repeats_score(lambda repeats: line(repeats)[1], total),  # what every video takes once
        "time_ratio": repeats_score(ratio, total),
        "processor_s": repeats_score(np.median, processor[:, long]),
        "processor_time_ratio": repeats_score(ratio, processor),
        "language_model_share": repeats_score(np.median, shares),
    }
    medians = {f"{length:g}": repeats_score(np.median, own) for length, own in zip(times, total.T, strict=True)}
    medians.pop(f"{seconds:g}")
    return {"frames": times[seconds][0].frames, "short_median_s": medians, **scores}


def timed_video(model: DiCoDe, prompt: str, seconds: float) -> VideoTime:
    """Generate a video, keep none of it, and tell the time."""
    watch, processor_before_s = Stopwatch(), time.process_time()
    with watch.stage("decode"):
        key_frames = watch.timed("language model", model.write([prompt], seconds=seconds))
        frames = sum(clip.shape[1] for clip in model.render(key_frames, seconds))
    processor_s = time.process_time() - processor_before_s
    return VideoTime(sum(watch.seconds.values()), watch.seconds["language model"], processor_s, frames)
