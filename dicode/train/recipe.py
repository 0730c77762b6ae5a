"""Recipes: functions of a Python file that return a training run, by `FILE.py:FUNCTION`."""

import ast
import dataclasses
import math
from pathlib import Path
from typing import Any

from dicode.user_code import RecipeError, load_file, load_function, run_own


def load_run(recipe: str) -> Any:
    """Call RUN of `FILE.py:RUN`; raises `ValueError` where it is no function that returns a dataclass."""
    run = run_own(load_function(recipe, "recipe", "FILE.py:RUN, as in recipes/sprites.py:lm", "train"), recipe)
    if not dataclasses.is_dataclass(run):
        raise RecipeError(f"{recipe}: expected it to return a run (a dataclass), got {type(run).__name__}")
    return run


def runs_of(file: str) -> dict[str, Any]:
    """All runs of a recipe file by their names, in its order: functions without parameters that return a …Run."""
    from dicode.files import read_text  # brings fsspec, which help need not wait for

    try:
        parts = ast.parse(read_text(Path(file)), file).body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise RecipeError(f"{file}: not readable as Python ({error})") from error
    names = [
        part.name
        for part in parts
        if isinstance(part, ast.FunctionDef)
        and not part.args.args
        and part.returns is not None
        and ast.unparse(part.returns).strip("'").endswith("Run")
        and not part.name.startswith("_")
    ]
    if not names:
        raise RecipeError(f"{file}: expected functions that return a run, as 'def lm() -> LanguageRun:', found none")
    return {name: load_run(f"{file}:{name}") for name in names}


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
