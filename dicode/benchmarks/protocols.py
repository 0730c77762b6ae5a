"""The work of `dicode benchmark ucf101`, `msrvtt` and `vbench`.

Where the literature differs, the docstring of a command says whose usage is followed.
"""

import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dicode.benchmarks.parts import Parts, Shard, shard_of
from dicode.benchmarks.sets import (
    class_prompts,
    drawn_captions,
    msrvtt_videos,
    share_out,
    shuffled,
    ucf101_videos,
    vbench_prompts,
)
from dicode.checkpoint import resolve
from dicode.cli.evaluate_flags import Msrvtt, Ucf101, Vbench
from dicode.device import pick_device
from dicode.evaluate.scores import class_score, frechet_score, inception_scores
from dicode.features.metrics import bootstrap_interval
from dicode.features.networks import C3D, I3D, Clip, clip_similarity
from dicode.features.published import NetworkFile, c3d_file, check_confirmed, clip_file, i3d_file
from dicode.pipeline import DiCoDe
from dicode.provenance import model_origin, write_result
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
    fvd_clips: int  # on either side of the FVD
    size: int  # of real clips
    batch_size: int
    seed: int
    model: str
    revision: str | None
    confirm: Sequence[str]
    output: Path
    work_folder: Path | None


@dataclass(frozen=True)
class Job:
    """One video for VBench."""

    prompt: str
    file: Path
    number: int  # of the sample


def ucf101(command: Ucf101, watch: Stopwatch) -> int:
    """Zero-shot UCF-101.

    Samples: 10,000, classes as often as in the data set (Make-A-Video, arXiv 2209.14792, which wrote one sentence a
    class and published none: give yours with --prompts). Prompts: the class name in words (LaVie, arXiv 2309.15103).
    FVD: 2,048 generated clips, the first of the samples in shuffled order, against 2,048 real ones of 16 frames
    (StyleGAN-V, arXiv 2112.14683; DynamiCrafter, arXiv 2310.12190). Inception Score: of all samples, over 10 splits. A
    real clip begins at a random place of a video of its own, at the model's frame rate (8 a second is DynamiCrafter's
    every third frame), 256×256.
    """
    classes = ucf101_videos(Path(command.folder), command.split)
    sentences = class_prompts(list(classes), command.template, command.prompts)
    check_counts(command.samples, SPLITS, command.fvd_clips)
    shares = share_out(command.samples, {name: len(videos) for name, videos in classes.items()})
    prompts = shuffled([sentences[name] for name, n in shares.items() for _ in range(n)], command.seed, "samples")
    i3d_path, i3d_known = i3d_file(command.i3d, command.confirm)
    c3d_path, c3d_known = c3d_file(command.c3d, command.confirm)
    shard = shard_of(command.shard)
    device = pick_device(command.device)
    with watch.stage("load"):
        i3d, c3d = I3D(i3d_path, device), C3D(c3d_path, device)
    measures: dict[str, Measure] = {
        "i3d": lambda clip, _: torch.from_numpy(i3d.clip_vector(clip)),
        "c3d": lambda clip, _: torch.from_numpy(c3d.clip_vector(clip)),
    }
    videos = [video for files in classes.values() for video in files]
    benchmark = benchmark_of(command, prompts, videos, measures)

    def figures(rows: Mapping[str, np.ndarray]) -> dict[str, Any]:
        score, name = class_score(rows["c3d"], command.seed, SPLITS), c3d_known.figure("Inception Score")
        deviation = inception_scores(rows["c3d"], SPLITS).std()
        return {
            name: {"value": score.value, "interval": score.interval, "deviation": deviation, "splits": SPLITS}
            | counted(name, len(rows["c3d"]), UCF101_SAMPLES),
            **counted("UCF-101", len(classes), UCF101_CLASSES, "classes"),
            "split": command.split,
        }

    return measure(benchmark, watch, [i3d_known, c3d_known], UCF101_CLIPS, figures, device, shard)


