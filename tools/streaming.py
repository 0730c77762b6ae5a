"""How fast a tokenizer trains on clips that are decoded meanwhile, beside the same run on a cache.

    PYTHONPATH=tests python tools/streaming.py results/streaming.json

The denoiser of the bundled model `sprites`, 64×64, on drawn videos of 256×256 at 24 fps in archives. Each round times a
few steps of every kind, one after the other, so that what else the machine does slows all of them; the cache's frames
and latents are there before. Processor seconds of single clips are of one process.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from drawn_archives import write_archives

from dicode.checkpoint import read_section
from dicode.data.build import CacheOptions, build_cache
from dicode.data.index import read_index
from dicode.provenance import write_result
from dicode.seeds import generator_for
from dicode.tokenizer.config import TokenizerConfig
from dicode.train.checkpoint import TrainState
from dicode.train.distributed import Processes
from dicode.train.loop import Training, draw_batches, train_step
from dicode.train.runs import LoopConfig, OptimConfig, StreamConfig, TokenizerRun
from dicode.train.tokenizer import TokenizerTraining

BUNDLED = Path(__file__).parents[1] / "dicode/checkpoints/sprites"
ROUNDS, WARM_STEPS, STEPS, BATCH, VIDEOS = 3, 4, 8, 8, 12  # warm: as many as two workers have ready
WORKERS = {"cached": 0, "in the process": 0, "2 workers": 2}
NOTES = "Measured while other programs used both cores: compare kinds of one round, not with other machines."


def timed(training: Training) -> float:
    """Samples a second of some steps, after those that start workers and use up what they have ready."""
    state, batches = TrainState(), draw_batches(training, 0)
    for step in range(WARM_STEPS + STEPS):
        if step == WARM_STEPS:
            began_s = time.perf_counter()
        train_step(training, state, next(batches))
        state.step += 1
    batches.close()  # type: ignore[attr-defined]
    return STEPS * BATCH / (time.perf_counter() - began_s)


def processor_s(work: Callable[[int], Any]) -> float:
    """Processor seconds of a clip, the least of some batches."""
    spent_s = []
    for number in range(6):
        began_s = time.process_time()
        work(number)
        spent_s.append((time.process_time() - began_s) / BATCH)
    return min(spent_s)


def main(output: str) -> None:
    """All kinds, into a result file."""
    torch.set_num_threads(1)
    model = read_section(BUNDLED, "tokenizer", TokenizerConfig)
    loop = LoopConfig(micro_batches=1, device="cpu", optim=OptimConfig(steps=1000, batch_size=BATCH, lr=1e-4))
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_archives(root, VIDEOS, ((256, 256),))
        build_cache(read_index(root / "tars"), root / "cache", CacheOptions(size=model.size, max_fps=24.0))
        runs = {
            kind: TokenizerRun(
                cache=str(root / ("cache" if kind == "cached" else "index")),
                init=str(BUNDLED), model=model, loop=loop, stream=StreamConfig(workers), trains="denoiser",
            )
            for kind, workers in WORKERS.items()
        }  # fmt: skip
        stages = {kind: TokenizerTraining(run) for kind, run in runs.items()}
        training = {kind: Training(stage, loop, Processes()) for kind, stage in stages.items()}
        rounds = []
        for _ in range(ROUNDS):
            rounds.append({kind: timed(own) for kind, own in training.items()})
            print(rounds[-1], flush=True)
        indices, streamed = torch.arange(BATCH), stages["in the process"]
        cached, batch = stages["cached"], streamed.batch(indices, generator_for(0))
        held = cached.batch(indices, generator_for(0))
        processor = {
            "decode": processor_s(lambda n: streamed.batch(indices, generator_for(n))),
            "encode": processor_s(lambda n: streamed.inputs(batch)),
            "step on the cache": processor_s(lambda n: cached.loss(held, generator_for(n))[0].backward()),
            "read from the cache": processor_s(lambda n: cached.batch(indices, generator_for(n))),
        }
    shares = {kind: [own[kind] / own["cached"] for own in rounds] for kind in WORKERS if kind != "cached"}
    values = {
        "samples_per_s": {kind: statistics.median(own[kind] for own in rounds) for kind in WORKERS},
        "of_cached": {kind: {"median": statistics.median(own), "rounds": own} for kind, own in shares.items()},
        "processor_s_a_clip": processor,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "loop": dataclasses.asdict(loop.optim),
    }
    write_result(output, "training on archives", values, ROUNDS, 0, " ".join(["python", *sys.argv]), notes=NOTES)
    print(values)


if __name__ == "__main__":
    main(sys.argv[1])
