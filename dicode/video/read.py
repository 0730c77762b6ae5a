"""Video files to frames, by timestamps; the writing half is `writer.py`, its names are re-exported here."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from upath import UPath

from dicode.files import read_text
from dicode.video.container import CONTAINER_SUFFIXES, container_comment, container_frames, stream_facts
from dicode.video.fit import Fit, Size, covering, fitted
from dicode.video.images import IMAGE_SUFFIXES, folder_frames, image_comment, image_format, image_frames
from dicode.video.timed import (
    DEFAULT_FPS,
    MOST_BYTES,
    MOST_PIXELS,
    TIME_TOLERANCE_S,
    Picture,
    Shown,
    Timed,
    Video,
    VideoReadError,
    checked_fps,
    shown,
)
from dicode.video.write import FOLDER_METADATA, VideoWriter

__all__ = [
    "DEFAULT_FPS",
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "Facts",
    "VideoFrames",
    "VideoReadError",
    "VideoWriter",
    "check_frames",
    "frame_indices",
    "native_frames",
    "natural_key",
    "probe",
    "read_metadata",
    "read_video",
]

Times = Float[ndarray, "f"]
FrameIndices = Int[ndarray, "n"]

VIDEO_SUFFIXES = IMAGE_SUFFIXES | CONTAINER_SUFFIXES
THINNED_TO = 1.05  # of 1/max_fps: what is left comes no slower than that, but for films, whose 24 a second become 12


@dataclass(frozen=True)
class VideoFrames:
    """Frames in memory with the true rate they are to be shown at; `source_fps` is the mean rate of the file."""

    frames: Video
    fps: float
    source_fps: float

    @property
    def duration_s(self) -> float:
        """How long these frames last."""
        return len(self.frames) / self.fps


@dataclass(frozen=True)
class Facts:
    """What a file holds, found without decoding a video; sizes are before rotation. A still lasts no time."""

    height: int
    width: int
    num_frames: int
    duration_s: float
    hdr: bool = False  # PQ or HLG: frames are tone-mapped when they are read

    @property
    def still(self) -> bool:
        """Whether there is a single frame."""
        return self.num_frames == 1

    @property
    def fps(self) -> float:
        """The mean rate; 0 for a still image."""
        return self.num_frames / self.duration_s if self.duration_s > 0 else 0.0


def read_video(
    path: str | Path,
    fps: float | None = DEFAULT_FPS,
    size: Size | None = None,
    fit: Fit = "crop",
    start_s: float = 0.0,
    max_duration_s: float | None = None,
    *,
    min_frames: int = 1,
    folder_fps: float | None = None,
    allow_partial: bool = False,
) -> VideoFrames:
    """Read a video, an image, still or animated, or a folder of frames: frame i is what is shown at start_s + i/fps.

    The last frame is shown for its own duration, a still image for one frame. `fps=None` keeps the file's own frames.
    `size` is a side or (height, width): the picture is scaled to cover it and cropped at the centre, or scaled to fit
    and padded with white. Rotation flags are obeyed, transparency is laid over white, HDR is tone-mapped. A folder runs
    at `folder_fps`, else at the rate in its metadata.json, else at 8. Only the frames returned are held in memory.

    Raises `VideoReadError` for whatever cannot be read, for fewer than `min_frames` frames, for what is beyond the
    bounds of `timed.py`, and for a file that breaks off (`allow_partial=True` takes what came before).
    """
    path = Path(path)
    fps = None if fps is None else checked_fps(fps, "fps")
    if not (math.isfinite(start_s) and start_s >= 0):
        raise ValueError(f"start_s: expected a time from 0 on, got {start_s}")
    if max_duration_s is not None and not max_duration_s > 0:
        raise ValueError(f"max_duration_s: expected a positive time or None, got {max_duration_s}")
    end_s = math.inf if max_duration_s is None else start_s + max_duration_s
    held = _Held(path, size, fit)
    seen, shown_until_s, seen_from_s, first_start_s = 0, 0.0, 0.0, 0.0
    for frame in shown(path, _timed_frames(path, 1 / (fps or DEFAULT_FPS), folder_fps, allow_partial, start_s)):
        seen_from_s = seen_from_s if seen else frame.start_s
        seen, shown_until_s = seen + 1, frame.end_s
        if fps is None:
            begun = not start_s or frame.end_s - TIME_TOLERANCE_S > start_s
            wanted = int(begun and frame.start_s + TIME_TOLERANCE_S < end_s)
        else:  # sample times start_s + i/fps from the next one on, up to this frame's end
            until_s = min(frame.end_s, end_s) - TIME_TOLERANCE_S
            wanted = max(0, math.ceil((until_s - start_s) * fps) - held.count)
        if wanted:
            first_start_s = first_start_s if held.count else frame.start_s
            held.add(frame, wanted)
        if frame.end_s >= end_s:
            break
    if held.count < max(min_frames, 1):
        rate = f" at {fps:g} fps" if fps else ""
        raise VideoReadError(
            f"{path}: too short: expected at least {max(min_frames, 1)} frame(s){rate} from {start_s:g} s on,"
            f" got {held.count}; the file lasts {shown_until_s:.3g} s ({seen} frame(s))"
        )
    own_fps = held.count / max(shown_until_s - first_start_s, TIME_TOLERANCE_S)
    source_fps = seen / max(shown_until_s - seen_from_s, TIME_TOLERANCE_S)
    return VideoFrames(held.frames(), own_fps if fps is None else fps, source_fps)


def native_frames(
    path: str | Path,
    size: Size | None = None,
    fit: Fit = "crop",
    *,
    folder_fps: float | None = None,
    max_fps: float = math.inf,
    start_s: float = 0.0,
    end_s: float | None = None,
) -> tuple[Video, Times, float]:
    """All frames of a file, the time in seconds each appears at, and the period a loop repeats after.

    A frame is left out where the one kept before it and the one after it lie within 1/max_fps (and 5 %): 25 and 30 a
    second become 12.5 and 15 for 12.5, 15 stay. The period includes the last frame's own duration. Memory holds every
    frame kept. Of a span from `start_s` to `end_s`, these are the frames shown in it, timed from its beginning; the
    period is its length, or what the file has of it.
    """
    held = _Held(Path(path), size, fit)
    gap_s = THINNED_TO / max_fps if math.isfinite(max_fps) else -1.0
    times_s, period_s = _walked(Path(path), held.add, folder_fps, gap_s, start_s, end_s)
    return held.frames(), np.array(times_s, dtype=np.float64), period_s


def check_frames(path: str | Path, size: int, start_s: float = 0.0, end_s: float | None = None) -> tuple[int, float]:
    """How many frames `native_frames` would return at this size, and their period; every one is decoded, none kept."""
    times_s, period_s = _walked(
        Path(path), lambda frame: covering(Path(path), frame.render(), (size, size)), None, -1.0, start_s, end_s
    )
    return len(times_s), period_s


def _walked(
    path: Path,
    take: Callable[[Shown], object],
    folder_fps: float | None,
    gap_s: float,
    start_s: float,
    end_s: float | None,
) -> tuple[list[float], float]:
    """The times of a span's frames, each of which is taken, and its period; see `native_frames`."""
    until_s = math.inf if end_s is None else float(end_s)
    if not (math.isfinite(start_s) and 0 <= start_s < until_s):
        raise ValueError(f"expected 0 ≤ start_s < end_s, got start_s {start_s} and end_s {end_s}")
    period_s, file_s = 0.0, 0.0
    times_s: list[float] = []
    for frame in shown(path, _timed_frames(path, 1 / DEFAULT_FPS, folder_fps, False, start_s)):
        file_s = frame.end_s
        if frame.start_s + TIME_TOLERANCE_S >= until_s:
            break
        if start_s and frame.end_s - TIME_TOLERANCE_S <= start_s:
            continue
        time_s = max(0.0, frame.start_s - start_s)
        if not times_s or gap_s < 0 or frame.end_s - start_s - times_s[-1] > gap_s:
            take(frame)
            times_s.append(time_s)
        period_s = min(frame.end_s, until_s) - start_s
    if not times_s:
        raise VideoReadError(f"{path}: expected frames from {start_s:g} s on; the file lasts {file_s:.3g} s")
    return times_s, period_s


