"""Functions of Python files that a user supplies, by `FILE.py:FUNCTION`: recipes of runs, scorers of clips."""

import dataclasses
import math
import sys
import traceback
from collections.abc import Callable
from hashlib import sha256
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

from dicode.config import nearest
from dicode.extras import missing_extra


class RecipeError(ValueError):
    """What a user's file raised or does not hold: names file, line and the exception."""


def load_run(recipe: str) -> Any:
    """Call RUN of `FILE.py:RUN`; raises `ValueError` where it is no function that returns a dataclass."""
    run = run_own(load_function(recipe, "recipe", "FILE.py:RUN, as in recipes/sprites.py:lm", "train"), recipe)
    if not dataclasses.is_dataclass(run):
        raise RecipeError(f"{recipe}: expected it to return a run (a dataclass), got {type(run).__name__}")
    return run


def stages_of(file: str) -> tuple[dict[str, Any], dict[str, float], dict[str, Any]]:
    """Runs of a recipe file in the order of its `STAGES`, their shares of the time, and its `SAMPLING` if it has one.

    Raises `RecipeError` where the file does not say how to train it whole.
    """
    module = load_file(Path(file), "recipe", "train")
    shares, sampling = getattr(module, "STAGES", None), getattr(module, "SAMPLING", {})
    if not isinstance(shares, dict) or not shares or not all(_is_share(share) for share in shares.values()):
        raise RecipeError(
            f"{file}: expected STAGES, a dict of its runs in order with their shares of the time, such as "
            f"{{'first_stage': 0.3, 'lm': 0.7}}, got {shares!r}; or name one run, as in {file}:lm"
        )
    runs = {name: load_run(f"{file}:{name}") for name in shares}
    return runs, {name: float(share) for name, share in shares.items()}, dict(sampling)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def load_function(spec: str, kind: str, form: str, extra: str) -> Callable[..., Any]:
    """The function that `FILE.py:NAME` names; the error of another text says what `form` is expected of a `kind`.

    `extra` is what to install where the file needs a package that is not there.
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


def load_file(file: Path, kind: str, extra: str) -> ModuleType:
    """Run a Python file as a module under a name that no library has, so that `tokenizers.py` replaces none."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such {kind} file")
    name = f"dicode_{kind}_{sha256(str(file.resolve()).encode()).hexdigest()[:8]}_{file.stem}"
    spec = util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = util.module_from_spec(spec)  # a dataclass in the file looks for its module there
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise missing_extra(error, extra) from error
    except SyntaxError as error:
        raise RecipeError(f"{file}, line {error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        raise raised_in(str(file), error) from error
    return module


def run_own(function: Callable[..., Any], spec: str, *arguments: Any) -> Any:
    """Call a function of a user's file; raises `RecipeError` for whatever it raises, naming its line."""
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        raise raised_in(spec.rpartition(":")[0], error) from error


def raised_in(file: str, error: BaseException) -> RecipeError:
    """The error of a user's file in one line: where in that file, what stands there, what was raised."""
    inside = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == Path(file)]
    where = f", line {inside[-1].lineno} ({inside[-1].line})" if inside else ""
    return RecipeError(f"{file}{where}: {type(error).__name__}: {error}")
