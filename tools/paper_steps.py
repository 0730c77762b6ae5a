"""Seconds and memory of a training step of the paper's language models, beside what `dicode info` counts for it.

    python tools/paper_steps.py results/paper-h100.json gpt2 gpt2_medium llama_1b

One micro-batch of 16 samples of 3 key frames, random tokens, as each of four GPUs computes it; on the device `auto`.
"""

import dataclasses
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from dicode.device import GPUS, peak_flops, peak_memory_gib, pick_device
from dicode.lm.deep_lm import DeepTokenLM
from dicode.provenance import write_result
from dicode.sizing.plan import Planner, blank_batches
from dicode.train.checkpoint import TrainState
from dicode.train.distributed import Processes
from dicode.train.lm import LanguageTraining
from dicode.train.loop import Training, attention_on, train_step
from dicode.train.runs import LanguageRun, load_run

RECIPES = Path(__file__).parents[1] / "recipes/paper.py"
SAMPLES, STEPS, WARM_UP = 16, 25, 8


class RandomTokens(LanguageTraining):
    """A language model's stage without data."""

    def __init__(self, run: LanguageRun) -> None:
        self.run = run
        with pick_device("auto"):
            self.module = DeepTokenLM(run.model)

    def num_samples(self) -> int:
        return 4096

    def by_size(self, indices: Tensor) -> Tensor:
        return indices

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        ((_, batch),) = blank_batches(self.run, len(indices))
        batch["text_ids"].random_(self.run.model.vocab_size, generator=generator)
        batch["tokens"].normal_(generator=generator)
        return batch


def micro_batch_of(run: LanguageRun) -> LanguageRun:
    """A run of one micro-batch of the shortest samples."""
    loop = dataclasses.replace(
        run.loop, micro_batches=1, strategy="ddp", optim=dataclasses.replace(run.loop.optim, batch_size=SAMPLES)
    )
    return dataclasses.replace(run, longer=(), longer_share=(), loop=loop)


def measure(run: LanguageRun) -> dict[str, Any]:
    """Median seconds of a step, the most memory, and both as they are counted."""
    plan = Planner(run).plan(1, GPUS["h100-80gb"], 0.4)
    training, state, spent_s = Training(RandomTokens(run), run.loop, Processes()), TrainState(), []
    on_gpu = training.device.type != "cpu"
    if on_gpu:
        torch.accelerator.reset_peak_memory_stats()
    with sdpa_kernel(attention_on(training.device)):
        for step in range(STEPS):
            batch = training.stage.batch(training.samples(step), training.generator("batch", step, 0))
            began_s = time.perf_counter()
            train_step(training, state, {0: batch})
            state.step += 1
            if on_gpu:
                torch.accelerator.synchronize()
            spent_s.append(time.perf_counter() - began_s)
    median_s = statistics.median(spent_s[WARM_UP:])
    return {
        "parameters": plan["trained"],
        "samples": SAMPLES,
        "median_s": median_s,
        "memory_gib": peak_memory_gib(training.device),
        "counted_gib": sum(plan["bytes_held"].values()) / 2**30,
        "tflop": plan["step_flops"] / 1e12,
        "mfu": plan["step_flops"] / median_s / peak_flops(training.device),
    }


def main(output: str, *names: str) -> None:
    """The models asked for, smallest first, into a result file."""
    values = {name: measure(micro_batch_of(load_run(f"{RECIPES}:{name}"))) for name in names}
    command = shlex.join(["python", "tools/paper_steps.py", output, *names])
    title = "language models of the paper: steps of one micro-batch of 16 samples of 3 key frames"
    write_result(Path(output), title, values, SAMPLES, 0, command, pick_device("auto"))


if __name__ == "__main__":
    main(*sys.argv[1:])
