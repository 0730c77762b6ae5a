"""Videos to the shards of a training cache: the same bytes however many workers, and however often it was stopped.

Beside each shard lies a note of its inputs and videos (shard-00000.json), from which the same command goes on; and
quarantine.jsonl, the files that could not be read, and copies.jsonl, the videos that were left out as copies.
"""

import dataclasses
import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from PIL import Image

from dicode.config import Whole, config_from_dict, missing_extra
from dicode.data.cache import Shard, fault, shard_name, write_index, write_shard
from dicode.data.cache_folder import INDEX, check_own, remove_index, shard_files, stale_files
from dicode.data.columns import CachedVideo
from dicode.data.parallel_map import parallel_map
from dicode.data.records import ClipRecord, validation_split
from dicode.files import Place, json_value, put_text, read_text, state_of
from dicode.stopwatch import Progress
from dicode.video.read import Times, VideoReadError, native_frames
from dicode.video.timed import Video

QUARANTINE, COPIES = "quarantine.jsonl", "copies.jsonl"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SIXTHS = (1, 3, 5)  # of a video, where its frames are compared: its ends are often blank, and the same in many
THUMBNAIL = 4  # side; for colours, which a perceptual hash does not have
# Levels of 255 within which the colours of copies lie. Of 1,798 spells and emoji, hashes alone at 4 bits call 199
# copies, hearts of other colours and hands of other skin among them; with the colours, at 4 to 12 levels, one.
COLOUR_LEVELS = 8


@dataclass(frozen=True)
class CacheOptions:
    """How videos become shards; equal options and files give equal bytes."""

    size: int = 64
    max_fps: float = 12.5
    loops: bool = False
    scenes: float | None = None  # shortest scene in seconds; None: videos are not cut
    dedupe: int | None = None  # bits of 64 in which copies may differ; None: copies stay
    files_per_shard: int = 64

    def __post_init__(self) -> None:
        """Raises `ValueError` for options that contradict each other or are out of range."""
        if self.loops and self.scenes is not None:
            raise ValueError("loops, scenes: a scene cut out of a video does not repeat without a seam; leave one out")
        if self.files_per_shard < 1 or self.size < 1 or not self.max_fps > 0:
            raise ValueError("size, max_fps, files_per_shard: expected positive numbers")


