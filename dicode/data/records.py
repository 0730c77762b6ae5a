"""Clips of a data set: the file, its captions, its span and its split, as a line of a list gives them."""

import difflib
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from dicode.config import nearest, shortened
from dicode.files import Place, fetched, place
from dicode.video.read import VideoReadError

# The names under which lists have these; the first that a line fills counts.
FILE_KEYS = ("file", "file_name", "filename", "video", "video_path", "path", "video_file", "file_path", "filepath")
CAPTION_KEYS = ("caption", "text", "prompt")
SPAN_KEYS = ("start_s", "end_s")
KEY_GROUPS = (FILE_KEYS, (*CAPTION_KEYS, "captions"), ("expanded",), ("validation",), ("start_s",), ("end_s",))
KEYS = {key for group in KEY_GROUPS for key in group}
# Keys of other lists, not read since their units differ, and the key to use here.
FOREIGN_KEYS = {
    **dict.fromkeys(("start", "start_time", "start_sec", "begin", "from_timestamp", "start time"), "start_s"),
    **dict.fromkeys(("end", "end_time", "end_sec", "to_timestamp", "end time"), "end_s"),
    **dict.fromkeys(("start_frame", "end_frame", "timestamp", "timestamps"), "start_s, end_s"),
    **dict.fromkeys(("split", "val", "is_validation"), "validation"),
}
TRUE, FALSE = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no")  # pandas writes 1.0
LIKE_A_KEY = 0.7  # where the key of a file is missing: fiel
SIMILARITY = 0.85  # of a mistyped key: captoin, end_ms, but not start, caption_en
MOST_LACKING_S = 0.5  # of a span, at the end of its file: times of lists are rounded
VALIDATION_EVERY = 15
MOST_NESTING = 20  # of further values; what is deeper is null
MOST_CAPTIONS = 1000  # of a clip
MOST_CAPTION = 100_000  # characters: a caption, not a book that a quote left open has swallowed


class Member(NamedTuple):
    """A file within an archive, which can be read without looking at those before it."""

    archive: Place
    span: tuple[int, int]  # offset and length in bytes


@dataclass(frozen=True)
class ClipRecord:
    """A clip of a data set: a video, or a span of it, and its captions."""

    path: Place  # a file, or a folder of frames
    captions: tuple[str, ...]  # all of them, the short one first
    folder: Place  # the data set's
    start_s: float = 0.0
    end_s: float | None = None  # None: to the end of the file
    validation: bool | None = None  # as its line has it
    extra: Mapping[str, Any] = field(default_factory=dict)  # further values of its line
    episode: str = ""  # of a file or of several; the split takes it for one video
    inside: Member | None = None  # of a tar archive, if it is no file of its own
    fault: str = ""  # what is wrong with it, if that is known before it is read

    @property
    def caption(self) -> str:
        """The first caption, or ''."""
        return self.captions[0] if self.captions else ""

    @property
    def source(self) -> str:
        """The name of the data set: that of its folder."""
        return _name_of(self.folder)

    @property
    def file(self) -> str:
        """The path within the data set, or the whole path of what lies elsewhere."""
        path, folder = self.path.as_posix(), self.folder.as_posix()
        return path.removeprefix(f"{folder}/") if folder != "." else path

    @property
    def video(self) -> str:
        """Identifies the video, however many clips are spans of it."""
        return self.episode or (os.path.normpath(self.path) if isinstance(self.path, Path) else str(self.path))

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """A path to read frames from, as long as the block lasts; errors of reading name the clip, not a copy of it."""
        if self.fault:
            raise VideoReadError(self.fault)
        source, span = self.inside or (self.path, None)
        with fetched(source, span, self.path.name) as local:
            try:
                yield local
            except VideoReadError as error:
                raise VideoReadError(str(error).replace(str(local), str(self.path))) from error

    def check_length(self, length_s: float) -> None:
        """Raise `VideoReadError` where a file has much less than the span of its line: `length_s` from its start on."""
        if self.end_s is not None and self.end_s - self.start_s - length_s > MOST_LACKING_S:
            ends_s = self.start_s + length_s
            raise VideoReadError(f"{self.path}: its line has end_s {self.end_s:g}, and the file ends at {ends_s:.4g} s")


@lru_cache
def _name_of(folder: Place) -> str:
    return folder.resolve().name


