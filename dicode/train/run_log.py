"""A run's folder, which explains itself.

recipe.json      the resolved configuration; recipe-from-step-….json where a later start changed it
recipe.py        the source the configuration came from
sessions.jsonl   one line a start: time, command, commit, versions, device, dtype, threads, processes, data
log.jsonl        losses, speeds and validation metrics; TensorBoard has them too, or the tracker chosen
tracker-id       under which wandb or trackio knows this run
.lock            held by the process that trains here
sheets/          contact sheets of fixed validation samples
step-…/, best/   checkpoints, and the best weights so far
"""

import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from PIL import Image

from dicode.device import compute_dtype, describe_device, measured_flops, pick_device
from dicode.files import alone_with, put, put_text
from dicode.provenance import describe_commit, versions
from dicode.stopwatch import EVERY_S, duration
from dicode.train.distributed import Processes
from dicode.train.runs import LoopConfig, Tracker
from dicode.train.speed import name_of

ABOUT_SPEED = ("trained_s", "samples_per_s", "data_share", "eta_s", "memory_gib", "mfu")
# What a run writes, replaces or removes; other files of its folder stay as they are.
OF_A_RUN = re.compile(r"best|last|sheets|(damaged-)?step-\d{8}|log\.jsonl|fit\.json|tracker-id|recipe[\w-]*\.(json|py)")
UNSURE = ("device", "dtype", "threads", "processes")  # what the last digits of a run depend on


@contextmanager
def claimed(folder: Path, data: str, config: LoopConfig, processes: Processes) -> Iterator[None]:
    """In here no other process trains in `folder`; prints what it computes on.

    Raises `ValueError` where one does, where the run was begun with other data, where the folder holds files of
    others, or where its tracker is missing.
    """
    with ExitStack() as stack:
        problem = ""
        if processes.first:
            try:
                import_tracker(config.tracker)
                sessions = records(folder / "sessions.jsonl")
                held = [] if sessions or not folder.exists() else os.listdir(folder)
                if foreign := sorted(filter(OF_A_RUN.fullmatch, held)):
                    raise ValueError(f"{folder}: holds {foreign[0]!r}, and no run; name another folder")
                folder.mkdir(parents=True, exist_ok=True)
                lock(folder / ".lock", stack)
                begun = [session["data"] for session in sessions if "data" in session]
                if begun and begun[-1] != data:
                    problem = (
                        f"{folder} was begun with other data (index.json {begun[-1]} then, {data} now): name another "
                        f"(--run-folder), where --init {folder}/best goes on from its weights, or delete this one"
                    )
            except (ValueError, OSError) as error:
                problem = str(error)
        if problem := processes.from_first(problem):
            raise ValueError(problem)
        if processes.first:
            device = pick_device(config.device)
            dtype = compute_dtype(device, config.precision)
            rate = f"{name_of(dtype)}, matrix products at {measured_flops(device, dtype) / 1e9:,.0f} GFLOP/s"
            print(f"{folder}: {describe_device(device)}; {rate}", flush=True)
        yield


def lock(file: Path, stack: ExitStack) -> None:
    """Hold a file until the stack is closed or this process ends. Raises `ValueError` where another holds it."""
    file.touch()
    try:
        alone = stack.enter_context(alone_with(file, wait=False))
    except OSError as error:  # a file system without locks
        print(f"{file}: cannot be locked ({error}); make sure that no second process trains here", flush=True)
        return
    if not alone:
        holder = f" ({text})" if (text := file.read_text().strip()) else ""
        raise ValueError(
            f"{file.parent}: another process trains here{holder}; wait for its end, or name another --run-folder"
        )
    file.write_text(f"process {os.getpid()} on {platform.node()}\n")


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that hold a JSON object: a process may have ended, or a disk failed, within one."""
    found = []
    for line in path.read_bytes().decode("utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


class RunLog:
    """`log.jsonl`, a tracker and `sheets/` of one run folder, and a line on the terminal; a resource to close.

    Only the first process `writes`. Records of steps after `step`, which were lost and come again, are taken out.
    """

    def __init__(self, folder: Path, step: int, tracker: Tracker, recipe: Mapping[str, Any], writes: bool = True):
        path, self.sheets, self.writes = folder / "log.jsonl", folder / "sheets", writes
        self.tracker: TensorBoard | Hosted | None = None
        if writes:
            kept = [record for record in records(path) if record.get("step", 0) <= step] if step else []
            put_text(path, "".join(json.dumps(record) + "\n" for record in kept))
            if tracker != "none":
                board = tracker == "tensorboard"
                self.tracker = TensorBoard(folder, step) if board else Hosted(tracker, folder, recipe)
        self.file = (path if writes else Path(os.devnull)).open("a")
        self.printed_s = time.monotonic()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.tracker:
            self.tracker.close()

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Append numbers to every log."""
        self.append({"kind": kind, "step": step, **values})
        if self.tracker:
            self.tracker.numbers(step, {f"{kind}/{name}": value for name, value in values.items()})
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if name not in ABOUT_SPEED)
        eta = f"  {duration(values['eta_s'])} to go" if "eta_s" in values else ""
        self._print(f"{kind} {step}: {numbers}{eta}")

    def heartbeat(self, step: int, steps: int, loss: float) -> None:
        """A line on the terminal alone, where steps are so long that there was none for half a minute."""
        if time.monotonic() - self.printed_s >= EVERY_S:
            self._print(f"step {step} of {steps}: loss {loss:.4g}")

    def _print(self, line: str) -> None:
        if self.writes:
            print(line, flush=True)
        self.printed_s = time.monotonic()

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a record to `log.jsonl` alone."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def sheet(self, step: int, image: Image.Image) -> None:
        """Keep the contact sheet of one evaluation."""
        if self.writes:
            self.sheets.mkdir(exist_ok=True)
            image.save(self.sheets / f"{step:07d}.png")
        if self.tracker:
            self.tracker.image(step, image)


