"""Plain values ⇄ frozen dataclasses, as in `config.json`. Importing it needs no torch, so that help comes at once."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

Precision = Literal["auto", "bfloat16", "float32"]
T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be loaded: says which file, what was expected and what was found."""


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
