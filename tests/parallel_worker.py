"""Train toy runs with as many processes as torchrun starts, or with forks of this one: see test_train_parallel.py.

    torchrun --standalone --nproc-per-node 2 tests/parallel_worker.py ROOT OUTPUT ddp:lm fsdp:denoiser:7
    python tests/parallel_worker.py --forks 4 ROOT OUTPUT ddp:lm fsdp:denoiser:7

A third part is the step in which a signal stops the run, which then lies in ROOT/stopped. What follows `recipes` is for
parallel_recipes.py, in the same processes, since starting them takes longest.
"""

import dataclasses
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import parallel_recipes
import torch
from toy_runs import loop, runs, variants

import dicode.train.first_stage
import dicode.train.lm
import dicode.train.loop
import dicode.train.tokenizer
from dicode.train.checkpoint import TrainState
from dicode.train.distributed import Processes, Stopped
from dicode.train.loop import Training
from dicode.train.runs import Strategy
from dicode.train.stages import Run, run_recipe

STEPS = 10


def parallel_run(root: Path, name: str, strategy: Strategy) -> Run:
    """One of the toy runs, its batch of 8 in four micro-batches."""
    run = {**runs(root), **variants(root)}[name]
    optim = dataclasses.replace(loop(STEPS).optim, optimizer=run.loop.optim.optimizer, batch_size=8)
    again = name == "lm"  # one with activations computed twice, and batches made ahead
    changed = dataclasses.replace(
        loop(STEPS), optim=optim, micro_batches=4, strategy=strategy, checkpoint_every=5, evaluate_every=5,
        checkpoint_activations=again, prefetch=again, tracker="none",
    )  # fmt: skip
    return dataclasses.replace(run, loop=changed)


@contextmanager
def signal_at(step: int) -> Iterator[None]:
    """Send this process a SIGTERM in the training step of this number."""
    original = dicode.train.loop.train_step

    def stepping(run: Training, state: TrainState, batches: Any) -> Any:
        if state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, state, batches)

    dicode.train.loop.train_step = stepping
    try:
        yield
    finally:
        dicode.train.loop.train_step = original


def train(root: str, output: str, strategy: Strategy, name: str, stop_at: str | None = None) -> None:
    """One run to its end, or to where a signal to the second process stops all of them."""
    with Processes() as processes, signal_at(int(stop_at)) if stop_at and processes.rank == 1 else nullcontext():
        place = Path(root) / "stopped" if stop_at else Path(output)
        try:
            run_recipe(parallel_run(Path(root), name, strategy), place / f"{strategy}-{name}", {})
        except Stopped:
            assert stop_at


def main(root: str, output: str, *asked: str) -> None:
    """The runs asked for, one after the other in the same processes."""
    torch.set_num_threads(1)
    own = asked.index("recipes") if "recipes" in asked else len(asked)
    with Processes():
        for run in asked[:own]:
            train(root, output, *run.split(":"))  # type: ignore[arg-type]
        if recipes := asked[own + 1 :]:
            parallel_recipes.main(root, f"{root}/recipes.json", *recipes)
    assert not (left := [name for name in threads() if "gloo" in name]), f"threads that may abort Python's end: {left}"


def threads() -> list[str]:
    """Names of this process's threads, where the system lists them."""
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def forked(count: int, *arguments: str) -> int:
    """Run `main` in forks that find what torchrun would tell them; ends all with the first that fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    running = []
    for rank in map(str, range(count)):
        if (process := os.fork()) == 0:
            os.environ |= {**told, "RANK": rank, "LOCAL_RANK": rank}
            try:
                main(*arguments)
                code = 0
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            os._exit(code)
        running.append(process)
    code = 0
    while running:
        process, status = os.wait()
        running.remove(process)
        if status and not code:
            code = 1
            for other in running:
                os.kill(other, signal.SIGKILL)
    return code


if __name__ == "__main__":
    if sys.argv[1] == "--forks":
        sys.exit(forked(int(sys.argv[2]), *sys.argv[3:]))
    main(*sys.argv[1:])
