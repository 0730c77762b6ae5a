"""Checkpoint folders written: weights, `config.json`, and the folder whole or not at all."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dicode.checkpoint import FILES, FORMAT, SCALES, SEAL, content_of, read_config, read_tensors
from dicode.config import CheckpointError
from dicode.files import check_folder, put, whole_folder


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json` of a checkpoint folder, with the format number that `read_config` checks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"format": FORMAT, **config}, indent=2) + "\n")


def save_weights(module: nn.Module, path: Path, dtype: torch.dtype | None = None, beside: Path | None = None) -> None:
    """Write a module's state as one safetensors file, floating-point tensors as `dtype` where given.

    `int8` stores 8 bits a number and a scale a row for matrices, float16 for the rest; loading gives floats again.
    `beside` is the text tokenizer that belongs to the weights: the seal covers it too.
    """
    state = {}
    for name, value in module.state_dict().items():
        stored, scales = as_stored(value.detach().cpu(), dtype)
        state[name] = stored.contiguous()
        if scales is not None:
            state[name + SCALES] = scales.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    unknown = "0" * (32 if beside else 16)
    save_file(state, path, metadata={SEAL: unknown})  # a single key: the order of several varies
    content = content_of(path, beside)[0]
    with path.open("r+b") as file:
        head = file.read(2**16)
        file.seek(0)
        file.write(head.replace(f'"{SEAL}":"{unknown}"'.encode(), f'"{SEAL}":"{content}"'.encode(), 1))
    path.chmod(0o644)  # safetensors creates files for their owner alone


def as_stored(value: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """A tensor as `save_weights` stores it, and the float32 scales, one a row, to multiply int8 with."""
    if dtype is None or not value.is_floating_point():
        return value, None
    if dtype != torch.int8 or value.ndim < 2:
        return value.to(torch.float16 if dtype == torch.int8 else dtype), None
    scales = value.float().abs().amax(tuple(range(1, value.ndim)), keepdim=True).clamp_min(1e-12) / 127
    return (value.float() / scales).round().to(torch.int8), scales


def as_saved(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor as it is read back from a file of `save_weights`."""
    stored, scales = as_stored(value, dtype)
    return stored if scales is None else stored.float() * scales


def kept_tensors(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a file, which is written from `make` where it is missing."""
    if not path.is_file():
        put(path, lambda partial: save_file(make(), partial))
    return read_tensors(path)


@contextmanager
def model_folder(output: Path, own: Sequence[str] = FILES, *, keep: bool = False) -> Iterator[Path]:
    """An empty folder for a checkpoint, which takes the place of `output` when the block ends: whole, or not at all.

    A model card that is there stays; with `keep` so do all files that the block does not write. Raises as
    `check_model_folder`.
    """
    check_model_folder(output, own)
    with whole_folder(output) as folder:
        yield folder
        for path in output.iterdir() if output.is_dir() else ():
            if (keep or path.name == "README.md") and not (folder / path.name).exists():
                shutil.copy2(path, folder)


def check_model_folder(output: Path, own: Sequence[str] = FILES) -> None:
    """Raise `CheckpointError` unless a folder is missing, empty, or a dicode checkpoint with files of these names."""
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output}: expected a folder to write, or none yet, got a file")
    check_folder(output)
    names = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in own)]
    if names and not foreign:
        try:
            read_config(output)
        except CheckpointError:
            foreign = names
    if foreign:
        raise CheckpointError(
            f"{output}: holds {', '.join(foreign[:3])}{' …' if len(foreign) > 3 else ''}, which this command did not "
            "write and would not keep: name another folder"
        )
