"""Data sets of clips and their captions: reading a list, a folder or an archive, checking the files, and a table."""

import logging
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dicode.data.folders import TAR_SUFFIX, DataSet, scan, scan_archive
from dicode.data.lists import SUFFIXES, read_list
from dicode.data.records import FOREIGN_KEYS, ClipRecord, merged
from dicode.files import Place, TextError, is_utf8, place
from dicode.video.read import VideoReadError, check_frames

CHECKED_SIZE = 32  # a picture is bad if it cannot be scaled to this side
CLIP_S = 2.0  # of the bundled models: 16 frames at 8 a second
MOST_SHOWN = 5  # of different values
_log = logging.getLogger(__name__)


class Clip(NamedTuple):
    """A clip as it was found; `size` and `hdr` are of its file, and not known of a cache."""

    frames: int
    seconds: float
    captions: tuple[str, ...]
    size: str = ""
    hdr: bool = False
    loops: bool = False


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
    except TextError as error:
        raise VideoReadError(str(error)) from error
    except OSError as error:
        raise VideoReadError(f"{error.filename or path}: {error.strerror or error}") from error
    records = found.records = merged(found.records)
    found.left_out = +found.left_out  # without zeros
    if not records:
        others = [f"{count} {kind}" for kind, count in found.left_out.items()] + found.unread
        unread = f"; not read: {_shortened(others)}" if others else ""
        raise VideoReadError(f"{path}: expected an index of clips or a folder of video files, found no clip{unread}")
    if missing := sum(not (record.captions or record.fault) for record in records):
        _log.warning("%s: %d of %d clips have no caption", path, missing, len(records))
    foreign = {key: FOREIGN_KEYS[key.lower()] for r in records for key in r.extra if key.lower() in FOREIGN_KEYS}
    if foreign:
        names = ", ".join(f"{key} (did you mean {name}?)" for key, name in foreign.items())
        _log.warning("%s: keys that are kept and change nothing: %s", path, names)
    return found


def _read(path: Place) -> DataSet:
    suffix = path.suffix.lower()
    if path.is_dir():
        return scan(path)
    if not path.is_file():
        what = "expected a file or a folder, got a pipe, socket or device"
        exists = isinstance(path, Path) and path.exists()
        raise VideoReadError(f"{path}: {what if exists else 'no such index file or folder'}")
    data = DataSet(lists=[path.name])
    if suffix == TAR_SUFFIX:
        data.records = scan_archive(path, path.parent, data)
    elif suffix in SUFFIXES:
        data.records = read_list(path, path.parent)
    else:
        expected = f"{', '.join(SUFFIXES)} or {TAR_SUFFIX} file or a folder"
        raise VideoReadError(f"{path}: expected a {expected}, got {path.suffix or 'no suffix'!r}")
    return data


def check_files(records: Iterable[ClipRecord]) -> tuple[list[tuple[ClipRecord, Clip]], list[tuple[ClipRecord, str]]]:
    """Read every clip to its end: the good ones, and the bad ones with the reason."""
    good: list[tuple[ClipRecord, Clip]] = []
    bad: list[tuple[ClipRecord, str]] = []
    for record in records:
        try:
            with record.opened() as path:
                facts = check_frames(path, CHECKED_SIZE, record.start_s, record.end_s)
            record.check_length(facts.duration_s)
            size = f"{facts.width}×{facts.height}"
            good.append((record, Clip(facts.num_frames, facts.duration_s, record.captions, size, facts.hdr)))
        except (VideoReadError, OSError) as error:
            bad.append((record, str(error)))
    return good, bad


def table(clips: Sequence[Clip], found: Sequence[DataSet], bad: int, copies: int | None = None) -> str:
    """Lengths, rates, sizes, captions, what is short, what was read and what not: a line for each, name and values."""
    moving = [clip for clip in clips if clip.frames > 1]
    short = sum(clip.seconds < CLIP_S - 0.5 * clip.seconds / clip.frames for clip in moving if not clip.loops)
    lengths = [clip.seconds for clip in moving]
    captioned = sum(bool(clip.captions) for clip in clips)
    left_out = sum((each.left_out for each in found), Counter())
    lists, unread = ([name for each in found for name in getattr(each, kind)] for kind in ("lists", "unread"))
    rows = [
        ("clips", f"{len(clips):,}"),
        ("seconds", f"{sum(lengths):,.1f}, from {min(lengths):.3g} to {max(lengths):.3g}, median"
         f" {statistics.median(lengths):.3g}" if lengths else "none"),
        ("frames a second", _counted(f"{clip.frames / clip.seconds:.3g}" for clip in moving if clip.seconds > 0)),
        ("sizes", _counted(clip.size for clip in clips if clip.size)),
        ("captions", f"{captioned:,} clips with, {len(clips) - captioned:,} without;"
         f" {len({text for clip in clips for text in clip.captions}):,} different texts"),
        (f"under {CLIP_S:g} s", f"{short:,}" + (f": shorter than a clip of {CLIP_S:g} s, so they train single frames,"
         " not motion (with --loops they repeat)" if short else "")),
        ("still images", f"{len(clips) - len(moving):,}"),
        ("HDR", f"{sum(clip.hdr for clip in clips):,}" if any(clip.size for clip in clips) else ""),
        ("bad files", f"{bad:,}"),
        ("copies left out", "" if copies is None else f"{copies:,}"),
        ("read", _shortened(lists) or "files and the texts beside them"),
        ("not read", _shortened(unread)),
        ("left out", ", ".join(f"{count:,} {kind}" for kind, count in left_out.items())),
    ]  # fmt: skip
    return "\n".join(f"  {name:<16} {value}" for name, value in rows if value)


def _shortened(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = [f"and {len(names) - MOST_SHOWN} more"] if len(names) > MOST_SHOWN else []
    return ", ".join([*names[:MOST_SHOWN], *more])


def _counted(values: Iterable[str]) -> str:
    return _shortened([f"{value} ({count:,})" for value, count in Counter(values).most_common()])
