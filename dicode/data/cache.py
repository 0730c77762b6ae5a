"""The training cache: frames of a data set with their times, so that any clip at any rate is a lookup.

cache/shard-00000.safetensors          frames u8 `f h w c`, times_s f64 `f`; read through memory maps
cache/shard-00000.NAME.safetensors     `values` computed of its frames, first axis `f`, or of `rows` of them
cache/index.json                       shards and the file of videos, each with size and SHA-256
cache/videos.safetensors               the videos; see `dicode.data.columns`
"""

import dataclasses
import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from dicode.checkpoint import read_tensors
from dicode.config import MOST_INTEGER, CheckpointError, Count, Items, Range, Whole, config_from_dict, shortened
from dicode.data.cache_folder import INDEX, VIDEOS, check_own, remove_index, shard_files
from dicode.data.columns import VALIDATION, FrameRows, Videos, fault_of_columns
from dicode.data.columns import CachedVideo as CachedVideo  # which other modules import from here
from dicode.files import Place, TextError, alone_with, fetched, place, put, put_text, read_json, sha256_of
from dicode.stopwatch import Progress

FORMAT = 2
ARCHIVES = "archives"  # the format of another index (`dicode.data.archive_index`), which holds no frames
AGAIN = "make the cache again with the same `dicode data cache`, or copy it again"
Bytes = Annotated[int, Range(1, MOST_INTEGER)]
MOST_OPEN = 1024  # shards mapped at a time: Linux allows a process 65,530 maps, 10 million clips are 156,250 shards


@dataclass(frozen=True)
class Shard:
    """A file of a cache: what it should hold."""

    file: str
    frames: Count
    bytes: Bytes
    sha256: str


class CacheError(ValueError):
    """A cache that cannot be read: names the file, what was expected and what was found."""


def mapped(files: Sequence[Path], shards: Sequence[Shard] = ()) -> Callable[[int], dict[str, Tensor]]:
    """The tensors of each of many safetensors files, by its number; the last files read stay mapped.

    Raises `CacheError` for a file that holds another number of frames than its shard, where `shards` are given.
    """

    @lru_cache(MOST_OPEN)
    def read(number: int) -> dict[str, Tensor]:
        tensors = read_tensors(files[number])
        if shards and (wrong := _fault_of_tensors(files[number], tensors, shards[number].frames)):
            raise CacheError(f"{wrong}; {AGAIN}")
        return tensors

    return read


def _fault_of_tensors(path: Place, tensors: dict[str, Tensor], frames: int) -> str:
    """Why these are not the tensors of a shard of so many frames, or ''."""
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    _, shape = found.get("frames", (None, ()))
    expected = {"frames": (torch.uint8, (frames, *shape[1:4])), "times_s": (torch.float64, (frames,))}
    if found == expected and len(shape) == 4:
        return ""
    held = ", ".join(f"{name} {dtype} {shape}" for name, (dtype, shape) in found.items())
    return f"{path}: expected {frames:,} frames and their times, got {held}"


