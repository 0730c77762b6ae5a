"""Video files to frames, by timestamps; the writing half is `writer.py`, its names are re-exported here."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from PIL import Image, ImageOps
from upath import UPath

from dicode.shapes import Video
from dicode.video.writer import FOLDER_METADATA, VideoWriter

__all__ = [
    "VideoFrames",
    "VideoReadError",
    "VideoWriter",
    "frame_indices",
    "native_frames",
    "natural_key",
    "read_metadata",
    "read_video",
]

Fit = Literal["crop", "pad"]
Size = int | tuple[int, int]
Picture = UInt8[ndarray, "_h _w _c"]
Times = Float[ndarray, "f"]
FrameIndices = Int[ndarray, "n"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".apng"})
VIDEO_SUFFIXES = IMAGE_SUFFIXES | {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts"}

# Matroska rounds times to 1 ms, so a frame starting up to this much late still counts as shown.
TIME_TOLERANCE_S = 1e-3
# Browsers show a frame of an animated image that asks for 10 ms or less for 100 ms; so do we.
SHORTEST_DELAY_S, REPLACED_DELAY_S = 0.010, 0.100
DEFAULT_FPS = 8.0
# swscale's default loses 1 to 3 levels of colour each time a file is read; these flags round without bias and place
# colour samples where the file says. (POINT, which would undo our own writing exactly, shifts everyone else's colours.)
EXACT_COLOURS = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# Real containers only: FFmpeg would also open playlists, which read other files, and draw plain text as video.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,ogg,flv,asf,h264,hevc,ivf,m4v,mp3,wav,flac"
)


class VideoReadError(ValueError):
    """A file that is no readable video: says which file, what was expected and found, and what to do."""


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


class _Timed(NamedTuple):
    time_s: float
    duration_s: float | None  # None where the file does not say
    render: Callable[[], Picture]  # conversion waits until the frame is known to be wanted


class _Shown(NamedTuple):
    start_s: float
    end_s: float
    render: Callable[[], Picture]


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
    and padded with white. Rotation flags are obeyed, transparency is laid over white. A folder runs at `folder_fps`,
    else at the rate in its metadata.json, else at 8. Only the frames returned are held in memory.

    Raises `VideoReadError` for whatever cannot be read, for fewer than `min_frames` frames, and for a file that breaks
    off (`allow_partial=True` takes what came before).
    """
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps: expected a positive rate or None, got {fps}")
    if start_s < 0:
        raise ValueError(f"start_s: expected a time from 0 on, got {start_s}")
    path, end_s = Path(path), math.inf if max_duration_s is None else start_s + max_duration_s
    frames: list[Picture] = []
    seen, shown_until_s, first_start_s = 0, 0.0, 0.0
    for shown in _shown(_timed_frames(path, 1 / (fps or DEFAULT_FPS), folder_fps, allow_partial)):
        seen, shown_until_s = seen + 1, shown.end_s
        if fps is None:
            wanted = int(shown.end_s - TIME_TOLERANCE_S > start_s and shown.start_s + TIME_TOLERANCE_S < end_s)
        else:  # sample times start_s + i/fps from the next one on, up to this frame's end
            until_s = min(shown.end_s, end_s) - TIME_TOLERANCE_S
            wanted = max(0, math.ceil((until_s - start_s) * fps) - len(frames))
        if wanted:
            first_start_s = first_start_s if frames else shown.start_s
            frames += [_checked(path, _fit(shown.render(), size, fit), frames)] * wanted
        if shown.end_s >= end_s:
            break
    if len(frames) < max(min_frames, 1):
        rate = f" at {fps:g} fps" if fps else ""
        raise VideoReadError(
            f"{path}: too short: expected at least {max(min_frames, 1)} frame(s){rate} from {start_s:g} s on,"
            f" got {len(frames)}; the file lasts {shown_until_s:.3g} s ({seen} frame(s))"
        )
    own_fps = len(frames) / max(shown_until_s - first_start_s, TIME_TOLERANCE_S)
    source_fps = seen / max(shown_until_s, TIME_TOLERANCE_S)
    return VideoFrames(np.stack(frames), own_fps if fps is None else float(fps), source_fps)


