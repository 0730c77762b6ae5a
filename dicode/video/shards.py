"""The training cache: frames of a data set with their times, so that any clip at any rate is a lookup.

cache/shard-00000.safetensors          frames u8 `f h w c`, times_s f64 `f`; read through memory maps
cache/shard-00000.NAME.safetensors     what was computed of its frames: `values`, first axis `f`
cache/index.json                       shards with size and SHA-256, videos, and which ones repeat another
"""

import dataclasses
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from dicode.files import Place, place, put, put_text, sha256_of
from dicode.hub import CheckpointError, config_from_dict, read_tensors
from dicode.progress import Progress

FORMAT = 1
INDEX = "index.json"


@dataclass(frozen=True)
class CachedVideo:
    """One video of a cache: frames `first … first + count − 1`, which play for `period_s` seconds and may loop."""

    source: str
    file: str
    captions: tuple[str, ...]
    validation: bool
    loops: bool
    first: int
    count: int
    period_s: float
    start_s: float = 0.0  # where it begins in its file, if that was cut into scenes


@dataclass(frozen=True)
class Shard:
    """A file of a cache: what it should hold."""

    file: str
    frames: int
    bytes: int
    sha256: str


class CacheError(ValueError):
    """A cache that cannot be read: says which file, what was expected and what was found."""


class Rows:
    """Tensors of equal width beneath each other, indexed by row as if they were one; none is copied whole."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = list(parts)
        self.starts = [0, *accumulate(len(part) for part in parts)]
        self.shape = torch.Size([self.starts[-1], *parts[0].shape[1:]])
        self._bounds = torch.tensor(self.starts[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: Any) -> Tensor:
        """As `torch.cat(parts)[at]`, for a slice within one part, or integers, lists or tensors counted from 0."""
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            i = min(bisect_right(self.starts, start), len(self.parts)) - 1
            if stop <= self.starts[i + 1]:
                return self.parts[i][start - self.starts[i] : stop - self.starts[i] : step]
            at = torch.arange(start, stop, step)
        given = torch.broadcast_tensors(*map(torch.as_tensor, at if isinstance(at, tuple) else (at,)))
        rows, *others = (index.flatten().contiguous() for index in given)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"expected rows from 0 to {len(self) - 1}, got {rows.min()} to {rows.max()}")
        values = torch.empty(len(rows), *self.shape[1 + len(others) :], dtype=self.parts[0].dtype)
        part_of = torch.bucketize(rows, self._bounds, right=True)
        for i in part_of.unique().tolist():
            own = part_of == i
            values[own] = self.parts[i][(rows[own] - self.starts[i], *(index[own] for index in others))]
        return values.reshape(*given[0].shape, *values.shape[1:])


@dataclass(frozen=True)
class FrameCache:
    """All videos of a data set, their frames in memory or in shards."""

    videos: tuple[CachedVideo, ...]
    frames: Tensor | Rows  # uint8 f h w c
    times_s: Tensor | Rows  # float64 f, from the start of each video
    files: tuple[Path, ...] = ()  # of the shards

    @classmethod
    def load(cls, folder: str | Path) -> "FrameCache":
        """Open a cache; its frames stay on disk. Raises `CacheError` where a shard is missing or has another size."""
        where = place(folder)
        if not isinstance(where, Path):
            raise CacheError(f"{where}: shards are read through memory maps; copy the cache to this machine first")
        shards, videos = read_cache_index(where)
        if wrong := [said for shard in shards if (said := fault(where, shard, hashes=False))]:
            raise CacheError(f"{wrong[0]}; make the cache again with the same `dicode data cache`, or copy it again")
        files = tuple(where / shard.file for shard in shards)
        tensors = [read_tensors(file) for file in files]
        frames, times_s = (Rows([t[name] for t in tensors]) for name in ("frames", "times_s"))
        return cls(videos, frames, times_s, files)

    def save(self, folder: str | Path) -> None:
        """Write the videos of a cache in memory as one shard.

        What lay there before goes, with what was computed of it: an interrupted write leaves no cache.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)
        for old in (*folder.glob("*.safetensors"), *folder.glob("shard-*.json")):
            old.unlink()
        shard = write_shard(folder, shard_name(0), self.frames[:], self.times_s[:])
        put_text(folder / INDEX, index_text([shard], self.videos))

    def computed(self, name: str, make: Callable[[Tensor], Tensor]) -> Rows:
        """What `make` gives for all frames, kept beside each shard under `name`; interrupted, it goes on by shards."""
        if not isinstance(self.frames, Rows) or not self.files:
            return Rows([make(self.frames[:])])
        parts = zip(self.files, self.frames.parts, strict=True)
        made = []
        with Progress(f"computing {name.split('-')[0]}", len(self.frames), "frame") as progress:
            for file, frames in parts:
                path = file.with_suffix(f".{name}.safetensors")
                if not path.is_file():
                    values = make(frames)
                    put(path, partial(save_file, {"values": values}))
                made.append(read_tensors(path)["values"])
                progress.update(len(frames))
        return Rows(made)

    def subset(self, validation: bool) -> "FrameCache":
        """The videos of one split; the frames are shared, not copied. Raises `ValueError` where it has none."""
        chosen = tuple(v for v in self.videos if v.validation == validation)
        if not chosen:
            raise ValueError(f"none of {len(self.videos)} videos is for {'validation' if validation else 'training'}")
        return dataclasses.replace(self, videos=chosen)

    def frame_rows(self) -> Tensor:
        """Row numbers of all frames of the videos in this (sub)set."""
        return torch.cat([torch.arange(v.first, v.first + v.count) for v in self.videos])

    def clip_rows(self, video: CachedVideo, start_s: float, num_frames: int, fps: float) -> Tensor:
        """Row of the frame shown at `start_s + i / fps`; a looping video wraps, another holds its last frame."""
        times = self.times_s[video.first : video.first + video.count].numpy()
        moments = start_s + np.arange(num_frames) / fps
        if video.loops:
            moments = moments % video.period_s
        shown = np.searchsorted(times, moments + 1e-6, side="right") - 1
        return torch.from_numpy(video.first + shown.clip(0, video.count - 1))