class TensorBoard:
    """`tensorboard/` in the run folder."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.close = self.writer.close

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, image: Image.Image) -> None:
        self.writer.add_image("validation/sheet", np.asarray(image), step, dataformats="HWC")


class Hosted:
    """`wandb`, or `trackio`, which has the same functions; a continued run is found by the id that is kept."""

    def __init__(self, library: str, folder: Path, recipe: Mapping[str, Any]):
        self.library = import_module(library)
        if not (kept := folder / "tracker-id").is_file():
            put_text(kept, f"{folder.name}-{uuid4().hex[:8]}\n")
        name = kept.read_text().strip()  # a folder's name alone may be another run's too
        place = {"id": name, "dir": str(folder)} if library == "wandb" else {}
        self.run = self.library.init(project="dicode", name=name, config=dict(recipe), resume="allow", **place)
        self.close = self.run.finish

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def image(self, step: int, image: Image.Image) -> None:
        self.run.log({"validation/sheet": self.library.Image(image)}, step=step)


def import_tracker(kind: Tracker) -> None:
    """Raise `ValueError` where the library of a tracker is missing."""
    try:
        if kind != "none":
            import_module("torch.utils.tensorboard" if kind == "tensorboard" else kind)
    except ModuleNotFoundError as error:
        package, other = ("'dicode[train]'", "none") if kind == "tensorboard" else (kind, "tensorboard")
        raise ValueError(
            f"tracker {kind}: {error}; pip install {package}, or choose another (--loop.tracker {other})"
        ) from error


def note_start(
    folder: Path, step: int, asked: Mapping[str, Any], source: Path | None, environment: Mapping[str, Any]
) -> None:
    """Record the recipe and the environment of this start; print what differs from the start before."""
    text = json.dumps(asked, indent=2, default=str) + "\n"
    recipe, sessions = folder / "recipe.json", folder / "sessions.jsonl"
    before = records(sessions)
    session = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "from_step": step,
        "command": sys.argv,
        **describe_commit(),
        "versions": versions(),
        **environment,
    }
    put_text(sessions, "".join(json.dumps(line) + "\n" for line in [*before, session]))
    if not recipe.exists():
        put_text(recipe, text)
        if source:
            put(folder / "recipe.py", lambda copy: copy.write_bytes(source.read_bytes()))
    elif text != recipe.read_text():
        changed = folder / f"recipe-from-step-{step:08d}.json"
        put_text(changed, text)
        fields = ", ".join(differing(json.loads(recipe.read_text()), json.loads(text))[:5])
        print(f"the recipe is not the one the run began with ({fields}): see {changed}", flush=True)
    for name in UNSURE if before else ():
        if (then := before[-1].get(name, environment[name])) != environment[name]:
            print(f"{name}: {then} then, {environment[name]} now: results will differ in their last digits", flush=True)


def differing(then: Any, now: Any, name: str = "") -> list[str]:
    """The names of what differs between two values of JSON."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return [] if then == now else [name]
    inner = [(key, then.get(key), now.get(key)) for key in {**then, **now}]
    return [found for key, a, b in inner for found in differing(a, b, f"{name}.{key}" if name else key)]
