"""Speed of two checkouts of this repository, in turn on this machine, and the ratio of every figure.

    git worktree add ../before COMMIT
    python tools/compare_speed.py ../before . results/compare-speed.json

Counts are exact: *kernels* are the operations that torch runs, views not among them. Times are medians of runs that
take turns, by this one Python. What a side cannot do is null there, with its error beside it.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from dicode.provenance import write_result

REPEATS = 5
PROMPT = "a fireball"
MODELS = ("sprites", "world")
STEPS = 8
RECIPES = ("sprites:denoiser", "sprites:lm", "world:denoiser", "world:lm")
COMMANDS = {
    "dicode --help": ["-m", "dicode", "--help"],
    "import dicode": ["-c", "import dicode"],
    "generate 4 s": ["-m", "dicode", "generate", PROMPT, "--seconds", "4", "--timings", "-o", "out.mp4"],
}

KERNELS = """
import json, sys, time, torch
from torch.utils._python_dispatch import TorchDispatchMode

class Kernels(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **kwargs or {})

def kernels(function):
    with Kernels() as counted:
        function()
    return counted.count
"""
VIDEOS = """
from dicode import DiCoDe
name, prompt, repeats = sys.argv[1], sys.argv[2], int(sys.argv[3])
model, calls = DiCoDe.from_pretrained(name), []
model.tokenizer.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
ids = model.text.encode([prompt], model.lm.config.text_length)

def video(seconds):
    calls.clear()
    for _ in model.generate(prompt, seconds=seconds, seed=0): pass
    return len(calls)

def key_frames(count):
    for _ in model.lm.generate(ids, count, seed=0): pass

with torch.inference_mode():
    found = {"forwards a clip": video(4.0) - video(2.0)}
    found["kernels a key frame"] = kernels(lambda: key_frames(3)) - kernels(lambda: key_frames(2))
    two = kernels(lambda: video(4.0)) - kernels(lambda: video(2.0))
    found["kernels a clip"] = two - found["kernels a key frame"]
    took = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        video(4.0)
        took.append(time.perf_counter() - began)
    found["real-time factor"] = [4.0 / one for one in took[1:]]
print("FOUND", json.dumps(found))
"""
TRAINING = """
import dicode.train.loop as loop
from dicode.cli.app import main
step, counted, own = 0, [], loop.train_step

def train_step(*arguments):
    global step
    step += 1
    if step != 3:
        return own(*arguments)
    result = []
    counted.append(kernels(lambda: result.append(own(*arguments))))
    return result[0]

