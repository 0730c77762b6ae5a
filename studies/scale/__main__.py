"""Language models of several sizes on equal data, and the power laws of their loss.

    python studies/scale cache/sprites cache/world --seeds 3

caches ─► one cache ─► a run a size and seed, all on the same samples ─► figures.json of each ─► power laws
"""

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
import tyro
from einops import repeat
from laws import fit_power_law
from torch import Tensor
from tyro.conf import Positional, arg

from dicode.cli.info import runs_of
from dicode.config import Count, Positive, Range, config_from_dict, config_to_dict, missing_extra
from dicode.data.cache import CachedVideo, FrameCache, join_caches
from dicode.device import pick_device
from dicode.files import put_text, read_json
from dicode.lm.deep_lm import DeepTokenLM
from dicode.provenance import read_result, write_result
from dicode.seeds import generator_for
from dicode.sizing.count import batch_flops, count_parameters
from dicode.train.runs import LanguageRun

try:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dicode.sizing.plan import blank_batches, blank_stage
    from dicode.train.lm import LanguageTraining, chunks
    from dicode.train.loop import train
    from dicode.train.parallel import Processes
    from dicode.train.signals import StopSignal
except ModuleNotFoundError as error:
    raise missing_extra(error, "train") from error

RIVALS = 8  # captions of other clips of the same folder that a clip's own is compared with
RANKED = 192  # training clips for which this is done too
HERE = Path(__file__).parent
FIGURES = "figures.json"
SIZES, ARMS = "language models of several sizes", "one thing changed"  # names of results
Figures = dict[str, Any]
Measure = Callable[[LanguageTraining], dict[str, float]]


@dataclass(frozen=True)
class Scale:
    """Train language models of several sizes on equal data: loss and text alignment against parameters and FLOPs.

    The same command goes on where it was stopped; torchrun shares the work of each run among processes.
    """

    caches: Annotated[Positional[tuple[str, ...]], arg(metavar="CACHE …")]  # from `dicode data cache`, taken as one
    family: str = str(HERE / "scale.py")  # a file of recipes: its language models, from the smallest on
    tokenizer: str = "dicode/checkpoints/sprites"  # whose deep tokens
    seeds: Annotated[int, Range(1, 1000)] = 3  # runs a size
    samples: Count | None = None  # training samples a run; default: as many as the recipes say
    micro_batches: Count | None = None  # to cut a batch into, a multiple of the processes; default: as the recipes say
    # in place of the sizes one thing changed at a time, of the family's second: results in ablations.json
    studies: tuple[Literal["tokens", "width", "head", "noise", "joins"], ...] = ()
    work_folder: Path = Path("runs/scale")  # of the runs
    output: Annotated[Path, arg(aliases=("-o",))] = Path("results")  # folder of the JSON file, named as the family is
    dry_run: bool = False  # only say what sizes and FLOPs there are, and hours
    device: str = "auto"  # cpu, cuda, mps
    tflops: Positive = 0.15  # of the machine that the hours are of, by the second and in use


def main(command: Scale) -> int:
    """A signal stops it after a checkpoint, with exit code 75, as `dicode train`."""
    name, title = ("ablations", ARMS) if command.studies else (Path(command.family).stem, SIZES)
    path = check_result(command.output / f"{name}.json", title)
    runs = family(command)
    if command.studies:
        return ablate(command, runs, path)
    sizes = {name: counted(run) for name, run in runs.items()}
    print_sizes(sizes, command.seeds, command.tflops)
    if command.dry_run:
        return 0
    with StopSignal() as stop, Processes() as processes:
        figures = {name: seeds_of(name, run, command, likelihoods, processes, stop) for name, run in runs.items()}
        if processes.first:
            values = {"sizes": sizes, "means": means(figures), **laws(sizes, figures), "runs": by_seed(figures)}
            publish(command, path, SIZES, values)
    return 0


def ablate(command: Scale, runs: dict[str, LanguageRun], path: Path) -> int:
    """The second smallest of the family, or the only one, with one thing changed at a time."""
    from ablations import arms, in_latents, joins

    def measure(stage: LanguageTraining) -> dict[str, float]:
        return {**likelihoods(stage), **in_latents(stage)}

    base = [*runs.values()][:2][-1]
    with StopSignal() as stop, Processes() as processes:
        with stop.cutting(), processes.one_first():
            changed = arms(base, command.studies, command.work_folder / "tokenizers")
        figures = {name: seeds_of(name, run, command, measure, processes, stop) for name, run in changed.items()}
        if processes.first:
            values: Figures = {"sizes": {name: counted(run) for name, run in changed.items()}, "means": means(figures)}
            if "joins" in command.studies:
                with stop.cutting():
                    values["joins"] = joins(
                        Path(command.tokenizer), Path(base.cache), device=str(pick_device(command.device))
                    )
            publish(command, path, ARMS, {**values, "runs": by_seed(figures)})
    return 0


def check_result(path: Path, name: str) -> Path:
    """The path, before any work is done. Raises `ValueError` where it is a file that is no such result."""
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"{path.parent}: expected a folder for {path.name}, got a file")
    if path.exists() and read_result(path)["name"] != name:
        raise ValueError(f"{path}: expected the result {name!r}, or no file yet; name another folder with -o")
    return path


