"""List files, a line, an entry or a row for every clip, from JSON, CSV, Parquet or plain text; folders of LeRobot."""

import csv
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dicode.config import missing_extra
from dicode.data.records import CAPTION_KEYS, FILE_KEYS, SPAN_KEYS, ClipRecord, meant, record_of
from dicode.files import Place, fetched, json_value, read_json, read_text
from dicode.video.read import IMAGE_SUFFIXES, VIDEO_SUFFIXES, VideoReadError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".json", ".parquet")
# What a folder's list is called, the first that is there; metadata is what Hugging Face's VideoFolder reads.
NAMES = (
    *(f"captions{suffix}" for suffix in SUFFIXES),
    *(f"metadata{suffix}" for suffix in SUFFIXES if suffix != ".json"),  # metadata.json describes frames beside it
)
PROMPTS, VIDEOS = ("prompts.txt", "prompt.txt"), "videos.txt"  # a line a clip in both, as trainers of CogVideoX read
# A folder of LeRobot's, versions 2 and 3, and keys of version 3.
INFO = "meta/info.json"
PLACE_KEYS, TIME_KEYS = ("chunk_index", "file_index"), ("from_timestamp", "to_timestamp")
MOST_ROWS = 10_000_000  # of a Parquet file, in which equal ones take no room: 40 million fit into 250 kB
ROWS_AT_ONCE = 1024
Row = tuple[str, dict[str, Any]]  # where it stands, and its values


def read_list(path: Place, folder: Place) -> list[ClipRecord]:
    """The clips of a list file, one a line. Raises `VideoReadError` or `TextError` naming file and line."""
    return [record_of(row, where, path.parent, folder) for where, row in rows(path)]


def read_pairs(prompts: Place, videos: Place, folder: Place) -> list[ClipRecord]:
    """The clips of two text files, of which one has the captions and one the files, a line each."""
    texts, files = (read_text(path).splitlines() for path in (prompts, videos))
    while files and not files[-1].strip():
        files.pop()
    if not any(text.strip() for text in texts[len(files) :]):
        del texts[len(files) :]
    if len(texts) != len(files):
        lines = f"{len(texts)} and {len(files)}"
        raise VideoReadError(f"{prompts}, {videos.name}: expected as many lines in both, got {lines}")
    return [
        record_of({"file": file.strip(), "caption": text}, f"{videos}, line {line}", videos.parent, folder)
        for line, (file, text) in enumerate(zip(files, texts, strict=True), 1)
    ]


def rows(path: Place) -> Iterator[Row]:
    """The rows of a list file, each with where it stands."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(_read_parquet(path)))
    elif suffix in (".csv", ".tsv"):
        yield from _csv_rows(path, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".json":
        yield from _json_rows(path)
    else:
        for line, text in enumerate(read_text(path).split("\n"), 1):
            if text.strip():
                where = f"{path}, line {line}"
                yield where, _object(json_value(text, where), where)


def _object(value: Any, where: str) -> dict[str, Any]:
    """The same value, if it is an object of JSON. Raises `VideoReadError` naming `where`."""
    if not isinstance(value, dict):
        raise VideoReadError(f"{where}: expected an object, got {str(value)[:60]!r}")
    return value


def _json_rows(path: Place) -> Iterator[Row]:
    """A list of objects, or an object that names captions, or an object, for every file."""
    value = read_json(path)
    if isinstance(value, dict) and not any(key in value for key in FILE_KEYS):
        for file, entry in value.items():
            yield f"{path}, {file!r}", {"file": file, **(entry if isinstance(entry, dict) else {"caption": entry})}
        return
    for i, entry in enumerate(value if isinstance(value, list) else [value]):
        where = f"{path}, entry {i} (counting from 0)"
        yield where, _object(entry, where)


def _csv_rows(path: Place, delimiter: str) -> Iterator[Row]:
    """Rows with as many values as there are columns; quotes are closed, and begin where the value does."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True, delimiter=delimiter)
    columns: list[str] = []
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = "is a quote left open, or one within a text single?"
            raise VideoReadError(f"{where}: not CSV ({error}); {hint}") from error
        if values and not columns:
            columns = _columns(values, where, delimiter)
        elif values:
            if wrong := _misread(path, columns, values, delimiter):
                raise VideoReadError(f"{where}: {wrong}")
            yield where, dict(zip(columns, values, strict=True))


