"""Clips and their captions: reading an index of them, checking the files."""

import csv
import io
import json
import logging
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from dicode.data.tars import TAR_SUFFIX, Member, samples
from dicode.files import Place, fetched, place
from dicode.video.io import DEFAULT_FPS, VIDEO_SUFFIXES, VideoReadError, natural_key, read_video

INDEX_NAMES = ("captions.jsonl", "captions.csv")
DROID_VALIDATION_LAB = "f147f077"  # one lab's rooms and cameras, so that none of them is trained on
VALIDATION_EVERY = 15
CHECKED_SIZE = 32  # files are checked at this size: every frame is decoded, and little of it kept
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipRecord:
    """One line of an index: a video file, what it shows, and its place in the index (`line` counts from 0)."""

    path: Place
    caption: str  # '' where the source has none
    line: int
    folder: Place  # where the index lies
    expanded: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    inside: Member | None = None  # of a tar archive, if it is no file of its own
    fault: str = ""  # what is wrong with it, if that is known before it is read

    @property
    def source(self) -> str:
        """The name of the data set: that of its folder."""
        return self.folder.resolve().name

    @property
    def file(self) -> str:
        """The path within the data set, or the whole path of what lies elsewhere."""
        path, folder = self.path.as_posix(), self.folder.as_posix()
        return path.removeprefix(f"{folder}/") if folder != "." else path

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """A path to read frames from, as long as the block lasts; errors of reading name the clip, not a copy of it."""
        if self.fault:
            raise VideoReadError(self.fault)
        held, span = (self.inside.archive, self.inside.span) if self.inside else (self.path, None)
        with fetched(held, span, self.path.name) as local:
            try:
                yield local
            except VideoReadError as error:
                raise VideoReadError(str(error).replace(str(local), str(self.path))) from error

    @property
    def captions(self) -> tuple[str, ...]:
        """Every text there is for this clip, the short one first."""
        return tuple(text for text in (self.caption, self.expanded) if text)


class BadFile(NamedTuple):
    """A file of an index that cannot be read, and why."""

    record: ClipRecord
    reason: str


def read_index(folder_or_file: str | Place) -> list[ClipRecord]:
    """The clips of a data set, in order, from a .jsonl, .csv or .tar file or from a folder, here or at an fsspec URL.

    A line names `file` (relative to the index) and `caption`, perhaps `expanded`; other values are kept in `extra`. A
    folder without captions.jsonl or captions.csv gives its video files, each with the text of the .txt beside it, and
    what its tar archives hold, arranged as `webdataset` has it: KEY.mp4 with KEY.json (with the values of a line) or
    KEY.txt. Missing captions are '' and their count is logged as a warning. Whether the files can be read is for
    `check_files`.

    Raises `VideoReadError` naming file and line where the index cannot be understood, or holds nothing.
    """
    path = place(folder_or_file)
    if path.is_dir():
        path = next((path / name for name in INDEX_NAMES if (path / name).is_file()), path)
    if path.is_dir():
        records = list(_from_files(path))
    elif not path.is_file():
        raise VideoReadError(f"{path}: no such index file or folder")
    elif path.suffix.lower() == TAR_SUFFIX:
        records = list(_from_tar(path, path.parent, 0))
    elif path.suffix.lower() in (".jsonl", ".csv"):
        rows = _jsonl_rows(path) if path.suffix.lower() == ".jsonl" else _csv_rows(path)
        records = [_record(path, line, row) for line, row in rows]
    else:
        raise VideoReadError(
            f"{path}: expected a .jsonl, .csv or .tar file or a folder, got {path.suffix or 'no suffix'!r}"
        )
    if not records:
        raise VideoReadError(f"{path}: expected an index of clips or a folder of video files, found no clip")
    missing = sum(not record.caption for record in records)
    if missing:
        _log.warning("%s: %d of %d clips have no caption", path, missing, len(records))
    return records


def is_validation(record: ClipRecord) -> bool:
    """Whether a clip is kept from training: as its line says (`validation`: true or false), else by a rule.

    For `droid` it is one lab's clips, elsewhere every line divisible by 15.
    """
    if isinstance(said := record.extra.get("validation"), bool):
        return said
    if record.source == "droid":
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
            with record.opened() as path:
                read_video(path, fps, CHECKED_SIZE, min_frames=min_frames)
            good.append(record)
        except (VideoReadError, OSError) as error:
            bad.append(BadFile(record, str(error)))
    return good, bad


def _jsonl_rows(path: Place) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for line, text in enumerate(file):
            if not text.strip():
                continue
            try:
                row = json.loads(text.decode("utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise VideoReadError(f"{path}, line {line + 1}: not JSON in UTF-8 ({error})") from error
            if not isinstance(row, dict):
                shown = text.decode("utf-8").strip()[:60]
                raise VideoReadError(f"{path}, line {line + 1}: expected an object, got {shown}")
            yield line, row


def _csv_rows(path: Place) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise VideoReadError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not {"file", "caption"} <= set(reader.fieldnames or ()):
        raise VideoReadError(f"{path}: expected a first line with columns file and caption, got {reader.fieldnames}")
    yield from enumerate(reader)


def _record(path: Place, line: int, row: dict[str, Any]) -> ClipRecord:
    texts = {key: row.pop(key, None) for key in ("file", "caption", "expanded")}
    for key, text in texts.items():
        if not isinstance(text, str | None) or (key == "file" and not text):
            raise VideoReadError(f"{path}, entry {line} (counting from 0): expected text for {key!r}, got {text!r}")
    caption, expanded = (" ".join((texts[key] or "").split()) for key in ("caption", "expanded"))
    file = str(texts["file"])
    video = place(file) if "://" in file else path.parent / file
    return ClipRecord(video, caption, line, path.parent, expanded, row)


def _from_files(folder: Place) -> Iterator[ClipRecord]:
    found = [path for path in folder.rglob("*") if path.suffix.lower() in (TAR_SUFFIX, *VIDEO_SUFFIXES)]
    line = 0
    for path in sorted((path for path in found if path.is_file()), key=natural_key):
        is_tar, note = path.suffix.lower() == TAR_SUFFIX, path.with_suffix(".txt")
        notes = {".txt": note.read_bytes()} if not is_tar and note.is_file() else {}
        for record in _from_tar(path, folder, line) if is_tar else (_noted(path, notes, line, folder),):
            yield record
            line += 1


def _from_tar(archive: Place, folder: Place, line: int) -> Iterator[ClipRecord]:
    try:
        for name, member, notes in samples(archive):
            yield replace(_noted(archive / name, notes, line, folder), inside=member)
            line += 1
    except tarfile.ReadError as error:
        yield ClipRecord(archive, "", line, folder, fault=f"{archive}: not a whole, uncompressed tar ({error})")


def _noted(path: Place, notes: Mapping[str, bytes], line: int, folder: Place) -> ClipRecord:
    """A clip with what the .json or else the .txt beside it says; one that cannot be understood makes it a bad file."""
    try:
        if ".json" in notes:
            row = json.loads(notes[".json"].decode("utf-8"))
            return replace(_record(path, line, {**row, "file": path.name}), path=path, folder=folder)
        return ClipRecord(path, " ".join(notes.get(".txt", b"").decode("utf-8").split()), line, folder)
    except (ValueError, TypeError) as error:
        return ClipRecord(path, "", line, folder, fault=f"{path}: the text beside it cannot be read ({error})")
