"""Videos to the shards of a training cache: the same bytes however many workers, and however often it was stopped.

Beside the shards lie what each of them was made of and from (shard-00000.json), for the same command to go on from, and
quarantine.jsonl, the files that could not be read, and copies.jsonl, the videos that were left out as copies.
"""

import dataclasses
import errno
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dicode.checkpoint import read_tensors
from dicode.config import CheckpointError, config_from_dict
from dicode.data.cache import Shard, fault, index_text, shard_name, write_shard, write_videos
from dicode.data.cache_folder import INDEX, check_own, shard_files, stale_files, whole_files
from dicode.data.columns import CachedVideo
from dicode.data.dedupe import look_of, repeats, scenes
from dicode.data.parallel_map import spread
from dicode.data.records import ClipRecord, validation_split
from dicode.files import Place, fetched, put_text, state_of
from dicode.stopwatch import Progress
from dicode.video.read import Times, VideoReadError, native_frames
from dicode.video.timed import Video

QUARANTINE, COPIES = "quarantine.jsonl", "copies.jsonl"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MOST_LACKING_S = 0.5  # of a span, at the end of its file: times of lists are rounded


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
        """Raises `ValueError` for options that cannot be."""
        if self.loops and self.scenes is not None:
            raise ValueError("loops, scenes: a scene cut out of a video does not repeat without a seam; leave one out")
        if self.files_per_shard < 1 or self.size < 1 or not self.max_fps > 0:
            raise ValueError("size, max_fps, files_per_shard: expected positive numbers")

    def of_units(self) -> str:
        """What of the options a single shard depends on."""
        return json.dumps([self.size, self.max_fps, self.loops, self.scenes, self.dedupe is not None])


@dataclass(frozen=True)
class Unit:
    """The files that become one shard."""

    number: int
    records: tuple[ClipRecord, ...]
    options: CacheOptions
    output: Place
    afresh: bool = False  # even if the shard is there


@dataclass(frozen=True)
class Entry:
    """A video of a unit: its rows counted from the first of the shard, and whether it is left out as a copy."""

    video: CachedVideo  # in the notes of shards without captions, split and further values; see `with_lines`
    look: str = ""  # see `look_of`
    repeats: str = ""  # the video it is a copy of
    record: int = 0  # of the unit's


@dataclass(frozen=True)
class Bad:
    """A file that could not be read."""

    file: str
    reason: str


@dataclass(frozen=True)
class Made:
    """What a unit became, as kept in the .json beside its shard; `inputs` stands for its files and options."""

    number: int
    inputs: str
    shard: Shard | None  # None: no file could be read
    entries: tuple[Entry, ...]
    bad: tuple[Bad, ...]


