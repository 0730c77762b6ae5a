"""Texts beside a clip, in a folder or an archive: KEY.txt and KEY.json of KEY.mp4."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from dicode.data.lists import json_value
from dicode.data.records import ClipRecord, described, faulty
from dicode.files import Place, TextError, read_text
from dicode.video.read import VideoReadError

NOTES = (".json", ".txt")
MOST_BYTES = 2**24  # of a note


def noted(path: Place, notes: Mapping[str, Place], folder: Place, left_out: Counter[str]) -> ClipRecord:
    """A clip with what the .json and .txt beside it tell; one that cannot be understood makes it a bad file."""
    try:
        texts = {suffix: read_text(note, MOST_BYTES) for suffix, note in notes.items()}
    except (TextError, OSError) as error:
        return faulty(path, folder, f"the text beside it cannot be read ({error})")
    return of_texts(path, texts, folder, left_out)


def of_texts(path: Place, texts: Mapping[str, str], folder: Place, left_out: Counter[str]) -> ClipRecord:
    """A clip with the text of its .json and .txt: the .txt is its caption where the .json has none."""
    try:
        row = json_value(texts[".json"], "the .json") if ".json" in texts else {}
        if not isinstance(row, dict):
            if ".txt" not in texts:
                raise VideoReadError(f"expected an object, got {str(row)[:60]}")
            left_out[".json files that hold no object"] += 1
            row = {}
        record = described({key: value for key, value in row.items() if key != "file"}, str(path), folder, path)
        if record.captions or ".txt" not in texts:
            return record
        return replace(record, captions=described({"caption": texts[".txt"]}, str(path), folder, path).captions)
    except VideoReadError as error:
        return faulty(path, folder, f"the text beside it cannot be read ({str(error).removeprefix(f'{path}: ')})")