def faulty(path: Place, folder: Place, reason: str) -> ClipRecord:
    """A clip that cannot be read, and why; bytes of its name that are not UTF-8 become \\xNN."""
    names = (str(each).encode(errors="surrogateescape") for each in (path, folder))
    path, folder = (place(name.decode(errors="backslashreplace")) for name in names)
    return ClipRecord(path, (), folder, fault=f"{path}: {reason}")


def record_of(row: Mapping[str, Any], where: str, base: Place, folder: Place) -> ClipRecord:
    """The clip of a list's line; its file is relative to `base`. Raises `VideoReadError` naming `where`."""
    key = _file_key(row)
    file = row[key] if key else None
    if not isinstance(file, str):
        found = shortened(file) if key else f"the keys {', '.join(map(str, row))[:60] or 'none'}{meant(row)}"
        raise VideoReadError(f"{where}: expected text for 'file' (or one of {', '.join(FILE_KEYS[1:])}), got {found}")
    if not _is_text(file):
        raise VideoReadError(f"{where}: the file's name {file!r} is no text")
    try:
        path = place(file) if "://" in file else base / file
        if "\\" in file and isinstance(path, Path) and not path.exists():
            path = base / file.replace("\\", "/")  # written on Windows
        if not isinstance(path, Path):
            _ = path.fs  # whose package may be missing
    except (ValueError, OSError, ImportError) as error:
        raise VideoReadError(f"{where}: {file!r} names no file that can be reached ({error})") from error
    return described(row, where, folder, path)


def described(row: Mapping[str, Any], where: str, folder: Place, path: Place) -> ClipRecord:
    """The clip at `path` with the values of a line, other than the file that it names."""
    for key, known in _misspelt(tuple(row)):
        raise VideoReadError(f"{where}: unknown key {key!r} (did you mean {known!r}?)")
    texts = next((found for key in CAPTION_KEYS if (found := _texts(row, key, where))), ())
    captions = (*texts[:1], *_texts(row, "expanded", where), *texts[1:], *_texts(row, "captions", where))
    if len(captions) > MOST_CAPTIONS:
        raise VideoReadError(f"{where}: expected at most {MOST_CAPTIONS} captions of a clip, got {len(captions)}")
    start_s, end_s = (_seconds(row, key, where) for key in SPAN_KEYS)
    start_s = start_s or 0.0
    if end_s is not None and end_s <= start_s:
        raise VideoReadError(f"{where}: expected end_s after start_s, got {start_s:g} and {end_s:g}")
    caption_key = next((key for key in CAPTION_KEYS if row.get(key)), "caption")
    used = {_file_key(row), caption_key, "caption", "captions", "expanded", "validation", *SPAN_KEYS}
    extra = {_plain(str(key), 0): _plain(value, 0) for key, value in row.items() if key not in used}
    return ClipRecord(path, tuple(dict.fromkeys(captions)), folder, start_s, end_s, _boolean(row, where), extra)


def _file_key(row: Mapping[str, Any]) -> str:
    """The key under which a line names its file; '' where it names none."""
    return next((key for key in FILE_KEYS if row.get(key) not in (None, "")), "")


def meant(keys: Iterable[Any]) -> str:
    """' (did you mean …?)' for the first of some unknown keys that is like that of a file or a caption, or ''."""
    hints = (nearest(str(key), [*FILE_KEYS, *CAPTION_KEYS], LIKE_A_KEY) for key in keys if key not in KEYS)
    return next(filter(None, hints), "")


