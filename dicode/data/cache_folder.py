"""Which files of a folder a cache has written there: no others are removed, and no cache is begun among others."""

import json
import re
from collections.abc import Iterator
from typing import Any

from dicode.files import PARTIAL, Place

INDEX, VIDEOS = "index.json", "videos.safetensors"
NAMES = re.compile(
    r"index\.json|(quarantine|copies)\.jsonl|videos\.safetensors|shard-\d{5,}\.(json|([\w.+-]+\.)?safetensors)"
)
UNFINISHED = re.compile(rf"\.({NAMES.pattern})\..*{re.escape(PARTIAL)}")
# Computed of a whole cache, and stale when that changes.
OF_THE_WHOLE = re.compile(r"(rendered-[\w.+-]+|features-\w+-[0-9a-f]{8}-[0-9a-f]{16})\.safetensors")
# Of a shard; of what was computed of its frames; of rendered clips; of features.
TENSORS = ({"frames", "times_s"}, {"values"}, {"rows", "values"}, {"latents"}, {"clips", "frames", "probabilities"})
OF_VIDEOS = {"first", "count", "period_s", "text_end"}  # among others
OF_LINES = ({"file", "reason"}, {"source", "file", "start_s", "repeats"})  # of quarantine.jsonl, copies.jsonl
OF_A_NOTE = {"number", "inputs", "shard", "entries", "bad"}
MOST_HEADER = 2**20  # bytes of a safetensors header of ours


def check_own(folder: Place) -> None:
    """Raise `ValueError` for a folder that holds other files than a cache's, unless it is a cache among them."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder for a cache, got a file; name another -o")
    others = [path.name for path in folder.iterdir() if not (path.name.startswith(".") or is_own(path))]
    is_cache = any(is_own(path) for path in (folder / INDEX, *folder.glob("shard-*.json")))
    if is_cache:  # where another file may stay, but none in the place of a cache's
        others = [name for name in others if NAMES.fullmatch(name) and not _is_damaged(folder / name)]
    if others:
        names = ", ".join(sorted(others)[:3]) + (", …" if len(others) > 3 else "")
        raise ValueError(f"{folder}: holds files that no cache has ({names}); name a new or an empty folder with -o")


def shard_files(folder: Place, name: str = "shard-*") -> Iterator[Place]:
    """The files of one shard, or of all, with what was computed of them."""
    return (path for path in [*folder.glob(f"{name}.*")] if is_own(path))


def remove_index(folder: Place) -> None:
    """Leave the shards of a cache alone, with what was computed of each; what was computed of the whole of it goes."""
    for path in [*folder.glob("*.safetensors")]:
        if OF_THE_WHOLE.fullmatch(path.name) and is_own(path):
            path.unlink()
    (folder / INDEX).unlink(missing_ok=True)


def stale_files(folder: Place) -> Iterator[Place]:
    """Unfinished files of a cache's, which nobody writes any more."""
    return (path for path in [*folder.glob(f".*{PARTIAL}")] if UNFINISHED.fullmatch(path.name))


def is_own(path: Place) -> bool:
    """Whether a cache has written a file, by its name and what it holds."""
    name = path.name
    if UNFINISHED.fullmatch(name):
        return True
    if not (NAMES.fullmatch(name) or OF_THE_WHOLE.fullmatch(name)) or not path.is_file():
        return False
    with path.open("rb") as file:
        if name == INDEX:
            return _keys(file.read()) >= {"format", "shards"}
        if name.endswith(".jsonl"):
            return all(_keys(line) in OF_LINES for line in file)
        if name.endswith(".json"):
            return _keys(file.read()) >= OF_A_NOTE
        names = _header(file)
    if name == VIDEOS:
        return names >= OF_VIDEOS
    return bool(names) and names <= TENSORS[-1] if name.startswith("features-") else names in TENSORS[:-1]


def _is_damaged(path: Place) -> bool:
    """Whether a cache's file cannot be read any more, or breaks off in its last line, and may be written again."""
    with path.open("rb") as file:
        if path.suffix == ".jsonl":
            *whole, last = [*file] or [b""]
            return all(_keys(line) in OF_LINES for line in whole) and not _keys(last)
        return not (_header(file) if path.suffix == ".safetensors" else _keys(file.read()))


def _header(file: Any) -> set[str]:
    """The names of a safetensors file's tensors; none of another file."""
    size = int.from_bytes(file.read(8), "little")
    return _keys(file.read(size)) - {"__metadata__"} if size <= MOST_HEADER else set()


def _keys(data: bytes) -> set[str]:
    """The keys of a JSON object; none of anything else."""
    try:
        values: Any = json.loads(data)
    except (ValueError, RecursionError):
        return set()
    return set(values) if isinstance(values, dict) else set()
