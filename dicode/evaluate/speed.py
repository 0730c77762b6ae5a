"""Seconds and memory that one video takes, measured several times."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray

from dicode.evaluate.scores import Score, repeats_score
from dicode.pipeline import DiCoDe


class WholeProcess(NamedTuple):
    """What one `dicode generate` took, from folder to file."""

    took_s: float
    peak_memory_gib: float  # nan on Windows, which does not tell


def evaluate_speed(model: DiCoDe, folder: Path, prompt: str, seconds: float = 4.0, repeats: int = 5) -> dict[str, Any]:
    """Seconds for one video, model loaded and after a warm-up, and of a whole process with its peak memory.

    Medians of `repeats`, with intervals from five on (`repeats_score`).
    """
    times = []
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        frames = sum(len(clip) for clip in model.generate(prompt, seconds=seconds, seed=repeat))
        times.append(time.perf_counter() - started)
    processes = [whole_process(model, folder, prompt, seconds) for _ in range(repeats)]
    return {
        "seconds_of_video": seconds,
        "frames": frames,
        "median_s": repeats_score(np.median, np.array(times[1:])),
        "process_s": repeats_score(np.median, np.array([one.took_s for one in processes])),
        "peak_memory_gib": memory_score(np.median, np.array([one.peak_memory_gib for one in processes])),
        "threads": torch.get_num_threads(),
    }


def whole_process(model: DiCoDe, folder: Path, prompt: str, seconds: float) -> WholeProcess:
    """Seconds and peak memory in GiB of `dicode generate`, from folder to file, on the model's device in its dtype."""
    device, dtype = model.tokenizer.device.type, str(next(model.tokenizer.parameters()).dtype).removeprefix("torch.")
    command = ["generate", prompt, "--seconds", str(seconds), "--model", str(folder), "--device", device, "--timings"]
    command += ["--dtype", dtype]
    with TemporaryDirectory() as scratch:
        started = time.perf_counter()
        argv = [sys.executable, "-m", "dicode", *command, "-o", f"{scratch}/out.mp4"]
        printed = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout
        process_s = time.perf_counter() - started
    memory = re.search(r"peak memory ([\d.]+) MiB", printed)
    return WholeProcess(process_s, float(memory[1]) / 2**10 if memory else float("nan"))


def memory_score(statistic: Callable[[ndarray], float], repeats: Float64[ndarray, "n *lengths"]) -> Score | None:
    """A statistic of peak memory with its interval; None where the system does not tell it."""
    return None if np.isnan(repeats).any() else repeats_score(statistic, repeats)
