"""Training checkpoints: everything a run needs to continue, whole on disk or not there at all.

    runs/sprites-lm/step-00000500/
        shard-00001-….safetensors   weights, EMA, buffers and optimizer, one file a process
        state.json                  step, best metrics so far, seconds trained, steps skipped
        SHA256SUMS                  of all of them; `sha256sum -c SHA256SUMS` checks it too

Written by `torch.distributed.checkpoint` in safetensors, so that any number of processes reads what any other number
wrote, and no pickle is involved. No state of random numbers is needed: every draw is a function of (seed, step).
"""

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dicode.checkpoint import is_finite
from dicode.config import CheckpointError
from dicode.files import UNFINISHED, flush, sha256_of, whole_folder
from dicode.train.distributed import Processes, local

KEPT = 2
SUMS, STATE = "SHA256SUMS", "state.json"
ALONE = "torch.distributed is disabled"  # a warning, where no_dist asks for just that


@dataclass
class TrainState:
    """Where a run stands."""

    step: int = 0  # steps done
    best: dict[str, float] | None = None  # validation metrics of the exported weights
    trained_s: float = 0.0
    skipped: int = 0  # steps left out because they were not finite
    replaced: int = 0  # samples that others stood in for because they were damaged
    evaluated: int = 0  # the step of the last evaluation: one that a signal cut short is done again


def save_checkpoint(folder: Path, state: TrainState, tensors: Mapping[str, Tensor], processes: Processes) -> Path:
    """Write `folder/step-…`, sums of its files included, whole or not at all; keep the two newest.

    Raises `CheckpointError`, leaving earlier checkpoints as they are, where a tensor is not finite or the disk is full.
    """
    unfit = [name for name, value in tensors.items() if not is_finite(local(value))]
    if processes.any(bool(unfit)):
        raise CheckpointError(
            f"step {state.step}: NaN or infinity in {unfit[:5] or 'another process'}; nothing written"
        )
    final, failure = folder / f"step-{state.step:08d}", ""
    try:
        with whole_folder(final) if processes.first else nullcontext(final) as own:
            place = processes.from_first(own)
            _write(place, tensors, processes)
            if processes.first:
                (place / STATE).write_text(json.dumps(asdict(state)))
                sums = "".join(f"{sha256_of(path)}  {path.name}\n" for path in sorted(place.iterdir()))
                (place / SUMS).write_text(sums)
                flush(place / STATE)
                flush(place / SUMS)
    except CheckpointException as error:  # which is no Exception
        failure = "; ".join(f"{cause}" for cause, _ in error.failures.values())
    except OSError as error:
        failure = str(error)
    if processes.any(bool(failure)):
        left = checkpoints(folder)
        kept = f"{left[-1].name} is whole: make room, and the same command continues" if left else "there is no other"
        raise CheckpointError(f"{final}: cannot be written ({failure or 'in another process'}); {kept}")
    if processes.first:
        flush(folder)
        for old in checkpoints(folder)[:-KEPT]:
            shutil.rmtree(old)
    return final


def _write(folder: Path, tensors: Mapping[str, Tensor], processes: Processes) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    packed = {name: value.contiguous() for name, value in tensors.items()}  # some are channels-last
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ALONE)
        save(packed, storage_writer=writer, no_dist=processes.count == 1)


def checkpoints(folder: Path) -> list[Path]:
    """The `step-…` folders of a run, oldest first."""
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name) and p.is_dir())


def newest_checkpoint(folder: Path, processes: Processes) -> Path | None:
    """The newest whole checkpoint of a run, or None where there was never one.

    Damaged ones are named, and renamed to `damaged-…`. Raises `CheckpointError` where no other is left.
    """
    found: Path | None = None
    problem = ""
    if processes.first:
        for rest in filter(lambda path: UNFINISHED.fullmatch(path.name), folder.iterdir()):  # of a run that was killed
            shutil.rmtree(rest, ignore_errors=True)
            rest.unlink(missing_ok=True)
        for path in reversed(checkpoints(folder)):
            if not (problem := damage(path)):
                found = path
                break
            print(f"{path} is damaged: {problem}", flush=True)
            shutil.rmtree(path.with_name(f"damaged-{path.name}"), ignore_errors=True)
            path.rename(path.with_name(f"damaged-{path.name}"))
    found, problem = processes.from_first((found, problem))
    if problem and not found:
        raise CheckpointError(f"{folder}: no whole checkpoint is left; delete the folder to begin again")
    return found


def damage(path: Path) -> str:
    """How a checkpoint differs from what was written, or ''."""
    try:
        text = (path / SUMS).read_bytes().decode("ascii")
        sums = {name: digest for digest, name in (line.split("  ") for line in text.splitlines())}
        there = {entry.name for entry in path.iterdir()} - {SUMS}
        if there != sums.keys() or not text.endswith("\n") or STATE not in sums:
            return f"{SUMS} lists {sorted(sums)}, the folder holds {sorted(there)}"
        changed = [name for name, digest in sums.items() if sha256_of(path / name) != digest]
        return f"{', '.join(changed)}: not as written (SHA-256 differs)" if changed else ""
    except (OSError, ValueError) as error:
        return f"{SUMS}: {error}"


def load_checkpoint(path: Path, tensors: Mapping[str, Tensor], processes: Processes) -> TrainState:
    """Fill `tensors` in place from a whole checkpoint; those that do not match raise `CheckpointError`."""
    reader = HuggingFaceStorageReader(str(path))
    found = reader.read_metadata().state_dict_metadata
    held = {name: tuple(value.size) for name, value in found.items() if isinstance(value, TensorStorageMetadata)}
    asked = {name: tuple(value.shape) for name, value in tensors.items()}
    if differing := sorted(held.keys() ^ asked.keys()):
        other = "optimizer" if all(name.startswith("optimizer/") for name in differing) else "recipe"
        raise CheckpointError(f"{path}: written with another {other}; differing tensors: {differing[:5]}")
    if misshapen := [name for name, shape in asked.items() if shape != held[name]]:
        raise CheckpointError(f"{path}: written with another recipe; tensors of other shapes: {misshapen[:5]}")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=ALONE)
        load(dict(tensors), storage_reader=reader, no_dist=processes.count == 1)
    return TrainState(**json.loads((path / STATE).read_text()))