class Rows:
    """Tensors of equal width beneath each other, indexed by row as if they were one; none is copied whole.

    `read` gives the tensors of a part, of which `name` is the one that these rows are of; `sizes` are the parts'
    numbers of rows. If `partly`, some rows are left out: a part's tensor `rows` has the numbers of those there are.
    """

    def __init__(
        self, read: Callable[[int], dict[str, Tensor]], name: str, sizes: Sequence[int], partly: bool = False
    ) -> None:
        self.read, self.name, self.partly = read, name, partly
        self.starts = [0, *accumulate(sizes)]
        self.shape = torch.Size([self.starts[-1], *self.part(0).shape[1:]])
        self._bounds = torch.tensor(self.starts[1:])

    def part(self, number: int) -> Tensor:
        """The rows of one part."""
        return self.read(number)[self.name]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: Any) -> Tensor:
        """As `torch.cat(parts)[at]`, for a slice within one part, or integers, lists or tensors counted from 0."""
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            i = min(bisect_right(self.starts, start), len(self._bounds)) - 1
            if not self.partly and stop <= self.starts[i + 1]:
                return self.part(i)[start - self.starts[i] : stop - self.starts[i] : step]
            at = torch.arange(start, stop, step)
        given = torch.broadcast_tensors(*map(torch.as_tensor, at if isinstance(at, tuple) else (at,)))
        rows, *others = (index.flatten().contiguous() for index in given)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"expected rows from 0 to {len(self) - 1}, got {rows.min()} to {rows.max()}")
        values = torch.empty(len(rows), *self.shape[1 + len(others) :], dtype=self.part(0).dtype)
        part_of = torch.bucketize(rows, self._bounds, right=True)
        for i in part_of.unique().tolist():
            own = part_of == i
            within = wanted = rows[own] - self.starts[i]
            if self.partly:
                held = self.read(i)["rows"]
                within = torch.searchsorted(held, wanted).clamp(max=max(0, len(held) - 1))
                if len(held) == 0 or not torch.equal(held[within], wanted):
                    raise IndexError(f"rows {rows[own].tolist()[:8]}: some were left out, as no key frames")
            values[own] = self.part(i)[(within, *(index[own] for index in others))]
        return values.reshape(*given[0].shape, *values.shape[1:])


