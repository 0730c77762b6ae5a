"""The work of benchmarks: samples and real clips measured in parts, and videos for VBench."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dicode.benchmarks.parts import Parts, Shard
from dicode.benchmarks.sets import shuffled, vbench_prompts
from dicode.checkpoint import model_origin, resolve
from dicode.evaluate.scores import frechet_score
from dicode.features.networks import I3D
from dicode.features.published import NetworkFile, check_confirmed
from dicode.pipeline import DiCoDe
from dicode.provenance import command_line, write_result
from dicode.seeds import generator_for
from dicode.stopwatch import Stopwatch
from dicode.video.read import read_video
from dicode.video.timed import Video
from dicode.video.write import VideoWriter

FRAMES = 16  # of a clip for I3D and C3D in the literature
SPLITS = 10  # of the Inception Score
UCF101_CLASSES, UCF101_SAMPLES, UCF101_CLIPS = 101, 10_000, 2048
MSRVTT_VIDEOS, MSRVTT_CAPTIONS = 2990, 59_794
VBENCH_SAMPLES = 5
SAMPLES_APART = 1000  # sample numbers between two prompts of VBench, so that more videos a prompt leave the first ones

Measure = Callable[[Video, str], Tensor]  # a clip and its prompt → one row of numbers


@dataclass(frozen=True)
class Benchmark:
    """What is measured: samples of prompts, and real videos."""

    name: str
    prompts: Sequence[str]  # of each sample, in order
    videos: Sequence[Path]
    measures: Mapping[str, Measure]  # of a sample; `i3d` also of a real clip
    networks: Sequence[NetworkFile]  # I3D's first
    protocol_clips: int  # of the FVD, in the literature


@dataclass(frozen=True)
class Setup:
    """How a benchmark runs: flags of `dicode benchmark`."""

    output: Path
    fvd_clips: int  # on either side of the FVD
    confirm: Sequence[str]
    model: str
    revision: str | None
    size: int  # of real clips
    seed: int
    batch_size: int
    shard: Shard
    work_folder: Path | None
    device: torch.device


@dataclass(frozen=True)
class Job:
    """One video for VBench."""

    prompt: str
    file: Path
    number: int  # of the sample


def measure(
    benchmark: Benchmark,
    setup: Setup,
    figures: Callable[[Mapping[str, np.ndarray]], dict[str, Any]],
    watch: Stopwatch,
) -> None:
    """Do this process's share; the one that finds all parts done writes the result: FVD, and `figures` of the rows."""
    networks, seed, batch = benchmark.networks, setup.seed, setup.batch_size
    check_confirmed(setup.confirm, networks)
    folder = resolve(setup.model, setup.revision)
    model = DiCoDe.from_pretrained(folder, device=str(setup.device))
    config, samples = model.tokenizer.config, len(benchmark.prompts)
    clips = min(setup.fvd_clips, len(benchmark.videos))
    run = {
        **sampled_model(model, folder),
        "benchmark": benchmark.name,
        "samples": samples,
        "prompts": digest(benchmark.prompts),
        "videos": digest([f"{path.parent.name}/{path.name} {path.stat().st_size}" for path in benchmark.videos]),
        "real_clips": clips,
        "real_size": setup.size,
        "fps": config.fps,
        "frames": FRAMES,
        "seed": seed,
        "batch_size": batch,
        "networks": {file.network: file.sha256 for file in networks},
        "device": setup.device.type,
    }
    parts = Parts(setup.work_folder or setup.output.with_suffix(".work"), run, setup.shard)
    counts = {"real": -(-clips // batch), "samples": -(-samples // batch)}
    with watch.stage("real clips"):
        parts.make("real", counts["real"], lambda part: real_rows(benchmark, setup, config.fps, clips, part))
    with watch.stage("samples"):
        parts.make("samples", counts["samples"], lambda part: sample_rows(benchmark, setup, model, part))
    if missing := sum(parts.missing(kind, count) for kind, count in counts.items()):
        print(f"{parts.folder}: this share is done; parts still to come from others: {missing}")
        return
    real, rows = (joined(parts.read(kind, count)) for kind, count in counts.items())
    values = {
        **fvd(networks[0].figure("FVD"), real["i3d"], rows["i3d"][: setup.fvd_clips], benchmark.protocol_clips, seed),
        **figures(rows),
        "real_videos_too_short": clips - len(real["i3d"]),
        "networks": [asdict(file) for file in networks],
        **{key: run[key] for key in ("model", "weights", "settings", "fps", "frames", "real_size", "batch_size")},
        "size": config.size,
    }
    name = f"{run['model']}: zero-shot {benchmark.name}"
    write_result(setup.output, name, values, samples, seed, command_line(), setup.device)
    print(f"{summary(values)}{setup.output}\n{watch.text()}")


def joined(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, np.ndarray]:
    """The rows of all parts, by measure."""
    read = list(parts)
    return {key: np.concatenate([part[key].numpy() for part in read]) for key in read[0]}


def summary(values: Mapping[str, Any]) -> str:
    """A line for every figure with its interval and counts."""
    lines = []
    for key, figure in values.items():
        if isinstance(figure, dict) and "protocol_samples" in figure:
            interval = "{:.5g} to {:.5g}, ".format(*figure["interval"]) if figure["interval"] else ""
            counts = f"{figure['samples']} samples, protocol {figure['protocol_samples']}"
            lines.append(f"{key} {figure['value']:.5g} ({interval}{counts})\n")
    return "".join(lines)


def vbench_videos(
    prompts_file: Path,
    output: Path,
    folder: Path,
    shard: Shard,
    device: torch.device,
    samples: int,
    seconds: float,
    scale: int,
    seed: int,
    batch_size: int,
) -> dict[str, Any] | None:
    """Write this process's share of the videos for VBench; returns what describes them, None while others' are missing.

    `folder` is the model's. As VBench's `prompts/README.md` asks: `<prompt>-<index>.mp4`, index from 0, random numbers
    of its own for every video.
    """
    prompts = vbench_prompts(prompts_file)
    work = output.with_name(f"{output.name}.work")
    if output.is_dir() and any(output.iterdir()) and not work.is_dir():
        raise FileExistsError(f"{output}: holds files that this command did not write; name a new folder")
    model = DiCoDe.from_pretrained(folder, device=str(device))
    flags = {"samples": samples, "seconds": seconds, "scale": scale, "seed": seed}
    run = {**sampled_model(model, folder), **flags, "batch_size": batch_size, "device": device.type}
    parts = Parts(work, {"benchmark": "vbench", "prompts": digest(prompts), **run}, shard)
    if len({prompt.casefold() for prompt in prompts}) < len(prompts) and (work / "RUN.JSON").is_file():
        raise ValueError(f"{prompts_file}: prompts that differ only in case are one file on this disk; use another")
    output.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(prompt, output / f"{prompt}-{index}.mp4", SAMPLES_APART * place + index)
        for place, prompt in enumerate(prompts)
        for index in range(samples)
    ]
    batches = [jobs[first : first + batch_size] for first in range(0, len(jobs), batch_size)]
    parts.each("videos", len(batches), lambda part: write_videos(model, batches[part], seconds, seed, scale))
    if missing := sum(not job.file.is_file() for job in jobs):
        print(f"{output}: this share is done; videos still to come from others: {missing}")
        return None
    return {
        **run,
        **counted("VBench, every prompt", samples, VBENCH_SAMPLES),
        "prompts": len(prompts),
        "sample_numbers": f"{SAMPLES_APART} × place of the prompt + index",
    }


def write_videos(model: DiCoDe, jobs: Sequence[Job], seconds: float, seed: int, scale: int) -> None:
    """Generate one batch and write those of its videos that are not there.

    Without metadata, since VBench takes every file in the folder, a .json too, for a video.
    """
    if all(job.file.is_file() for job in jobs):
        return
    prompts, numbers = [job.prompt for job in jobs], [job.number for job in jobs]
    clips = model.generate_batch(prompts, seconds=seconds, seed=seed, sample_indices=numbers)
    for job, frames in zip(jobs, torch.cat(list(clips), dim=1).numpy(), strict=True):
        if not job.file.is_file():
            with VideoWriter(job.file, model.tokenizer.config.fps, scale=scale) as writer:
                writer.write(frames)


def sample_rows(benchmark: Benchmark, setup: Setup, model: DiCoDe, part: int) -> dict[str, Tensor]:
    """Generate one batch of clips and measure each: a tensor a measure, one row a clip."""
    first = part * setup.batch_size
    prompts = list(benchmark.prompts[first : first + setup.batch_size])
    seconds, indices = FRAMES / model.tokenizer.config.fps, list(range(first, first + len(prompts)))
    parts = model.generate_batch(prompts, seconds=seconds, seed=setup.seed, sample_indices=indices)
    clips = torch.cat(list(parts), dim=1).numpy()
    return {
        key: torch.stack([numbers_of(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)])
        for key, numbers_of in benchmark.measures.items()
    }


def real_rows(benchmark: Benchmark, setup: Setup, fps: float, clips: int, part: int) -> dict[str, Tensor]:
    """I3D's vectors of one batch of real clips; a clip whose videos are all too short is left out.

    Clip i has the videos i, i + clips, … of a shuffled list, and is of the first that is long enough.
    """
    order, vectors = shuffled(benchmark.videos, setup.seed, "real clips"), []
    for i in range(part * setup.batch_size, min(clips, (part + 1) * setup.batch_size)):
        candidates = (real_clip(path, fps, setup.size, setup.seed) for path in order[i::clips])
        clip = next((clip for clip in candidates if clip is not None), None)
        vectors += [] if clip is None else [benchmark.measures["i3d"](clip, "")]
    return {"i3d": torch.stack(vectors) if vectors else torch.zeros(0, I3D.width)}


def real_clip(path: Path, fps: float, size: int, seed: int) -> Video | None:
    """16 frames from a random place of a video, or None where it is shorter."""
    frames = read_video(path, fps, size).frames
    if len(frames) < FRAMES:
        return None
    start = int(torch.randint(len(frames) - FRAMES + 1, (1,), generator=generator_for(seed, "start", path.name)))
    return frames[start : start + FRAMES]


def fvd(name: str, real: np.ndarray, generated: np.ndarray, protocol_clips: int, seed: int) -> dict[str, Any]:
    """The squared Fréchet distance of I3D's vectors, with an interval over both sets of clips (`set_score`).

    They are taken for independent, though prompts come from the captions or classes of the real videos.
    """
    score = frechet_score(real, generated, seed, paired=False)
    samples = counted(name, len(generated), protocol_clips)
    real_clips = counted(name, len(real), protocol_clips, "real_clips")
    return {name: {"value": score.value, "interval": score.interval, **samples, **real_clips}}


def counted(name: str, count: int, protocol: int, unit: str = "samples") -> dict[str, int]:
    """Both counts, `samples` and `protocol_samples`; warns where the protocol takes more."""
    if count < protocol:
        warnings.warn(
            f"{name}: {count} {unit.replace('_', ' ')} where the protocol takes {protocol}: not to be compared with "
            "published figures",
            stacklevel=2,
        )
    return {unit: count, f"protocol_{unit}": protocol}


def sampled_model(model: DiCoDe, folder: Path) -> dict[str, Any]:
    """Model, its weights and configuration, version, and how it is sampled: its own settings."""
    return {
        **model_origin(folder, folder / "config.json", *folder.glob("*.safetensors")),
        "settings": asdict(model.sampling),
    }


def digest(texts: Sequence[str]) -> str:
    """Sixteen hexadecimal digits that stand for texts in their order."""
    return sha256(repr(list(texts)).encode()).hexdigest()[:16]