def probe(path: str | Path, folder_fps: float | None = None) -> Facts:
    """Size, length and kind of a file or folder. Packets of a video are counted, not decoded.

    Raises `VideoReadError` for what cannot be opened; that all frames can be decoded is not checked.
    """
    path = Path(path)
    _check_kind(path)
    try:
        if path.is_file() and image_format(path) is None:
            return Facts(*stream_facts(path))
    except VideoReadError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    count, last = 0, None
    for frame in shown(path, _timed_frames(path, 0.0, folder_fps, False)):
        count, last = count + 1, frame
    assert last is not None
    height, width = last.render().shape[:2]
    return Facts(height, width, count, last.end_s if count > 1 else 0.0)


class _Held:
    """The frames that are wanted, each once however often it is repeated, within the bound of memory."""

    def __init__(self, path: Path, size: Size | None, fit: Fit) -> None:
        height, width = (size, size) if isinstance(size, int) else size or (1, 1)
        if height < 1 or width < 1 or height * width > MOST_PIXELS:
            raise ValueError(f"size: expected sides of at least 1 and at most {MOST_PIXELS:,} pixels, got {size}")
        self.path, self.size, self.fit = path, size, fit
        self.pictures: list[tuple[Picture, int]] = []
        self.count = 0

    def add(self, frame: Shown, times: int = 1) -> None:
        picture = fitted(self.path, frame.render(), self.size, self.fit)
        first = self.pictures[0][0] if self.pictures else picture
        if picture.shape != first.shape:
            (height, width), (first_height, first_width) = picture.shape[:2], first.shape[:2]
            raise VideoReadError(
                f"{self.path}: frame {self.count} is {width}x{height}, the first one {first_width}x{first_height};"
                " pass a size to bring them to one"
            )
        self.count += times
        if self.count * picture.nbytes > MOST_BYTES:
            raise VideoReadError(
                f"{self.path}: {self.count} frames of {picture.shape[1]}x{picture.shape[0]} and more, up to"
                f" {frame.start_s:.1f} s, would fill {self.count * picture.nbytes / 2**30:.1f} GiB; expected at most"
                f" {MOST_BYTES / 2**30:.1f}: read them smaller (size, --size), or a span (start_s, end_s)"
            )
        self.pictures.append((picture, times))

    def frames(self) -> Video:
        """All in one array; pictures are let go while it is filled."""
        stacked, at = np.empty((self.count, *self.pictures[0][0].shape), dtype=np.uint8), self.count
        while self.pictures:
            picture, times = self.pictures.pop()
            stacked[at - times : at] = picture
            at -= times
        return stacked


