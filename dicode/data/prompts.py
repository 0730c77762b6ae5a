"""Files of prompts: a text file with a prompt a line, or what `dicode data index` reads captions from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dicode.data.lists import SUFFIXES, rows
from dicode.data.records import FILE_KEYS, described
from dicode.files import put_text, read_text

MOST_BYTES = 2**26  # of a text file
MOST = 100_000


class Asked(NamedTuple):
    """A prompt, and the further keys of its line, which its video keeps."""

    prompt: str
    keys: dict[str, Any]


def read_prompts(path: Path) -> list[Asked]:
    """The prompts of a file. Raises `ValueError` naming file and line where one has none.

    Of a list of captions (.jsonl, .csv, .tsv, .json, .parquet) the first caption of every line is the prompt; the files
    that it names are not opened.
    """
    if path.suffix.lower() in SUFFIXES:
        asked = [_asked(row, where, path) for where, row in rows(path)]
    else:
        lines = (" ".join(line.split()) for line in read_text(path, MOST_BYTES).splitlines())
        asked = [Asked(line, {}) for line in lines if line]
    if not asked:
        raise ValueError(f"{path}: expected a prompt a line, found none")
    if len(asked) > MOST:
        raise ValueError(f"{path}: expected at most {MOST:,} prompts, got {len(asked):,}; split the file")
    return asked


def write_captions(path: Path, videos: Sequence[str], asked: Sequence[Asked]) -> None:
    """A list of videos with the captions that they were made of, to cache or score them as any data set."""
    lines = [{"file": file, "caption": a.prompt, **a.keys} for file, a in zip(videos, asked, strict=True)]
    put_text(path, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))


def _asked(row: dict[str, Any], where: str, path: Path) -> Asked:
    file_key = next((key for key in FILE_KEYS if row.get(key)), "")
    record = described(row, where, path.parent, path, file_key)
    if not record.captions:
        raise ValueError(f"{where}: expected a caption to make a video of, found none")
    return Asked(record.captions[0], dict(record.extra))