@dataclass(frozen=True)
class Unit:
    """The files that become one shard."""

    number: int
    records: tuple[ClipRecord, ...]
    options: CacheOptions
    output: Place
    copies: Mapping[int, str] | None = None  # videos to leave out, and what each repeats; None: as in a shard there

    def inputs(self) -> str:
        """A digest of all that the shard depends on."""
        o = self.options
        digest = hashlib.sha256(json.dumps([o.size, o.max_fps, o.loops, o.scenes, o.dedupe is not None]).encode())
        for record in self.records:
            source = record.inside.archive if record.inside else record.path
            facts = (record.source, record.file, record.start_s, record.end_s, record.inside and record.inside.span)
            digest.update(json.dumps([*facts, record.fault or state_of(source)]).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Entry:
    """A video of a unit: its rows counted from the first of the shard, and whether it is left out as a copy."""

    video: CachedVideo  # in notes without captions, split and further values; see `_with_lines`
    look: str = ""  # see `look_of`
    repeats: str = ""  # the video it is a copy of
    record: Whole = 0  # of the unit's


@dataclass(frozen=True)
class Bad:
    """A file that could not be read."""

    file: str
    reason: str


@dataclass(frozen=True)
class ShardNote:
    """The result of a unit, as kept in the .json beside its shard."""

    number: int
    inputs: str  # see `Unit.inputs`
    shard: Shard | None  # None: no file could be read
    entries: tuple[Entry, ...]
    bad: tuple[Bad, ...]

    @classmethod
    def parse(cls, text: str) -> "ShardNote":
        """Of the JSON that `write` gives. Raises `ValueError` for that of another version."""
        return config_from_dict(cls, json_value(text, "unit"), "unit")

    def write(self, output: Place) -> str:
        """Put it beside the shard; gives its text."""
        text = json.dumps(dataclasses.asdict(self), ensure_ascii=False)
        put_text(output / f"{shard_name(self.number)}.json", text)
        return text


def build_cache(
    records: Sequence[ClipRecord],
    output: Place,
    options: CacheOptions,
    workers: int = 1,
    ray: str | None = None,
    validation_by: tuple[str, str] | None = None,
) -> list[ShardNote]:
    """Write a cache of these clips, in their order, going on from what an earlier run of the same left.

    Bad files are noted and left out. `validation_by`: see `validation_split`. Raises `VideoReadError` where nothing can
    be read, and `ValueError` for a folder with other files than a cache's.
    """
    check_own(output)
    if validation_by is not None:
        validation_split(records, validation_by)  # raises before the work rather than after it
    for old in stale_files(output):
        old.unlink()
    size = options.files_per_shard
    parts = [tuple(records[i : i + size]) for i in range(0, len(records), size)]
    units = [Unit(number, part, options, output) for number, part in enumerate(parts)]
    notes = make_shards(units, workers, ray, make_shard)
    copies: list[dict[int, str]] = [{} for _ in units]
    if options.dedupe is not None:
        copies = _copies(notes, options.dedupe)
        left_out = [{j for j, entry in enumerate(note.entries) if entry.repeats} for note in notes]
        changed = [replace(units[i], copies=own) for i, own in enumerate(copies) if own.keys() != left_out[i]]
        for note in make_shards(changed, workers, ray, make_shard):
            notes[note.number] = note
    notes = _with_lines(notes, units, copies, validation_by)
    put_text(output / QUARANTINE, _jsonl(dataclasses.asdict(file) for note in notes for file in note.bad))
    write_cache(notes, output)
    return notes


@runtime_checkable
class Numbered(Protocol):
    """A unit of any kind: a number, and what it is counted by."""

    @property
    def number(self) -> int: ...
    @property
    def records(self) -> Sized: ...


U = TypeVar("U", bound=Numbered)


def make_shards(units: Sequence[U], workers: int, ray: str | None, make: Callable[[U], str]) -> list[ShardNote]:
    """The notes of units in their order, whose shards are there then; `make` gives each as JSON."""
    notes: dict[int, ShardNote] = {}
    sizes = {unit.number: len(unit.records) for unit in units}
    with Progress("caching", sum(sizes.values()), "clip") as progress:
        for note in map(ShardNote.parse, parallel_map(make, units, workers, ray)):
            notes[note.number] = note
            progress.update(sizes[note.number])
    return [notes[unit.number] for unit in units]


def make_shard(unit: Unit) -> str:
    """The note of a unit as JSON: of the shard there, if these files and options give the same, or of a new one."""
    name, inputs = shard_name(unit.number), unit.inputs()
    expected = inputs if unit.copies is None else ""  # "": none that is there
    if (text := finished_note(unit.output, unit.number, len(unit.records), expected)) is not None:
        return text
    entries: list[Entry] = []
    frames: list[Video] = []
    times_s: list[Times] = []
    bad: list[Bad] = []
    first = 0
    for number, record in enumerate(unit.records):
        try:
            for entry, own_frames, own_times_s in _clips(record, unit.options):
                original = (unit.copies or {}).get(len(entries), "")
                entries.append(replace(entry, record=number, video=replace(entry.video, first=first), repeats=original))
                if not original:
                    frames.append(own_frames)
                    times_s.append(own_times_s)
                    first += len(own_frames)
        except (VideoReadError, OSError) as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise  # of a copy that an archive's member is read from
            bad.append(Bad(str(record.path), str(error)))
    shard = None
    if frames:
        tensors = (torch.from_numpy(np.concatenate(parts)) for parts in (frames, times_s))
        shard = write_shard(unit.output, name, *tensors)
    return ShardNote(unit.number, inputs, shard, tuple(entries), tuple(bad)).write(unit.output)


def finished_note(output: Place, number: int, records: int, inputs: str) -> str | None:
    """The note of a shard that is there, of these inputs, so many records and whole.

    Any other goes, and the index, which lists it.
    """
    name = shard_name(number)
    path = output / f"{name}.json"
    with suppress(ValueError):
        text = read_text(path) if path.is_file() else ""
        note = ShardNote.parse(text)
        kept = [entry.video for entry in note.entries if not entry.repeats]
        ends = max((video.first + video.count for video in kept), default=0)
        if (
            (note.number, note.inputs, ends) == (number, inputs, note.shard.frames if note.shard else 0)
            and all(entry.record < records for entry in note.entries)
            and (note.shard is None or not fault(output, note.shard, hashes=True))
        ):
            return text
    for old in [output / INDEX, *shard_files(output, name)]:
        old.unlink(missing_ok=True)
    return None


def _clips(record: ClipRecord, options: CacheOptions) -> Iterator[tuple[Entry, Video, Times]]:
    """The video of a file, or its scenes."""
    with record.opened() as path:
        frames, times_s, period_s = native_frames(
            path, options.size, max_fps=options.max_fps, start_s=record.start_s, end_s=record.end_s
        )
    record.check_length(period_s)
    least_s = options.scenes or 0.0
    spans = [(0, len(frames))] if options.scenes is None else scenes(frames)
    bounds_s = [*times_s[[start for start, _ in spans]], period_s]
    lengths_s = np.diff(bounds_s)
    if max(lengths_s) < least_s:
        raise VideoReadError(f"{record.path}: its longest scene lasts {max(lengths_s):.2f} s")
    for (start, stop), length_s in zip(spans, lengths_s, strict=True):
        if length_s < least_s:
            continue
        own, count, begins_s = frames[start:stop], stop - start, record.start_s + float(times_s[start])
        facts = (record.source, record.file, (), False, options.loops, 0, count, float(length_s), begins_s)
        look = "" if options.dedupe is None else look_of(own)
        yield Entry(CachedVideo(*facts), look), own, times_s[start:stop] - times_s[start]


def scenes(frames: Video) -> list[tuple[int, int]]:
    """First frame of every scene and the one after its last, by PySceneDetect's `AdaptiveDetector`.

    It compares a change with those around it, so that fast motion, and a low rate, make no cuts.
    """
    try:
        from scenedetect import AdaptiveDetector, FrameTimecode
    except ModuleNotFoundError as error:
        raise missing_extra(error, "data") from error
    detector, cuts = AdaptiveDetector(min_scene_len=1), []
    for i, frame in enumerate(frames):
        bgr = np.ascontiguousarray(frame[..., ::-1])
        cuts += [at.frame_num for at in detector.process_frame(FrameTimecode(i, fps=1.0), bgr)]
    return list(pairwise([0, *cuts, len(frames)]))


def look_of(frames: Video) -> str:
    """Perceptual hashes (64 bits) and thumbnails of three frames, as hexadecimal digits."""
    try:
        from imagehash import phash
    except ModuleNotFoundError as error:
        raise missing_extra(error, "data") from error
    images = [Image.fromarray(frames[len(frames) * sixths // 6]) for sixths in SIXTHS]
    bits = np.concatenate([np.packbits(phash(image).hash) for image in images])
    small = [np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)) for image in images]
    return (bits.tobytes() + np.stack(small).tobytes()).hex()


def repeats(looks: Sequence[str], most_bits: int) -> dict[int, int]:
    """Of looks that repeat an earlier one, which one: hashes differ in at most so many of 64 bits, in each frame.

    What repeats another is not itself compared with, so the first of several alike is kept whatever their number. Takes
    time with the square of their number: 2 minutes for 100,000.
    """
    if not looks:
        return {}
    raw = np.frombuffer(bytes.fromhex("".join(looks)), dtype=np.uint8).reshape(len(looks), -1)
    split = 8 * len(SIXTHS)
    hashes, colours = raw[:, :split].copy().view(np.uint64), raw[:, split:].astype(np.int16)
    is_kept, found = np.zeros(len(looks), dtype=bool), {}
    for i in range(len(looks)):
        alike = np.flatnonzero(is_kept[:i])
        alike = alike[(np.bitwise_count(hashes[alike] ^ hashes[i]) <= most_bits).all(axis=1)]
        alike = alike[(np.abs(colours[alike] - colours[i]) <= COLOUR_LEVELS).all(axis=1)]
        is_kept[i] = not len(alike)
        if len(alike):
            found[i] = int(alike[0])
    return found


def _copies(notes: Sequence[ShardNote], most_bits: int) -> list[dict[int, str]]:
    """The videos of each shard, by their number in it, that repeat an earlier one, and which."""
    entries = [(i, j, entry) for i, note in enumerate(notes) for j, entry in enumerate(note.entries)]
    copies: list[dict[int, str]] = [{} for _ in notes]
    for copy, original in repeats([entry.look for *_, entry in entries], most_bits).items():
        i, j, _ = entries[copy]
        video = entries[original][2].video
        copies[i][j] = f"{video.source}/{video.file}" + (f" {video.start_s:g} s" if video.start_s else "")
    return copies


def _with_lines(
    notes: Sequence[ShardNote], units: Sequence[Unit], copies: Sequence[dict[int, str]], by: tuple[str, str] | None
) -> list[ShardNote]:
    """The same with the values of each video's line, what it repeats, and the split of those that can be read."""
    kept = dict.fromkeys((note.number, e.record) for note in notes for e in note.entries if not e.repeats)
    records = [units[number].records[record] for number, record in kept]
    split = dict(zip(kept, validation_split(records, by), strict=True))

    def with_line(number: int, j: int, entry: Entry) -> Entry:
        record, held_out = units[number].records[entry.record], split.get((number, entry.record), False)
        video = replace(entry.video, captions=record.captions, validation=held_out, extra=dict(record.extra))
        return replace(entry, video=video, repeats=copies[number].get(j, ""))

    return [
        replace(note, entries=tuple(with_line(note.number, j, entry) for j, entry in enumerate(note.entries)))
        for note in notes
    ]


def write_cache(notes: Sequence[ShardNote], output: Place) -> None:
    """Write the index of the shards, and remove what does not belong to them."""
    names = {shard_name(note.number) for note in notes}
    for old in (*shard_files(output), *stale_files(output)):
        if old.name.partition(".")[0] not in names:
            old.unlink()
    videos: list[CachedVideo] = []
    copies: list[dict[str, Any]] = []
    first = 0
    for note in notes:
        for video, original in ((entry.video, entry.repeats) for entry in note.entries):
            if original:
                facts = {"source": video.source, "file": video.file, "start_s": video.start_s}
                copies.append({**facts, "repeats": original})
            else:
                videos.append(replace(video, first=first + video.first))
        first += note.shard.frames if note.shard else 0
    put_text(output / COPIES, _jsonl(copies))
    if not videos:
        remove_index(output)
        bad = [file for note in notes for file in note.bad]
        raise VideoReadError(f"none of {len(bad)} files can be read; see {output / QUARANTINE}; {bad[0].reason}")
    write_index(output, [note.shard for note in notes if note.shard], videos)


def _jsonl(values: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
