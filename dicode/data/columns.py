"""The videos of a cache as columns of one file: mapped into memory, not read, so that ten million cost what ten do.

cache/videos.safetensors   first i64, count i32, period_s and start_s f64, flags u8, source i32, a number a video each;
                           text u8 and text_end i64: of each video the JSON of its file, captions and further keys
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

DTYPES = {
    "first": torch.int64,
    "count": torch.int32,
    "period_s": torch.float64,
    "start_s": torch.float64,
    "flags": torch.uint8,
    "source": torch.int32,
    "text_end": torch.int64,
}
VALIDATION, LOOPS, CAPTIONED = 1, 2, 4  # bits of `flags`
BLOCK = 4096  # videos: frames are counted by blocks, and within one when asked for


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
    start_s: float = 0.0  # where it begins in its file
    extra: dict[str, Any] = field(default_factory=dict)  # further keys of its caption's line: JSON scalars and lists

    def lasts(self, seconds: float) -> bool:
        """Whether something is shown for that long, to half a frame: a still image never, a loop for ever."""
        return self.count > 1 and (self.loops or self.period_s * (1 + 0.5 / self.count) >= seconds)


class Videos(Sequence[CachedVideo]):
    """Videos of columns, each made when asked for; a slice or an array of numbers gives some of them."""

    def __init__(
        self, columns: Mapping[str, NDArray[Any]], sources: Sequence[str], chosen: range | NDArray[Any] | None = None
    ) -> None:
        self.columns, self.sources = columns, tuple(sources)
        self.chosen = range(len(columns["first"])) if chosen is None else chosen

    @classmethod
    def of(cls, videos: Iterable[CachedVideo]) -> "Videos":
        """The columns of these videos, in memory; the same object where they are columns already."""
        if isinstance(videos, cls):
            return videos
        columns: dict[str, list[Any]] = {name: [] for name in DTYPES}
        sources: dict[str, int] = {}
        text = bytearray()
        for video in videos:
            text += json.dumps([video.file, video.captions, video.extra], ensure_ascii=False).encode(
                "utf-8", "surrogatepass"
            )
            flags = VALIDATION * video.validation + LOOPS * video.loops + CAPTIONED * any(video.captions)
            for name in ("first", "count", "period_s", "start_s"):
                columns[name].append(getattr(video, name))
            columns["flags"].append(flags)
            columns["source"].append(sources.setdefault(video.source, len(sources)))
            columns["text_end"].append(len(text))
        arrays = {name: torch.tensor(values, dtype=DTYPES[name]).numpy() for name, values in columns.items()}
        return cls({**arrays, "text": np.array(text, np.uint8)}, tuple(sources))

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, at: int) -> CachedVideo: ...
    @overload
    def __getitem__(self, at: "slice | NDArray[Any]") -> "Videos": ...
    def __getitem__(self, at: Any) -> "CachedVideo | Videos":
        if isinstance(at, slice):
            return Videos(self.columns, self.sources, self.chosen[at])
        if isinstance(at, np.ndarray) and at.ndim:
            return Videos(self.columns, self.sources, np.asarray(self.chosen)[at])
        return self._made(int(self.chosen[at]))

    def __iter__(self) -> Iterator[CachedVideo]:
        return map(self._made, map(int, self.chosen))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(CachedVideo.__eq__, self, other))

    def __add__(self, others: "Videos") -> list[CachedVideo]:
        return [*self, *others]

    def _made(self, number: int) -> CachedVideo:
        columns = self.columns
        end, flags = int(columns["text_end"][number]), int(columns["flags"][number])
        text = columns["text"][int(columns["text_end"][number - 1]) if number else 0 : end].tobytes()
        file, captions, extra = json.loads(text.decode("utf-8", "surrogatepass"))
        return CachedVideo(
            source=self.sources[int(columns["source"][number])],
            file=file,
            captions=tuple(captions),
            validation=bool(flags & VALIDATION),
            loops=bool(flags & LOOPS),
            first=int(columns["first"][number]),
            count=int(columns["count"][number]),
            period_s=float(columns["period_s"][number]),
            start_s=float(columns["start_s"][number]),
            extra=extra,
        )

    def column(self, name: str) -> NDArray[Any]:
        """One number of every video; not a copy where these are all."""
        if isinstance(self.chosen, range):
            start, stop, step = self.chosen.start, self.chosen.stop, self.chosen.step
            return self.columns[name][start:stop:step]
        return self.columns[name][self.chosen]

    def having(self, flag: int, wanted: bool = True) -> "Videos":
        """Those with this bit of `flags`, or without it."""
        return self[_numbers((self.column("flags") & flag != 0) == wanted)]

    def last(self, seconds: float) -> NDArray[np.bool_]:
        """Of each whether `CachedVideo.lasts` holds."""
        count, period_s = self.column("count"), self.column("period_s")
        long = (self.column("flags") & LOOPS != 0) | (period_s * (1 + 0.5 / count) >= seconds)
        return long & (count > 1)

    def lasting(self, seconds: float) -> "Videos":
        """Those for which `CachedVideo.lasts` holds."""
        return self[_numbers(self.last(seconds))]

    def spread(self, count: int) -> "Videos":
        """Up to so many of them, evenly over all, the same ones every time."""
        return self[spread_numbers(len(self), count)]

    def tensors(self) -> dict[str, Tensor]:
        """What a file of these videos holds."""
        if self.chosen != range(len(self.columns["first"])):
            return Videos.of(list(self)).tensors()
        return {name: torch.from_numpy(np.array(values)) for name, values in self.columns.items()}


def joined(parts: Sequence[Videos], frames: Sequence[int]) -> Videos:
    """The videos of several caches with so many frames each, as of one cache."""
    sources = list(dict.fromkeys(source for part in parts for source in part.sources))
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in parts[0].columns}
    first = end = 0
    for part, own_frames in zip(parts, frames, strict=True):
        numbers = np.array([sources.index(source) for source in part.sources], np.int32)
        moved = {"first": part.columns["first"] + first, "text_end": part.columns["text_end"] + end}
        moved["source"] = numbers[part.columns["source"]]
        for name, values in part.columns.items():
            columns[name].append(moved.get(name, values))
        first += own_frames
        end += len(part.columns["text"])
    return Videos({name: np.concatenate(values) for name, values in columns.items()}, sources)


class FrameRows:
    """Row numbers of all frames of some videos, in order, found when asked for: none are kept but a sum a block."""

    def __init__(self, videos: Videos) -> None:
        self.videos = videos
        counts = videos.column("count")
        self.ends = np.cumsum([part.sum(dtype=np.int64) for part in np.split(counts, range(BLOCK, len(counts), BLOCK))])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, at: Any) -> Tensor:
        """Rows of the frames of these numbers: a slice, or anything that makes a tensor of integers."""
        numbers = torch.arange(*at.indices(len(self))) if isinstance(at, slice) else torch.as_tensor(at)
        return torch.from_numpy(self._rows(numbers.flatten().numpy())).reshape(numbers.shape)

    def _rows(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"expected frames from 0 to {len(self) - 1}, got {numbers.min()} to {numbers.max()}")
        rows, blocks = np.empty_like(numbers), np.searchsorted(self.ends, numbers, side="right")
        for block in np.unique(blocks):
            own, part = blocks == block, self.videos[int(block) * BLOCK : (int(block) + 1) * BLOCK]
            ends = np.cumsum(part.column("count"), dtype=np.int64)
            within = numbers[own] - (self.ends[block - 1] if block else 0)
            video = np.searchsorted(ends, within, side="right")
            rows[own] = part.column("first")[video] + within - (ends[video] - part.column("count")[video])
        return rows

    def spread(self, count: int) -> Tensor:
        """Rows of up to so many frames, evenly over all, the same ones every time."""
        return self[torch.from_numpy(spread_numbers(len(self), count))]


def spread_numbers(total: int, count: int) -> NDArray[np.int64]:
    """Up to `count` numbers below `total`, evenly, without one twice."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)


def _numbers(wanted: ArrayLike) -> NDArray[Any]:
    """Where it holds, in four bytes each."""
    return np.flatnonzero(wanted).astype(np.int32)
