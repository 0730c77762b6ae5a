"""Files of prompts: a text file with a prompt a line, or what `dicode data index` reads captions from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dicode.files import put_text, read_text

MOST_BYTES = 2**26  # of a text file
MOST = 100_000
PromptLine = tuple[str, dict[str, Any]]  # a prompt, and the further keys of its line, which its video keeps


def read_prompts(path: Path) -> list[PromptLine]:
    """The prompts of a file. Raises `ValueError` naming file and line where one has none.

    Of a list of captions (.jsonl, .csv, .tsv, .json, .parquet) the first caption of every line is the prompt; the files
    that it names are not opened.
    """
    from dicode.data.lists import SUFFIXES, rows  # which most commands with a prompt do not need
    from dicode.data.records import described

    if path.suffix.lower() in SUFFIXES:
        records = [(where, described(row, where, path.parent, path)) for where, row in rows(path)]
        if without := next((where for where, record in records if not record.captions), ""):
            raise ValueError(f"{without}: expected a caption to make a video of, found none")
        prompts = [(record.caption, dict(record.extra)) for _, record in records]
    else:
        lines = (" ".join(line.split()) for line in read_text(path, MOST_BYTES).splitlines())
        prompts = [(line, {}) for line in lines if line]
    if not prompts:
        raise ValueError(f"{path}: expected a prompt a line, found none")
    if len(prompts) > MOST:
        raise ValueError(f"{path}: expected at most {MOST:,} prompts, got {len(prompts):,}; split the file")
    return prompts


def write_captions(path: Path, videos: Sequence[str], prompts: Sequence[PromptLine]) -> None:
    """A list of videos with the prompts that they were generated from, to cache or score them as any data set."""
    lines = [{"file": file, "caption": text, **keys} for file, (text, keys) in zip(videos, prompts, strict=True)]
    put_text(path, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