@dataclass(frozen=True)
class FrameCache:
    """All videos of a data set, their frames in memory or in shards."""

    videos: Sequence[CachedVideo]  # kept as `Videos`
    frames: Tensor | Rows  # uint8 f h w c
    times_s: Tensor | Rows  # float64 f, from the start of each video
    files: tuple[Path, ...] = ()  # of the shards

    def __post_init__(self) -> None:
        object.__setattr__(self, "videos", Videos.of(self.videos))

    @property
    def columns(self) -> Videos:
        """The videos, with the type that they have."""
        return cast(Videos, self.videos)

    @classmethod
    def load(cls, folder: str | Path) -> "FrameCache":
        """Open a cache; its frames stay on disk. Raises `CacheError` where a shard is missing or has another size."""
        where = place(folder)
        if not isinstance(where, Path):
            raise CacheError(f"{where}: shards are read through memory maps; copy the cache to this machine first")
        shards, videos = read_cache_index(where)
        if wrong := next((w for shard in shards if (w := fault(where, shard, hashes=False))), ""):
            raise CacheError(f"{wrong}; {AGAIN}")
        files, sizes = tuple(where / shard.file for shard in shards), [shard.frames for shard in shards]
        read = mapped(files, shards)
        return cls(videos, Rows(read, "frames", sizes), Rows(read, "times_s", sizes), files)

    def save(self, folder: str | Path) -> None:
        """Write the videos of a cache in memory as one shard.

        A cache that lay there before goes, with what was computed of it: an interrupted write leaves none. Raises
        `ValueError` for a folder with other files.
        """
        folder = Path(folder)
        check_own(folder)
        folder.mkdir(parents=True, exist_ok=True)
        remove_index(folder)
        for old in shard_files(folder):
            old.unlink()
        shard = write_shard(folder, shard_name(0), self.frames[:], self.times_s[:])
        write_index(folder, [shard], self.columns)

    @property
    def _starts(self) -> list[int]:
        """First row of each shard, and the number of rows."""
        return self.frames.starts if isinstance(self.frames, Rows) and self.files else [0, len(self.frames)]

    def computed(self, name: str, compute: Callable[[Tensor], Tensor]) -> Rows:
        """The values of `compute` for all frames, kept beside each shard as NAME; interrupted, it goes on by shards."""
        return self._computed(name, lambda rows: {"values": compute(self.frames[rows.start : rows.stop])})

    def computed_of(self, name: str, select: Callable[[range], Tensor], compute: Callable[[Tensor], Tensor]) -> Rows:
        """The values of `compute` for the rows that `select` gives of a shard's, ascending; kept as `computed` does."""

        def tensors(rows: range) -> dict[str, Tensor]:
            selected = select(rows)
            return {"rows": selected - rows.start, "values": compute(selected)}

        return self._computed(name, tensors, partly=True)

    def _computed(self, name: str, tensors: Callable[[range], dict[str, Tensor]], partly: bool = False) -> Rows:
        shards = [range(start, stop) for start, stop in pairwise(self._starts)]
        sizes = [len(rows) for rows in shards]
        if not self.files:
            made = tensors(shards[0])
            return Rows(lambda _: made, "values", sizes, partly)
        paths = [self._computed_file(number, name) for number in range(len(shards))]
        missing = [number for number, path in enumerate(paths) if not path.is_file()]
        with Progress(f"computing {name.split('-')[0]}", sum(sizes[n] for n in missing), "frame") as progress:
            for wait in (False, True):  # shards that other processes have begun come last, and are done by then, or not
                for number in missing:
                    with alone_with(self.files[number], wait) as alone:
                        if alone and not paths[number].is_file():
                            put(paths[number], partial(save_file, tensors(shards[number])))
                            progress.update(sizes[number])
        return Rows(mapped(paths), "values", sizes, partly)

    def _computed_file(self, number: int, name: str) -> Path:
        return self.files[number].with_suffix(f".{name}.safetensors")

    def kept(self, name: str, rows: Tensor) -> Tensor | None:
        """The values that `computed` left as NAME of these rows, all of one shard; None where it left none."""
        if not self.files or len(rows) == 0:
            return None
        number = bisect_right(self._starts, int(rows[0])) - 1
        path = self._computed_file(number, name)
        return read_tensors(path)["values"][rows - self._starts[number]] if path.is_file() else None

    def of_rows(self, rows: range) -> Videos:
        """The videos that begin within these rows: of one shard."""
        bounds = np.searchsorted(self.columns.column("first"), [rows.start, rows.stop])
        return self.columns[bounds[0] : bounds[1]]

    def subset(self, validation: bool) -> "FrameCache":
        """The videos of one split; the frames are shared, not copied. Raises `ValueError` where it has none."""
        chosen = self.columns.having(VALIDATION, validation)
        if not chosen:
            raise ValueError(f"none of {len(self.videos)} videos is for {'validation' if validation else 'training'}")
        return dataclasses.replace(self, videos=chosen)

    def frame_rows(self) -> FrameRows:
        """Row numbers of all frames of the videos in this (sub)set; `[:]` makes them all."""
        return FrameRows(self.columns)

    def clip_rows(self, video: CachedVideo, start_s: float, num_frames: int, fps: float) -> Tensor:
        """Row of the frame `start_s + i / fps` after a video's first; a loop wraps, another holds its last frame."""
        times = self.times_s[video.first : video.first + video.count].numpy()
        times = times - times[:1]  # it may be a part of one whose frames it shares
        moments = start_s + np.arange(num_frames) / fps
        if video.loops:
            moments = moments % video.period_s
        index = np.searchsorted(times, moments + 1e-6, side="right") - 1
        return torch.from_numpy(video.first + index.clip(0, video.count - 1))


def shard_name(number: int) -> str:
    """What the names of a shard's files begin with."""
    return f"shard-{number:05}"


def write_shard(folder: Place, name: str, frames: Tensor, times_s: Tensor) -> Shard:
    """Write one shard, whole or not at all; equal tensors give equal bytes."""
    path = folder / f"{name}.safetensors"
    facts: list[tuple[int, str]] = []

    def write(partial: Path) -> None:
        save_file({"frames": frames.contiguous(), "times_s": times_s.contiguous()}, partial)
        facts.append((partial.stat().st_size, sha256_of(partial)))

    put(path, write)
    return Shard(path.name, len(frames), *facts[0])