def _columns(values: list[str], where: str, delimiter: str) -> list[str]:
    columns = [value.strip() for value in values]
    if twice := next((name for name in columns if columns.count(name) > 1), None):
        raise VideoReadError(f"{where}: the column {twice!r} is there twice")
    if not set(columns) & {*FILE_KEYS, *CAPTION_KEYS}:
        other = next((mark for mark in ";\t," if mark != delimiter and mark in "".join(values)), "")
        hint = f"; columns are separated by {delimiter!r}, not by {other!r}" if other else ""
        raise VideoReadError(f"{where}: expected columns file and caption, got {columns}{hint or meant(columns)}")
    return columns


def _misread(path: Place, columns: list[str], values: list[str], delimiter: str) -> str:
    """Why a row has other values than were meant, by a comma or a quote; '' where nothing looks so."""
    if len(values) != len(columns):
        kind, separators = "more" if len(values) > len(columns) else "fewer", "tabs" if delimiter != "," else "commas"
        hint = f"put a text that holds {separators} in double quotes, with no space before the first"
        return f"{kind} values than columns ({len(values)}, {len(columns)}); {hint}"
    if any(value[:1].isspace() and value.lstrip().startswith('"') for value in values):
        return "a space before a double quote, which so is part of the text; take it out"
    at = next((columns.index(key) for key in FILE_KEYS if key in columns), None)
    for column, value in enumerate(values):
        if line := _swallowed(path, value.splitlines(), delimiter, column, at):
            return f"a text in quotes that holds a row ({line[:60]!r}); is a quote left open?"
    return ""


def _swallowed(path: Place, lines: list[str], delimiter: str, column: int, file_column: int | None) -> str:
    """The line of a text in this column with the file of a row that an open quote has swallowed; '' for none.

    The first line is the end of the row, the others begin one: a video's name, or that of a file
    or a folder of images beside the list, is then no part of a caption.
    """
    for number, line in enumerate(lines if len(lines) > 1 else ()):
        cells = [cell.strip(' "') for cell in line.split(delimiter)]
        if any(cell.lower().endswith(tuple(VIDEO_SUFFIXES)) for cell in (cells[:-1] if number else cells[1:])):
            return line
        at = -1 if file_column is None else file_column - (0 if number else column)
        is_there = len(cells) > max(1, at) and at >= (0 if number else 1)
        if is_there and isinstance(path, Path) and _holds_clip(path.parent, cells[at]):
            return line
    return ""


def _holds_clip(folder: Path, name: str) -> bool:
    """Whether a folder has a file of this name, or a folder of images."""
    try:
        return bool(name.strip(".")) and (
            (folder / name).is_file()
            or any(each.suffix.lower() in IMAGE_SUFFIXES for each in (folder / name).iterdir())
        )
    except (OSError, ValueError):  # none of that name, or no name at all
        return False


def _read_parquet(path: Place, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, of all columns or those of these that it has."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise missing_extra(error, "data") from error
    with fetched(path) as local:
        try:
            with parquet.ParquetFile(local) as file:
                if (count := file.metadata.num_rows) > MOST_ROWS:
                    raise VideoReadError(f"{path}: expected at most {MOST_ROWS:,} rows, got {count:,}")
                chosen = [name for name in file.schema_arrow.names if columns is None or name in columns]
                for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns and chosen):
                    yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise VideoReadError(f"{path}: not a Parquet file that can be read ({error})") from error


