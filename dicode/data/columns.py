"""The videos of a cache as columns of one file, mapped into memory rather than read: there may be millions.

cache/videos.safetensors   first i64, count i32, period_s and start_s f64, flags u8, source i32, a number a video each;
                           text u8 and text_end i64: of each video the JSON of its file, captions and further keys
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dicode.config import MOST_INTEGER, Count, Range
from dicode.data.cache_folder import INDEX, VIDEOS
from dicode.video.timed import LONGEST_FRAME_S, MOST_FRAMES

DTYPES = {
    "first": torch.int64, "count": torch.int32, "period_s": torch.float64, "start_s": torch.float64,
    "flags": torch.uint8, "source": torch.int32, "text_end": torch.int64,
}  # fmt: skip
VALIDATION, LOOPS, CAPTIONED = 1, 2, 4  # bits of `flags`
LONGEST_S = MOST_FRAMES * LONGEST_FRAME_S  # no file that is read plays for longer


@dataclass(frozen=True)
class CachedVideo:
    """One video of a cache: frames `first … first + count − 1`, which play for `period_s` seconds and may loop."""

    source: str
    file: str
    captions: tuple[str, ...]
    validation: bool
    loops: bool
    first: Annotated[int, Range(0, MOST_INTEGER)]
    count: Count
    period_s: Annotated[float, Range(0, LONGEST_S, above=True)]
    start_s: Annotated[float, Range(0, LONGEST_S)] = 0.0  # where it begins in its file
    extra: dict[str, Any] = field(default_factory=dict)  # further keys of its line

    @property
    def caption(self) -> str:
        """The first caption, which is the short one where there are two; empty where there is none."""
        return self.captions[0] if self.captions else ""

    def lasts(self, seconds: float) -> bool:
        """Whether something is shown for that long, to half a frame: a still image never, a loop for ever."""
        return self.count > 1 and (self.loops or self.period_s * (1 + 0.5 / self.count) >= seconds)


def fault_of_columns(columns: Mapping[str, NDArray[Any]], videos: int, frames: int, sources: int) -> str:
    """Why these cannot be the columns of so many videos, of so many frames and sources in all; '' for nothing."""
    types = {name: (str(dtype).removeprefix("torch."), (videos,)) for name, dtype in DTYPES.items()}
    types["text"] = ("uint8", columns["text"].shape[:1] if "text" in columns else ())
    if (held := {name: (str(column.dtype), column.shape) for name, column in columns.items()}) != types:
        return f"expected columns of {videos:,} videos, got {', '.join(f'{n} {t} {s}' for n, (t, s) in held.items())}"
    first, count, text_end, flags = (columns[name] for name in ("first", "count", "text_end", "flags"))
    texts, all_flags = len(columns["text"]), VALIDATION | LOOPS | CAPTIONED
    rules = {
        f"first and count within {frames:,} frames": (first >= 0) & (count >= 1) & (count <= frames - first),
        f"period_s up to {LONGEST_S:,.0f}": (columns["period_s"] > 0) & (columns["period_s"] <= LONGEST_S),
        f"start_s up to {LONGEST_S:,.0f}": (columns["start_s"] >= 0) & (columns["start_s"] <= LONGEST_S),
        f"source from 0 to {sources - 1}": (columns["source"] >= 0) & (columns["source"] < sources),
        f"flags from 0 to {all_flags}": flags <= all_flags,
        f"text_end above the one before, up to {texts:,}": (np.diff(text_end, prepend=0) > 0) & (text_end <= texts),
    }
    for expected, holds in rules.items():
        if not holds.all():
            number = int(holds.argmin())
            found = ", ".join(f"{name} {columns[name][number]:g}" for name in DTYPES)
            return f"video {number}: expected {expected}, got {found}"
    if (end := int((first + count).max())) != frames:
        return f"its videos have {end:,} frames, and the shards of {INDEX} {frames:,}"
    return ""


# Any: of Sequence[CachedVideo], a type checker at run time reads a random video at every call
class Videos(Sequence[Any]):
    """Videos as columns; an integer gives a `CachedVideo`, a slice or an array of integers some of the videos."""

    def __init__(
        self,
        columns: Mapping[str, NDArray[Any]],
        sources: Sequence[str],
        chosen: range | NDArray[Any] | None = None,
        file: str = VIDEOS,
    ) -> None:
        self.columns, self.sources, self.file = columns, tuple(sources), file
        self.chosen = range(len(columns["first"])) if chosen is None else chosen

    @classmethod
    def of(cls, videos: Iterable[CachedVideo]) -> "Videos":
        """The columns of these videos, in memory; the same object where they are columns already."""
        if isinstance(videos, cls):
            return videos
        videos = list(videos)
        texts = [json.dumps([v.file, v.captions, v.extra], ensure_ascii=False) for v in videos]
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        sources = {source: i for i, source in enumerate(dict.fromkeys(v.source for v in videos))}
        columns = {name: [getattr(v, name) for v in videos] for name in ("first", "count", "period_s", "start_s")}
        columns["flags"] = [VALIDATION * v.validation + LOOPS * v.loops + CAPTIONED * any(v.captions) for v in videos]
        columns["source"] = [sources[v.source] for v in videos]
        columns["text_end"] = list(accumulate(map(len, encoded)))
        arrays = {name: torch.tensor(columns[name], dtype=dtype).numpy() for name, dtype in DTYPES.items()}
        return cls({**arrays, "text": np.frombuffer(b"".join(encoded), np.uint8)}, tuple(sources))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return Videos(self.columns, self.sources, self.chosen[at], self.file)
        if isinstance(at, np.ndarray) and at.ndim:
            return Videos(self.columns, self.sources, self.numbers(at), self.file)
        return self._video(int(self.chosen[at]))

    def __iter__(self) -> Iterator[CachedVideo]:
        return map(self._video, map(int, self.chosen))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(CachedVideo.__eq__, self, other))

    def _video(self, number: int) -> CachedVideo:
        values = {name: column[number].item() for name, column in self.columns.items() if name in DTYPES}
        flags, end = values.pop("flags"), values.pop("text_end")
        text = self.columns["text"][self.columns["text_end"][number - 1] if number else 0 : end].tobytes()
        values |= {"source": self.sources[values["source"]], "validation": bool(flags & VALIDATION)}
        try:
            file, captions, extra = json.loads(text.decode("utf-8", "surrogatepass"))
            if not (isinstance(file, str) and isinstance(extra, dict) and all(isinstance(c, str) for c in captions)):
                raise TypeError("no name, captions and object")
        except (ValueError, TypeError, RecursionError) as error:
            damaged = f"the text of video {number} is damaged ({error}): {text[:60]!r}"
            raise ValueError(f"{self.file}: {damaged}; copy the cache again") from error
        return CachedVideo(file=file, captions=tuple(captions), extra=extra, loops=bool(flags & LOOPS), **values)

    def numbers(self, at: NDArray[Any]) -> NDArray[Any]:
        """Rows in the columns of the videos at these places."""
        return self.chosen.start + self.chosen.step * at if isinstance(self.chosen, range) else self.chosen[at]

    def column(self, name: str) -> NDArray[Any]:
        """One number of every video; a view where they follow each other."""
        if isinstance(self.chosen, range):
            start, stop, step = self.chosen.start, self.chosen.stop, self.chosen.step
            return self.columns[name][start:stop:step]
        return self.columns[name][self.chosen]

    def having(self, flag: int, wanted: bool = True) -> "Videos":
        """Those with this bit of `flags`, or without it."""
        return self._where((self.column("flags") & flag != 0) == wanted)

    def last(self, seconds: float) -> NDArray[np.bool_]:
        """Whether `CachedVideo.lasts` holds, for each."""
        count, loops = self.column("count"), self.column("flags") & LOOPS != 0
        return (count > 1) & (loops | (self.column("period_s") * (1 + 0.5 / count) >= seconds))

    def lasting(self, seconds: float) -> "Videos":
        """Those for which `CachedVideo.lasts` holds."""
        return self._where(self.last(seconds))

    def _where(self, wanted: NDArray[np.bool_]) -> "Videos":
        return self[np.flatnonzero(wanted).astype(np.int32)]

    def spread(self, count: int) -> "Videos":
        """Up to so many of them, evenly over all, the same ones every time."""
        return self[spread_numbers(len(self), count)]

    def tensors(self) -> dict[str, Tensor]:
        """The content of a file of these videos."""
        if not isinstance(self.chosen, range) or len(self) < len(self.columns["first"]):
            return Videos.of(list(self)).tensors()
        return {name: torch.from_numpy(np.array(values)) for name, values in self.columns.items()}


class FrameRows:
    """Row numbers of all frames of some videos, in order, found when asked for: only their counts are summed."""

    def __init__(self, videos: Videos) -> None:
        self.videos = videos
        self.ends = np.cumsum(videos.column("count"), dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, at: Any) -> Tensor:
        """Rows of the frames of these numbers: a slice, or anything that makes a tensor of integers."""
        numbers = torch.arange(*at.indices(len(self))) if isinstance(at, slice) else torch.as_tensor(at)
        if numbers.numel() and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"expected frames from 0 to {len(self) - 1}, got {numbers.min()} to {numbers.max()}")
        asked = numbers.numpy()
        video = np.searchsorted(self.ends, asked, side="right")
        first, count = (self.videos.columns[name][self.videos.numbers(video)] for name in ("first", "count"))
        return torch.as_tensor(first + asked - (self.ends[video] - count))

    def spread(self, count: int) -> Tensor:
        """Rows of up to so many frames, evenly over all, the same ones every time."""
        return self[torch.from_numpy(spread_numbers(len(self), count))]


def spread_numbers(total: int, count: int) -> NDArray[np.int64]:
    """Up to `count` numbers below `total`, evenly, without one twice."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)
