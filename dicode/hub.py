"""A checkpoint is a folder: `config.json`, `*.safetensors`, `README.md`. It loads strictly, runs no code of its own."""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CHECKPOINTS = Path(__file__).parent / "checkpoints"
DEFAULT_MODEL = "sprites"
FORMAT = 1
T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be loaded: says which file, what was expected and what was found."""


def resolve(name_or_folder: str | Path | None = None) -> Path:
    """The folder of a checkpoint: a folder on disk, or the name of a model in the box (default: `sprites`)."""
    if name_or_folder is None:
        name_or_folder = DEFAULT_MODEL
    for folder in (Path(name_or_folder), CHECKPOINTS / name_or_folder):
        if (folder / "config.json").is_file():
            return folder
    boxed = sorted(p.parent.name for p in CHECKPOINTS.glob("*/config.json"))
    raise CheckpointError(
        f"no checkpoint at {str(name_or_folder)!r}: expected a folder with config.json, or one of {boxed}"
    )


def nearest(word: str, known: list[str]) -> str:
    """' (did you mean …?)' for a misspelt name, or '' when nothing is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def config_to_dict(config: Any) -> dict[str, Any]:
    """A frozen dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_dict(kind: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Build a frozen dataclass from JSON values; an unknown or a missing key is an error that names it."""
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in fields:
            raise CheckpointError(f"{where}: unknown key {key!r}{nearest(key, list(fields))}")
    built = {}
    for key, field in fields.items():
        if key in values:
            built[key] = _convert(hints[key], values[key], f"{where}.{key}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise CheckpointError(f"{where}: missing key {key!r}")
    return kind(**built)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return config_from_dict(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        return tuple(_convert(arguments[0], v, where) for v in value)
    if origin is typing.Literal:
        if value not in arguments:
            raise CheckpointError(f"{where}: expected one of {arguments}, got {value!r}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise CheckpointError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def save_weights(module: nn.Module, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write a module's state as one safetensors file, floating-point tensors cast to `dtype` where given."""
    state = {
        name: (value.to(dtype) if dtype and value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in module.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes files for their owner alone; a checkpoint is there to be shared


def kept_tensors(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a file that `make` fills on first use; an interrupted first use leaves no file."""
    if not path.is_file():
        partial = path.with_name(f".{path.name}.part")
        try:
            save_file(make(), partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return read_tensors(path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill a module from a safetensors file: missing, extra or misshapen tensors raise `CheckpointError` by name."""
    load_state(module, read_tensors(path), str(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file; a missing, truncated or damaged file raises `CheckpointError`."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; the checkpoint folder is incomplete")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}); download or copy it again"
        ) from error


def content_hash(*files: Path) -> str:
    """Sixteen hexadecimal digits that stand for the names and the content of files."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into `module`, strictly; values are cast to the module's dtype."""
    own = module.state_dict()
    problems = [f"missing {name} {tuple(own[name].shape)}" for name in own if name not in state]
    problems += [f"unexpected {name}{nearest(name, list(own))}" for name in state if name not in own]
    problems += [
        f"{name}: expected shape {tuple(own[name].shape)}, got {tuple(value.shape)}"
        for name, value in state.items()
        if name in own and own[name].shape != value.shape
    ]
    problems += [f"{name}: holds NaN or infinity" for name, value in state.items() if not torch.isfinite(value).all()]
    if problems:
        shown = "\n  ".join(problems[:8])
        more = f"\n  … and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{source} does not fit the model of its config.json:\n  {shown}{more}")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(state[name])


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json` of a checkpoint folder, with the format number that `read_config` checks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"format": FORMAT, **config}, indent=2) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a checkpoint folder and check its format number."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise CheckpointError(f"{path}: expected format {FORMAT}, got {found!r}; this version of dicode cannot read it")
    return {key: value for key, value in values.items() if key != "format"}