def frame_indices(
    times_s: Times, period_s: float, fps: float, num_frames: int, start_s: float = 0.0, loop: bool = False
) -> FrameIndices:
    """Which of the frames of `native_frames` are shown at start_s + i/fps, for i in 0 … num_frames-1.

    With `loop` times wrap at `period_s`; without it, asking past the end raises ValueError.
    """
    at_s = start_s + np.arange(num_frames) / fps + TIME_TOLERANCE_S
    if loop:
        at_s %= period_s
    elif num_frames and (start_s < 0 or at_s[-1] >= period_s):
        raise ValueError(
            f"asked for {num_frames} frames at {fps:g} fps from {start_s:g} s, the last at"
            f" {at_s[-1] - TIME_TOLERANCE_S:.3f} s; the video lasts {period_s:.3f} s"
        )
    return np.searchsorted(times_s, at_s, side="right") - 1


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `VideoWriter` wrote about a file: from the file itself, else from the .json beside it, else {}."""
    path = Path(path)
    _check_kind(path)
    texts: list[str] = []
    if path.is_dir():
        texts = [read_text(note) for note in [path / FOLDER_METADATA] if note.is_file()]
    else:
        try:
            form = image_format(path)
            texts.append(image_comment(path, form) if form else container_comment(path))
        except Exception as error:
            raise VideoReadError(f"{path}: not a readable video or image ({error})") from error
        beside = path.with_suffix(".json")
        texts += [read_text(beside)] if beside.is_file() else []
    for text in texts:
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            continue  # somebody else's comment
        if isinstance(values, dict):
            return values
    return {}


def natural_key(path: Path | UPath) -> list[tuple[int, str]]:
    """Sort key by which frame2.png comes before frame10.png, whatever the digits before."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _timed_frames(
    path: Path, still_s: float, folder_fps: float | None, allow_partial: bool, start_s: float = 0.0
) -> Iterator[Timed]:
    """The frames of whatever lies at `path`, at least one, in order; all errors become `VideoReadError`."""
    _check_kind(path)
    count = 0
    try:
        form = None if path.is_dir() else image_format(path)
        if path.is_dir():
            source = folder_frames(*_folder(path, folder_fps))
        else:
            source = container_frames(path, start_s) if form is None else image_frames(path, form, still_s)
        for frame in source:
            yield frame
            count += 1
    except VideoReadError:
        if not (allow_partial and count):
            raise
    except Exception as error:  # PyAV and Pillow raise a dozen kinds for damaged files, IndexError among them
        if count and not allow_partial:
            raise VideoReadError(
                f"{path}: breaks off after {count} frames ({error}); copy or download it again,"
                " or pass allow_partial=True to take these frames"
            ) from error
        if not count:
            raise _unreadable(path, error) from error
    if not count:
        raise VideoReadError(f"{path}: opens as a video but holds no frame that can be decoded")


def _check_kind(path: Path) -> None:
    """Raise `VideoReadError` for what is no file with content and no folder: a pipe would be waited for."""
    if not path.exists():
        raise VideoReadError(f"{path}: no such file or folder")
    if not (path.is_file() or path.is_dir()):
        raise VideoReadError(f"{path}: expected a file or a folder, found a pipe, a socket or a device")
    if path.is_file() and path.stat().st_size == 0:
        raise VideoReadError(f"{path}: expected a video, got an empty file (0 bytes); copy or download it again")


def _unreadable(path: Path, error: Exception) -> VideoReadError:
    return VideoReadError(
        f"{path}: expected a video, an image or a folder of images; the file is damaged or of another kind ({error})"
    )


def _folder(folder: Path, fps: float | None) -> tuple[list[Path], float]:
    """The images of a folder in order, and their rate."""
    images = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    if not images:
        raise VideoReadError(
            f"{folder}: expected a folder of frame images ({', '.join(sorted(IMAGE_SUFFIXES))}), got none"
        )
    if fps is not None:
        return sorted(images, key=natural_key), checked_fps(fps, "folder_fps")
    try:
        rate = checked_fps(read_metadata(folder).get("fps", DEFAULT_FPS), f"{folder / FOLDER_METADATA}: fps")
    except ValueError as error:
        raise VideoReadError(str(error)) from error
    return sorted(images, key=natural_key), rate
