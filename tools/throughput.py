"""How fast the recipes of a bundled model train here, and where the time of a step goes.

    python tools/throughput.py cache/sprites results/throughput.json

Each stage takes up to 20 s; `loader_ratio` is how much faster batches are made than steps consume them.
"""

import dataclasses
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dicode.provenance import write_result
from dicode.train.distributed import Processes
from dicode.train.loop import Training
from dicode.train.runs import load_run
from dicode.train.stages import stage_of

RECIPES = Path(__file__).parents[1] / "recipes/sprites.py"
BUNDLED = str(Path(__file__).parents[1] / "dicode/checkpoints/sprites")
SECONDS = 20.0
FOLDERS = ("init", "first_stage", "tokenizer")  # fields that name another run: the bundled model stands for it


def measure(name: str, cache: str) -> dict[str, Any]:
    """Seconds of each part of a step, means over as many as fit."""
    run = load_run(f"{RECIPES}:{name}")
    run = dataclasses.replace(run, cache=cache, **{f: BUNDLED for f in FOLDERS if getattr(run, f, None)})
    training = Training(stage_of(run), run.loop, Processes())
    training.stage.module.train()
    spent = dict.fromkeys(("data", "forward", "backward", "update"), 0.0)
    steps, began_s = 0, time.perf_counter()
    while steps < 3 or time.perf_counter() - began_s < SECONDS:
        marks = [time.perf_counter()]
        batch = training.stage.batch(training.samples(steps), training.generator("batch", steps, 0))
        marks.append(time.perf_counter())
        loss, _ = training.loss(steps, 0, batch)
        marks.append(time.perf_counter())
        training.stage.module.zero_grad(set_to_none=True)
        loss.backward()
        marks.append(time.perf_counter())
        nn.utils.clip_grad_norm_(training.trained.values(), run.loop.optim.clip_norm)
        for optimizer in training.optimizers:
            optimizer.step()
        marks.append(time.perf_counter())
        for part, (start, end) in zip(spent, pairwise(marks), strict=True):
            spent[part] += end - start
        steps += 1
    step_s = sum(spent.values()) / steps
    samples = run.loop.optim.batch_size
    return {
        "parameters_trained": sum(p.numel() for p in training.trained.values()),
        "samples_a_step": samples,
        "steps": steps,
        "step_s": step_s,
        "share": {part: seconds / steps / step_s for part, seconds in spent.items()},
        "samples_per_s": samples / step_s,
        "loader_samples_per_s": samples * steps / spent["data"],
        "loader_ratio": sum(spent.values()) / spent["data"],
    }


def main(cache: str, output: str) -> None:
    """All recipes that take steps, into a result file."""
    names = ("first_stage", "first_stage_decoder", "denoiser", "lm")
    values = {name: measure(name, cache) for name in names}
    steps = sum(v["steps"] for v in values.values())
    write_result(output, "training throughput", values, steps, 0, " ".join(["python", *sys.argv]))
    for name, value in values.items():
        print(name, {k: v for k, v in value.items() if k != "share"}, value["share"])


if __name__ == "__main__":
    torch.manual_seed(0)
    main(*sys.argv[1:])
