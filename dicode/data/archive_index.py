"""Where the videos of tar archives lie, so that training decodes any of them without a cache of their frames.

index.json           the archives, each with its size, and the file of videos
videos.safetensors   the columns of `dicode.data.columns`, and of each video the number of its archive i32, offset and
                     length in it i64, height and width i32
quarantine.jsonl     the videos that cannot be opened
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save

from dicode.checkpoint import read_tensors
from dicode.config import MOST_INTEGER, CheckpointError, Items, config_from_dict
from dicode.data.build import QUARANTINE, Bad
from dicode.data.cache import ARCHIVES, Bytes, CacheError, VideosFile, fault
from dicode.data.cache_folder import INDEX, VIDEOS, check_own, remove_index
from dicode.data.columns import DTYPES, VALIDATION, CachedVideo, Videos, fault_of_columns
from dicode.data.parallel_map import parallel_map
from dicode.data.records import ClipRecord, validation_split
from dicode.files import Place, TextError, place, put, put_text, read_json
from dicode.stopwatch import Progress
from dicode.video.read import Facts, VideoReadError, header_facts

PLACES = {"archive": torch.int32, "offset": torch.int64, "length": torch.int64, "height": torch.int32,
          "width": torch.int32}  # fmt: skip
CHECKED_SIZE = 32  # a picture is bad if it cannot be scaled to this side
AT_ONCE = 64  # videos of a unit of work
AGAIN = "make the index again with the same `dicode data stream`"


@dataclass(frozen=True)
class Archive:
    """A tar archive: its path, relative to the index if both lie in one folder, or its URL; and its size."""

    file: str
    bytes: Bytes


@dataclass(frozen=True)
class ArchiveIndex:
    """What index.json holds."""

    format: str
    videos: VideosFile
    sources: Annotated[tuple[str, ...], Items(1, MOST_INTEGER)]
    shards: Annotated[tuple[Archive, ...], Items(1, MOST_INTEGER)]


@dataclass(frozen=True)
class ArchivedVideos:
    """Videos in archives. `first` and `count` of a video number its frames, of which none is held."""

    archives: tuple[str, ...]
    columns: Videos  # with `PLACES`

    @classmethod
    def load(cls, folder: str | Path) -> "ArchivedVideos":
        """Open an index. Raises `CacheError` for a damaged one, or for an archive here of another size."""
        where = place(folder)
        if not isinstance(where, Path):
            raise CacheError(f"{where}: an index is read through memory maps; copy it to this machine first")
        try:
            index = config_from_dict(ArchiveIndex, read_json(where / INDEX), INDEX)
            if wrong := fault(where, index.videos, hashes=False):
                raise CacheError(f"{wrong}; {AGAIN}")
            columns = {name: tensor.numpy() for name, tensor in read_tensors(where / index.videos.file).items()}
        except (TextError, CheckpointError) as error:
            raise CacheError(f"{error}; {AGAIN}") from error
        if wrong := _fault_of(columns, index):
            raise CacheError(f"{where / index.videos.file}: {wrong}; {AGAIN}")
        archives = [_archive_of(archive.file, where) for archive in index.shards]
        for own, archive in zip(archives, index.shards, strict=True):
            if isinstance(own, Path):
                found = own.stat().st_size if own.is_file() else None
                if found != archive.bytes:
                    held = "nothing" if found is None else f"{found:,} bytes"
                    raise CacheError(f"{own}: expected an archive of {archive.bytes:,} bytes, got {held}; {AGAIN}")
        videos = Videos(columns, index.sources, file=str(where / index.videos.file))
        return cls(tuple(map(str, archives)), videos)

    def subset(self, validation: bool) -> "ArchivedVideos":
        """The videos of one split. Raises `ValueError` where it has none."""
        if not (chosen := self.columns.having(VALIDATION, validation)):
            raise ValueError(f"none of {len(self.columns)} videos is for {'validation' if validation else 'training'}")
        return replace(self, columns=chosen)


def _archive_of(file: str, folder: Path) -> Place:
    own = place(file)
    return (folder / own).resolve() if isinstance(own, Path) else own


def is_archive_index(folder: str | Path) -> bool:
    """Whether a folder is an index of archives, by the beginning of its index.json."""
    path = place(folder) / INDEX
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b'"format": "%s"' % ARCHIVES.encode() in file.read(64)


def _fault_of(columns: Mapping[str, NDArray[Any]], index: ArchiveIndex) -> str:
    """Why these cannot be the columns of an index; '' for nothing."""
    videos, names = index.videos.videos, set(columns)
    expected = {**DTYPES, "text": torch.uint8, **PLACES}
    if names != expected.keys():
        return f"expected the columns {', '.join(sorted(expected))}, got {', '.join(sorted(names))}"
    types = {name: (str(dtype).removeprefix("torch."), (videos,)) for name, dtype in PLACES.items()}
    if (held := {name: (str(columns[name].dtype), columns[name].shape) for name in PLACES}) != types:
        return f"expected {types}, got {held}"
    own = {name: column for name, column in columns.items() if name not in PLACES}
    if wrong := fault_of_columns(own, videos, int(columns["count"].sum(dtype=np.int64)), len(index.sources)):
        return wrong
    archive, ends = columns["archive"], columns["offset"] + columns["length"]
    sizes = np.array([shard.bytes for shard in index.shards])
    if not ((archive >= 0) & (archive < len(sizes))).all():
        return f"expected archives from 0 to {len(sizes) - 1}"
    within = (columns["offset"] >= 0) & (columns["length"] >= 1) & (ends <= sizes[archive])
    within &= (columns["height"] >= 1) & (columns["width"] >= 1)
    return "" if within.all() else f"video {int(within.argmin())} does not lie within its archive, or has no picture"


def build_archive_index(
    records: Sequence[ClipRecord], output: Path, workers: int = 1, validation_by: tuple[str, str] | None = None
) -> tuple[ArchivedVideos, list[Bad]]:
    """Write the index of the videos of archives, in their order; gives it, and the bad files, which are left out.

    Of a video the header and the first frame are read: what is damaged further on is found when it is decoded. Raises
    `ValueError` for videos that lie in no archive and for a folder with other files, `VideoReadError` where none opens.
    """
    check_own(output)
    if loose := next((record for record in records if not (record.inside or record.fault)), None):
        raise ValueError(
            f"{loose.path}: expected videos in .tar archives, got a file of its own; pack them, or make a cache "
            "(`dicode data cache`)"
        )
    units = [(i, tuple(records[i : i + AT_ONCE])) for i in range(0, len(records), AT_ONCE)]
    found: dict[int, Facts | str] = {}
    with Progress("indexing", len(records), "clip") as progress:
        for number, those in parallel_map(_facts_of, units, workers):
            found.update(enumerate(those, number))
            progress.update(len(those))
    bad = [Bad(str(record.path), reason) for i, record in enumerate(records) if isinstance(reason := found[i], str)]
    kept = [(record, facts) for i, record in enumerate(records) if isinstance(facts := found[i], Facts)]
    output.mkdir(parents=True, exist_ok=True)
    remove_index(output)
    lines = [json.dumps(dataclasses.asdict(file), ensure_ascii=False) + "\n" for file in bad]
    put_text(output / QUARANTINE, "".join(lines))
    if not kept:
        raise VideoReadError(f"none of {len(bad)} videos can be opened; see {output / QUARANTINE}; {bad[0].reason}")
    made = _archived(kept, validation_split([record for record, _ in kept], validation_by))
    _write(made, output)
    return made, bad


def _facts_of(unit: tuple[int, Sequence[ClipRecord]]) -> tuple[int, list[Facts | str]]:
    """The number of the first of some videos, and of each the facts of its span, or why it cannot be opened."""
    found: list[Facts | str] = []
    for record in unit[1]:
        try:
            with record.opened() as path:
                facts = header_facts(path, CHECKED_SIZE)
                length_s = facts.duration_s - record.start_s
                record.check_length(length_s)
                if length_s <= 0:
                    raise VideoReadError(f"{path}: its line has start_s {record.start_s:g}, and it ends before")
            length_s = length_s if record.end_s is None else min(length_s, record.end_s - record.start_s)
            count = max(1, round(facts.num_frames * length_s / facts.duration_s))
            found.append(facts._replace(num_frames=count, duration_s=length_s))
        except VideoReadError as error:
            found.append(str(error))
    return unit[0], found


def _archived(kept: Sequence[tuple[ClipRecord, Facts]], held_out: Sequence[bool]) -> ArchivedVideos:
    archives: dict[str, int] = {}
    videos, places, first = [], [], 0
    for (record, facts), validation in zip(kept, held_out, strict=True):
        assert record.inside is not None
        own, (offset, length) = record.inside
        number = archives.setdefault(str(own.resolve() if isinstance(own, Path) else own), len(archives))
        line = (record.source, record.file, record.captions, validation, False, first, facts.num_frames)
        videos.append(CachedVideo(*line, facts.duration_s, record.start_s, dict(record.extra)))
        places.append((number, offset, length, facts.height, facts.width))
        first += facts.num_frames
    columns, own_places = Videos.of(videos), zip(PLACES.items(), zip(*places, strict=True), strict=True)
    more = {name: torch.tensor(values, dtype=dtype).numpy() for (name, dtype), values in own_places}
    return ArchivedVideos(tuple(archives), Videos({**columns.columns, **more}, columns.sources))


def _write(made: ArchivedVideos, output: Path) -> None:
    data, videos = save(made.columns.tensors()), made.columns
    facts = (len(videos), len(videos.having(VALIDATION)), len(data), hashlib.sha256(data).hexdigest())
    beside = output.resolve().parent  # so that both may be copied to another disk, and a run there goes on
    shards = []
    for own in map(place, made.archives):
        file = str(own)
        if isinstance(own, Path) and own.is_relative_to(beside):
            file = Path(os.path.relpath(own, output.resolve())).as_posix()
        shards.append({"file": file, "bytes": own.stat().st_size})
    values = {"format": ARCHIVES, "videos": dataclasses.asdict(VideosFile(VIDEOS, *facts))}
    put(output / VIDEOS, lambda partial: partial.write_bytes(data))
    text = json.dumps({**values, "sources": list(videos.sources), "shards": shards}, indent=0, ensure_ascii=False)
    put_text(output / INDEX, text + "\n")
