"""Does training survive? Kills, signals, damaged files and NaN, on a small run, against one that nothing happens to.

    python tests/survival.py results/survival.json      # 50 kills, 20 signals, 300 damaged checkpoints, 100 NaN

Every run is a process of its own, forked from this one, which has loaded all libraries and computed nothing.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils import tensorboard  # noqa: F401 - loaded once, before the forks
from toy_runs import SHARD, loop, runs, write_cache

import dicode.train.checkpoint
import dicode.train.loop
from dicode.device import peak_flops
from dicode.provenance import write_result
from dicode.train.checkpoint import checkpoints, damage
from dicode.train.run_log import ABOUT_SPEED
from dicode.train.runs import LanguageRun
from dicode.train.stages import run_recipe, stage_of


def the_run(root: Path, steps: int) -> LanguageRun:
    """A language model of 20,000 parameters, which logs every step, and evaluates and checkpoints often."""
    run = runs(root)["lm"]
    assert isinstance(run, LanguageRun)
    often = dataclasses.replace(loop(steps), log_samples=True, evaluate_every=25, checkpoint_every=5)
    return dataclasses.replace(run, loop=often)


def start(work: Callable[[], object], log: Path) -> int:
    """Do some work in a fork of this process, which ends with it; returns its number."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(process: int) -> int:
    """Exit code of a fork once it has ended; −9 where it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def prepare(root: Path) -> None:
    """What the run reads: a cache, and a tokenizer trained for four steps."""
    write_cache(root / "cache")
    for name in ("first_stage", "linear_code"):
        run_recipe(runs(root)[name], root / name, {})


def records(folder: Path) -> list[dict[str, Any]]:
    if not (folder / "log.jsonl").exists():
        return []
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ABOUT_SPEED} for line in lines]


def differences(folder: Path, other: Path, steps: int) -> list[str]:
    """What two finished runs do not have in common: logged numbers, tensors, exported weights."""
    found = [] if records(folder) == records(other) else ["log.jsonl"]
    for name in (f"step-{steps:08d}/{SHARD}", "best/lm.safetensors"):
        one, two = load_file(folder / name), load_file(other / name)
        found += [f"{name}: {key}" for key in one.keys() | two.keys() if not torch.equal(one[key], two[key])]
    return found


def repeated_or_missed(folder: Path, samples: int) -> int:
    """Samples that did not come exactly once in one of the whole epochs of a run."""
    order = [s for line in records(folder) if line["kind"] == "samples" for s in line["samples"]]
    epochs = [order[i : i + samples] for i in range(0, len(order) - samples + 1, samples)]
    return sum(len(set(range(samples)) ^ set(epoch)) + samples - len(set(epoch)) for epoch in epochs)


def telling(pipe: int, furthest: int) -> None:
    """Let the training that follows in this process tell every step it has done, and go no further than one of them."""
    original = dicode.train.loop.train_step

    def step(training: Any, state: Any, batches: Any) -> Any:
        if state.step >= furthest:
            os.write(pipe, WAITING)
            time.sleep(3600)  # to be killed
        done = original(training, state, batches)
        os.write(pipe, STEP)
        return done

    dicode.train.loop.train_step = step


STEP, WAITING = b".", b"|"
LEAST_DIFFERENT = 0.6  # of the kills: of the checkpoints that lives go on from


def survive_kills(root: Path, whole: Path, steps: int, kills: int, seed: int) -> dict[str, Any]:
    """`kill -9` after a random number of a life's steps and a moment more, then the same run once more, to its end.

    Lives are counted in steps, so that a busy machine changes nothing; each stays within its share of them.
    """
    draw, folder, began_s = random.Random(seed), root / "killed", time.monotonic()
    resumed_at: list[int] = []
    for i in range(kills):
        pipe, end = os.pipe()

        def life(furthest: int = steps * (i + 1) // (kills + 1), end: int = end) -> None:
            telling(end, furthest)
            run_recipe(the_run(root, steps), folder, {})

        process = start(life, root / "killed.log")
        os.close(end)
        last_s, step_s = time.monotonic(), 0.0
        for _ in range(draw.randint(1, 2 * steps // kills)):
            if os.read(pipe, 1) != STEP:  # it waits, or has ended
                break
            step_s, last_s = time.monotonic() - last_s, time.monotonic()
        time.sleep(draw.uniform(0, 2 * min(step_s, 1.0)))  # in whatever it does then
        os.kill(process, signal.SIGKILL)
        code = finish(process)
        os.close(pipe)
        if code != -signal.SIGKILL:
            raise RuntimeError(f"ended by itself with {code}: {(root / 'killed.log').read_text()}")
        resumed_at.append(max([int(p.name[5:]) for p in checkpoints(folder)], default=0))
    assert finish(start(lambda: run_recipe(the_run(root, steps), folder, {}), root / "killed.log")) == 0
    assert len(set(resumed_at)) >= LEAST_DIFFERENT * kills, f"lives went on from {resumed_at}"
    return {
        "kills": kills,
        "steps": steps,
        "different_lives": len(set(resumed_at)),
        "differences": differences(folder, whole, steps),
        "samples_repeated_or_missed": repeated_or_missed(folder, 15),
        "damaged_checkpoints_left": len(list(folder.glob("damaged-*"))),
        "seconds": time.monotonic() - began_s,
    }


def signal_in(phase: str, call: int, note: Path) -> None:
    """Send this process a SIGTERM in the `call`-th passage of a phase of the training that follows."""
    passed = 0

    def passing() -> None:
        nonlocal passed
        passed += 1
        if passed == call:
            note.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGTERM)

    def before(owner: Any, name: str, after: bool = False) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not after:
                passing()
            result = original(*args, **kwargs)
            if after:
                passing()
            return result

        setattr(owner, name, wrapped)

    from dicode.train.lm import LanguageTraining

    places: dict[str, tuple[Any, str]] = {
        "building": (LanguageTraining, "_text"),
        "batch": (LanguageTraining, "batch"),
        "forward": (LanguageTraining, "loss"),
        "update": (torch.optim.AdamW, "step"),
        "validating": (LanguageTraining, "caption_rank"),
        "evaluated": (dicode.train.loop, "_keep_evaluation"),
        "writing": (dicode.train.checkpoint, "_write"),
        "summing": (dicode.train.checkpoint, "sha256_of"),
        "logging": (dicode.train.loop.RunLog, "write"),
        "reading": (dicode.train.loop, "load_checkpoint"),
    }
    before(*places[phase])
    if phase == "validating":  # and it would take minutes more
        slow = LanguageTraining.written
        LanguageTraining.written = lambda self, videos: (time.sleep(300), slow(self, videos))[1]  # type: ignore[method-assign]


PHASES = [
    "building",
    "batch",
    "forward",
    "update",
    "validating",
    "evaluated",
    "writing",
    "summing",
    "logging",
    "reading",
]


ONCE = {"building", "reading", "validating", "evaluated"}  # in a life, or in many steps


def survive_signals(root: Path, whole: Path, steps: int, signals: int) -> dict[str, Any]:
    """SIGTERM in every phase of a run; each life goes some steps further."""
    folder, note = root / "stopped", root / "signal"
    slowest_s, lost, codes = 0.0, 0, []
    for i in range(signals):
        phase = PHASES[i % len(PHASES)]
        call = 1 if phase in ONCE else 1 + 3 * (i // len(PHASES))
        note.unlink(missing_ok=True)  # and there is an error below where a life ended without its signal

        def life(phase: str = phase, call: int = call) -> None:
            signal_in(phase, call, note)
            run_recipe(the_run(root, steps), folder, {})

        codes.append(finish(start(life, root / "stopped.log")))
        slowest_s = max(slowest_s, time.time() - float(note.read_text()))
        logged = [line["step"] for line in records(folder) if line["kind"] == "train"] if folder.exists() else []
        at = int(checkpoints(folder)[-1].name[5:]) if folder.exists() and checkpoints(folder) else 0
        lost += max(0, max(logged, default=0) - at)
    assert finish(start(lambda: run_recipe(the_run(root, steps), folder, {}), root / "stopped.log")) == 0
    return {
        "signals": signals,
        "phases": PHASES,
        "exit_codes": sorted(set(codes)),
        "slowest_s": slowest_s,
        "steps_lost": lost,
        "differences": differences(folder, whole, steps),
    }


def detect_damage(whole: Path, flips: int, truncations: int, seed: int) -> dict[str, Any]:
    """One flipped bit, or a shorter file, anywhere in a checkpoint."""
    draw, path = random.Random(seed), checkpoints(whole)[-1]
    files = sorted(path.iterdir())
    found = {"flips": 0, "truncations": 0}
    for kind, count in (("flips", flips), ("truncations", truncations)):
        for i in range(count):
            file = files[i % len(files)]
            held = file.read_bytes()
            changed = bytearray(held)
            if kind == "flips":
                changed[draw.randrange(len(held))] ^= 1 << draw.randrange(8)
            else:
                del changed[draw.randrange(len(held)) :]
            file.write_bytes(changed)
            found[kind] += bool(damage(path))
            file.write_bytes(held)
    assert not damage(path)
    return {"flips": flips, "truncations": truncations, "detected": found}


def inject_nan(root: Path, injections: int, seed: int) -> dict[str, Any]:
    """NaN in a weight, its average, its optimizer state, a gradient, the batch or the loss, at a random step."""
    draw, found = random.Random(seed), {"stopped": 0, "without_effect": 0, "files_with_nan": 0}
    run = the_run(root, 8)
    run = dataclasses.replace(run, loop=dataclasses.replace(run.loop, evaluate_every=4, checkpoint_every=2))
    original, messages = dicode.train.loop.train_step, []
    for _ in range(injections):
        folder, kind, at = root / "nan", draw.choice(KINDS), draw.randrange(8)
        stage = stage_of(run)

        def step(training: Any, state: Any, batches: Any, kind: str = kind, at: int = at) -> Any:
            if state.step == at:
                poison(kind, training, batches, draw)
            return original(training, state, batches)

        dicode.train.loop.train_step = step
        try:
            dicode.train.loop.train(stage, run.loop, folder, {})
            found["without_effect"] += 1
        except (dicode.train.loop.NonFiniteLossError, dicode.train.checkpoint.CheckpointError) as error:
            found["stopped"] += 1
            messages.append(str(error))
        for path in folder.rglob("*.safetensors"):
            bad = [n for n, t in load_file(path).items() if t.is_floating_point() and not torch.isfinite(t).all()]
            found["files_with_nan"] += bool(bad)
        shutil.rmtree(folder)
    dicode.train.loop.train_step = original
    (root / "nan.json").write_text(
        json.dumps({"injections": injections, **found, "naming_a_step": sum("step" in m for m in messages)})
    )


KINDS = ("weight", "average", "moment", "gradient", "batch")


def poison(kind: str, training: Any, batches: Any, draw: random.Random) -> None:
    """Put one NaN somewhere."""
    name = draw.choice(list(training.trained))
    parameter = training.trained[name]
    if kind == "gradient":
        parameter.register_hook(lambda gradient: gradient * torch.nan)
        return
    target = {
        "weight": parameter.data,
        "average": training.ema[name],
        "moment": training.optimizers[0].state[parameter]["exp_avg_sq"],
        "batch": next(iter(batches.values()))["tokens"],
    }[kind]
    target.view(-1)[draw.randrange(target.numel())] = torch.nan


def main() -> None:
    """Everything, into a result file."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("output", type=Path)
    for name, count in (("kills", 50), ("signals", 20), ("flips", 200), ("truncations", 100), ("nan", 100)):
        options.add_argument(f"--{name}", type=int, default=count)
    options.add_argument("--steps", type=int, default=600)
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args()
    torch.set_num_threads(1)
    peak_flops(torch.device("cpu"), torch.float32)  # measured once, before the forks
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        whole = root / "whole"
        log = root / "whole.log"
        if finish(start(lambda: prepare(root), log)):
            sys.exit(log.read_text())
        began_s = time.monotonic()
        if finish(start(lambda: run_recipe(the_run(root, asked.steps), whole, {}), log)):
            sys.exit(log.read_text())
        whole_s = time.monotonic() - began_s
        values: dict[str, Any] = {"uninterrupted_s": whole_s}
        values["kills"] = survive_kills(root, whole, asked.steps, asked.kills, asked.seed)
        values["signals"] = survive_signals(root, whole, asked.steps, asked.signals)
        values["damage"] = detect_damage(whole, asked.flips, asked.truncations, asked.seed)
        if finish(start(lambda: inject_nan(root, asked.nan, asked.seed), log)):
            sys.exit(log.read_text())
        values["nan"] = json.loads((root / "nan.json").read_text())
    write_result(asked.output, "survival", values, asked.kills, asked.seed, " ".join(["python", *sys.argv]))
    print(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
