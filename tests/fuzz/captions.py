"""Damaged lists of captions: no clip may be lost, or take another's caption, without a word.

File `v0007.mp4` has captions with `m0007` in them, and damage changes no digit: a record whose captions have another
number is mislabelled, and a file whose name still stands in the list, but in no record, is lost.
"""

import csv
import io
import json
import logging
import random
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from dicode.data.index import read_data
from dicode.data.records import ClipRecord, validation_split
from dicode.files import TextError
from dicode.video.read import VideoReadError
from tests.fuzz import guarded

COUNT = 6  # clips of a list
WORDS = (
    "a red, round fire",
    'the "blue" ice',
    "größer; längst",
    "two  spaces",
    "x",
    "it's a {brace} [bracket]",
    "ice\u2028cold",
)
BYTES = [bytes([b]) for b in b'"\\,;:{}[]\n\r\t \x00\xff\xc3|ae']
NAME, MARK = re.compile(r"v(\d{4})\.mp4"), re.compile(r"m(\d{4})")


class Case(NamedTuple):
    """A list of some kind, and what is done to it."""

    kind: str
    seed: int


def rows(draw: random.Random) -> list[dict[str, str]]:
    """File and caption of a few clips."""
    return [
        {"file": f"v{i:04}.mp4", "caption": f"{draw.choice(WORDS)} m{i:04} {draw.choice(WORDS)}", "lab": "a"}
        for i in draw.sample(range(9999), COUNT)
    ]


def as_csv(own: list[dict[str, str]], delimiter: str) -> bytes:
    """The rows as Python's own writer has them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(own[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(own)
    return text.getvalue().encode()


def as_tar(own: list[dict[str, str]], draw: random.Random) -> bytes:
    """An archive with the captions in .txt and .json files."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for row in own:
            note = json.dumps({"caption": row["caption"]}) if draw.random() < 0.5 else row["caption"]
            stem = row["file"].removesuffix(".mp4")
            for name, content in (
                (row["file"], b"video"),
                (f"{stem}{'.json' if note[0] == '{' else '.txt'}", note.encode()),
            ):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return data.getvalue()


MADE: dict[str, Callable[[list[dict[str, str]], random.Random], dict[str, bytes]]] = {
    "captions.jsonl": lambda own, _: {"captions.jsonl": "\n".join(map(json.dumps, own)).encode()},
    "metadata.jsonl": lambda own, _: {
        "metadata.jsonl": "\n".join(
            json.dumps({"file_name": r["file"], "text": [r["caption"]]}, ensure_ascii=False) for r in own
        ).encode()
    },
    "captions.json": lambda own, _: {"captions.json": json.dumps({r["file"]: r["caption"] for r in own}).encode()},
    "captions.csv": lambda own, _: {"captions.csv": as_csv(own, ",")},
    "captions.tsv": lambda own, _: {"captions.tsv": as_csv(own, "\t")},
    "prompts.txt": lambda own, _: {
        "prompts.txt": "\n".join(r["caption"].replace("\u2028", " ") for r in own).encode(),
        "videos.txt": "\n".join(r["file"] for r in own).encode(),
    },
    "notes": lambda own, _: {
        name: content
        for r in own
        for name, content in ((r["file"], b""), (f"{r['file'][:-4]}.txt", r["caption"].encode()))
    },
    "clips.tar": lambda own, draw: {"clips.tar": as_tar(own, draw)},
}


def cases(seed: int, count: int) -> Iterator[Case]:
    """Every kind in turn."""
    draw = random.Random(seed)
    for number in range(count):
        yield Case(list(MADE)[number % len(MADE)], draw.getrandbits(32))


def damaged(data: bytes, draw: random.Random, times: int) -> bytes:
    """The bytes with a few changed, put in, taken out, or with the end cut off, but no digit other than it was."""
    for _ in range(times):
        at = draw.randrange(len(data) + 1)
        digit = data[at : at + 1].isdigit()
        change = draw.choice(["change", "insert", "insert", "remove", "cut", "mark", "encoding"])
        if change == "insert":
            data = data[:at] + draw.choice(BYTES) + data[at:]
        elif change == "change" and not digit:
            data = data[:at] + draw.choice(BYTES) + data[at + 1 :]
        elif change == "remove" and not digit:
            data = data[:at] + data[at + 1 :]
        elif change == "cut" and draw.random() < 0.3:
            data = data[:at]
        elif change == "mark":
            data = b"\xef\xbb\xbf" + data
        elif change == "encoding" and draw.random() < 0.2:
            data = data.decode("utf-8", "replace").encode(draw.choice(["utf-16", "utf-16-le", "latin-1"]), "replace")
    return data


def run(case: Case, folder: Path) -> str:
    """Write the damaged list into the folder and read it."""
    draw = random.Random(case.seed)
    own = rows(draw)
    files = MADE[case.kind](own, draw)
    listed = ""
    name = draw.choice([name for name in files if not (case.kind == "notes" and name.endswith(".mp4"))])
    files[name] = damaged(files[name], draw, 1 if case.kind == "prompts.txt" else draw.randint(1, 3))
    for path, content in files.items():
        (folder / path).write_bytes(content)
        listed += path + "\n" + text_of(content) + "\n"
    return guarded(lambda: outcome(folder, listed))


def text_of(data: bytes) -> str:
    """What a reader may take bytes for."""
    return data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8", "replace")


def outcome(folder: Path, listed: str) -> str:
    """What reading the folder gives."""
    logging.disable(logging.WARNING)
    try:
        found = read_data(folder)
    except (VideoReadError, TextError) as error:
        return "refused" if "\n" not in str(error) else f"traceback: an error of several lines: {error}"
    validation_split(found.records)
    faults = [record for record in found.records if record.fault]
    for record in found.records:
        if said := mislabelled(record):
            return f"wrong: {said}"
    held = "\n".join(record.path.name for record in found.records)
    lost = {match[0] for match in NAME.finditer(listed) if match[0] not in held}
    if lost and not faults and not found.unread and not found.left_out:
        return f"wrong: lost without a word: {sorted(lost)}"
    return "refused" if faults else "ok"


def mislabelled(record: ClipRecord) -> str:
    """What is wrong with a record; '' for nothing."""
    json.dumps(dict(record.extra), allow_nan=False, ensure_ascii=False).encode()
    own = set(NAME.findall(record.file))
    for text in record.captions:
        text.encode()
        if others := set(MARK.findall(text)) - own:
            return f"{record.file} has the caption of {sorted(others)}: {text!r}" if own else ""
        if "\0" in text or NAME.search(text):
            return f"{record.file} has swallowed another line: {text!r}"
    return ""
