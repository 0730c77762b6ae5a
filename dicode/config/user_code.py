"""Users' own Python files, such as recipes and scorers: what they define, and what of theirs raises.

Imports no torch, so that `dicode --help` is fast.
"""

import sys
import traceback
import types
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from dicode.config import missing_extra, nearest


class RecipeError(ValueError):
    """A user's Python file that raises or lacks something: names file, line and exception."""


def load_function(spec: str, kind: str, form: str, extra: str) -> Callable[..., Any]:
    """The function that `FILE.py:NAME` names, of a user's recipe or scorer (`kind`).

    An error shows the expected `form`, and the package `extra` to install where the file needs one that is missing.
    """
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise RecipeError(f"{kind}: expected {form}, got {spec!r}")
    module = load_file(Path(file), kind, extra)
    values = vars(module).items()
    own = [n for n, value in values if callable(value) and getattr(value, "__module__", "") == module.__name__]
    if name not in own:
        raise RecipeError(f"{file}: no function {name!r}{nearest(name, own)}; it has {', '.join(own)}")
    return getattr(module, name)


def load_file(file: Path, kind: str, extra: str) -> types.ModuleType:
    """Run a Python file as a module, under a name that no library has: `tokenizers.py` must not replace one."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such {kind} file")
    name = f"dicode_{kind}_{sha256(str(file.resolve()).encode()).hexdigest()[:8]}_{file.stem}"
    module = sys.modules[name] = types.ModuleType(name)  # dataclasses look their module up there
    module.__file__ = str(file)
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
    except ModuleNotFoundError as error:
        raise missing_extra(error, extra) from error
    except SyntaxError as error:
        raise RecipeError(f"{file}, line {error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        raise raised_in(str(file), error) from error
    return module


def run_own(function: Callable[..., Any], spec: str, *arguments: Any) -> Any:
    """Call a function of a user's file. Raises `RecipeError` for whatever it raises."""
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        raise raised_in(spec.rpartition(":")[0], error) from error


def raised_in(file: str, error: BaseException) -> RecipeError:
    """An exception of a user's file in one line: file, line number and text, exception."""
    inside = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == Path(file)]
    where = f", line {inside[-1].lineno} ({inside[-1].line})" if inside else ""
    return RecipeError(f"{file}{where}: {type(error).__name__}: {error}")