def native_frames(
    path: str | Path,
    size: Size | None = None,
    fit: Fit = "crop",
    *,
    folder_fps: float | None = None,
    max_fps: float = math.inf,
) -> tuple[Video, Times, float]:
    """All frames of a file, the time in seconds each appears at, and the period a loop repeats after.

    Frames that come sooner than 1/max_fps (within 1 %) after one kept are left out. The period includes the last
    frame's own duration. Memory holds every frame kept.
    """
    frames: list[Picture] = []
    times_s: list[float] = []
    period_s = 0.0
    for shown in _shown(_timed_frames(Path(path), 1 / DEFAULT_FPS, folder_fps, allow_partial=False)):
        if not times_s or shown.start_s - times_s[-1] >= 0.99 / max_fps:
            frames.append(_checked(Path(path), _fit(shown.render(), size, fit), frames))
            times_s.append(shown.start_s)
        period_s = shown.end_s
    return np.stack(frames), np.array(times_s, dtype=np.float64), period_s


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
    texts: list[str] = []
    if path.is_dir():
        texts = [note.read_text(encoding="utf-8") for note in [path / FOLDER_METADATA] if note.is_file()]
    elif not path.is_file():
        raise VideoReadError(f"{path}: no such file or folder")
    else:
        texts.append(_comment(path))
        beside = path.with_suffix(".json")
        texts += [beside.read_text(encoding="utf-8")] if beside.is_file() else []
    for text in texts:
        try:
            values = json.loads(text)
        except json.JSONDecodeError:
            continue  # somebody else's comment
        if isinstance(values, dict):
            return values
    return {}


def natural_key(path: Path | UPath) -> list[tuple[int, str]]:
    """Sort key by which frame2.png comes before frame10.png, whatever the digits before."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _shown(timed: Iterator[_Timed]) -> Iterator[_Shown]:
    """Give each frame its end: the next frame's start, or for the last its own duration. Times start at 0."""
    last = next(timed)
    origin_s, length_s = last.time_s, last.duration_s or 0.0
    for frame in timed:
        frame = frame._replace(time_s=max(frame.time_s, last.time_s))  # damaged clocks run backwards
        length_s = frame.time_s - last.time_s
        yield _Shown(last.time_s - origin_s, frame.time_s - origin_s, last.render)
        last = frame
    length_s = last.duration_s or length_s
    yield _Shown(last.time_s - origin_s, last.time_s - origin_s + length_s, last.render)


def _timed_frames(path: Path, still_s: float, folder_fps: float | None, allow_partial: bool) -> Iterator[_Timed]:
    """The frames of whatever lies at `path`, at least one, in order; all errors become `VideoReadError`."""
    if not path.exists():
        raise VideoReadError(f"{path}: no such file or folder")
    if path.is_file() and path.stat().st_size == 0:
        raise VideoReadError(f"{path}: expected a video, got an empty file (0 bytes); copy or download it again")
    count = 0
    try:
        if path.is_dir():
            source = _folder_frames(path, folder_fps)
        else:
            source = (_image_frames if _is_image(path) else _container_frames)(path, still_s)
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
            raise VideoReadError(
                f"{path}: expected a video, an image or a folder of images;"
                f" the file is damaged or of another kind ({error})"
            ) from error
    if not count:
        raise VideoReadError(f"{path}: opens as a video but holds no frame that can be decoded")