def msrvtt(command: Msrvtt, watch: Stopwatch) -> int:
    """Zero-shot MSR-VTT.

    One caption a test video, drawn by the seed: 2,990 samples (VideoLDM, arXiv 2304.08818, and most since).
    --all-captions is GODIVA's and Make-A-Video's usage: all 59,794. CLIPSIM is the mean over a clip's 16 frames, then
    over samples (GODIVA, arXiv 2104.14806), not times 100. FVD: as of UCF-101, of one clip a test video (DynamiCrafter
    takes 2,048 of them: --fvd-clips).
    """
    captioned = msrvtt_videos(Path(command.folder))
    captions = shuffled(drawn_captions(captioned, command.seed, command.all_captions), command.seed, "samples")
    samples = len(captions) if command.samples is None else command.samples
    if samples > len(captions):
        raise ValueError(f"samples: expected at most the {len(captions)} captions, got {samples}")
    check_counts(samples, 2, command.fvd_clips)
    i3d_path, i3d_known = i3d_file(command.i3d, command.confirm)
    clip_folder, clip_known = clip_file(command.clip, command.confirm)
    shard = shard_of(command.shard)
    device = pick_device(command.device)
    with watch.stage("load"):
        i3d, network = I3D(i3d_path, device), Clip(clip_folder, device)
    measures: dict[str, Measure] = {
        "i3d": lambda clip, _: torch.from_numpy(i3d.clip_vector(clip)),
        "clipsim": lambda clip, prompt: torch.tensor([clip_similarity(network, clip, prompt)], dtype=torch.float64),
    }
    videos = [video.path for video in captioned]
    benchmark = benchmark_of(command, captions[:samples], videos, measures)
    protocol = MSRVTT_CAPTIONS if command.all_captions else MSRVTT_VIDEOS

    def figures(rows: Mapping[str, np.ndarray]) -> dict[str, Any]:
        similarities, name = rows["clipsim"][:, 0], clip_known.figure("CLIPSIM")
        interval = bootstrap_interval(np.mean, similarities, seed=command.seed)
        return {
            name: {"value": similarities.mean(), "interval": interval} | counted(name, len(similarities), protocol),
            "captions": "all" if command.all_captions else "one a video",
        }

    return measure(benchmark, watch, [i3d_known, clip_known], MSRVTT_VIDEOS, figures, device, shard)


def benchmark_of(
    command: Ucf101 | Msrvtt, prompts: Sequence[str], videos: Sequence[Path], measures: Mapping[str, Measure]
) -> Benchmark:
    """What both commands measure, by their flags."""
    shared = ("fvd_clips", "size", "batch_size", "seed", "model", "revision", "confirm", "output", "work_folder")
    flags = {name: getattr(command, name) for name in shared}
    return Benchmark(type(command).__name__.lower(), prompts, videos, measures, **flags)


