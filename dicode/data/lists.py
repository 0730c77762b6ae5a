"""List files: a line, an entry or a row for every clip, from JSON, CSV, Parquet or plain text."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from dicode.config import missing_extra, unique
from dicode.data.records import CAPTION_KEYS, FILE_KEYS, ClipRecord, record_of
from dicode.files import Place, TextError, fetched, read_text
from dicode.video.read import VIDEO_SUFFIXES, VideoReadError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".json", ".parquet")
# What a folder's list is called, the first that is there; metadata is what Hugging Face's VideoFolder reads.
NAMES = (
    *(f"captions{suffix}" for suffix in SUFFIXES),
    *(f"metadata{suffix}" for suffix in SUFFIXES if suffix != ".json"),  # metadata.json describes frames beside it
)
PROMPTS, VIDEOS = ("prompts.txt", "prompt.txt"), "videos.txt"  # a line a clip in both, as trainers of CogVideoX read
Row = tuple[str, dict[str, Any]]  # where it stands, and its values


def read_list(path: Place, folder: Place) -> list[ClipRecord]:
    """The clips of a list file, one a line. Raises `VideoReadError` naming file and line."""
    return [record_of(row, where, path.parent, folder) for where, row in rows(path)]


def read_pairs(prompts: Place, videos: Place, folder: Place) -> list[ClipRecord]:
    """The clips of two text files, of which one has the captions and one the files, a line each."""
    texts, files = (_text(path).splitlines() for path in (prompts, videos))
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
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(read_parquet(path)))
    elif suffix in (".csv", ".tsv"):
        yield from _csv_rows(path, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".json":
        yield from ((where, _object(entry, where)) for where, entry in _json_entries(path))
    else:
        lines = enumerate(_text(path).split("\n"), 1)
        named = ((f"{path}, line {line}", text) for line, text in lines if text.strip())
        yield from ((where, json_object(text, where)) for where, text in named)


def json_object(text: str, where: str) -> dict[str, Any]:
    """An object of JSON. Raises `VideoReadError` naming `where`."""
    return _object(json_value(text, where), where)


def json_value(text: str, where: str) -> Any:
    """A value of JSON, in which no object has a key twice. NaN is a number here, as many programs write it."""
    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise VideoReadError(f"{where}: not JSON (brackets within brackets, too many)") from error
    except ValueError as error:
        raise VideoReadError(f"{where}: not JSON ({error})") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise VideoReadError(f"{where}: expected an object, got {str(value)[:60]!r}")
    return value


def _text(path: Place) -> str:
    try:
        return read_text(path)
    except (TextError, OSError) as error:
        raise VideoReadError(str(error)) from error


def _json_entries(path: Place) -> Iterator[tuple[str, Any]]:
    """A list of objects, or an object that names captions, or an object, for every file."""
    value = json_value(_text(path), str(path))
    if isinstance(value, dict) and not any(key in value for key in FILE_KEYS):
        for file, entry in value.items():
            yield f"{path}, {file!r}", {"file": file, **(entry if isinstance(entry, dict) else {"caption": entry})}
    else:
        for i, entry in enumerate(value if isinstance(value, list) else [value]):
            yield f"{path}, entry {i} (counting from 0)", entry


def _csv_rows(path: Place, delimiter: str) -> Iterator[Row]:
    """Rows with as many values as there are columns; quotes are closed, and begin where the value does."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True, delimiter=delimiter)
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
            _check_values(values, len(columns), where, delimiter)
            yield where, dict(zip(columns, values, strict=True))


def _columns(values: list[str], where: str, delimiter: str) -> list[str]:
    columns = [value.strip() for value in values]
    if twice := next((name for name in columns if columns.count(name) > 1), None):
        raise VideoReadError(f"{where}: the column {twice!r} is there twice")
    if not set(columns) & {*FILE_KEYS, *CAPTION_KEYS}:
        other = next((mark for mark in ";\t," if mark != delimiter and mark in "".join(values)), "")
        hint = f"; columns are separated by {delimiter!r}, not by {other!r}" if other else ""
        raise VideoReadError(f"{where}: expected columns file and caption, got {columns}{hint}")
    return columns


def _check_values(values: list[str], num_columns: int, where: str, delimiter: str) -> None:
    """Raise `VideoReadError` for a row that a comma or a quote has made of other values than were meant."""
    if len(values) != num_columns:
        kind = "more" if len(values) > num_columns else "fewer"
        raise VideoReadError(
            f"{where}: {kind} values than columns ({len(values)}, {num_columns}); put a text that holds"
            f" {'tabs' if delimiter != ',' else 'commas'} in double quotes, with no space before the first"
        )
    if any(value[:1].isspace() and value.lstrip().startswith('"') for value in values):
        raise VideoReadError(f"{where}: a space before a double quote, which so is part of the text; take it out")
    inner_lines = [line for value in values for line in value.splitlines()[1:]]
    # A line within a text that begins with a video's name is a row that an open quote has swallowed.
    cells = ((line, cell.strip(' "').lower()) for line in inner_lines for cell in line.split(delimiter)[:-1])
    if row := next((line for line, cell in cells if cell.endswith(tuple(VIDEO_SUFFIXES))), None):
        raise VideoReadError(f"{where}: a text in quotes that holds a row ({row[:60]!r}); is a quote left open?")


def read_parquet(path: Place, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a Parquet file, of all columns or those of these that it has."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise missing_extra(error, "data") from error
    with fetched(path) as local:
        try:
            held = parquet.read_schema(local).names
            return parquet.read_table(local, columns=[c for c in held if columns is None or c in columns]).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise VideoReadError(f"{path}: not a Parquet file that can be read ({error})") from error


def whole_number(value: Any, where: str) -> int:
    """An integer from 0 on."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value % 1 != 0:
        raise VideoReadError(f"{where}: expected a number from 0 on, got {value!r}")
    return int(value)