def is_lerobot(folder: Place) -> bool:
    """Whether a folder is one of LeRobot's."""
    return (folder / INFO).is_file() and "codebase_version" in read_text(folder / INFO)


def read_lerobot(folder: Place, root: Place) -> list[ClipRecord]:
    """A clip of each camera for every episode of a folder in the data set `root`, the task as caption.

    Raises `VideoReadError` or `TextError` for what is missing.
    """
    info_path = str(folder / INFO)
    info = _object(read_json(folder / INFO), info_path)
    cameras, version = _cameras(info, info_path), str(info.get("codebase_version"))
    if not (major := re.match(r"v?([23])(?!\d)", version)):
        expected = f"expected codebase_version v2 or v3, got {version!r}"
        raise VideoReadError(f"{info_path}: {expected}; convert it with lerobot")
    chunk_size = _whole_number({"chunks_size": 1000, **info}, "chunks_size", info_path) or 1000
    clips = []
    for where, row in _episodes(folder, major[1], cameras):
        number = _whole_number(row, "episode_index", where)
        for camera in cameras:
            own = {key.removeprefix(f"videos/{camera}/"): value for key, value in row.items()}
            span = dict(zip(SPAN_KEYS, map(own.get, TIME_KEYS), strict=True))
            if major[1] == "3" and None in span.values():
                raise VideoReadError(f"{where}: expected {' and '.join(TIME_KEYS)} of {camera}")
            fields = {**own, "video_key": camera, "episode_chunk": number // chunk_size}
            file, extra = _filled(info["video_path"], fields, where), {"episode_index": number, "camera": camera}
            line = {"file": file, "caption": row.get("tasks"), **span, **extra}
            clips.append(replace(record_of(line, where, folder, root), episode=f"{folder}, episode {number}"))
    return clips


def _cameras(info: dict[str, Any], where: str) -> list[str]:
    held = info.get("features")
    features = {k: v for k, v in held.items() if isinstance(v, dict)} if isinstance(held, dict) else {}
    cameras = [name for name, feature in features.items() if feature.get("dtype") == "video" and not _is_depth(feature)]
    if not cameras or not isinstance(info.get("video_path"), str):
        images = ", ".join(name for name, feature in features.items() if feature.get("dtype") == "image")
        found = f"images inside of data/*.parquet ({images}): convert them to videos" if images else "none"
        raise VideoReadError(f"{where}: expected features of dtype video and a video_path, got {found}")
    return cameras


def _is_depth(feature: dict[str, Any]) -> bool:
    facts = feature.get("info") or feature.get("video_info") or {}
    return isinstance(facts, dict) and facts.get("video.is_depth_map") is True


def _episodes(folder: Place, version: str, cameras: list[str]) -> list[Row]:
    if version == "2":
        return list(rows(folder / "meta/episodes.jsonl"))
    columns = ["episode_index", "tasks", *(f"videos/{c}/{key}" for c in cameras for key in (*PLACE_KEYS, *TIME_KEYS))]
    files: list[Place] = sorted((folder / "meta/episodes").rglob("*.parquet"), key=str)
    return [(f"{file}, row {i}", row) for file in files for i, row in enumerate(_read_parquet(file, columns))]


def _filled(template: str, fields: Mapping[str, Any], where: str) -> str:
    """`str.format` for the camera's name, and for numbers and their widths, alone."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        text = fields[name] if name == "video_key" else str(_whole_number(fields, name, f"{where}: {template!r}"))
        return text.rjust(int(match[2] or 0), "0")

    return re.sub(r"\{(\w+)(?::0(\d)d)?\}", value, template)


def _whole_number(fields: Mapping[str, Any], key: str, where: str) -> int:
    """An integer from 0 on."""
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value % 1 != 0:
        raise VideoReadError(f"{where}: expected a number from 0 on for {key!r}, got {value!r}")
    return int(value)
