"""Video files to frames, by timestamps."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from upath import UPath

from dicode.files import read_text
from dicode.video.container import ADVICE, CONTAINER_SUFFIXES, container_comment, container_frames, container_header
from dicode.video.images import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from dicode.video.images import Fit, Size, covering, fitted, image_comment, image_format, image_frames
from dicode.video.timed import DEFAULT_FPS as DEFAULT_FPS
from dicode.video.timed import (
    MOST_BYTES,
    MOST_PIXELS,
    MOST_SHOWN,
    TIME_TOLERANCE_S,
    Frame,
    Picture,
    Video,
    checked_fps,
    contiguous,
)
from dicode.video.timed import VideoReadError as VideoReadError
from dicode.video.write import FOLDER_METADATA

Times = Float[ndarray, "f"]

VIDEO_SUFFIXES = IMAGE_SUFFIXES | CONTAINER_SUFFIXES
RATE_NAMES = ("fps", "framerate", "framespersecond")  # that others give to a folder's fps, and its other spellings
THINNED_TO = 1.05  # of 1/max_fps: what is left comes no slower than that, but for films, whose 24 a second become 12


class VideoFrames(NamedTuple):
    """Frames in memory with the true rate they are to be shown at."""

    frames: Video
    fps: float


class Facts(NamedTuple):
    """What a file holds, all of it decoded; HDR is PQ or HLG."""

    height: int
    width: int
    num_frames: int
    duration_s: float
    hdr: bool


def read_video(
    path: str | Path,
    fps: float | None = DEFAULT_FPS,
    size: Size | None = None,
    fit: Fit = "crop",
    start_s: float = 0.0,
    end_s: float | None = None,
    *,
    min_frames: int = 1,
    allow_partial: bool = False,
) -> VideoFrames:
    """Read a video, an image, still or animated, or a folder of frames: frame i is what is shown at start_s + i/fps.

    Frames end before `end_s`; the last one of a file is shown for its own duration, a still image for one frame.
    `fps=None` keeps the file's own frames. `size` is a side or (height, width): the picture is scaled to cover it and
    cropped at the centre, or scaled to fit and padded with white. Rotation flags are obeyed, transparency is laid over
    white, HDR is tone-mapped. A folder runs at the rate in its metadata.json, else at 8.

    Raises `VideoReadError` for whatever cannot be read, for fewer than `min_frames` frames, for what is beyond the
    bounds of `timed.py`, and for a file that breaks off (`allow_partial=True` takes what came before).
    """
    path = Path(path)
    fps = None if fps is None else checked_fps(fps, "fps")
    buffer, length_s = _FrameBuffer(path, size, fit), 0.0
    for frame in _span(path, start_s, end_s, 1 / (fps or DEFAULT_FPS), allow_partial):
        length_s = _length_s(frame, start_s, end_s)
        times = 1 if fps is None else math.ceil((length_s - TIME_TOLERANCE_S) * fps) - len(buffer.pictures)
        buffer.add(frame, times)
    count = len(buffer.pictures)
    if count < max(min_frames, 1):
        wanted = f"at least {max(min_frames, 1)} frame(s)" + (f" at {fps:g} fps" if fps else "")
        got = f"from {start_s:g} s on, got {count} in {length_s:.3g} s"
        raise VideoReadError(f"{path}: too short: expected {wanted} {got}")
    return VideoFrames(buffer.frames(), fps or count / max(length_s, TIME_TOLERANCE_S))


def frames_at(
    path: str | Path, moments_s: Times, size: Size, start_s: float = 0.0, end_s: float | None = None
) -> tuple[Video, float]:
    """The frames shown at these moments, ascending and counted from `start_s`; and when the last one read ends.

    Of a span up to `end_s`, or a file that ends before some moments, the last frame stands for those. What is not shown
    at any is decoded, and not converted. Raises as `read_video`.
    """
    path, first_s = Path(path), float(moments_s[0])
    buffer, length_s = _FrameBuffer(path, size, "crop"), 0.0
    for frame in _span(path, start_s + first_s, end_s):
        length_s = first_s + _length_s(frame, start_s + first_s, end_s)
        shown = int(np.searchsorted(moments_s, length_s - TIME_TOLERANCE_S))
        buffer.add(frame, shown - len(buffer.pictures))
        if len(buffer.pictures) == len(moments_s):
            break
    buffer.add(frame, len(moments_s) - len(buffer.pictures))
    return buffer.frames(), length_s


def native_frames(
    path: str | Path,
    size: Size | None = None,
    *,
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
    path, period_s = Path(path), 0.0
    buffer = _FrameBuffer(path, size, "crop")
    times_s: list[float] = []
    for frame in _span(path, start_s, end_s):
        if not times_s or max_fps == math.inf or frame.end_s - times_s[-1] > THINNED_TO / max_fps:
            buffer.add(frame)
            times_s.append(frame.start_s)
        period_s = _length_s(frame, start_s, end_s)
    return buffer.frames(), np.array(times_s, dtype=np.float64), period_s


def check_frames(path: str | Path, size: int, start_s: float = 0.0, end_s: float | None = None) -> Facts:
    """What `native_frames` would find of a file or span, scaled to this size; every frame is decoded, none kept."""
    path, found = Path(path), Facts(0, 0, 0, 0.0, False)
    for frame in _span(path, start_s, end_s):
        picture = frame.render()
        covering(path, picture, (size, size))
        height, width = found[:2] if found.num_frames else picture.shape[:2]
        length_s, hdr = _length_s(frame, start_s, end_s), found.hdr or frame.hdr
        found = Facts(height, width, found.num_frames + 1, length_s, hdr)
    return found


def header_facts(path: str | Path, size: int) -> Facts:
    """As `check_frames` of a whole file, where its header gives the length by the first frame alone."""
    path = Path(path)
    picture, hdr = next((frame.render(), frame.hdr) for frame in _frames(path, 0.0, 1 / DEFAULT_FPS, False))
    try:
        header = None if image_format(path) else container_header(path)
    except (VideoReadError, OSError):
        raise
    except Exception as error:  # as in `_frames`
        raise VideoReadError(f"{path}: its header is damaged ({error})") from error
    if header is None:
        return check_frames(path, size)
    covering(path, picture, (size, size))
    return Facts(picture.shape[0], picture.shape[1], *header, hdr)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `VideoWriter` wrote about a file: from the file itself, else from the .json beside it, else {}."""
    path = Path(path)
    _check_kind(path)
    note, comment = path / FOLDER_METADATA, ""
    if path.is_file():
        note = path.with_suffix(".json")
        try:
            form = image_format(path)
            comment = image_comment(path, form) if form else container_comment(path)
        except Exception as error:
            raise VideoReadError(f"{path}: not a readable video or image ({error})") from error
    for text in (comment, read_text(note) if note.is_file() else ""):
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