def build_cache(
    records: Sequence[ClipRecord],
    output: Place,
    options: CacheOptions,
    workers: int = 1,
    ray: str | None = None,
    validation_by: tuple[str, str] | None = None,
) -> list[Made]:
    """Write a cache of these clips, in their order, going on from what an earlier run of the same left.

    Bad files are noted and left out. `validation_by`: see `validation_split`. Raises `VideoReadError` where nothing can
    be read, and `ValueError` for a folder with other files than a cache's.
    """
    check_own(output)
    if validation_by is not None:
        validation_split(records, validation_by)  # raises before the work rather than after it
    for old in stale_files(output):
        old.unlink()
    at_once = options.files_per_shard
    units = [
        Unit(i // at_once, tuple(records[i : i + at_once]), options, output) for i in range(0, len(records), at_once)
    ]
    made = []
    with Progress("caching", len(records), "clip") as progress:
        for text in spread(make_shard, units, workers, ray):
            made.append(config_from_dict(Made, json.loads(text), "unit"))
            progress.update(len(units[made[-1].number].records))
    made.sort(key=lambda unit: unit.number)
    if options.dedupe is not None:
        made = without_copies(made, units, options.dedupe)
    made = with_lines(made, units, validation_by)
    bad = [dataclasses.asdict(file) for unit in made for file in unit.bad]
    put_text(output / QUARANTINE, "".join(json.dumps(file, ensure_ascii=False) + "\n" for file in bad))
    finish(made, output)
    return made


def make_shard(unit: Unit) -> str:
    """`Made` of a unit as JSON: of the shard there, if it is what these files and options give, or of a new one."""
    name, digest = shard_name(unit.number), hashlib.sha256(unit.options.of_units().encode())
    for record in unit.records:
        held = record.inside.archive if record.inside else record.path
        facts = (record.source, record.file, record.start_s, record.end_s, record.inside and record.inside.span)
        digest.update(json.dumps([*facts, record.fault or state_of(held)]).encode())
    note = unit.output / f"{name}.json"
    if not unit.afresh and note.is_file():
        text = note.read_text(encoding="utf-8")
        if _still_there(text, digest.hexdigest(), unit.output):
            return text
    _forget(unit.output, name)
    entries: list[Entry] = []
    frames: list[Video] = []
    times_s: list[Times] = []
    bad: list[Bad] = []
    first = 0
    for number, record in enumerate(unit.records):
        try:
            for entry, own_frames, own_times_s in _clips(record, unit.options):
                entries.append(replace(entry, record=number, video=replace(entry.video, first=first)))
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
    return _note(Made(unit.number, digest.hexdigest(), shard, tuple(entries), tuple(bad)), unit.output)


def _still_there(text: str, inputs: str, output: Place) -> bool:
    try:
        made = config_from_dict(Made, json.loads(text), "unit")
    except (json.JSONDecodeError, CheckpointError):  # of another version
        return False
    return made.inputs == inputs and (made.shard is None or not fault(output, made.shard, hashes=True))


def _clips(record: ClipRecord, options: CacheOptions) -> Iterator[tuple[Entry, Video, Times]]:
    """The video of a file, or its scenes."""
    with record.opened() as path:
        frames, times_s, period_s = native_frames(
            path, options.size, max_fps=options.max_fps, start_s=record.start_s, end_s=record.end_s
        )
    if record.end_s is not None and record.end_s - record.start_s - period_s > MOST_LACKING_S:
        lasts_s = record.start_s + period_s
        raise VideoReadError(
            f"{record.path}: its line has end_s {record.end_s:g}, and the file ends at {lasts_s:.4g} s"
        )
    spans = [(0, len(frames))] if options.scenes is None else scenes(frames)
    ends_s = [*times_s[[stop for _, stop in spans[:-1]]], period_s]
    lengths_s = [end_s - times_s[start] for (start, _), end_s in zip(spans, ends_s, strict=True)]
    if max(lengths_s) < (options.scenes or 0.0):
        raise VideoReadError(f"{record.path}: its longest scene lasts {max(lengths_s):.2f} s")
    for (start, stop), length_s in zip(spans, lengths_s, strict=True):
        if length_s < (options.scenes or 0.0):
            continue
        video = CachedVideo(
            source=record.source,
            file=record.file,
            captions=(),
            validation=False,
            loops=options.loops,
            first=0,
            count=stop - start,
            period_s=float(length_s),
            start_s=record.start_s + float(times_s[start]),
        )
        own = frames[start:stop]
        look = "" if options.dedupe is None else look_of(own)
        yield Entry(video, look), own, times_s[start:stop] - times_s[start]


def _note(made: Made, output: Place) -> str:
    text = json.dumps(dataclasses.asdict(made), ensure_ascii=False)
    put_text(output / f"{shard_name(made.number)}.json", text)
    return text


def _forget(output: Place, name: str) -> None:
    """Remove a shard with all that was computed of it, and the index, which speaks of it."""
    for old in [output / INDEX, *shard_files(output, name)]:
        old.unlink(missing_ok=True)


def without_copies(made: Iterable[Made], units: Sequence[Unit], most_bits: int) -> list[Made]:
    """The same without the videos that repeat an earlier one; shards that hold such are written anew."""
    made = list(made)
    places = [(i, j) for i, unit in enumerate(made) for j in range(len(unit.entries))]
    entries = [made[i].entries[j] for i, j in places]
    copies = repeats([entry.look for entry in entries], most_bits)
    names: dict[int, dict[int, str]] = {}
    for copy, first in copies.items():
        i, j = places[copy]
        video = entries[first].video
        names.setdefault(i, {})[j] = f"{video.source}/{video.file}" + (f" {video.start_s:g} s" if video.start_s else "")
    return [_thinned(unit, units[i], names.get(i, {})) for i, unit in enumerate(made)]


def _thinned(made: Made, unit: Unit, copies: dict[int, str]) -> Made:
    out = {j for j, entry in enumerate(made.entries) if entry.repeats}
    if out - copies.keys():  # left out by an earlier run, with another threshold or other files before it
        made = config_from_dict(Made, json.loads(make_shard(replace(unit, afresh=True))), "unit")
        out = set()
    if out != copies.keys():
        made = _rewritten(made, unit.output, copies)
    return replace(made, entries=tuple(replace(e, repeats=copies.get(j, "")) for j, e in enumerate(made.entries)))


def _rewritten(made: Made, output: Place, copies: dict[int, str]) -> Made:
    """The shard without the rows of copies. Stopped between its files, it does not fit its note and is made anew."""
    assert made.shard is not None
    entries, rows, first = [], [torch.empty(0, dtype=torch.long)], 0
    for j, entry in enumerate(made.entries):
        if j not in copies:
            rows.append(torch.arange(entry.video.first, entry.video.first + entry.video.count))
        entries.append(replace(entry, video=replace(entry.video, first=first), repeats=copies.get(j, "")))
        first += 0 if j in copies else entry.video.count
    with fetched(output / made.shard.file) as local:
        kept = {name: values[torch.cat(rows)] for name, values in read_tensors(local).items()}
    _forget(output, shard_name(made.number))
    shard = write_shard(output, shard_name(made.number), kept["frames"], kept["times_s"]) if first else None
    made = replace(made, shard=shard, entries=tuple(entries))
    _note(made, output)
    return made


def with_lines(made: Iterable[Made], units: Sequence[Unit], validation_by: tuple[str, str] | None = None) -> list[Made]:
    """The same with what the lines tell of each video, and the split, which is over videos that can be read."""
    made = list(made)
    lines = {i: units[unit.number].records for i, unit in enumerate(made)}
    kept = dict.fromkeys((i, e.record) for i, unit in enumerate(made) for e in unit.entries if not e.repeats)
    split = dict(zip(kept, validation_split([lines[i][number] for i, number in kept], validation_by), strict=True))

    def told(i: int, entry: Entry) -> Entry:
        record, held_out = lines[i][entry.record], split.get((i, entry.record), False)
        video = replace(entry.video, captions=record.captions, validation=held_out, extra=dict(record.extra))
        return replace(entry, video=video)

    return [replace(unit, entries=tuple(told(i, entry) for entry in unit.entries)) for i, unit in enumerate(made)]


def finish(made: Sequence[Made], output: Place) -> None:
    """Write the index of the shards, and remove what does not belong to them."""
    shards: list[Shard] = []
    videos: list[CachedVideo] = []
    copies: list[dict[str, Any]] = []
    for unit in made:
        first = sum(shard.frames for shard in shards)
        shards += [unit.shard] if unit.shard else []
        for entry in unit.entries:
            if entry.repeats:
                facts = {name: getattr(entry.video, name) for name in ("source", "file", "start_s")}
                copies.append({**facts, "repeats": entry.repeats})
            else:
                videos.append(replace(entry.video, first=first + entry.video.first))
    names, index = {shard_name(unit.number) for unit in made}, output / INDEX
    for old in (*shard_files(output), *stale_files(output)):
        if old.name.partition(".")[0] not in names:
            old.unlink()
    put_text(output / COPIES, "".join(json.dumps(copy, ensure_ascii=False) + "\n" for copy in copies))
    text = index_text(shards, *write_videos(output, videos)) if videos else ""
    if videos and index.is_file() and index.read_text(encoding="utf-8") == text:
        return
    for old in whole_files(output):
        old.unlink()
    index.unlink(missing_ok=True)
    if not videos:
        bad = [file for unit in made for file in unit.bad]
        raise VideoReadError(f"none of {len(bad)} files can be read; see {output / QUARANTINE}; {bad[0].reason}")
    put_text(index, text)
