"""Which files of a folder a cache has written there: no others are removed, and no cache is begun among others."""

import json
import re
from collections.abc import Iterator
from typing import Any

from dicode.files import PARTIAL, Place

INDEX, VIDEOS = "index.json", "videos.safetensors"
SHARD = re.compile(r"shard-\d{5,}")
NAMES = re.compile(
    rf"{INDEX}|quarantine\.jsonl|copies\.jsonl|{re.escape(VIDEOS)}|shard-\d{{5,}}\.(json|safetensors|[\w.+-]+\.safetensors)"
)
UNFINISHED = re.compile(rf"\.({NAMES.pattern})\..*{re.escape(PARTIAL)}")
# Computed of a whole cache, and stale when that changes.
OF_THE_WHOLE = re.compile(r"((rendered|EffLite0)-[\w.+-]+|features-\w+-[0-9a-f]{8}-[0-9a-f]{16})\.safetensors")
TENSORS = ({"frames", "times_s"}, {"values"}, {"rows", "values"})  # of a shard; of what was computed of its frames
OF_VIDEOS = {"first", "count", "period_s", "text_end"}  # among others
OF_A_NOTE = {"number", "inputs", "shard", "entries", "bad"}
MOST_HEADER = 2**20  # bytes of a safetensors header of ours


def check_own(folder: Place) -> None:
    """Raise `ValueError` for a folder that holds other files than a cache's, unless it is a cache among them."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder for a cache, got a file; name another -o")
    others = [path.name for path in folder.iterdir() if not (path.name.startswith(".") or is_own(path))]
    is_cache = (folder / INDEX).is_file() or any(map(is_own, folder.glob("shard-*.json")))
    if INDEX in others or (others and not is_cache):
        names = ", ".join(sorted(others)[:3]) + (", …" if len(others) > 3 else "")
        raise ValueError(f"{folder}: holds files that no cache has ({names}); name a new or an empty folder with -o")


def shard_files(folder: Place, name: str = "shard-*") -> Iterator[Place]:
    """The files of one shard, or of all, with what was computed of them."""
    return (path for path in [*folder.glob(f"{name}.*")] if is_own(path))


def whole_files(folder: Place) -> Iterator[Place]:
    """Files computed of a whole cache as it was."""
    return (path for path in [*folder.glob("*.safetensors")] if OF_THE_WHOLE.fullmatch(path.name))


def stale_files(folder: Place) -> Iterator[Place]:
    """Unfinished files of a cache's, which nobody writes any more."""
    return (path for path in [*folder.glob(f".*{PARTIAL}")] if UNFINISHED.fullmatch(path.name))


def is_own(path: Place) -> bool:
    """Whether a cache has written a file, by its name and what it holds."""
    name = path.name
    if UNFINISHED.fullmatch(name):
        return True
    if not NAMES.fullmatch(name) or not path.is_file():
        return False
    if name == INDEX:
        return {"format", "shards"} <= _keys(path.read_bytes())
    if SHARD.match(name) and name.endswith(".json"):
        return _keys(path.read_bytes()) >= OF_A_NOTE
    if SHARD.match(name):
        return _tensor_names(path) in TENSORS
    return name != VIDEOS or _tensor_names(path) >= OF_VIDEOS


def _tensor_names(path: Place) -> set[str]:
    """The names of a safetensors file's tensors, as far as one of ours may have them."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return _keys(file.read(size)) - {"__metadata__"} if size <= MOST_HEADER else set()


def _keys(data: bytes) -> set[str]:
    """The keys of a JSON object; none of anything else."""
    try:
        values: Any = json.loads(data)
    except (ValueError, RecursionError):
        return set()
    return set(values) if isinstance(values, dict) else set()