def join_caches(folders: Sequence[str | Path], output: Path) -> None:
    """Make of several caches one that is an index alone: shards, and what is computed of them, stay where they are."""
    shards: list[Shard] = []
    videos: list[CachedVideo] = []
    for folder in folders:
        first = sum(shard.frames for shard in shards)
        own, theirs = read_cache_index(Path(folder))
        shards += [dataclasses.replace(shard, file=str(Path(folder, shard.file).resolve())) for shard in own]
        videos += [dataclasses.replace(video, first=first + video.first) for video in theirs]
    output.mkdir(parents=True, exist_ok=True)
    put_text(output / INDEX, index_text(shards, videos))


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


def fault(folder: Place, shard: Shard, hashes: bool) -> str:
    """What is wrong with a shard's file, by its size and, if asked for, its SHA-256; '' for nothing."""
    path = folder / shard.file
    if not path.is_file():
        return f"{path}: missing"
    if (found := path.stat().st_size) != shard.bytes:
        return f"{path}: expected {shard.bytes} bytes, got {found}"
    if hashes and (digest := sha256_of(path)) != shard.sha256:
        return f"{path}: expected SHA-256 {shard.sha256}, got {digest}"
    return ""


def index_text(shards: Sequence[Shard], videos: Sequence[CachedVideo], **more: Any) -> str:
    """The content of index.json, which makes shards a cache; `more` values are for whoever looks into it."""
    more |= {"shards": [dataclasses.asdict(s) for s in shards], "videos": [dataclasses.asdict(v) for v in videos]}
    return json.dumps({"format": FORMAT, **more}, indent=0, ensure_ascii=False) + "\n"


def read_cache_index(folder: Place) -> tuple[tuple[Shard, ...], tuple[CachedVideo, ...]]:
    """The shards and videos of a cache. Raises `FileNotFoundError`, or `CacheError` for another kind of index.json."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no frame cache there; make it with `dicode data cache`")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        if found != FORMAT:
            raise CacheError(f"{path}: expected format {FORMAT}, got {found!r}; make the cache again")
        shards, videos = values["shards"], values["videos"]
        return (
            tuple(config_from_dict(Shard, entry, INDEX) for entry in shards),
            tuple(config_from_dict(CachedVideo, entry, INDEX) for entry in videos),
        )
    except (json.JSONDecodeError, KeyError, CheckpointError) as error:
        raise CacheError(f"{path}: not an index of a cache ({error}); make the cache again") from error
