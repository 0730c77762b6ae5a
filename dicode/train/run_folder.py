"""A run's folder, which explains itself.

recipe.json      the resolved configuration; recipe-from-step-….json where a later start changed it
recipe.py        the source the configuration came from
sessions.jsonl   one line a start: time, command, commit, versions, device, processes, data
log.jsonl        losses, speeds and validation metrics; TensorBoard has them too, or the tracker chosen
sheets/          contact sheets of fixed validation samples
step-…/, best/   what to go on from, and the best weights so far
"""

import json
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dicode.evaluate.report import describe_commit, describe_device, versions
from dicode.files import put_text
from dicode.progress import EVERY_S, duration
from dicode.train.runs import Tracker

ABOUT_SPEED = ("trained_s", "samples_per_s", "data_share", "eta_s", "memory_gib", "mfu")


class RunLog:
    """`log.jsonl`, a tracker and `sheets/` of one run folder, and a line on the terminal; a resource to close.

    What a lost stretch of the run left in `log.jsonl`, from `step` on, is taken out: the steps come again.
    """

    def __init__(self, folder: Path, step: int, tracker: Tracker, recipe: Mapping[str, Any]):
        self.path, self.sheets = folder / "log.jsonl", folder / "sheets"
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
        put_text(self.path, "".join(kept))
        self.tracker = open_tracker(tracker, folder, step, recipe)
        self.file = self.path.open("a")
        self.spoke_s = time.monotonic()

    def _lines(self) -> list[str]:
        """The whole lines; the process may have ended within the last one."""
        text = self.path.read_text() if self.path.exists() else ""
        return [line for line in text.splitlines(keepends=True) if line.endswith("}\n")]

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.tracker.close()

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Append numbers to every log."""
        self.append({"kind": kind, "step": step, **values})
        self.tracker.numbers(kind, step, values)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if name not in ABOUT_SPEED)
        eta = f"  {duration(values['eta_s'])} to go" if "eta_s" in values else ""
        self._say(f"{kind} {step}: {shown}{eta}")

    def heartbeat(self, step: int, steps: int, loss: float) -> None:
        """A line on the terminal alone, where steps are so long that there was none for half a minute."""
        if time.monotonic() - self.spoke_s >= EVERY_S:
            self._say(f"step {step} of {steps}: loss {loss:.4g}")

    def _say(self, line: str) -> None:
        print(line, flush=True)
        self.spoke_s = time.monotonic()

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a record to `log.jsonl` alone."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def sheet(self, step: int, image: Image.Image) -> None:
        """Keep the contact sheet of one evaluation."""
        self.sheets.mkdir(exist_ok=True)
        image.save(self.sheets / f"{step:07d}.png")
        self.tracker.image(step, image)


class NoLog:
    """The log of processes beside the first, which writes for all."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *_: object) -> None: ...

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None: ...

    def heartbeat(self, step: int, steps: int, loss: float) -> None: ...

    def append(self, record: Mapping[str, Any]) -> None: ...

    def sheet(self, step: int, image: Image.Image) -> None: ...


class NoTracker:
    """`log.jsonl` alone."""

    def numbers(self, kind: str, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, image: Image.Image) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """`tensorboard/` in the run folder."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def numbers(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{kind}/{name}", value, step)

    def image(self, step: int, image: Image.Image) -> None:
        self.writer.add_image("validation/sheet", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Hosted:
    """`wandb`, or `trackio`, which has the same functions; a run that goes on is found again by its name."""

    def __init__(self, library: str, folder: Path, recipe: Mapping[str, Any]):
        self.library = import_module(library)
        place = {"id": folder.name, "dir": str(folder)} if library == "wandb" else {}
        self.run = self.library.init(project="dicode", name=folder.name, config=dict(recipe), resume="allow", **place)

    def numbers(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def image(self, step: int, image: Image.Image) -> None:
        self.run.log({"validation/sheet": self.library.Image(image)}, step=step)

    def close(self) -> None:
        self.run.finish()


def open_tracker(kind: Tracker, folder: Path, step: int, recipe: Mapping[str, Any]) -> NoTracker | TensorBoard | Hosted:
    """The tracker of this name. Raises `ValueError` where its library is missing."""
    if kind == "none":
        return NoTracker()
    if kind == "tensorboard":
        return TensorBoard(folder, step)
    try:
        return Hosted(kind, folder, recipe)
    except ModuleNotFoundError as error:
        raise ValueError(f"tracker {kind}: {error}; pip install {kind}, or choose tensorboard") from error


def note_start(
    folder: Path, step: int, asked: Mapping[str, Any], source: Path | None, data: str, processes: int
) -> None:
    """Write down what this start of a run is made of; says where recipe or data are not those it began with."""
    text = json.dumps(asked, indent=2, default=str) + "\n"
    recipe, sessions = folder / "recipe.json", folder / "sessions.jsonl"
    if not recipe.exists():
        put_text(recipe, text)
        if source:
            put_text(folder / "recipe.py", source.read_text())
    elif text != recipe.read_text():
        changed = folder / f"recipe-from-step-{step:08d}.json"
        put_text(changed, text)
        print(f"the recipe is not the one the run began with: see {changed}", flush=True)
    lines = sessions.read_text().splitlines(keepends=True) if sessions.exists() else []
    before = [json.loads(line) for line in lines if line.endswith("}\n")]
    if before and before[-1]["data"] != data:
        print(f"the data are not those the run began with: {before[-1]['data']} then, {data} now", flush=True)
    session = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "from_step": step,
        "command": sys.argv,
        **describe_commit(),
        "versions": versions(),
        "device": describe_device("cuda" if torch.cuda.is_available() else "cpu"),
        "processes": processes,
        "data": data,
    }
    put_text(sessions, "".join(json.dumps(line) + "\n" for line in [*before, session]))
