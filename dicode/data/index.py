"""Data sets of clips and their captions: reading a list, a folder or an archive of them, and checking the files."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dicode.data.folders import DataSet, scan, scan_archive
from dicode.data.lists import SUFFIXES, read_list
from dicode.data.records import FOREIGN_KEYS, ClipRecord, merged
from dicode.data.summary import Clip, shortened_list
from dicode.data.tars import TAR_SUFFIX
from dicode.files import Place, is_utf8, place
from dicode.video.read import VideoReadError, check_frames

CHECKED_SIZE = 32  # a picture is bad if it cannot be scaled to this side
_log = logging.getLogger(__name__)


class BadFile(NamedTuple):
    """A file of an index that cannot be read, and why."""

    record: ClipRecord
    reason: str


def read_index(folder_or_file: str | Place) -> list[ClipRecord]:
    """The clips of a data set, in order; see `read_data`."""
    return read_data(folder_or_file).records


def read_data(folder_or_file: str | Place) -> DataSet:
    """A data set of a list file (.jsonl, .json, .csv, .tsv, .parquet), a .tar or a folder, here or at an fsspec URL.

    Lines of one file become one clip with several captions. Missing captions are logged as a warning, with their count.
    Whether the files can be read is for `check_files`.

    Raises `VideoReadError` naming file and line where a list cannot be understood, or nothing is there.
    """
    path = place(folder_or_file)
    if not is_utf8(str(path)):
        raise VideoReadError(f"{str(path)!a}: the name is not UTF-8; rename it")
    try:
        found = _read(path)
    except OSError as error:
        raise VideoReadError(f"{path}: {error.strerror or error}") from error
    records = found.records = merged(found.records)
    found.left_out = +found.left_out  # without zeros
    if not records:
        others = [f"{count} {kind}" for kind, count in found.left_out.items()] + found.unread
        unread = f"; not read: {shortened_list(others)}" if others else ""
        raise VideoReadError(f"{path}: expected an index of clips or a folder of video files, found no clip{unread}")
    missing = sum(not (record.captions or record.fault) for record in records)
    if missing:
        _log.warning("%s: %d of %d clips have no caption", path, missing, len(records))
    foreign = {key: FOREIGN_KEYS[key] for record in records for key in record.extra if key in FOREIGN_KEYS}
    if foreign:
        names = ", ".join(f"{key} (did you mean {name}?)" for key, name in foreign.items())
        _log.warning("%s: keys that are kept and change nothing: %s", path, names)
    return found


def _read(path: Place) -> DataSet:
    suffix = path.suffix.lower()
    if path.is_dir():
        return scan(path)
    if isinstance(path, Path) and path.exists() and not path.is_file():
        raise VideoReadError(f"{path}: expected a file or a folder, got a pipe, socket or device")
    if not path.is_file():
        raise VideoReadError(f"{path}: no such index file or folder")
    found = DataSet(lists=[path.name])
    if suffix == TAR_SUFFIX:
        found.records = scan_archive(path, path.parent, found)
    elif suffix in SUFFIXES:
        found.records = read_list(path, path.parent)
    else:
        expected = f"{', '.join(SUFFIXES)} or {TAR_SUFFIX} file or a folder"
        raise VideoReadError(f"{path}: expected a {expected}, got {path.suffix or 'no suffix'!r}")
    return found


def check_files(records: Iterable[ClipRecord]) -> tuple[list[tuple[ClipRecord, Clip]], list[BadFile]]:
    """Read every clip to its end; a bad one is noted with its reason and the rest go on."""
    good: list[tuple[ClipRecord, Clip]] = []
    bad: list[BadFile] = []
    for record in records:
        try:
            with record.opened() as path:
                facts = check_frames(path, CHECKED_SIZE, record.start_s, record.end_s)
            size = f"{facts.width}×{facts.height}"
            good.append((record, Clip(facts.num_frames, facts.duration_s, record.captions, size, facts.hdr)))
        except (VideoReadError, OSError) as error:
            bad.append(BadFile(record, str(error)))
    return good, bad