class _FrameBuffer:
    """Frames of one size, within the bound of memory."""

    def __init__(self, path: Path, size: Size | None, fit: Fit) -> None:
        height, width = (size, size) if isinstance(size, int) else size or (1, 1)
        if height < 1 or width < 1 or height * width > MOST_PIXELS:
            raise ValueError(f"size: expected sides of at least 1 and at most {MOST_PIXELS:,} pixels, got {size}")
        self.path, self.size, self.fit = path, size, fit
        self.pictures: list[Picture] = []

    def add(self, frame: Frame, times: int = 1) -> None:
        if times < 1:
            return
        picture = fitted(self.path, frame.render(), self.size, self.fit)
        first = self.pictures[0] if self.pictures else picture
        size, first_size = (f"{p.shape[1]}x{p.shape[0]}" for p in (picture, first))
        if size != first_size:
            unlike = f"frame {len(self.pictures)} is {size}, the first one {first_size}"
            raise VideoReadError(f"{self.path}: {unlike}; pass a size to bring them to one")
        count = len(self.pictures) + times
        if (held := count * picture.nbytes) > MOST_BYTES:
            raise VideoReadError(
                f"{self.path}: {count} frames of {size} and more, up to {frame.start_s:.1f} s, would fill"
                f" {held / 2**30:.1f} GiB; expected at most {MOST_BYTES / 2**30:.1f}: read them smaller (size, --size),"
                " or a span (start_s, end_s)"
            )
        if count > MOST_SHOWN:
            raise VideoReadError(
                f"{self.path}: {count:,} frames and more, up to {frame.start_s:.1f} s; expected at most {MOST_SHOWN:,}:"
                " read it at a lower rate (fps), or a span (start_s, end_s)"
            )
        self.pictures += [picture] * times

    def frames(self) -> Video:
        """All in one array; pictures are let go while it is filled."""
        stacked = np.empty((len(self.pictures), *self.pictures[0].shape), dtype=np.uint8)
        while self.pictures:
            picture = self.pictures.pop()
            stacked[len(self.pictures)] = picture
        return stacked


