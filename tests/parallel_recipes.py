"""The first steps of every bundled recipe, with its flags, at toy size: see parallel_worker.py."""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import test_golden
import torch
import torch.distributed as dist
from test_golden import EVERY, RECIPES, toy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from dicode.train.distributed import Processes, Strategy, full
from dicode.train.lm import LanguageRun
from dicode.train.loop import Training
from dicode.train.optim import Muon
from dicode.train.runs import load_run
from dicode.train.stages import Run, stage_of

STEPS, MICRO_BATCHES = 3, 4  # two of a process: weights that only the first of them reaches have a gradient too
NAMES = [name for name in EVERY if (RECIPES / name.partition(":")[0]).with_suffix(".py").is_file()]
COMPARED = (
    "sprites:first_stage",
    "sprites:denoiser",
    "sprites:lm",
    "world:lm_own",
    "paper:gpt2_mini",
)  # with one process
SHARED = ("sprites:first_stage", "sprites:denoiser", "sprites:lm", "paper:gpt2_mini")  # by FSDP too


def recipe(name: str, root: Path, strategy: Strategy = "ddp") -> Run:
    """A recipe at toy size; what it does in some of its steps it does in about half of these."""
    run = toy(load_run(f"{RECIPES / name.partition(':')[0]}.py:{name.partition(':')[2]}"), root)
    if isinstance(run, LanguageRun):
        run = dataclasses.replace(run, end_frame_prob=0.5 * run.model.end_frame_conditioning)
    optim = dataclasses.replace(run.loop.optim, batch_size=2 * MICRO_BATCHES)
    precision = "bfloat16" if strategy == "fsdp" else "float32"
    return dataclasses.replace(
        run,
        loop=dataclasses.replace(
            run.loop, optim=optim, micro_batches=MICRO_BATCHES, strategy=strategy, precision=precision
        ),
    )


def first_steps(run: Run, processes: Processes) -> dict[str, Any]:
    """Losses and gradient norms of its first steps, how far it moved, and all-gathers of the optimizers by matrix."""
    with processes.one_first():
        stage = stage_of(run)
    training = Training(stage, run.loop, processes)
    start = {name: full(p.detach()).clone() for name, p in training.trained.items()}
    lines = test_golden.first_steps(training, STEPS)
    moved = torch.stack([(full(p.detach()) - start[name]).square().sum() for name, p in training.trained.items()]).sum()
    found = {"loss": [line["loss"] for line in lines], "norm": [line["gradient_norm"] for line in lines]}
    return {**found, "moved": moved.sqrt().item(), "gathers": gathers(training)}


def gathers(training: Training) -> list[int]:
    """All-gathers of one step of Muon, its matrices, and their shapes; nothing where it has no part."""
    for optimizer in training.optimizers:
        matrices = [p for group in optimizer.param_groups for p in group["params"]]
        if isinstance(optimizer, Muon) and isinstance(matrices[0], DTensor):
            with CommDebugMode() as counted:
                optimizer.step()
            by_kind = {str(kind): count for kind, count in counted.get_comm_counts().items()}
            gathered = sum(count for kind, count in by_kind.items() if "all_gather" in kind)
            return [gathered, sum(by_kind.values()), len(matrices), len({p.shape for p in matrices})]
    return []


def main(root: str, output: str, *asked: str) -> None:
    """The recipes asked for, one after the other in the same processes."""
    found = {}
    with Processes() as processes:
        for one in asked:
            strategy, _, name = one.partition(":")
            try:
                found[one] = first_steps(recipe(name, Path(root), cast(Strategy, strategy)), processes)
            except Exception as error:
                raise RuntimeError(f"{one}: {error}") from error
            dist.barrier()
        if processes.first:
            Path(output).write_text(json.dumps(found))
