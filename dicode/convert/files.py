"""Weights in, weights out: other people's files read tensor by tensor, ours written the same way."""

import json
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from dicode.checkpoint import FLOATS, read_tensors
from dicode.config import CheckpointError

State = dict[str, Tensor]
DTYPES = {**FLOATS, torch.int64: "I64"}  # as safetensors' headers name them
WRAPPERS = ("module", "state_dict")  # of DeepSpeed and of Lightning
FOLDER_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")


def read_weights(path: Path) -> State:
    """The tensors of a torch pickle, a safetensors file, or a folder that holds one; else raises `CheckpointError`.

    Pickles run no code (`weights_only`) and are mapped into memory. Wrappers of DeepSpeed and Lightning are removed.
    """
    if path.is_dir():
        found = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        if not found:
            raise CheckpointError(f"{path}: expected one of {', '.join(FOLDER_FILES)} in it")
        path = found[0]
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        mmap = zipfile.is_zipfile(path)  # files of torch before 1.6 cannot be mapped
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, … for one and the same thing
        reason = f" ({' '.join(str(error).split())})" if isinstance(error, UnpicklingError) else ""  # names the class
        raise CheckpointError(f"{path}: not a torch file of plain tensors{reason}") from error
    for wrapper in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        keys = list(loaded)[:5] if isinstance(loaded, Mapping) else ""
        raise CheckpointError(f"{path}: expected tensors by name, got {type(loaded).__name__} {keys}")
    return dict(loaded)


def without_prefix(state: Mapping[str, Tensor], parts: Iterable[str], source: str) -> State:
    """Names without what stands before every one of them, such as `module.`; `parts` are how known names begin."""
    starts = {name[: name.index(part)] for name in state for part in parts if f".{part}" in f".{name}"}
    shortest = min(starts, key=len, default="")
    if others := [name for name in state if not name.startswith(shortest)]:
        raise CheckpointError(f"{source}: most names begin with {shortest!r}, but not {others[:5]}")
    return {name.removeprefix(shortest): value for name, value in state.items()}


def taken(state: State, prefix: str) -> State:
    """Move the tensors of one part out of `state`, without the part's name."""
    return {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}


def write_tensors(path: Path, state: Mapping[str, Tensor], dtype: torch.dtype, exact: tuple[str, ...] = ()) -> None:
    """Write a safetensors file with one tensor at a time in memory, floating-point ones in `dtype`.

    Names that begin with one of `exact` keep float32.
    """
    kinds = {
        name: value.dtype if not value.is_floating_point() else torch.float32 if name.startswith(exact) else dtype
        for name, value in state.items()
    }
    header, end = {}, 0
    for name, value in state.items():
        start, end = end, end + value.numel() * kinds[name].itemsize
        header[name] = {"dtype": DTYPES[kinds[name]], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, value in state.items():
            flat = value.detach().to(kinds[name]).contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().data)