@lru_cache
def _misspelt(keys: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Keys that are nearly one which is missing, or it in other letters, each with that one."""
    missing = [key for group in KEY_GROUPS[1:] if not set(group) & set(keys) for key in group]
    long = [key for key in missing if len(key) > len("text")]  # "test" is a word of its own
    found: list[tuple[str, str]] = []
    for key in (key for key in keys if key not in KEYS and key not in FOREIGN_KEYS):
        word = key.strip().lower()
        close = [word] if word in missing else difflib.get_close_matches(word, long, 1, SIMILARITY)
        found += [(key, known) for known in close]
    return tuple(found)


def _texts(row: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = row.get(key)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(text, str) for text in values):
        raise VideoReadError(f"{where}: expected text, or a list of texts, for {key!r}, got {shortened(value)}")
    for text in values:
        if not _is_text(text):
            raise VideoReadError(f"{where}: {key!r} holds half a character or a NUL: {shortened(text)}")
        if len(text) > MOST_CAPTION:
            raise VideoReadError(f"{where}: {key!r}: expected at most {MOST_CAPTION:,} characters, got {len(text):,}")
    return tuple(stripped for text in values if (stripped := " ".join(text.split())))


def _is_text(text: str) -> bool:
    return "\0" not in text and (text.isascii() or not re.search("[\ud800-\udfff]", text))


def _seconds(row: Mapping[str, Any], key: str, where: str) -> float | None:
    if (value := row.get(key)) in (None, ""):
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise VideoReadError(f"{where}: expected seconds from 0 on for {key!r}, got {shortened(value)}")
    return seconds


def _boolean(row: Mapping[str, Any], where: str) -> bool | None:
    if (value := row.get("validation")) in (None, ""):
        return None
    word = str(value).strip().lower() if isinstance(value, bool | int | float | str) else ""
    if word not in (*TRUE, *FALSE):
        raise VideoReadError(f"{where}: expected true or false for 'validation', got {shortened(value)}")
    return word in TRUE


def _plain(value: Any, depth: int) -> Any:
    """A value as JSON in UTF-8 has it: numbers that are not finite are null, halves of characters question marks."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, int):
        return value
    if depth >= MOST_NESTING:
        return None
    if isinstance(value, dict):
        return {_plain(str(key), 0): _plain(item, depth + 1) for key, item in value.items()}
    return [_plain(item, depth + 1) for item in value] if isinstance(value, list | tuple) else str(value)


def merged(records: Iterable[ClipRecord]) -> list[ClipRecord]:
    """One clip of all lines that name the same span of the same file, with every caption of theirs.

    Raises `VideoReadError` where they disagree on whether it is for validation.
    """
    found: dict[tuple[Any, ...], ClipRecord] = {}
    for record in records:
        key = (os.path.normpath(str(record.path)), record.start_s, record.end_s, record.inside)
        if (before := found.get(key)) is None:
            found[key] = record
            continue
        if {before.validation, record.validation} == {True, False}:
            raise VideoReadError(f"{record.path}: one line says that it is for validation, another that it is not")
        captions = tuple(dict.fromkeys((*before.captions, *record.captions)))
        if len(captions) > MOST_CAPTIONS:
            raise VideoReadError(f"{record.path}: expected at most {MOST_CAPTIONS} captions of a clip, got more")
        split = record.validation if before.validation is None else before.validation
        extra, fault = {**record.extra, **before.extra}, before.fault or record.fault
        found[key] = replace(before, captions=captions, validation=split, extra=extra, fault=fault)
    return list(found.values())


def validation_split(records: Sequence[ClipRecord], by: tuple[str, str] | None = None) -> list[bool]:
    """Which clips are kept from training: as their line has it, else every 15th video of a data set, from the first on.

    Clips of one video stay together, unless there is no other. `by`, a key and a value: in data sets whose lines have
    that key, the clips with that value instead.
    """

    def has_value(record: ClipRecord) -> bool:
        return by is not None and str(record.extra.get(by[0])) == by[1]

    if by and not any(map(has_value, records)):
        raise ValueError(f"--validation-by {by[0]}={by[1]}: no line has that")
    keyed = {record.folder for record in records if by and by[0] in record.extra}
    videos: dict[Place, set[str]] = defaultdict(set)
    for record in records:
        videos[record.folder].add(record.video)
    units = [(r.video, r.start_s if len(videos[r.folder]) == 1 else None) for r in records]
    numbers: dict[Place, dict[Any, int]] = defaultdict(dict)  # of the units of a data set, counted from 0
    explicit: dict[Any, bool] = {}
    for record, unit in zip(records, units, strict=True):
        numbers[record.folder].setdefault(unit, len(numbers[record.folder]))
        if record.validation is not None:
            explicit.setdefault(unit, record.validation)

    def chosen(record: ClipRecord, unit: Any) -> bool:
        is_held = explicit.get(unit) if record.validation is None else record.validation
        if is_held is None and record.folder in keyed:
            is_held = has_value(record)
        return numbers[record.folder][unit] % VALIDATION_EVERY == 0 if is_held is None else is_held

    return [chosen(record, unit) for record, unit in zip(records, units, strict=True)]