loop.train_step = train_step
main(sys.argv[1:])
print("FOUND", json.dumps({"kernels a step": counted[0]}))
"""


class Side:
    """A checkout and a folder for what it writes."""

    def __init__(self, checkout: Path, scratch: Path):
        self.checkout, self.scratch = checkout.resolve(), scratch
        scratch.mkdir()

    def run(self, *arguments: str) -> tuple[float, str]:
        """Seconds that Python took with these arguments, and what it printed. Raises `RuntimeError`."""
        environment = {**os.environ, "PYTHONPATH": str(self.checkout)}
        began_s = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.scratch, env=environment, capture_output=True, text=True, check=False
        )
        took_s = time.perf_counter() - began_s
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
        return took_s, done.stdout

    def found(self, program: str, *arguments: str) -> dict[str, Any]:
        """What a program that ends with a line FOUND has found."""
        printed = self.run("-c", KERNELS + program, *arguments)[1]
        return json.loads(printed.rpartition("FOUND ")[2])

    def trained(self, recipe: str, data: Path) -> dict[str, Any]:
        """Samples a second, and kernels of a step, of a recipe's first steps on drawn clips, from a bundled model."""
        name, _, stage = recipe.partition(":")
        if not (cache := self.scratch / "cache").exists():
            self.run("-m", "dicode", "data", "cache", str(data), "-o", str(cache), "--size", "64")
        model = str(self.checkout / "dicode/checkpoints" / name)
        flags = ["--init" if stage == "denoiser" else "--tokenizer", model, "--cache", str(cache)]
        flags += ["--loop.optim.steps", str(STEPS), "--loop.optim.batch-size", "16", "--loop.log-every", "4"]
        flags += ["--loop.tracker", "none", "--run-folder", str(self.scratch / recipe.replace(":", "-"))]
        found = self.found(TRAINING, "train", f"{self.checkout / 'recipes' / name}.py:{stage}", *flags)
        lines = (self.scratch / recipe.replace(":", "-") / "log.jsonl").read_text().splitlines()
        rates = [line["samples_per_s"] for line in map(json.loads, lines) if line.get("kind") == "train"]
        return found | {"samples a second": rates[-1]}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    asked = parser.parse_args(argv)
    with TemporaryDirectory() as scratch:
        sides = [Side(own, Path(scratch) / str(i)) for i, own in enumerate((asked.before, asked.after))]
        figures = started(sides, asked.repeats)
        for name in asked.models:
            figures |= beside([tried(side.found, VIDEOS, name, PROMPT, str(asked.repeats)) for side in sides], name)
        data = Path(scratch) / "data"
        if asked.recipes:
            sys.path.append(str(Path(__file__).parents[1] / "tests"))
            from synthetic import write_dataset

            write_dataset(data, count=24, num_frames=64, size=64)
        for recipe in asked.recipes:
            figures |= beside([tried(side.trained, recipe, data) for side in sides], recipe)
    for name, (before, after, ratio) in figures.items():
        print(f"{name:45} {shown(before):>12} {shown(after):>12} {shown(ratio):>8}")
    values = {name: dict(zip(("before", "after", "ratio"), own, strict=True)) for name, own in figures.items()}
    commits = [commit_of(side.checkout) for side in sides]
    command = shlex.join(["python", "tools/compare_speed.py", *commits, *sys.argv[3:]])
    write_result(asked.output, "speed of two checkouts", values, asked.repeats, 0, command)


def started(sides: Sequence[Side], repeats: int) -> dict[str, Any]:
    """Seconds of whole commands, and memory of `generate`, of both sides in turn."""
    took: dict[str, list[list[float]]] = {name: [[], []] for name in COMMANDS}
    memory_mib: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        for name, command in COMMANDS.items():
            for i, side in enumerate(sides):
                took_s, printed = side.run(*command)
                took[name][i].append(took_s)
                if peak := re.search(r"peak memory ([\d.]+) MiB", printed):
                    memory_mib[i].append(float(peak[1]))
    rows = {f"{name}, s": [own[1:] for own in both] for name, both in took.items()}
    rows["generate 4 s, peak memory, MiB"] = memory_mib
    return {name: compared(*(median(own) if own else None for own in both)) for name, both in rows.items()}


def tried(function: Any, *arguments: Any) -> dict[str, Any]:
    """What a function returns; where a side lacks what it needs, the error alone."""
    try:
        return function(*arguments)
    except RuntimeError as error:
        return {"error": str(error)}


def beside(found: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Figures of both sides, with their ratios."""
    rows = {}
    for key in {**found[0], **found[1]}:
        both = [own.get(key) for own in found]
        both = [median(value) if isinstance(value, list) else value for value in both]
        rows[f"{name}, {key}"] = compared(*both)
    return rows


def compared(before: Any, after: Any) -> tuple[Any, Any, float | None]:
    """Both, and after ÷ before of numbers."""
    numbers = all(isinstance(own, int | float) for own in (before, after))
    return before, after, after / before if numbers and before else None


def shown(value: Any) -> str:
    return "–" if value is None else value[:12] if isinstance(value, str) else f"{value:,.4g}"


def commit_of(checkout: Path) -> str:
    """The commit that a checkout stands at."""
    git = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