def _folder_frames(folder: Path, fps: float | None) -> Iterator[_Timed]:
    images = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    if not images:
        raise VideoReadError(
            f"{folder}: expected a folder of frame images ({', '.join(sorted(IMAGE_SUFFIXES))}), got none"
        )
    fps = fps or float(read_metadata(folder).get("fps", DEFAULT_FPS))
    for index, image in enumerate(sorted(images, key=natural_key)):
        try:
            picture = next(_image_frames(image, 1 / fps)).render()
        except Exception as error:
            raise VideoReadError(f"{image}: not a readable image ({error}); copy it again") from error
        yield _Timed(index / fps, 1 / fps, partial(_same, picture))


def _is_image(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(12)
    return head.startswith((b"GIF8", b"\x89PNG", b"\xff\xd8\xff", b"BM")) or (head[:4], head[8:]) == (b"RIFF", b"WEBP")


def _image_frames(path: Path, still_s: float) -> Iterator[_Timed]:
    """Frames of a still or animated image through Pillow: FFmpeg cannot decode animated WebP."""
    with Image.open(path) as image:
        count = getattr(image, "n_frames", 1) if image.format in ("GIF", "PNG", "WEBP") else 1
        first = 1 if image.info.get("default_image") and count > 1 else 0  # an APNG's stand-in, not in the animation
        time_s = 0.0
        for index in range(first, count):
            image.seek(index)
            image.load()
            delay_s = float(image.info.get("duration") or 0) / 1000
            if count - first == 1:
                delay_s = still_s
            elif delay_s <= SHORTEST_DELAY_S:
                delay_s = REPLACED_DELAY_S
            yield _Timed(time_s, delay_s, partial(_same, _image_to_rgb(image)))
            time_s += delay_s


def _image_to_rgb(image: Image.Image) -> Picture:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
        upright = Image.fromarray((np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return _over_white(np.asarray(upright.convert("RGBA")))


def _container_frames(path: Path, still_s: float) -> Iterator[_Timed]:
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    with av.open(f"file:{path}", options=options) as container:  # "file:" since a name may hold a colon
        streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
        if not streams:
            kinds = " and ".join(sorted({s.type for s in container.streams})) or "nothing"
            raise VideoReadError(
                f"{path}: expected a video stream, found only {kinds}; a file cut off early looks like this too"
            )
        stream, count, end_s = streams[0], 0, 0.0
        tick_s = float(1 / stream.average_rate) if stream.average_rate else still_s
        for frame in _decode(container, stream):
            duration_s = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else None
            time_s = end_s if frame.pts is None or frame.time_base is None else float(frame.pts * frame.time_base)
            yield _Timed(time_s, duration_s or tick_s, partial(_frame_to_rgb, frame, stream.sample_aspect_ratio))
            count, end_s = count + 1, time_s + (duration_s or tick_s)
        declared_s = _declared_end_s(container, stream)
        if count and declared_s is not None and declared_s - end_s > 2 * tick_s + 0.05:
            raise VideoReadError(
                f"{path}: breaks off after {count} frames: {end_s:.2f} s of the {declared_s:.2f} s its header names;"
                " copy or download it again, or pass allow_partial=True to take these frames"
            )


def _decode(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """Decode one stream. FFmpeg's own VP8 and VP9 decoders drop transparency, libvpx keeps it."""
    name = stream.codec_context.name
    if stream.metadata.get("alpha_mode") != "1" or name not in ("vp8", "vp9"):
        yield from container.decode(stream)
        return
    decoder = av.VideoCodecContext.create("libvpx" if name == "vp8" else "libvpx-vp9", "r")
    for packet in container.demux(stream):
        yield from decoder.decode(packet if packet.size else None)


def _declared_end_s(container: InputContainer, stream: VideoStream) -> float | None:
    """When the stream ends by the header of a Matroska file: cut short, such a file ends with no error."""
    if "matroska" not in container.format.name:
        return None
    if match := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = match.groups()
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    alone = len(container.streams) == 1  # else the sound may be the longer one
    return container.duration / av.time_base if container.duration and alone else None


def _frame_to_rgb(frame: av.VideoFrame, aspect: Fraction | None) -> Picture:
    """A decoded frame as it is meant to be seen: 8 bit RGB, over white, square pixels, upright."""
    transparent = any(component.is_alpha for component in frame.format.components)
    if transparent or frame.format.has_palette:
        picture = _over_white(frame.to_ndarray(format="rgba", interpolation=EXACT_COLOURS))
    else:
        picture = frame.to_ndarray(format="rgb24", interpolation=EXACT_COLOURS)
    if aspect and aspect != 1:
        picture = _resize(picture, picture.shape[0], max(1, round(picture.shape[1] * aspect)))
    return _upright(picture, frame)


def _upright(picture: Picture, frame: av.VideoFrame) -> Picture:
    """Apply the display matrix (ISO 14496-12 §8.2.2): x' = ax + cy, y' = bx + dy, in quarter turns and mirrorings."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5]  # type: ignore[call-overload]
    if abs(b) > abs(a):
        picture, x_sign, y_sign = picture.transpose(1, 0, 2), c, b
    else:
        x_sign, y_sign = a, d
    return np.ascontiguousarray(picture[:: -1 if y_sign < 0 else 1, :: -1 if x_sign < 0 else 1])


def _over_white(rgba: Picture) -> Picture:
    if rgba[..., 3].min(initial=255) == 255:
        return np.ascontiguousarray(rgba[..., :3])
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _fit(picture: Picture, size: Size | None, fit: Fit) -> Picture:
    if size is None:
        return picture
    height, width = (size, size) if isinstance(size, int) else size
    own_height, own_width = picture.shape[:2]
    ratios = (height / own_height, width / own_width)
    if fit == "crop":
        scale = max(ratios)
        scaled = _resize(picture, max(height, round(own_height * scale)), max(width, round(own_width * scale)))
        top, left = (scaled.shape[0] - height) // 2, (scaled.shape[1] - width) // 2
        return scaled[top : top + height, left : left + width]
    if fit != "pad":
        raise ValueError(f"fit: expected 'crop' or 'pad', got {fit!r}")
    scale = min(ratios)
    scaled = _resize(picture, max(1, round(own_height * scale)), max(1, round(own_width * scale)))
    top, left = (height - scaled.shape[0]) // 2, (width - scaled.shape[1]) // 2
    padded = np.full((height, width, 3), 255, dtype=np.uint8)
    padded[top : top + scaled.shape[0], left : left + scaled.shape[1]] = scaled
    return padded


def _resize(picture: Picture, height: int, width: int) -> Picture:
    """Bilinear, averaging over the area when shrinking (torch on uint8: unbiased, ten times as fast as float)."""
    if picture.shape[:2] == (height, width):
        return picture
    pixels = torch.from_numpy(np.require(picture, requirements=["C", "W"])).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(scaled[0].permute(1, 2, 0).numpy())


def _checked(path: Path, picture: Picture, before: list[Picture]) -> Picture:
    if before and picture.shape != before[0].shape:
        (height, width), (first_height, first_width) = picture.shape[:2], before[0].shape[:2]
        raise VideoReadError(
            f"{path}: frame {len(before)} is {width}x{height}, the first one {first_width}x{first_height};"
            " pass a size to bring them to one"
        )
    return picture


def _same(picture: Picture) -> Picture:
    return picture


def _comment(path: Path) -> str:
    try:
        if _is_image(path):
            with Image.open(path) as image:
                comment = image.info.get("comment", "")
            return comment.decode("utf-8", "replace") if isinstance(comment, bytes) else str(comment)
        with av.open(f"file:{path}", options={"format_whitelist": _CONTAINERS}) as container:
            return next((text for key, text in container.metadata.items() if key.lower() == "comment"), "")
    except Exception as error:
        raise VideoReadError(f"{path}: not a readable video or image ({error})") from error