def measure(
    benchmark: Benchmark,
    watch: Stopwatch,
    networks: Sequence[NetworkFile],
    protocol_clips: int,
    figures: Callable[[Mapping[str, np.ndarray]], dict[str, Any]],
    device: torch.device,
    shard: Shard,
) -> int:
    """Do this process's share; the one that finds all parts done writes the result. FVD is measured for both."""
    check_confirmed(benchmark.confirm, networks)
    with watch.stage("load"):
        folder = resolve(benchmark.model, benchmark.revision)
        model = DiCoDe.from_pretrained(folder, device=str(device))
    config, samples, seed, batch = model.tokenizer.config, len(benchmark.prompts), benchmark.seed, benchmark.batch_size
    clips = min(benchmark.fvd_clips, len(benchmark.videos))
    run = {
        **sampled_model(model, folder),
        "benchmark": benchmark.name,
        "samples": samples,
        "prompts": digest(benchmark.prompts),
        "videos": digest([f"{path.parent.name}/{path.name} {path.stat().st_size}" for path in benchmark.videos]),
        "real_clips": clips,
        "real_size": benchmark.size,
        "fps": config.fps,
        "frames": FRAMES,
        "seed": seed,
        "batch_size": batch,
        "networks": {file.network: file.sha256 for file in networks},
        "device": device.type,
    }
    parts = Parts(benchmark.work_folder or benchmark.output.with_suffix(".work"), run, shard)
    counts = {"real": -(-clips // batch), "samples": -(-samples // batch)}
    with watch.stage("real clips"):
        parts.make("real", counts["real"], lambda part: real_rows(benchmark, config.fps, clips, part))
    with watch.stage("samples"):
        parts.make("samples", counts["samples"], lambda part: sample_rows(benchmark, model, part))
    if missing := sum(parts.missing(kind, count) for kind, count in counts.items()):
        print(f"{parts.folder}: this share is done; parts still to come from others: {missing}")
        return 0
    real, rows = (joined(parts.read(kind, count)) for kind, count in counts.items())
    values = {
        **fvd(networks[0].figure("FVD"), real["i3d"], rows["i3d"][: benchmark.fvd_clips], protocol_clips, seed),
        **figures(rows),
        "real_videos_too_short": clips - len(real["i3d"]),
        "networks": [asdict(file) for file in networks],
        **{key: run[key] for key in ("model", "weights", "settings", "fps", "frames", "real_size", "batch_size")},
        "size": config.size,
    }
    line, name = "dicode " + shlex.join(sys.argv[1:]), f"{run['model']}: zero-shot {benchmark.name}"
    write_result(benchmark.output, name, values, samples, seed, line, device)
    print(f"{summary(values)}{benchmark.output}\n{watch.text()}")
    return 0


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


def vbench(command: Vbench, watch: Stopwatch) -> int:
    """Videos under the names that VBench (arXiv 2311.17982) looks for, five a prompt, nothing else in their folder.

    As its `prompts/README.md` asks: `<prompt>-<index>.mp4`, index from 0, random numbers of its own for every video.
    """
    if not 1 <= command.samples <= SAMPLES_APART:
        raise ValueError(f"samples: expected 1 to {SAMPLES_APART} videos a prompt, got {command.samples}")
    prompts = vbench_prompts(command.prompts)
    work = command.output.with_name(f"{command.output.name}.work")
    if command.output.is_dir() and any(command.output.iterdir()) and not work.is_dir():
        raise FileExistsError(f"{command.output}: holds files that this command did not write; name a new folder")
    shard = shard_of(command.shard)
    device = pick_device(command.device)
    with watch.stage("load"):
        folder = resolve(command.model, command.revision)
        model = DiCoDe.from_pretrained(folder, device=str(device))
    flags = {"samples": command.samples, "seconds": command.seconds, "scale": command.scale, "seed": command.seed}
    run = {**sampled_model(model, folder), **flags, "batch_size": command.batch_size, "device": device.type}
    parts = Parts(work, {"benchmark": "vbench", "prompts": digest(prompts), **run}, shard)
    if len({prompt.casefold() for prompt in prompts}) < len(prompts) and (work / "RUN.JSON").is_file():
        raise ValueError(f"{command.prompts}: prompts that differ only in case are one file on this disk; use another")
    command.output.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(prompt, command.output / f"{prompt}-{index}.mp4", SAMPLES_APART * place + index)
        for place, prompt in enumerate(prompts)
        for index in range(command.samples)
    ]
    batches = [jobs[first : first + command.batch_size] for first in range(0, len(jobs), command.batch_size)]
    with watch.stage("samples"):
        options = command.seconds, command.seed, command.scale
        parts.each("videos", len(batches), lambda part: write_videos(model, batches[part], *options))
    if missing := sum(not job.file.is_file() for job in jobs):
        print(f"{command.output}: this share is done; videos still to come from others: {missing}")
        return 0
    values = {
        **run,
        **counted("VBench, every prompt", command.samples, VBENCH_SAMPLES),
        "prompts": len(prompts),
        "sample_numbers": f"{SAMPLES_APART} × place of the prompt + index",
    }
    result = command.output.with_name(f"{command.output.name}.json")
    line = "dicode " + shlex.join(sys.argv[1:])
    write_result(result, f"{run['model']}: videos for VBench", values, len(jobs), command.seed, line, device)
    print(f"{command.output}: {len(jobs)} videos of {len(prompts)} prompts\n{result}\n{watch.text()}")
    return 0


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


def sample_rows(benchmark: Benchmark, model: DiCoDe, part: int) -> dict[str, Tensor]:
    """Generate one batch of clips and measure each: a tensor a measure, one row a clip."""
    first = part * benchmark.batch_size
    prompts = list(benchmark.prompts[first : first + benchmark.batch_size])
    seconds, indices = FRAMES / model.tokenizer.config.fps, list(range(first, first + len(prompts)))
    parts = model.generate_batch(prompts, seconds=seconds, seed=benchmark.seed, sample_indices=indices)
    clips = torch.cat(list(parts), dim=1).numpy()
    return {
        key: torch.stack([numbers_of(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)])
        for key, numbers_of in benchmark.measures.items()
    }


def real_rows(benchmark: Benchmark, fps: float, clips: int, part: int) -> dict[str, Tensor]:
    """I3D's vectors of one batch of real clips; a clip whose videos are all too short is left out.

    Clip i has the videos i, i + clips, … of a shuffled list, and is of the first that is long enough.
    """
    order, vectors = shuffled(benchmark.videos, benchmark.seed, "real clips"), []
    for i in range(part * benchmark.batch_size, min(clips, (part + 1) * benchmark.batch_size)):
        candidates = (real_clip(path, fps, benchmark.size, benchmark.seed) for path in order[i::clips])
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


def check_counts(samples: int, least: int, fvd_clips: int) -> None:
    """Raise `ValueError` for counts that give no figure, before hours are spent on them."""
    if samples < least:
        raise ValueError(f"samples: expected {least} or more, got {samples}")
    if fvd_clips < 2:
        raise ValueError(f"fvd_clips: expected 2 or more, got {fvd_clips}")
