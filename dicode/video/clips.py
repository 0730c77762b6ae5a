"""Clips and their captions: reading an index of them, checking the files, where key frames lie."""

import csv
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dicode.video.io import DEFAULT_FPS, VIDEO_SUFFIXES, VideoReadError, natural_key, read_video

INDEX_NAMES = ("captions.jsonl", "captions.csv")
DROID_VALIDATION_LAB = "f147f077"  # one lab's rooms and cameras, so that none of them is trained on
VALIDATION_EVERY = 15
CHECKED_SIZE = 32  # files are checked at this size: every frame is decoded, and little of it kept
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipRecord:
    """One line of an index: a video file, what it shows, and its place in the index (`line` counts from 0)."""

    path: Path
    caption: str  # '' where the source has none
    line: int
    folder: Path  # where the index lies
    expanded: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def captions(self) -> tuple[str, ...]:
        """Every text there is for this clip, the short one first."""
        return tuple(text for text in (self.caption, self.expanded) if text)


class BadFile(NamedTuple):
    """A file of an index that cannot be read, and why."""

    record: ClipRecord
    reason: str


def read_index(folder_or_file: str | Path) -> list[ClipRecord]:
    """The clips of a data set, in order, from a .jsonl or .csv file or from a folder.

    A line names `file` (relative to the index) and `caption`, perhaps `expanded`; other values are kept in `extra`. A
    folder without captions.jsonl or captions.csv gives its video files, each with the text of the .txt beside it.
    Missing captions are '' and their count is logged as a warning. Whether the files can be read is for `check_files`.

    Raises `VideoReadError` naming file and line where the index cannot be understood, or holds nothing.
    """
    path = Path(folder_or_file)
    if path.is_dir():
        path = next((path / name for name in INDEX_NAMES if (path / name).is_file()), path)
    if path.is_dir():
        records = list(_from_text_files(path))
    elif not path.is_file():
        raise VideoReadError(f"{path}: no such index file or folder")
    elif path.suffix.lower() in (".jsonl", ".csv"):
        rows = _jsonl_rows(path) if path.suffix.lower() == ".jsonl" else _csv_rows(path)
        records = [_record(path, line, row) for line, row in rows]
    else:
        raise VideoReadError(f"{path}: expected a .jsonl or .csv index or a folder, got {path.suffix or 'no suffix'!r}")
    if not records:
        raise VideoReadError(f"{path}: expected an index of clips or a folder of video files, found no clip")
    missing = sum(not record.caption for record in records)
    if missing:
        _log.warning("%s: %d of %d clips have no caption", path, missing, len(records))
    return records


def is_validation(record: ClipRecord) -> bool:
    """Whether a clip is kept from training: for `droid` one lab's, elsewhere every line divisible by 15."""
    if record.folder.resolve().name == "droid":
        return record.extra.get("lab") == DROID_VALIDATION_LAB
    return record.line % VALIDATION_EVERY == 0


def check_files(
    records: Iterable[ClipRecord], fps: float | None = DEFAULT_FPS, min_frames: int = 1
) -> tuple[list[ClipRecord], list[BadFile]]:
    """Read every file to its end; a bad one is noted with its reason and the rest go on."""
    good: list[ClipRecord] = []
    bad: list[BadFile] = []
    for record in records:
        try:
            read_video(record.path, fps, CHECKED_SIZE, min_frames=min_frames)
            good.append(record)
        except (VideoReadError, OSError) as error:
            bad.append(BadFile(record, str(error)))
    return good, bad


def key_frame_indices(num_frames: int, spacing: int = 16) -> list[int]:
    """Indices of the key frames of a video, `spacing` apart: 0, 16, 32, … and the end of its last clip (DESIGN §2.9).

    N clips have N+1 key frames. A video that ends with or within its last clip has no frame 16·N: its last frame takes
    that place. Raises ValueError for a video of fewer than 2 frames.
    """
    if num_frames < 2:
        raise ValueError(f"expected at least 2 frames, got {num_frames}")
    num_clips = max(1, -(-(num_frames - 1) // spacing))
    return [min(i * spacing, num_frames - 1) for i in range(num_clips + 1)]


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise VideoReadError(f"{path}, line {line + 1}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise VideoReadError(f"{path}, line {line + 1}: expected an object, got {text.strip()[:60]}")
            yield line, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if not {"file", "caption"} <= set(reader.fieldnames or ()):
            raise VideoReadError(
                f"{path}: expected a first line with columns file and caption, got {reader.fieldnames}"
            )
        yield from enumerate(reader)


def _record(path: Path, line: int, row: dict[str, Any]) -> ClipRecord:
    texts = {key: row.pop(key, None) for key in ("file", "caption", "expanded")}
    for key, text in texts.items():
        if not isinstance(text, str | None) or (key == "file" and not text):
            raise VideoReadError(f"{path}, entry {line} (counting from 0): expected text for {key!r}, got {text!r}")
    caption, expanded = (" ".join((texts[key] or "").split()) for key in ("caption", "expanded"))
    return ClipRecord(path.parent / str(texts["file"]), caption, line, path.parent, expanded, row)


def _from_text_files(folder: Path) -> Iterator[ClipRecord]:
    videos = (path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    for line, path in enumerate(sorted(videos, key=natural_key)):
        note = path.with_suffix(".txt")
        caption = " ".join(note.read_text(encoding="utf-8").split()) if note.is_file() else ""
        yield ClipRecord(path, caption, line, folder)
