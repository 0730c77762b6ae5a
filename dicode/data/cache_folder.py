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
MOST_HEADER = 2**20  # bytes of a safetensors header of ours


def check_own(folder: Place) -> None:
    """Raise `ValueError` for a folder that holds other files than a cache's, unless it is a cache among them."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder for a cache, got a file; name another -o")
    others = [path.name for path in folder.iterdir() if not (path.name.startswith(".") or is_own(path))]
    index, has_others = folder / INDEX, bool(others)
    if INDEX in others or (has_others and not index.is_file() and not any(map(is_own, folder.glob("shard-*.json")))):
        names = ", ".join(sorted(others)[:3]) + (", …" if len(others) > 3 else "")
        raise ValueError(f"{folder}: holds files that no cache has ({names}); name a new or an empty folder with -o")


def shard_files(folder: Place, name: str = "shard-*") -> Iterator[Place]:
    """The files of one shard, or of all, with what was computed of them."""
    found: list[Place] = [*folder.glob(f"{name}.*")]
    yield from (path for path in found if is_own(path))


def whole_files(folder: Place) -> Iterator[Place]:
    """What was computed of a whole cache as it was."""
    found: list[Place] = [*folder.glob("*.safetensors")]
    yield from (path for path in found if OF_THE_WHOLE.fullmatch(path.name))


def stale_files(folder: Place) -> Iterator[Place]:
    """Unfinished files of a cache's, which nobody writes any more."""
    found: list[Place] = [*folder.glob(f".*{PARTIAL}")]
    yield from (path for path in found if UNFINISHED.fullmatch(path.name))


def is_own(path: Place) -> bool:
    """Whether a cache has written a file, by its name and what it holds."""
    name = path.name
    if UNFINISHED.fullmatch(name):
        return True
    if not NAMES.fullmatch(name) or not path.is_file():
        return False
    if name == INDEX:
        held = _json(path)
        return "format" in held and "shards" in held
    if SHARD.match(name) and name.endswith(".json"):
        return {"number", "inputs", "shard", "entries", "bad"} <= _json(path).keys()
    if SHARD.match(name):
        return tensor_names(path) in TENSORS
    return name != VIDEOS or tensor_names(path) >= OF_VIDEOS


def tensor_names(path: Place) -> set[str]:
    """The names of a safetensors file's tensors, as far as one of ours may have them."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if size <= MOST_HEADER else b""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return set()
    return {str(name) for name in values if name != "__metadata__"} if isinstance(values, dict) else set()


def _json(path: Place) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
