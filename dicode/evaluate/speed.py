"""Seconds and memory that videos take, measured several times: one video, and a long one beside a clip."""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray

from dicode.evaluate.scores import Score, repeats_score
from dicode.pipeline import DiCoDe
from dicode.stopwatch import Stopwatch, tracked

SHORT_CLIPS = (1, 2, 3, 4)  # lengths from which the time that one more clip takes is fitted


class WholeProcess(NamedTuple):
    """What one `dicode generate` took, from folder to file."""

    took_s: float
    peak_memory_gib: float  # nan on Windows, which does not report it


class VideoTime(NamedTuple):
    """Seconds that one video took, once the model was loaded."""

    total_s: float
    language_model_s: float  # those of them spent on deep tokens
    frames: int


def evaluate_speed(model: DiCoDe, folder: Path, prompt: str, repeats: int, seconds: float = 4.0) -> dict[str, Any]:
    """Seconds for one video, model loaded and after a warm-up, and of a whole process with its peak memory.

    Medians of `repeats`, with intervals from five on (`repeats_score`).
    """
    times = [timed_video(model, prompt, seconds, seed) for seed in range(repeats + 1)]
    took_s, memory_gib = np.array([whole_process(model, folder, prompt, seconds) for _ in range(repeats)]).T
    return {
        "seconds_of_video": seconds,
        "frames": times[0].frames,
        "median_s": repeats_score(np.median, np.array([one.total_s for one in times[1:]])),
        "process_s": repeats_score(np.median, took_s),
        "peak_memory_gib": memory_score(np.median, memory_gib),
        "threads": torch.get_num_threads(),
    }


def whole_process(model: DiCoDe, folder: Path, prompt: str, seconds: float) -> WholeProcess:
    """Seconds and peak memory in GiB of `dicode generate`, from folder to file, on the model's device in its dtype."""
    device, dtype = model.tokenizer.device.type, str(next(model.tokenizer.parameters()).dtype).removeprefix("torch.")
    argv = [sys.executable, "-m", "dicode", "generate", prompt, "--seconds", str(seconds), "--model", str(folder)]
    argv += ["--device", device, "--dtype", dtype, "--timings", "-o"]
    with TemporaryDirectory() as scratch:
        started = time.perf_counter()
        printed = subprocess.run([*argv, f"{scratch}/out.mp4"], check=True, stdout=subprocess.PIPE, text=True).stdout
        process_s = time.perf_counter() - started
    memory = re.search(r"peak memory ([\d.]+) MiB", printed)
    return WholeProcess(process_s, float(memory[1]) / 2**10 if memory else float("nan"))


def memory_score(statistic: Callable[[ndarray], float], repeats: Float64[ndarray, "n *lengths"]) -> Score | None:
    """A statistic of peak memory with its interval; None where the system does not report it."""
    return None if np.isnan(repeats).any() else repeats_score(statistic, repeats)


def check_length(model: DiCoDe, seconds: float) -> None:
    """Raise `ValueError` where the model does not hold such a video, or where it is too short to be called long."""
    model.generate("any prompt", seconds=seconds)  # renders nothing yet
    clips = model.tokenizer.config.num_clips(model.num_frames(seconds))
    if clips <= SHORT_CLIPS[1]:
        least_s = (SHORT_CLIPS[1] + 1) * model.tokenizer.config.clip_s
        raise ValueError(f"seconds: expected at least {least_s:g}, to compare with shorter videos, got {seconds:g}")


def cost_of_length(model: DiCoDe, folder: Path, prompt: str, seconds: float, repeats: int) -> dict[str, Any]:
    """Time and memory of one video of this length beside one clip, with the model's own options.

    Times are of the model loaded, after one video to warm up; lengths take turns so that another job on the machine
    weighs on all. Memory is that of a whole `dicode generate`. Medians of as many repeats, with intervals.
    """
    clip_s = model.tokenizer.config.clip_s
    lengths = [clips * clip_s for clips in SHORT_CLIPS if clips * clip_s < seconds] + [seconds]
    timed_video(model, prompt, lengths[-2])
    times: dict[float, list[VideoTime]] = {length: [] for length in lengths}
    for _ in tracked(range(repeats), "timing"):
        for length in lengths:
            times[length].append(timed_video(model, prompt, length))
    memory = np.array(
        [
            [whole_process(model, folder, prompt, length).peak_memory_gib for length in (seconds, clip_s)]
            for _ in tracked(range(repeats), "memory")
        ]
    )
    return {
        "joins": model.sampling.joins,
        **time_figures(times, seconds, clip_s),
        "peak_memory_gib": memory_score(np.median, memory[:, 0]),
        "one_clip_peak_memory_gib": memory_score(np.median, memory[:, 1]),
        "memory_ratio": memory_score(lambda drawn: np.median(drawn[:, 0]) / np.median(drawn[:, 1]), memory),
        "threads": torch.get_num_threads(),
    }


def time_figures(times: Mapping[float, Sequence[VideoTime]], seconds: float, clip_s: float) -> dict[str, Any]:
    """Time of a video of this length against as many times the marginal clip.

    The marginal clip is the slope of a least-squares line through the median times of the other lengths, all short.
    The ratio is 1 where later clips take no longer than early ones. Intervals are over the repeats, each with all
    lengths.
    """
    long, clips = list(times).index(seconds), np.array(list(times)) / clip_s
    short = clips != clips[long]
    total = np.array([[one.total_s for one in own] for own in times.values()]).T
    shares = np.array([one.language_model_s / one.total_s for one in times[seconds]])

    def marginal(repeats: Float64[ndarray, "n lengths"]) -> float:
        return float(np.polyfit(clips[short], np.median(repeats, axis=0)[short], 1)[0])

    def ratio(repeats: Float64[ndarray, "n lengths"]) -> float:
        return float(np.median(repeats[:, long]) / (clips[long] * marginal(repeats)))

    return {
        "frames": times[seconds][0].frames,
        "median_s": repeats_score(np.median, total[:, long]),
        "marginal_clip_s": repeats_score(marginal, total),
        "time_ratio": repeats_score(ratio, total),
        "language_model_share": repeats_score(np.median, shares),
    }


def timed_video(model: DiCoDe, prompt: str, seconds: float, seed: int = 0) -> VideoTime:
    """Generate a video, keep none of it, and measure the time."""
    watch = Stopwatch()
    with watch.stage("decode"):
        key_frames = watch.timed("language model", model.write([prompt], seconds=seconds, seed=seed))
        frames = sum(clip.shape[1] for clip in model.render(key_frames, seconds, seed=seed))
    return VideoTime(sum(watch.seconds.values()), watch.seconds["language model"], frames)