def fault(folder: Place, shard: "Shard | VideosFile", hashes: bool) -> str:
    """What is wrong with a file, by its size and, if asked for, its SHA-256 and what it holds; '' for nothing."""
    path = folder / shard.file
    if not path.is_file():
        return f"{path}: missing"
    if (found := path.stat().st_size) != shard.bytes:
        return f"{path}: expected {shard.bytes} bytes, got {found}"
    if not hashes:
        return ""
    with fetched(path) as local:
        if (digest := sha256_of(local)) != shard.sha256:
            return f"{path}: expected SHA-256 {shard.sha256}, got {digest}"
        return _fault_of_tensors(path, read_tensors(local), shard.frames) if isinstance(shard, Shard) else ""


def holds_archives(folder: Place) -> bool:
    """Whether this is a tar archive, or a folder with some."""
    return folder.suffix.lower() == ".tar" or (folder.is_dir() and any(True for _ in folder.glob("*.tar")))


@dataclass(frozen=True)
class VideosFile:
    """The file of a cache's videos: what it should hold."""

    file: str
    videos: Count
    validation: Whole
    bytes: Bytes
    sha256: str


@dataclass(frozen=True)
class Index:
    """What index.json holds."""

    format: int
    videos: VideosFile
    sources: Annotated[tuple[str, ...], Items(1, MOST_INTEGER)]
    shards: Annotated[tuple[Shard, ...], Items(1, MOST_INTEGER)]


def write_index(folder: Place, shards: Sequence[Shard], videos: Iterable[CachedVideo]) -> None:
    """Make shards a cache of these videos: the same bytes for equal shards and videos.

    Where the cache changes, files computed of the whole of it go; interrupted, it leaves no index.
    """
    columns, index = Videos.of(videos), folder / INDEX
    data, held_out = save(columns.tensors()), len(columns.having(VALIDATION))
    file = VideosFile(VIDEOS, len(columns), held_out, len(data), hashlib.sha256(data).hexdigest())
    values = {"format": FORMAT, "videos": dataclasses.asdict(file), "sources": list(columns.sources)}
    values["shards"] = [dataclasses.asdict(shard) for shard in shards]
    text = json.dumps(values, indent=0, ensure_ascii=False) + "\n"
    if index.is_file() and index.read_text("utf-8", "replace") == text and not fault(folder, file, hashes=True):
        return
    remove_index(folder)
    put(folder / VIDEOS, lambda partial: partial.write_bytes(data))
    put_text(index, text)


def read_cache_index(folder: Place, hashes: bool = False) -> tuple[tuple[Shard, ...], Videos]:
    """The shards and videos of a cache; `hashes` compares the file of videos with its SHA-256.

    Raises `FileNotFoundError`, or `CacheError` for another kind of index.json and for another file of videos.
    """
    path = folder / INDEX
    if not path.is_file():
        more = ", or an index of its archives with `dicode data stream`" if holds_archives(folder) else ""
        raise FileNotFoundError(f"{folder}: no frame cache there; make it with `dicode data cache`{more}")
    try:
        values = read_json(path)
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        if found == ARCHIVES:
            raise CacheError(
                f"{folder}: is an index of archives, whose videos only a TokenizerRun decodes while it trains; this "
                "needs frames: make a cache of the archives with `dicode data cache`"
            )
        if found != FORMAT:
            raise CacheError(f"{path}: expected format {FORMAT}, got {shortened(found)}; make the cache again")
        index = config_from_dict(Index, values, INDEX)
    except (TextError, CheckpointError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise CacheError(f"{path}: not an index of a cache ({reason}); make the cache again") from error
    file, frames = folder / index.videos.file, sum(shard.frames for shard in index.shards)
    if wrong := fault(folder, index.videos, hashes):
        raise CacheError(f"{wrong}; {AGAIN}")
    try:
        with fetched(file) as local:
            columns = {name: tensor.numpy() for name, tensor in read_tensors(local).items()}
    except CheckpointError as error:
        raise CacheError(str(error)) from error
    if wrong := fault_of_columns(columns, index.videos.videos, frames, len(index.sources)):
        raise CacheError(f"{file}: {wrong}; {AGAIN}")
    return index.shards, Videos(columns, index.sources, file=str(file))
