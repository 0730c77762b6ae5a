"""What all readers share: the error, frames with their times, and the bounds of what is read."""

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
MOST_SHOWN = 2**22  # frames that one call returns: six days at 8 a second; one that stays is as many of its picture
# Pixels that a file may unfold to: so many, and so many for each of its bytes. A slide of a talk in 4K has 2^17 a byte.
FREE_WORK, MOST_WORK = 2**32, 2**18
LOWEST_FPS, HIGHEST_FPS = 1 / LONGEST_FRAME_S, 1000.0
# Matroska rounds times to 1 ms, so a frame starting up to this much late still counts as shown.
TIME_TOLERANCE_S = 1e-3


class VideoReadError(ValueError):
    """A file that is no readable video: says which file, what was expected and found, and what to do."""


class Frame(NamedTuple):
    """A picture and the time for which it is shown, counted from the first frame of its file."""

    start_s: float
    end_s: float
    render: Callable[[], Picture]  # conversion waits until the frame is known to be wanted
    hdr: bool = False


def contiguous(path: Path, frames: Iterator[Frame]) -> Iterator[Frame]:
    """Frames that last until the next one starts, the last one for its own duration.

    Raises `VideoReadError` for a clock that jumps, runs backwards, or does not end.
    """

    def checked(index: int, frame: Frame) -> Frame:
        if (length_s := frame.end_s - frame.start_s) > LONGEST_FRAME_S:
            raise VideoReadError(
                f"{path}: its clock jumps: frame {index}, at {frame.start_s:g} s, stays for {length_s:g} s; expected at"
                f" most {LONGEST_FRAME_S:g} s; write it anew, e.g. with ffmpeg -vf setpts=N/FR/TB -r RATE"
            )
        return frame

    last, count = next(frames), 0
    for frame in frames:
        count += 1
        back_s = max(0.0, last.start_s - frame.start_s)
        if back_s > max(last.end_s - last.start_s, 0.1):
            raise VideoReadError(
                f"{path}: damaged, its clock runs backwards: frame {count} is to appear at {frame.start_s:.3f} s, the"
                f" one before at {last.start_s:.3f} s; write it anew, e.g. with ffmpeg -fflags +genpts"
            )
        frame = frame._replace(start_s=max(frame.start_s, last.start_s), end_s=frame.end_s + back_s)
        yield checked(count - 1, last._replace(end_s=frame.start_s))
        if count >= MOST_FRAMES:
            raise VideoReadError(f"{path}: expected at most {MOST_FRAMES:,} frames, got more; cut it into parts")
        last = frame
    yield checked(count, last)


def checked_fps(fps: object, name: str) -> float:
    """A rate that frames can be shown at. Raises `ValueError` with this name for any other."""
    if isinstance(fps, (int, float)) and not isinstance(fps, bool) and LOWEST_FPS <= fps <= HIGHEST_FPS:
        return float(fps)
    raise ValueError(f"{name}: expected a positive rate from 1/{LONGEST_FRAME_S:g} to {HIGHEST_FPS:g}, got {fps!r}")


def check_work(path: Path, pixels: int) -> None:
    """Raise `VideoReadError` for more pixels than a file of its size may hold: hours of work for a few kilobytes."""
    size = path.stat().st_size
    if pixels > (most := FREE_WORK + MOST_WORK * size):
        unfolds = f"{size:,} bytes that unfold to more than {most / 1e6:.0f} million pixels"
        raise VideoReadError(f"{path}: {unfolds}; make it smaller")


def check_pixels(path: Path, width: int, height: int) -> None:
    """Raise `VideoReadError` for a picture larger than `MOST_PIXELS`, before it is decoded."""
    if width * height > MOST_PIXELS:
        claim = f"claims pictures of {width}x{height}; expected at most {MOST_PIXELS:,} pixels"
        raise VideoReadError(f"{path}: {claim}: make it smaller")
