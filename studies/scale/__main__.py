"""Language models of several sizes on equal data, and the power laws of their loss against parameters and FLOPs.

    python studies/scale cache/sprites cache/world                       # results/scale.json
    python studies/scale cache/sprites --studies tokens width head noise joins --work-folder runs/ablations
    torchrun --nproc-per-node 8 studies/scale cache/videos --family recipes/paper.py --tokenizer FOLDER

The same command goes on where it was stopped. A run that is measured is kept as figures.json, without its checkpoints.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
import tyro
from ablations import ablated_runs, in_latents, joins
from einops import repeat
from join import join_caches
from laws import fit_power_law, t_interval
from tyro.conf import Positional, arg

from dicode.config import config_to_dict
from dicode.data.cache import CachedVideo, FrameCache
from dicode.files import put_text, read_json
from dicode.provenance import write_result
from dicode.seeds import generator_for
from dicode.sizing.count import count_parameters
from dicode.sizing.plan import Planner
from dicode.train.distributed import Processes, StopSignal
from dicode.train.lm import LanguageTraining, chunks
from dicode.train.loop import train
from dicode.train.runs import LanguageRun, runs_of

RIVALS = 8  # captions of other clips of the same folder that a clip's own is compared with
RANKED = 192  # training clips for which this is done too
Figures = dict[str, Any]
Measure = Callable[[LanguageTraining], Figures]


@dataclass(frozen=True)
class Scale:
    """Train language models of several sizes on equal data."""

    caches: Annotated[Positional[tuple[str, ...]], arg(metavar="CACHE …")]  # from `dicode data cache`, taken as one
    family: str = str(Path(__file__).with_name("scale.py"))  # a recipe file: its language models, smallest first
    tokenizer: str = "dicode/checkpoints/sprites"
    seeds: int = 3  # runs a size
    samples: int | None = None  # training samples a run; default: as the recipes have
    micro_batches: int | None = None  # of a batch; default: as the recipes have
    # instead of the sizes, one change at a time to the family's second size: results in ablations.json
    studies: tuple[Literal["tokens", "width", "head", "noise", "joins"], ...] = ()
    work_folder: Path = Path("runs/scale")
    output: Annotated[Path, arg(aliases=("-o",))] = Path("results")  # folder of the JSON file, named as the family
    dry_run: bool = False  # print parameters and TFLOP only


def main(command: Scale) -> None:
    """A signal stops it after a checkpoint, with exit code 75, as `dicode train`."""
    name, title = (
        ("ablations", "one thing changed")
        if command.studies
        else (Path(command.family).stem, "language models of several sizes")
    )
    runs, extra = family(command), []
    if command.dry_run:
        for size, counts in ((size, counted(run)) for size, run in runs.items()):
            print(f"{size:16}{counts['parameters']:16,}{counts['flops'] / 1e12:12,.3g} TFLOP")
        return
    with StopSignal() as stop, Processes() as processes:
        if command.studies:
            base, extra = [*runs.values()][:2][-1], [in_latents]
            with stop.cutting(), processes.one_first():
                runs = ablated_runs(base, command.studies, command.work_folder / "tokenizers")
        figures = {size: seeds_of(size, run, command, extra, processes, stop) for size, run in runs.items()}
        if not processes.first:
            return
        sizes = {size: counted(run) for size, run in runs.items()}
        values: Figures = {"sizes": sizes, "means": means(figures), "runs": figures}
        if "joins" in command.studies:
            values["joins"] = joins(Path(command.tokenizer), Path(base.cache))
        if not command.studies:
            values |= laws(sizes, figures)
        command.output.mkdir(parents=True, exist_ok=True)
        n = len(FrameCache.load(command.work_folder / "cache").subset(validation=True).videos)
        write_result(command.output / f"{name}.json", title, values, n, 0, shlex.join(["python", *sys.argv]))


def family(command: Scale) -> dict[str, LanguageRun]:
    """The language models of a recipe file on the caches and samples asked for."""
    cache = command.work_folder / "cache"
    if not command.dry_run and Processes().first:
        join_caches(command.caches, cache)
    runs = {}
    for name, run in runs_of(command.family).items():
        if isinstance(run, LanguageRun):
            loop = run.loop
            if command.samples is not None:
                steps = max(1, command.samples // loop.optim.batch_size)
                loop = replace(loop, optim=replace(loop.optim, steps=steps))
            if command.micro_batches is not None:
                loop = replace(loop, micro_batches=command.micro_batches)
            runs[name] = replace(run, cache=str(cache), tokenizer=command.tokenizer, loop=loop)
    return runs


def seeds_of(
    name: str,
    run: LanguageRun,
    command: Scale,
    extra: Sequence[Measure],
    processes: Processes,
    stop: StopSignal,
) -> list[Figures]:
    """The run with every seed: other initial weights, samples in another order."""
    figures = []
    for seed in range(command.seeds):
        seeded = replace(run, loop=replace(run.loop, seed=seed))
        folder = command.work_folder / f"{name.replace(' ', '-')}-{seed}"
        kept, asked = folder / "figures.json", json.loads(json.dumps(config_to_dict(seeded)))
        if not kept.exists():
            with stop.cutting():
                stage = LanguageTraining(seeded)
            stage.validate = partial(validated, stage, (likelihoods, *extra))  # type: ignore[method-assign]
            metrics = train(stage, seeded.loop, folder, {"run": asked})
            if processes.first:
                put_text(kept, json.dumps({"run": asked, "trained_s": trained_s(folder), **metrics}))
                for checkpoint in folder.glob("step-*"):
                    shutil.rmtree(checkpoint)
            processes.wait()
        held = read_json(kept)
        if held.pop("run") != asked:
            raise ValueError(f"{folder} was run with other settings: name another --work-folder")
        figures.append({"seed": seed, **held})
        print(f"{folder.name}: {held['nll']:.4g} nats")
    return figures


def validated(stage: LanguageTraining, measures: Sequence[Measure]) -> tuple[Figures, None]:
    """The figures of all measures, and no sheet."""
    return {name: value for measure in measures for name, value in measure(stage).items()}, None


def counted(run: LanguageRun) -> Figures:
    """Parameters and training FLOPs, without data or weights."""
    planner = Planner(run)
    module = planner.stages[False].module
    every, text = count_parameters(module), count_parameters(cast(Any, module).backbone.body.get_input_embeddings())
    return {
        "parameters": every,
        "without_text": every - text,  # the text's embedding table is looked up, not computed with
        "samples": run.loop.optim.steps * run.loop.optim.batch_size,
        "flops": round(planner.step_flops()) * run.loop.optim.steps,
    }


def trained_s(folder: Path) -> float:
    """Seconds that a run took, all its starts together."""
    lines = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["trained_s"] for line in lines if "trained_s" in line][-1]


def likelihoods(stage: LanguageTraining) -> dict[str, float]:
    """Figures of the validation clips, from their start and with their short captions.

    `nll`: nats a number of a deep token, mean over the real key frames; of each folder, and of each key frame.
    `alignment`: mean percentile rank (100 best, 50 chance) of a clip's own caption among those of `RIVALS` other clips
    of its folder, by the likelihood of its first key frame; and of `RANKED` training clips. `written_…`: see
    `LanguageTraining.written`.
    """
    videos = stage.validation.videos
    losses = torch.cat([stage.module(*stage.sample_of(part)).keyframe_loss.cpu() for part in chunks(videos, 32)])
    real = torch.stack([stage.key_frames(video, losses.shape[1])[1] for video in videos])
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
    """Percentile rank of each clip's own caption among others of its folder, by the clip's index."""
    ranks = {}
    for i, video in enumerate(videos):
        captions = {v.captions[0] for v in videos if v.captions and v.source == video.source}
        rivals = sorted(captions - set(video.captions[:1]))
        if not video.captions or not rivals:
            continue
        picked = torch.randperm(len(rivals), generator=generator_for(0, "rivals", i))[:RIVALS].tolist()
        _, tokens = stage.sample_of((video,), key_frames=1)
        ids = stage.encode([video.captions[0], *(rivals[at] for at in picked)]).to(tokens.device)
        loss = stage.module(ids, repeat(tokens[0], "k n d -> b k n d", b=len(ids))).keyframe_loss[:, 0]
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
    """Power laws of the loss against parameters and FLOPs; and the gain of each size over the one before it."""
    nll = np.array([[run["nll"] for run in runs] for runs in figures.values()])
    fits: Figures = {}
    for axis in ("parameters", "without_text", "flops"):
        x = np.array([size[axis] for size in sizes.values()], dtype=float)
        for kind, floor in (("with floor", True), ("without floor", False)):
            if len(x) >= 2 + floor and (floor or (nll > 0).all()):
                fits[f"{axis}, {kind}"] = asdict(fit_power_law(x, nll, floor))
    names, steps = [*sizes], np.diff(nll, axis=0)  # by pairs: runs of one seed had the same samples
    differences = {
        f"{one} → {two}": {"mean": float(step.mean()), "interval": t_interval(step)}
        for one, two, step in zip(names[:-1], names[1:], steps, strict=True)
    }
    return {"laws": fits, "differences": differences, "falls_monotonically": bool((steps.mean(1) < 0).all())}


if __name__ == "__main__":
    main(tyro.cli(Scale))
