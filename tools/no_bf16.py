"""Seconds a training step takes on a processor without bfloat16: this commit's, and those of one before.

    git worktree add /tmp/before eb730ed
    python tools/no_bf16.py /tmp/before results/no-bf16.json      # under four minutes on two idle cores

The processor is held to AVX2 (`ONEDNN_MAX_CPU_ISA`), and the same recipes are run by either commit with the same
command: random weights at their real sizes, drawn clips, steps with their batches, the first left out.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = {"first_stage": 12, "denoiser": 12, "lm": 12}
MOST_S = 15.0  # of one recipe: a step of before may take a minute, and is then the only one
ISA = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
WORKER = """
import dataclasses, json, sys, time
from pathlib import Path
import torch
from dicode.cli.app import load_run
from dicode.checkpoint import write_config
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.checkpoint import TrainState
from dicode.train.loop import Training, _batches, _step
from dicode.train.parallel import Processes
from dicode.train.stages import stage_of
from dicode.data.cache import CachedVideo, FrameCache
from tests.synthetic import draw_clip

root, steps, most_s = Path(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3])
clips, captions = zip(*(draw_clip(i, 16, 64) for i in range(8)))
videos = tuple(
    CachedVideo("drawn", f"{i}.mp4", (c,), i % 6 == 0, True, 16 * i, 16, 2.0) for i, c in enumerate(captions)
)
times = torch.arange(16, dtype=torch.float64).repeat(8) / 8
FrameCache(videos, torch.cat([torch.from_numpy(clip.copy()) for clip in clips]), times).save(root / "cache")
torch.manual_seed(0)
model = VideoTokenizer(load_run("recipes/sprites.py:denoiser").model)
write_config(root / "tokenizer", {"tokenizer": model.save_pretrained(root / "tokenizer")})
found = {}
for name, count in steps.items():
    run = load_run(f"recipes/sprites.py:{name}")
    changes = {"cache": str(root / "cache")}
    for field in ("first_stage", "init", "tokenizer"):
        if getattr(run, field, None):
            changes[field] = str(root / "tokenizer")
    began = time.perf_counter()
    stage = stage_of(dataclasses.replace(run, **changes))
    prepared_s = time.perf_counter() - began
    training, state = Training.of(stage, run.loop, Processes()), TrainState()
    batches, spent = _batches(training, 0), []
    while len(spent) <= count and sum(spent) < most_s:
        began = time.perf_counter()
        _step(training, state, next(batches))
        state.step += 1
        spent.append(time.perf_counter() - began)
    later = sorted(spent[1:] or spent)
    found[name] = {"prepared_s": prepared_s, "step_s": later[len(later) // 2], "steps": len(later)}
    print(name, found[name], file=sys.stderr, flush=True)
print(json.dumps(found))
"""


def measured(source: Path) -> dict[str, Any]:
    """The figures of one commit's working tree."""
    environment = {**os.environ, **ISA, "PYTHONPATH": str(source)}
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "-c", WORKER, root, json.dumps(STEPS), str(MOST_S)]
        done = subprocess.run(command, cwd=source, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(before: str, output: str) -> None:
    """Measure both, one after the other."""
    here = Path(__file__).parents[1]
    values: dict[str, Any] = {"processor": ISA, "before": measured(Path(before)), "after": measured(here)}
    values["times_faster"] = {
        name: values["before"][name]["step_s"] / values["after"][name]["step_s"] for name in STEPS
    }
    commits = {
        name: subprocess.run(["git", "rev-parse", "HEAD"], cwd=place, capture_output=True, text=True, check=True).stdout
        for name, place in (("before", before), ("after", here))
    }
    values["commits"] = {name: commit.strip() for name, commit in commits.items()}
    values["threads"] = os.environ.get("OMP_NUM_THREADS", f"{os.cpu_count()}")
    values["command"] = " ".join(["python", *sys.argv])
    Path(output).write_text(json.dumps(values, indent=1) + "\n")
    print(json.dumps(values["times_faster"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
