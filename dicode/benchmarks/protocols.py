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

from dicode.benchmarks.parts import Parts, shard_of
from dicode.benchmarks.sets import shuffled, vbench_prompts
from dicode.checkpoint import model_origin, resolve
from dicode.device import pick_device
from dicode.evaluate.scores import frechet_score, kernel_score
from dicode.features.networks import ClipNetwork, NetworkFile, checked_file
from dicode.pipeline import DiCoDe
from dicode.provenance import check_result, command_line, write_result
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

Measure = Callable[[Video, str], np.ndarray]  # a clip and its prompt → one row of numbers


@dataclass(frozen=True)
class Benchmark:
    """What is measured: the FVD of samples of prompts against real videos, and one measure more."""

    name: str
    prompts: Sequence[str]  # of each sample, in order
    videos: Sequence[Path]
    fvd_clips: int  # on either side of the FVD …
    protocol_clips: int  # … and in the literature
    measured: str  # what the measure's rows are called
    network: Callable[[torch.device], tuple[Measure, NetworkFile]]  # loads what the measure is made with
    figures: Callable[[np.ndarray, NetworkFile], dict[str, Any]]  # of the rows


def measure(benchmark: Benchmark, flags: Any, output: Path, watch: Stopwatch) -> None:
    """Do this process's share; the one that finds all parts done writes the result.

    `flags` are those that UCF-101 and MSR-VTT have in common (`dicode.cli.benchmark.RunFlags`).
    """
    check_result(output)
    i3d_path, i3d_file = checked_file("I3D", flags.i3d, flags.confirm)
    shard, seed, batch = shard_of(flags.shard), flags.seed, flags.batch_size
    device = pick_device(flags.device)  # after the shard: torchrun's processes take a GPU each
    measure_of, network = benchmark.network(device)
    networks = (i3d_file, network)
    if stray := set(flags.confirm) - {file.sha256 for file in networks}:  # a slip
        sums = ", ".join(f"{file.network} {file.sha256}" for file in networks)
        raise ValueError(f"--confirm {stray.pop()}: expected the SHA-256 of a file given, which are {sums}")
    i3d, folder = ClipNetwork("I3D", i3d_path, device), resolve(flags.model, flags.revision)
    model = DiCoDe.from_pretrained(folder, device=str(device))
    config, samples = model.tokenizer.config, len(benchmark.prompts)
    clips = min(benchmark.fvd_clips, len(benchmark.videos))
    run = {
        **sampled_model(model, folder),
        "benchmark": benchmark.name,
        "samples": samples,
        "prompts": digest(benchmark.prompts),
        "videos": digest([f"{path.parent.name}/{path.name} {path.stat().st_size}" for path in benchmark.videos]),
        "real_clips": clips,
        "real_size": flags.size,
        "fps": config.fps,
        "frames": FRAMES,
        "seed": seed,
        "batch_size": batch,
        "networks": {file.network: file.sha256 for file in networks},
        "device": device.type,
    }
    parts = Parts(flags.work_folder or output.with_suffix(".work"), run, shard)
    counts = {"real": -(-clips // batch), "samples": -(-samples // batch)}
    with watch.stage("real clips"):
        parts.make("real", counts["real"], lambda part: real_rows(benchmark, flags, i3d, config.fps, clips, part))
    with watch.stage("samples"):
        measures = {"i3d": lambda clip, _: i3d.clip_vector(clip), benchmark.measured: measure_of}
        parts.make("samples", counts["samples"], lambda part: sample_rows(benchmark, flags, measures, model, part))
    if missing := sum(parts.missing(kind, count) for kind, count in counts.items()):
        print(f"{parts.folder}: this share is done; parts still to come from others: {missing}")
        return
    real, rows = (joined(parts.read(kind, count)) for kind, count in counts.items())
    values = {
        **fvd(i3d_file.figure("FVD"), real["i3d"], rows["i3d"][: benchmark.fvd_clips], benchmark.protocol_clips, seed),
        **benchmark.figures(rows[benchmark.measured], network),
        "real_videos_too_short": clips - len(real["i3d"]),
        "networks": [asdict(file) for file in networks],
        **{key: run[key] for key in ("model", "weights", "settings", "fps", "frames", "real_size", "batch_size")},
        "size": config.size,
    }
    name = f"{run['model']}: zero-shot {benchmark.name}"
    write_result(output, name, values, samples, seed, command_line(), device)
    print(f"{summary(values)}{output}\n{watch.text()}")


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


def vbench(flags: Any, watch: Stopwatch) -> None:
    """Write this process's share of the videos for VBench, and where none is missing what describes them.

    `flags` are those of the command. As VBench's `prompts/README.md` asks: `<prompt>-<index>.mp4`, index from 0, random
    numbers of its own for every video.
    """
    prompts, output, samples = vbench_prompts(flags.prompts), flags.output, flags.samples
    if not output.name:
        raise ValueError(f"-o: expected the name of a folder, got {str(output)!r}")
    work, result = (output.with_name(f"{output.name}{suffix}") for suffix in (".work", ".json"))
    check_result(result)
    if output.is_dir() and any(output.iterdir()) and not work.is_dir():
        raise FileExistsError(f"{output}: holds files that this command did not write; name a new folder")
    shard = shard_of(flags.shard)
    device = pick_device(flags.device)  # after the shard: torchrun's processes take a GPU each
    folder = resolve(flags.model, flags.revision)
    model = DiCoDe.from_pretrained(folder, device=str(device))
    asked = {name: getattr(flags, name) for name in ("samples", "seconds", "scale", "seed", "batch_size")}
    run = {**sampled_model(model, folder), **asked, "device": device.type}
    parts = Parts(work, {"benchmark": "vbench", "prompts": digest(prompts), **run}, shard)
    if len({prompt.casefold() for prompt in prompts}) < len(prompts) and (work / "RUN.JSON").is_file():
        raise ValueError(f"{flags.prompts}: prompts that differ only in case are one file on this disk; use another")
    output.mkdir(parents=True, exist_ok=True)
    jobs = [
        (prompt, output / f"{prompt}-{index}.mp4", SAMPLES_APART * place + index)
        for place, prompt in enumerate(prompts)
        for index in range(samples)
    ]
    batches = [jobs[first : first + flags.batch_size] for first in range(0, len(jobs), flags.batch_size)]
    with watch.stage("samples"):
        parts.each("videos", len(batches), lambda part: write_videos(model, batches[part], flags))
    if missing := sum(not file.is_file() for _, file, _ in jobs):
        print(f"{output}: this share is done; videos still to come from others: {missing}")
        return
    values = {
        **run,
        **counted("VBench, every prompt", samples, VBENCH_SAMPLES),
        "prompts": len(prompts),
        "sample_numbers": f"{SAMPLES_APART} × place of the prompt + index",
    }
    name = f"{run['model']}: videos for VBench"
    write_result(result, name, values, len(jobs), flags.seed, command_line(), device)
    print(f"{output}: {len(jobs)} videos of {len(prompts)} prompts\n{result}\n{watch.text()}")


def write_videos(model: DiCoDe, jobs: Sequence[tuple[str, Path, int]], flags: Any) -> None:
    """Generate one batch of prompts, files and sample numbers, and write those of its videos that are not there.

    Without metadata, since VBench takes every file in the folder, a .json too, for a video.
    """
    prompts, files, numbers = map(list, zip(*jobs, strict=True))
    if all(file.is_file() for file in files):
        return
    clips = model.generate_batch(prompts, seconds=flags.seconds, seed=flags.seed, sample_indices=numbers)
    for file, frames in zip(files, torch.cat(list(clips), dim=1).numpy(), strict=True):
        if not file.is_file():
            with VideoWriter(file, model.tokenizer.config.fps, scale=flags.scale) as writer:
                writer.write(frames)


def sample_rows(
    benchmark: Benchmark, flags: Any, measures: Mapping[str, Measure], model: DiCoDe, part: int
) -> dict[str, Tensor]:
    """Generate one batch of clips and measure each: a tensor a measure, one row a clip."""
    first = part * flags.batch_size
    prompts = list(benchmark.prompts[first : first + flags.batch_size])
    seconds, indices = FRAMES / model.tokenizer.config.fps, list(range(first, first + len(prompts)))
    parts = model.generate_batch(prompts, seconds=seconds, seed=flags.seed, sample_indices=indices)
    clips = torch.cat(list(parts), dim=1).numpy()
    return {
        name: torch.from_numpy(np.stack([row_of(*pair) for pair in zip(clips, prompts, strict=True)]))
        for name, row_of in measures.items()
    }


def real_rows(
    benchmark: Benchmark, flags: Any, i3d: ClipNetwork, fps: float, clips: int, part: int
) -> dict[str, Tensor]:
    """I3D's vectors of one batch of real clips; a clip whose videos are all too short is left out.

    Clip i has the videos i, i + clips, … of a shuffled list, and is of the first that is long enough.
    """
    order, vectors = shuffled(benchmark.videos, flags.seed, "real clips"), []
    for i in range(part * flags.batch_size, min(clips, (part + 1) * flags.batch_size)):
        candidates = (real_clip(path, fps, flags.size, flags.seed) for path in order[i::clips])
        clip = next((clip for clip in candidates if clip is not None), None)
        vectors += [] if clip is None else [i3d.clip_vector(clip)]
    return {"i3d": torch.from_numpy(np.array(vectors, np.float32).reshape(-1, i3d.width))}


def real_clip(path: Path, fps: float, size: int, seed: int) -> Video | None:
    """16 frames from a random place of a video, or None where it is shorter."""
    frames = read_video(path, fps, size).frames
    if len(frames) < FRAMES:
        return None
    start = int(torch.randint(len(frames) - FRAMES + 1, (1,), generator=generator_for(seed, "start", path.name)))
    return frames[start : start + FRAMES]


def fvd(name: str, real: np.ndarray, generated: np.ndarray, protocol_clips: int, seed: int) -> dict[str, Any]:
    """The squared Fréchet distance of I3D's vectors and, beside it, their `kernel_distance`, which no protocol has.

    With intervals over both sets of clips (`set_score`). They are taken for independent, though prompts come from the
    captions or classes of the real videos.
    """
    samples = counted(name, len(generated), protocol_clips)
    counts = {**samples, **counted(name, len(real), protocol_clips, "real_clips")}
    scores = {name: frechet_score, name.replace("FVD", "MMD"): kernel_score}
    found = {key: score(real, generated, seed, paired=False) for key, score in scores.items()}
    return {key: {"value": own.value, "interval": own.interval, **counts} for key, own in found.items()}


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
