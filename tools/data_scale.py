"""What a training run costs on caches of 10,000, a million and ten million clips: to open, a step, to validate.

    PYTHONPATH=tests python tools/data_scale.py results/data-scale.json

The caches are simulated: an index of that many clips in shards of 64, all of them one small file. Each is measured in a
process of its own, by processor seconds, which other programs change little.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from test_tokenizer import tiny_config

from dicode.checkpoint.saving import write_config
from dicode.data.cache import CachedVideo, FrameCache, write_index, write_shard
from dicode.data.columns import Videos
from dicode.lm.config import BodyConfig, DeepLMConfig, HeadConfig
from dicode.provenance import write_result
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.distributed import Processes
from dicode.train.loop import Training
from dicode.train.runs import LanguageRun, LoopConfig, OptimConfig, TokenizerRun
from dicode.train.stages import stage_of

COUNTS = (10_000, 1_000_000, 10_000_000)
A_SHARD = 64
FRAMES = 20  # of a clip, at 8 fps
STEPS = 10


def write_cache(folder: Path, count: int) -> None:
    """An index of `count` clips whose shards are all the same file."""
    frames = torch.randint(256, (A_SHARD * FRAMES, 32, 32, 3), dtype=torch.uint8)
    times = (torch.arange(FRAMES, dtype=torch.float64) / 8).repeat(A_SHARD)
    shard = write_shard(folder, "shard-00000", frames, times)
    caption = "a blue cup is put on the left of a box"
    some = [
        CachedVideo(
            "made", f"{i:08}.mp4", (caption, f"clip {i:02}: {caption}"), i % 15 == 0, False, 0, FRAMES, FRAMES / 8
        )
        for i in range(60)
    ]
    own = Videos.of(some)
    times_ = count // len(some)
    columns = {name: np.tile(values, times_) for name, values in own.columns.items()}
    columns["first"] = np.arange(len(columns["first"]), dtype=np.int64) * FRAMES
    columns["text_end"] += np.arange(times_).repeat(len(some)) * len(own.columns["text"])
    shards = [shard] * -(-len(columns["first"]) // A_SHARD)
    write_index(folder, shards, Videos(columns, own.sources))


def runs(root: Path) -> dict[str, LanguageRun | TokenizerRun]:
    """A language model and a denoiser of a few thousand parameters."""
    loop = LoopConfig(precision="float32", optim=OptimConfig(batch_size=32))
    model = DeepLMConfig(
        BodyConfig("llama", width=32, depth=1, heads=2),
        head=HeadConfig(components=2),
        positions=48,
        vocab_size=300,
        token_width=6,
        tokens_per_keyframe=4,
        max_keyframes=6,
        text_length=12,
    )
    cache, tokenizer = str(root / "cache"), str(root / "tokenizer")
    return {
        "language": LanguageRun(cache=cache, tokenizer=tokenizer, model=model, longer=(), longer_share=(), loop=loop),
        "denoiser": TokenizerRun(cache=cache, init=tokenizer, model=tiny_config(), loop=loop),
    }


def measure(root: Path, name: str) -> dict[str, float]:
    """Processor seconds of one stage on the cache that lies there, and the memory of this process."""
    began_s = time.process_time()
    FrameCache.load(root / "cache").subset(validation=False)
    found = {"open_s": time.process_time() - began_s}
    stage_of(runs(root)[name])  # computes latents and tokens, which a run does once
    began_s = time.process_time()
    stage = stage_of(runs(root)[name])
    found["prepare_s"] = time.process_time() - began_s
    training = Training(stage, stage.run.loop, Processes())
    batch_s = step_s = 0.0
    for step in range(STEPS):
        began_s = time.process_time()
        batch = stage.batch(training.samples(step), training.generator("batch", step, 0))
        batch_s += time.process_time() - began_s
        stage.loss(batch, training.generator("noise", step, 0))[0].backward()
        step_s += time.process_time() - began_s
    found |= {"batch_s": batch_s / STEPS, "step_s": step_s / STEPS}
    stage.module.eval()
    began_s = time.process_time()
    with torch.no_grad():
        stage.validate()
    found["validate_s"] = time.process_time() - began_s
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found["own_memory_gib"] = int(status["RssAnon"].split()[0]) / 2**20  # without the pages of mapped files
    found["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found


def main(output: str) -> None:
    """All sizes, into a result file."""
    torch.set_num_threads(1)
    values: dict[str, Any] = {}
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as place:
            root = Path(place)
            (root / "cache").mkdir()
            folder = root / "tokenizer"
            write_config(folder, {"tokenizer": VideoTokenizer(tiny_config()).save_pretrained(folder)})
            apart(write_cache, root / "cache", count)
            own = {"index_mb": (root / "cache/index.json").stat().st_size / 1e6}
            own["videos_mb"] = (root / "cache/videos.safetensors").stat().st_size / 1e6
            values[str(count)] = own | {name: apart(measure, root, name) for name in ("language", "denoiser")}
            print(count, values[str(count)], flush=True)
    write_result(output, "training on many clips", values, STEPS, 0, " ".join(["python", *sys.argv]))


def apart(work: Callable[..., Any], *values: Any) -> Any:
    """What a function gives in a process of its own, whose memory counts alone."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(work, *values).result()


if __name__ == "__main__":
    main(sys.argv[1])
