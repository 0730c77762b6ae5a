"""The work of a benchmark in parts on disk: kept when it stops, checked before reuse, shared among processes.

A part is the same batch of the same samples in whichever process: so figures are equal to the last bit however the
parts were shared out, on equal devices and numbers of threads.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dicode.checkpoint import read_tensors
from dicode.checkpoint.saving import kept_tensors
from dicode.files import put_text, read_json
from dicode.stopwatch import tracked
from dicode.train.distributed import Processes

RUN_FILE = "run.json"


def shard_of(text: str | None) -> tuple[int, int]:
    """The share of this process, (1, 4) of `--shard 2/4`; without it that of torchrun, each process on its own GPU."""
    processes = Processes()
    if text is None:
        if processes.count > 1 and torch.accelerator.is_available():
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        return processes.rank, processes.count
    if processes.count > 1:
        raise ValueError(f"--shard {text}: torchrun shares the work out already; leave one of them out")
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--shard: expected NUMBER/COUNT from 1/COUNT to COUNT/COUNT, got {text!r}")
    return int(number) - 1, int(count)


class Parts:
    """A folder of what was computed so far, and `run.json`, the settings that it belongs to.

    A process's `shard`, (index, count), are the parts index, index + count, …
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], shard: tuple[int, int]) -> None:
        """Raises `ValueError` where the folder belongs to another run, naming what differs."""
        self.folder, self.shard = folder, shard
        folder.mkdir(parents=True, exist_ok=True)
        asked = json.loads(json.dumps(run))
        file = folder / RUN_FILE
        if not file.is_file():
            put_text(file, json.dumps(asked, indent=2, ensure_ascii=False) + "\n")
        kept = read_json(file)
        if not isinstance(kept, dict):
            raise ValueError(f"{file}: expected an object, got {type(kept).__name__}; delete the folder to begin again")
        differing = [key for key in {**kept, **asked} if kept.get(key) != asked.get(key)]
        if differing:
            listed = "; ".join(f"{key}: there {kept.get(key)!r}, asked {asked.get(key)!r}" for key in differing)
            raise ValueError(
                f"{folder}: holds parts of another run ({listed}). Name another output, or delete the folder"
            )

    def make(self, kind: str, count: int, make: Callable[[int], dict[str, Tensor]]) -> None:
        """Compute those of `count` parts that are this process's and not there yet."""
        self.each(kind, count, lambda number: kept_tensors(self._path(kind, number), partial(make, number)))

    def each(self, kind: str, count: int, work: Callable[[int], object]) -> None:
        """Work on this process's parts, with a progress bar."""
        try:
            for number in tracked(range(self.shard[0], count, self.shard[1]), kind, "part"):
                work(number)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt("finished parts are kept; the same command continues") from error

    def missing(self, kind: str, count: int) -> int:
        """How many of `count` parts are not there yet."""
        return sum(not self._path(kind, number).is_file() for number in range(count))

    def read(self, kind: str, count: int) -> Iterator[dict[str, Tensor]]:
        """All parts, in order."""
        return (read_tensors(self._path(kind, number)) for number in range(count))

    def _path(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}-{number:05d}.safetensors"