def publish(command: Scale, path: Path, name: str, values: Figures) -> None:
    """Write the result, of so many validation clips."""
    n = len(FrameCache.load(command.work_folder / "cache").subset(validation=True).videos)
    command.output.mkdir(parents=True, exist_ok=True)
    write_result(path, name, values, n, 0, shlex.join(["python", *sys.argv]), pick_device(command.device))
    print(f"{path}: of {n} validation clips")


def family(command: Scale) -> dict[str, LanguageRun]:
    """The language models of a recipe file, from the smallest on, on the caches and samples asked for."""
    if not command.caches or command.seeds < 1:
        raise ValueError(f"expected a cache and a seed or more, got {command.caches} and {command.seeds}")
    cache = command.work_folder / "cache"
    if not command.dry_run and Processes().first:
        join_caches(command.caches, cache)
    runs = {}
    for name, run in runs_of(command.family).items():
        if isinstance(run, LanguageRun):
            loop, batch_size = run.loop, run.loop.optim.batch_size
            if command.samples is not None:
                loop = replace(loop, optim=replace(loop.optim, steps=max(1, command.samples // batch_size)))
            if command.micro_batches is not None:
                loop = replace(loop, micro_batches=command.micro_batches)
            if command.device != "auto":
                loop = replace(loop, device=command.device)
            runs[name] = replace(run, cache=str(cache), tokenizer=command.tokenizer, loop=loop)
    if not runs:
        raise ValueError(f"{command.family}: none of its runs is of a language model")
    return runs


def seeds_of(
    name: str, run: LanguageRun, command: Scale, measure: Measure, processes: Processes, stop: StopSignal
) -> list[Figures]:
    """The run with every seed: other weights to begin from, samples in another order."""
    made = []
    for seed in range(command.seeds):
        seeded = replace(run, loop=replace(run.loop, seed=seed))
        folder = command.work_folder / f"{name.replace(' ', '-')}-{seed}"
        made.append(measured_run(seeded, folder, measure, processes, stop))
    return made


def counted(run: LanguageRun) -> Figures:
    """Parameters and training FLOPs, without data or weights."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    stage = blank_stage(run, fake)
    with fake:
        batches = blank_batches(run, run.loop.optim.batch_size // run.loop.micro_batches)
    flops = run.loop.micro_batches * sum(share * batch_flops(stage, batch, fake) for share, batch in batches)
    module = cast(DeepTokenLM, stage.module)
    every, text = count_parameters(module), count_parameters(module.backbone.body.get_input_embeddings())
    steps = run.loop.optim.steps
    return {
        "parameters": every,
        "without_text": every - text,  # the text's embedding table is looked up, not computed with
        "samples": steps * run.loop.optim.batch_size,
        "flops": round(flops) * steps,
    }


def print_sizes(sizes: dict[str, Figures], seeds: int, tflops: float) -> None:
    """A line a size."""
    print(f"{'':16}{'parameters':>14}{'without text':>14}{'samples':>12}{'TFLOP':>14}{'hours':>10}")
    hours = 0.0
    for name, size in sizes.items():
        own = size["flops"] / (tflops * 1e12) / 3600
        hours += own * seeds
        counts = f"{size['parameters']:14,}{size['without_text']:14,}{size['samples']:12,}"
        print(f"{name:16}{counts}{size['flops'] / 1e12:14,.3g}{own:10,.3g}")
    print(f"{hours:,.3g} hours for {seeds} seeds at {tflops:g} TFLOP/s")


def measured_run(run: LanguageRun, folder: Path, measure: Measure, processes: Processes, stop: StopSignal) -> Figures:
    """One run, from wherever it stands to its figures, which are kept in its folder in place of its checkpoints.

    A field that is younger than those figures had its default. Raises `ValueError` where the folder holds the figures
    of another run.
    """
    kept, asked = folder / FIGURES, config_to_dict(run)
    if kept.exists():
        held = read_json(kept)
        ran = config_to_dict(config_from_dict(LanguageRun, held["run"], str(kept)))
        if changed := [key for key in asked if asked[key] != ran[key]]:
            raise ValueError(f"{folder} was run with other values of {', '.join(changed)}: name another work folder")
        return held
    with stop.cutting():
        stage = LanguageTraining(run, measure)
    metrics = train(stage, run.loop, folder, {"run": asked}, stop=stop)
    if processes.first:
        figures = {"run": asked, "trained_s": trained_s(folder), **metrics}
        put_text(kept, json.dumps(figures, indent=2) + "\n")
        for checkpoint in folder.glob("step-*"):
            shutil.rmtree(checkpoint)
        print(f"{folder.name}: " + "  ".join(f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, float)))
    processes.wait()
    return read_json(kept)


def by_seed(figures: dict[str, list[Figures]]) -> dict[str, list[Figures]]:
    """What is published of every run: its seed and its figures. Its whole recipe stays in its folder."""
    return {
        name: [{"seed": run["run"]["loop"]["seed"], **{k: v for k, v in run.items() if k != "run"}} for run in runs]
        for name, runs in figures.items()
    }


def trained_s(folder: Path) -> float:
    """Seconds that a run took, all its starts together."""
    lines = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["trained_s"] for line in lines if "trained_s" in line][-1]


def likelihoods(stage: LanguageTraining) -> dict[str, float]:
    """What a model makes of the validation clips, from their start and with their short captions.

    `nll`: nats a number of a deep token, mean over the real key frames of all clips; of each folder, and of each key
    frame by its place. `alignment`: mean percentile rank (100 best, 50 chance) of a clip's own caption among those of
    `RIVALS` other clips of its folder, by the likelihood of its first key frame; and the same of `RANKED` training
    clips. `written_…`: see `LanguageTraining.written`.
    """
    videos = stage.validation.videos
    losses = torch.cat([stage.module(*stage.sample_of(part)).keyframe_loss.cpu() for part in chunks(videos, 32)])
    real = torch.stack([stage.is_real(video, losses.shape[1]) for video in videos])
    figures = {"nll": losses[real].mean().item()}
    for k in range(losses.shape[1]):
        figures[f"nll/key frame {k}"] = losses[:, k][real[:, k]].mean().item()
    trained = stage.cache.videos[:: max(1, len(stage.cache.videos) // RANKED)][:RANKED]
    ranks = caption_ranks(stage, videos)
    for name, found in (("alignment", ranks), ("alignment/training", caption_ranks(stage, trained))):
        if found:
            figures[name] = float(np.mean([*found.values()]))
    for source in sorted({video.source for video in videos}):
        own = torch.tensor([video.source == source for video in videos])
        figures[f"nll/{source}"] = losses[own][real[own]].mean().item()
        if aligned := [rank for i, rank in ranks.items() if own[i]]:
            figures[f"alignment/{source}"] = float(np.mean(aligned))
    figures["written_share"] = stage.written(stage.cache.videos)[0]
    figures["written_rank"] = stage.written(videos)[1]
    return figures


def caption_ranks(stage: LanguageTraining, videos: Sequence[CachedVideo]) -> dict[int, float]:
    """Percentile rank of each clip's own caption among others of its folder, by its place; some have no rivals."""
    ranks = {}
    for i, video in enumerate(videos):
        told = {v.captions[0] for v in videos if v.captions and v.source == video.source}
        rivals = sorted(told - set(video.captions[:1]))
        if not video.captions or not rivals:
            continue
        picked = torch.randperm(len(rivals), generator=generator_for(0, "rivals", i))[:RIVALS].tolist()
        _, tokens = stage.sample_of((video,), key_frames=1)
        ids = stage.encode([video.captions[0], *(rivals[at] for at in picked)]).to(tokens.device)
        loss: Tensor = stage.module(ids, repeat(tokens[0], "k n d -> b k n d", b=len(ids))).keyframe_loss[:, 0]
        ranks[i] = (loss[1:] > loss[0]).float().mean().item() * 100
    return ranks


def means(figures: dict[str, list[Figures]]) -> Figures:
    """Mean and interval of every figure over the seeds of a run."""
    return {
        name: {
            measure: {"mean": float(values.mean()), "interval": t_interval(values)}
            for measure in runs[0]
            if isinstance(runs[0][measure], float)
            for values in [np.array([run[measure] for run in runs])]
        }
        for name, runs in figures.items()
    }


def laws(sizes: dict[str, Figures], figures: dict[str, list[Figures]]) -> Figures:
    """Power laws of the loss against parameters and FLOPs; and what each size is better than the one before it."""
    nll = np.array([[run["nll"] for run in runs] for runs in figures.values()])
    fits: Figures = {}
    for axis in ("parameters", "without_text", "flops"):
        x = np.array([size[axis] for size in sizes.values()], dtype=float)
        for kind, floor in (("with floor", True), ("without floor", False)):
            if len(x) >= 2 + floor and (floor or (nll > 0).all()):
                fits[f"{axis}, {kind}"] = asdict(fit_power_law(x, nll, floor))
    names, steps = [*sizes], np.diff(nll, axis=0)  # by pairs: runs of one seed saw the same samples
    differences = {
        f"{one} → {two}": {"mean": float(step.mean()), "interval": t_interval(step)}
        for one, two, step in zip(names[:-1], names[1:], steps, strict=True)
    }
    return {"laws": fits, "differences": differences, "falls_monotonically": bool((steps.mean(1) < 0).all())}


def t_interval(values: np.ndarray) -> tuple[float, float] | None:
    """95 % of the mean over seeds, by Student's distribution; None for one seed."""
    try:
        from scipy import stats
    except ModuleNotFoundError as error:
        raise missing_extra(error, "evaluate") from error
    if len(values) < 2:
        return None
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return float(values.mean()) - half, float(values.mean()) + half


def parse(argv: list[str]) -> Scale:
    """The flags of a command line."""
    return tyro.cli(Scale, args=argv)


if __name__ == "__main__":
    sys.exit(main(parse(sys.argv[1:])))
