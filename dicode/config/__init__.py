"""Plain values ⇄ frozen dataclasses, with each field's range in its annotation.

Imports no torch, so that `dicode --help` is fast.
"""

import dataclasses
import difflib
import json
import math
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

DEFAULT_MODEL = "blocks"  # the bundled model where none is named …
FINETUNED_MODEL = "sprites"  # … and the one that is fine-tuned: `blocks` knows drawn scenes alone
Precision = Literal["auto", "bfloat16", "float32"]
MOST_INTEGER = 2**63 - 1
T = TypeVar("T")


class CheckpointError(ValueError):
    """A configuration or checkpoint that cannot be loaded: names file and key, what was expected and what was given."""


class RangeError(CheckpointError):
    """A number out of its field's range: names the field and the range."""


@dataclass(frozen=True)
class Range:
    """The range of a number, in its annotation: `Annotated[int, Range(1, 512)]`. NaN is in none."""

    least: int | float = -math.inf
    most: int | float = math.inf
    above: bool = False  # exclude `least`, which is 0 then

    def problem(self, value: int | float) -> str:
        """An error's text for a number out of the range, '' for one within."""
        if (self.least < value if self.above else self.least <= value) and value <= self.most:
            return ""
        if self.above:
            return f"expected a positive number, got {shortened(value)} (at most {self.most:,})"
        expected = f"{self.least:,} or more" if self.most >= 2**31 - 1 else f"{self.least:,} to {self.most:,}"
        return f"expected {expected}, got {shortened(value)}"


@dataclass(frozen=True)
class Items:
    """How many items a tuple has."""

    least: int
    most: int


class Unicode:
    """A text of valid Unicode: no bytes of another encoding, as a terminal may pass on."""


Count = Annotated[int, Range(1, 2**31 - 1)]
Whole = Annotated[int, Range(0, 2**31 - 1)]
Width = Annotated[int, Range(1, 2**16)]  # of a layer
Depth = Annotated[int, Range(0, 512)]  # in blocks
Side = Annotated[int, Range(1, 2**13)]  # of a picture
UpTo1000 = Annotated[float, Range(0, 1000, above=True)]
Steps = Annotated[int, Range(1, 1000)]  # of a sampler
StepsOrNone = Annotated[int, Range(0, 1000)]
Guidance = Annotated[float, Range(0, 1000)]
Share = Annotated[float, Range(0, 1)]
Factor = Annotated[float, Range(0, 1000)]  # of a temperature or a scale
Positive = Annotated[float, Range(0, 1e9, above=True)]
TrainingSteps = Annotated[int, Range(1, 10**8)]
LearningRate = Annotated[float, Range(0, 10, above=True)]
BatchSize = Annotated[int, Range(1, 2**20)]
Seed = Annotated[int, Range(0, MOST_INTEGER)]


def nearest(word: str, known: Iterable[str], similarity: float = 0.6) -> str:
    """' (did you mean …?)' for a misspelt name, or '' when nothing is close; capitals are as small letters."""
    names = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.strip().lower(), names, 1, similarity)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""


def config_to_dict(config: Any) -> dict[str, Any]:
    """A frozen dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_dict(kind: type[T], values: Any, where: str = "config") -> T:
    """Build a frozen dataclass from JSON values.

    Raises `CheckpointError` that names a key which is unknown, missing, of another type or out of its range.
    """
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{where}: expected a section of {kind.__name__}, got {shortened(values)}")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise CheckpointError(f"{where}: unknown key {shortened(key)}{nearest(str(key), list(fields))}")
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in values:
            raise CheckpointError(f"{where}: missing key {key!r}")
    hints = _hints(kind)  # type: ignore[arg-type]
    built = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    try:
        return kind(**built)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def check_ranges(config: Any, name: Callable[[str], str] = str, inside: str = "") -> None:
    """Raise `RangeError` for the first number of a dataclass, nested ones included, that is out of its field's range.

    `name` turns a field's path (loop.optim.lr) into the error's name for it.
    """
    try:
        hints = _hints(type(config))  # type: ignore[arg-type]
    except NameError:  # of a user's own dataclass, whose annotations cannot be resolved
        return
    for field in dataclasses.fields(config):
        path, value = f"{inside}.{field.name}" if inside else field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, name, path)
        else:
            _check(hints[field.name], value, name(path))


def _check(hint: Any, value: Any, where: str) -> None:
    """Raise `RangeError` where a value of the right type is out of its annotation's range."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return
    if origin is Annotated:
        for note in arguments[1:]:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if isinstance(note, Range) and is_number and (problem := note.problem(value)):
                raise RangeError(f"{where}: {problem}")
            if isinstance(note, Items) and not note.least <= len(value) <= note.most:
                raise RangeError(f"{where}: expected {note.least} to {note.most} values, got {len(value)}")
            if note is Unicode and any("\ud800" <= letter <= "\udfff" for letter in value):
                raise RangeError(f"{where}: expected text in UTF-8, got {value!r}")
        _check(arguments[0], value, where)
    elif origin in (typing.Union, types.UnionType):
        _check(next(a for a in arguments if a is not type(None)), value, where)
    elif isinstance(value, tuple):
        for item in value:
            _check(arguments[0] if arguments else type(item), item, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RangeError(f"{where}: expected a finite number, got {value}")
    elif isinstance(value, int) and abs(value) > MOST_INTEGER:
        raise RangeError(f"{where}: expected a number of at most 64 bits, got {shortened(value)}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        converted = _convert(arguments[0], value, where)
        _check(hint, converted, where)
        return converted
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return config_from_dict(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise CheckpointError(f"{where}: expected a list, got {shortened(value)}")
        return tuple(_convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Literal:
        if not isinstance(value, str | int) or value not in arguments:
            raise CheckpointError(f"{where}: expected one of {', '.join(map(str, arguments))}, got {shortened(value)}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MOST_INTEGER:
        value = float(value)
    if hint in (int, float, str, bool):
        if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
            raise CheckpointError(f"{where}: expected {hint.__name__}, got {shortened(value)}")
        _check(hint, value, where)
    return value


_SHORT = reprlib.Repr()  # stops after a few items, however large the value
_SHORT.maxstring = _SHORT.maxother = 60


def shortened(value: Any) -> str:
    """A value for an error's one line."""
    if isinstance(value, float):
        return f"{value:g}"
    try:
        return _SHORT.repr(value)[:200]
    except ValueError:
        return "a number of thousands of digits"


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict (`object_pairs_hook`). Raises `ValueError` for a duplicate key."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return values


def missing_extra(error: ModuleNotFoundError, extra: str) -> ImportError:
    """The same error, naming the extra of this package to install."""
    if error.name and error.name.split(".")[0] == "dicode":
        return error
    return ImportError(f"this needs the package {error.name!r}, not installed: pip install 'dicode[{extra}]'")