def _length_s(frame: Frame, start_s: float, end_s: float | None) -> float:
    """How long a span is up to the end of one of its frames."""
    return frame.end_s if end_s is None else min(frame.end_s, end_s - start_s)


def _span(
    path: Path, start_s: float, end_s: float | None, still_s: float = 1 / DEFAULT_FPS, allow_partial: bool = False
) -> Iterator[Frame]:
    """The frames shown between two times, at least one, timed from `start_s` on; the last may outlast `end_s`."""
    end_s = math.inf if end_s is None else end_s
    if not (math.isfinite(start_s) and 0 <= start_s < end_s):
        raise ValueError(f"expected 0 ≤ start_s < end_s, got start_s {start_s} and end_s {end_s}")
    found, file_s = False, 0.0
    for frame in contiguous(path, _frames(path, start_s, still_s, allow_partial)):
        file_s = frame.end_s
        if frame.start_s + TIME_TOLERANCE_S >= end_s:
            break
        if not start_s or frame.end_s - TIME_TOLERANCE_S > start_s:
            found = True
            yield frame._replace(start_s=max(0.0, frame.start_s - start_s), end_s=frame.end_s - start_s)
        if frame.end_s >= end_s:
            break
    if not found:
        raise VideoReadError(f"{path}: expected frames from {start_s:g} s on; the file lasts {file_s:.3g} s")


def _frames(path: Path, start_s: float, still_s: float, allow_partial: bool) -> Iterator[Frame]:
    """The frames of whatever lies at `path`, at least one, in order; all errors become `VideoReadError`."""
    _check_kind(path)
    count = 0
    try:
        if path.is_dir():
            source = _folder_frames(path)
        elif form := image_format(path):
            source = image_frames(path, form, still_s)
        else:
            source = container_frames(path, start_s)
        for frame in source:
            yield frame
            count += 1
    except VideoReadError:
        if not (allow_partial and count):
            raise
    except Exception as error:  # PyAV and Pillow raise a dozen kinds for damaged files, IndexError among them
        if not count:
            expected = "expected a video, an image or a folder of images; the file is damaged or of another kind"
            raise VideoReadError(f"{path}: {expected} ({error})") from error
        if not allow_partial:
            raise VideoReadError(f"{path}: breaks off after {count} frames ({error}); {ADVICE}") from error
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


def _folder_frames(folder: Path) -> Iterator[Frame]:
    """A frame of every image of a folder in order, at its rate."""
    images = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    if not images:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise VideoReadError(f"{folder}: expected a folder of frame images ({suffixes}), got none")
    facts = read_metadata(folder)
    if other := next(
        (key for key in facts if re.sub("[^a-z]", "", key.lower()) in RATE_NAMES and "fps" not in facts), ""
    ):
        raise VideoReadError(f"{folder / FOLDER_METADATA}: unknown key {other!r} (did you mean 'fps'?)")
    try:
        fps = checked_fps(facts.get("fps", DEFAULT_FPS), f"{folder / FOLDER_METADATA}: fps")
    except ValueError as error:
        raise VideoReadError(str(error)) from error
    for index, image in enumerate(sorted(images, key=natural_key)):
        try:
            if not image.is_file():
                raise ValueError("no regular file")
            if (form := image_format(image)) is None:
                raise ValueError("its content is that of no image")
            frame = next(image_frames(image, form, 1 / fps))
        except Exception as error:
            raise VideoReadError(f"{image}: not a readable image ({error}); copy it again") from error
        yield frame._replace(start_s=index / fps, end_s=index / fps + 1 / fps)
