"""What every way of reading shares: the error, pictures with their times, and the bounds of what is read."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from jaxtyping import UInt8
from numpy import ndarray

Picture = UInt8[ndarray, "_h _w _c"]
Video = UInt8[ndarray, "f h w c"]  # one video or clip in memory, as read from or written to a file
Still = UInt8[ndarray, "1 h w c"]  # a video of one frame

DEFAULT_FPS = 8.0
# Bounds: a file of a kilobyte can claim a picture of gigabytes, a frame that stays for a year, or a million frames.
LONGEST_FRAME_S = 600.0  # a slide of a talk stays for minutes; a clock that jumps, for hours and more
MOST_PIXELS = 2**26  # a picture of 8192x8192; 8K video has half of that
MOST_FRAMES = 2**20  # ten hours at 30 fps
MOST_BYTES = 2**32  # of the frames that one call returns
# Pixels that a file may unfold to: so many, and so many for each of its bytes. A slide of a talk in 4K has 2^17 a byte.
FREE_WORK, MOST_WORK = 2**32, 2**18
LOWEST_FPS, HIGHEST_FPS = 1 / LONGEST_FRAME_S, 1000.0
# Matroska rounds times to 1 ms, so a frame starting up to this much late still counts as shown.
TIME_TOLERANCE_S = 1e-3


class VideoReadError(ValueError):
    """A file that is no readable video: says which file, what was expected and found, and what to do."""


class Timed(NamedTuple):
    """A picture and when it appears, counted from the first one of its file."""

    time_s: float
    duration_s: float | None  # None where the file does not say
    render: Callable[[], Picture]  # conversion waits until the frame is known to be wanted


class Shown(NamedTuple):
    """A picture and the time for which it is shown."""

    start_s: float
    end_s: float
    render: Callable[[], Picture]


def shown(path: Path, timed: Iterator[Timed]) -> Iterator[Shown]:
    """Give each frame its end: the next frame's start, or for the last its own duration.

    Raises `VideoReadError` for a clock that jumps, runs backwards, or does not end.
    """
    last, length_s, count = next(timed), 0.0, 0
    length_s = last.duration_s or 0.0
    for frame in timed:
        count += 1
        back_s = last.time_s - frame.time_s
        if back_s > max(last.duration_s or 0.0, 0.1):
            raise VideoReadError(
                f"{path}: damaged, its clock runs backwards: frame {count} is to appear at {frame.time_s:.3f} s, the"
                f" one before at {last.time_s:.3f} s; write it anew, e.g. with ffmpeg -fflags +genpts"
            )
        frame = frame._replace(time_s=max(frame.time_s, last.time_s))
        length_s = frame.time_s - last.time_s
        _check_length(path, count - 1, last.time_s, length_s)
        if count >= MOST_FRAMES:
            raise VideoReadError(f"{path}: expected at most {MOST_FRAMES:,} frames, got more; cut it into parts")
        yield Shown(last.time_s, frame.time_s, last.render)
        last = frame
    length_s = last.duration_s or length_s
    _check_length(path, count, last.time_s, length_s)
    yield Shown(last.time_s, last.time_s + length_s, last.render)


def _check_length(path: Path, index: int, time_s: float, length_s: float) -> None:
    if length_s > LONGEST_FRAME_S:
        raise VideoReadError(
            f"{path}: frame {index}, at {time_s:g} s, stays for {length_s:g} s; expected at most {LONGEST_FRAME_S:g} s:"
            " the clock of the file jumps. Write it anew with a steady rate, e.g. ffmpeg -vf setpts=N/FR/TB -r RATE"
        )


def checked_fps(fps: object, name: str) -> float:
    """A rate that frames can be shown at. Raises `ValueError` with this name for any other."""
    if isinstance(fps, (int, float)) and not isinstance(fps, bool) and LOWEST_FPS <= fps <= HIGHEST_FPS:
        return float(fps)
    raise ValueError(f"{name}: expected a positive rate from 1/{LONGEST_FRAME_S:g} to {HIGHEST_FPS:g}, got {fps!r}")


def check_work(path: Path, pixels: int) -> None:
    """Raise `VideoReadError` for more pixels than a file of its size may hold: hours of work for a few kilobytes."""
    size = path.stat().st_size
    if pixels > FREE_WORK + MOST_WORK * size:
        most = (FREE_WORK + MOST_WORK * size) / 1e6
        raise VideoReadError(
            f"{path}: {size:,} bytes that unfold to more than {most:.0f} million pixels; make it smaller"
        )


def check_pixels(path: Path, width: int, height: int) -> None:
    """Raise `VideoReadError` before a picture of that size is decoded if it is larger than `MOST_PIXELS`."""
    if width * height > MOST_PIXELS:
        raise VideoReadError(
            f"{path}: claims pictures of {width}x{height}; expected at most {MOST_PIXELS:,} pixels: make it smaller"
        )
