"""Containers through PyAV: frames with their times, and whether the file is whole."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

from dicode.video.hdr import HDR_TRANSFERS, tone_mapped
from dicode.video.images import over_white, resized
from dicode.video.timed import DEFAULT_FPS, MOST_PIXELS, Frame, Picture, VideoReadError, check_pixels, check_work

CONTAINER_SUFFIXES = frozenset({
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".wmv",
    ".asf", ".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".mxf", ".mjpeg", ".mjpg", ".ivf",
})  # fmt: skip
# swscale's default loses 1 to 3 levels of colour each time a file is read; these flags round without bias and place
# colour samples where the file says. (POINT, which would undo our own writing exactly, shifts everyone else's colours.)
EXACT_COLOURS = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# Real containers only: FFmpeg would also open playlists, which read other files, and draw plain text as video.
_FORMATS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,ogg,flv,asf,h264,hevc,ivf,m4v,mp3,wav,flac,mxf,mjpeg,dv,nut"
_SEEKABLE = ("mp4", "matroska")  # their index holds every key frame with its time
_SEEK_FROM_S, _SEEK_BEFORE_S = 2.0, 1.0
_MOST_WAITING = 32  # frames without a time that are held until one with a time comes
ADVICE = "copy or download it again, or pass allow_partial=True to take these frames"


class _Counts:
    """Packets that went by while frames were decoded, and the first fault that FFmpeg marked."""

    packets = frames = 0
    fault = ""


def container_frames(path: Path, start_s: float = 0.0) -> Iterator[Frame]:
    """The frames of a file, timed from its first one, from the one shown at `start_s` or an earlier one on.

    Raises `VideoReadError` after the last good frame of a file that is damaged or breaks off.
    """
    with _opened(path) as container:
        stream = _video_stream(path, container)
        origin_s = _seek(path, container, stream, start_s)
        sought, counts, end_s = origin_s is not None, _Counts(), 0.0
        decoded = _timed(_decoded(path, container, stream, counts), _tick_s(stream))
        for number, (frame, time_s, duration_s) in enumerate(decoded):
            origin_s = time_s if origin_s is None else origin_s
            if not number and time_s > origin_s + start_s:
                yield from container_frames(path)  # the index led past the moment: from the beginning
                return
            check_pixels(path, frame.width, frame.height)
            check_work(path, number * frame.width * frame.height)
            hdr = int(frame.color_trc or 0) in HDR_TRANSFERS
            from_s, end_s = time_s - origin_s, time_s + duration_s
            aspect = stream.sample_aspect_ratio  # now: a frame may be rendered when the file is closed
            yield Frame(from_s, from_s + duration_s, partial(_to_rgb, path, frame, aspect), hdr)
        fault = counts.fault or ("" if sought else _shortfall(path, container, stream, counts, end_s))
        if counts.frames and fault:
            raise VideoReadError(f"{path}: breaks off after {counts.frames} frames: {fault}; {ADVICE}")


def container_comment(path: Path) -> str:
    """The comment in a file's metadata, or ''."""
    with _opened(path) as container:
        return next((text for key, text in container.metadata.items() if key.lower() == "comment"), "")


def container_header(path: Path) -> tuple[int, float] | None:
    """Frames and seconds of a file whose header gives both, None for other kinds of files.

    Raises `VideoReadError` for a file that is shorter than its header says.
    """
    with _opened(path) as container:
        kind, stream = container.format.name, _video_stream(path, container)
        if not any(name in kind for name in _SEEKABLE):
            return None
        if (declared := _declared_size(path, kind)) > (size := path.stat().st_size):
            raise VideoReadError(f"{path}: breaks off: {size:,} of the {declared:,} bytes its header names; {ADVICE}")
        length_s = _seconds(stream.duration, stream.time_base) or _declared_end_s(container, stream) or 0.0
        count = stream.frames or round(length_s / _tick_s(stream))
        return (count, length_s) if length_s > 0 and count > 0 else None


@contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    """The file by its content: FFmpeg believes names such as a.png, and JPEGs in a row may be anything to it."""
    with ExitStack() as stack:
        name: Any = f"file:{path}"  # "file:" since a name may hold a colon
        file = stack.enter_context(path.open("rb"))
        form = "mjpeg" if file.read(3) == b"\xff\xd8\xff" else None
        if path.suffix.lower() not in CONTAINER_SUFFIXES:
            name = stack.enter_context(open(os.open(path, os.O_RDONLY), "rb"))  # which has no name
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
        yield stack.enter_context(av.open(name, format=form, options=options, metadata_errors="replace"))


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    """The moving picture of a container: no cover art; of several the one of most frames."""
    streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not streams:
        kinds = " and ".join(sorted({s.type for s in container.streams})) or "nothing"
        found = f"expected a video stream, found only {kinds}; a file cut off early looks like this too"
        raise VideoReadError(f"{path}: {found}")
    best = container.streams.best("video")
    stream = max(streams, key=lambda s: (s.frames, s is best))  # covers may be streams like any other, of one frame
    check_pixels(path, stream.width, stream.height)
    stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
    return stream


def _seek(path: Path, container: InputContainer, stream: VideoStream, start_s: float) -> float | None:
    """Go to a key frame before `start_s`; gives the time of the file's first frame, None where it is the next one."""
    seekable = any(name in container.format.name for name in _SEEKABLE) and _decoder_name(stream) is None
    if start_s <= _SEEK_FROM_S or not seekable or not stream.time_base:
        return None
    first = next(_decoded(path, container, stream, _Counts()))
    origin_s = _seconds(first.pts, first.time_base) or 0.0
    target = math.floor((origin_s + start_s - _SEEK_BEFORE_S) / stream.time_base)
    container.seek(target, stream=stream, backward=True)
    return origin_s


def _decoded(path: Path, container: InputContainer, stream: VideoStream, counts: _Counts) -> Iterator[av.VideoFrame]:
    """Decode one stream up to the first damaged frame."""
    name = _decoder_name(stream)
    decoder: Any = av.VideoCodecContext.create(name, "r") if name else stream.codec_context
    for packet in container.demux(stream):
        counts.packets += packet.size > 0
        if packet.is_corrupt:
            counts.fault = "a packet is incomplete"
        failure: Exception | None = None
        try:
            frames = decoder.decode(packet if packet.size else None)
        except av.FFmpegError as error:
            failure, frames = error, decoder.decode(None)  # those that wait for their turn are whole
        for frame in frames:
            if frame.is_corrupt and not counts.frames and "mpegts" in container.format.name:
                continue  # recordings of broadcasts begin anywhere
            if frame.is_corrupt:
                after = f"breaks off after {counts.frames} frames: the next one is damaged"
                raise VideoReadError(f"{path}: {after}; {ADVICE}")
            counts.frames += 1
            frame.time_base = frame.time_base or stream.time_base  # of those that waited
            yield frame
        if failure is not None:
            raise failure


def _decoder_name(stream: VideoStream) -> str | None:
    """The decoder to take in place of FFmpeg's own, whose VP8 and VP9 drop transparency."""
    decoders = {"vp8": "libvpx", "vp9": "libvpx-vp9"} if stream.metadata.get("alpha_mode") == "1" else {}
    return decoders.get(stream.codec_context.name)


def _tick_s(stream: VideoStream) -> float:
    rate = stream.average_rate or stream.guessed_rate
    return float(1 / rate) if rate else 1 / DEFAULT_FPS


def _seconds(ticks: int | None, tick: Fraction | None) -> float | None:
    return None if ticks is None or tick is None else float(ticks * tick)


def _timed(frames: Iterator[av.VideoFrame], tick_s: float) -> Iterator[tuple[av.VideoFrame, float, float]]:
    """Every frame with its time and duration in seconds, `tick_s` where the file has none.

    One without a time follows the frame before; those at the beginning lead up to the first time.
    """
    leading: list[av.VideoFrame] = []
    for frame in islice(frames, _MOST_WAITING):
        leading.append(frame)
        if frame.pts is not None:
            break
    durations_s = [_seconds(frame.duration, frame.time_base) or tick_s for frame in leading[:-1]]
    first_s = _seconds(leading[-1].pts, leading[-1].time_base) if leading else None
    next_s = 0.0 if first_s is None else first_s - sum(durations_s)
    for frame in chain(leading, frames):
        time_s = _seconds(frame.pts, frame.time_base)
        time_s = next_s if time_s is None else time_s
        duration_s = _seconds(frame.duration, frame.time_base) or tick_s
        yield frame, time_s, duration_s
        next_s = time_s + duration_s


def _shortfall(path: Path, container: InputContainer, stream: VideoStream, counts: _Counts, end_s: float) -> str:
    """What is missing by the file's own word, or ''."""
    kind, size, tick_s = container.format.name, path.stat().st_size, _tick_s(stream)
    declared_s, declared_size = _declared_end_s(container, stream), _declared_size(path, kind)
    num_declared = round((declared_s or 0.0) / tick_s)
    if kind == "mxf" and counts.packets < num_declared:
        return f"{counts.packets} of the {num_declared} frames its header names"
    slack_s = 2 * tick_s + 0.05 if "matroska" in kind else 0.5 * tick_s  # the last frame of a .mkv may be longer
    if declared_s is not None and declared_s - end_s > slack_s:
        return f"{end_s:.2f} s of the {declared_s:.2f} s its header names"
    if counts.packets < stream.frames and (kind == "avi" or "mp4" in kind):
        start_s = _seconds(stream.start_time, stream.time_base) or 0.0
        mean_s = (end_s - start_s) / counts.packets  # an AVI counts frames that repeat the one before, too
        if end_s + (0.5 * tick_s if mean_s < 1.1 * tick_s else 2 * mean_s) < start_s + stream.frames * tick_s:
            return f"{counts.packets} of the {stream.frames} its header names"
    if kind == "mpegts" and all(size % step for step in (188, 192, 204)):
        return "it ends within a packet"
    if declared_size > size:
        return f"{size:,} of the {declared_size:,} bytes its header names"
    with path.open("rb") as file:
        file.seek(max(0, size - 2**17))
        tail = file.read()
    if kind == "ogg" and not _ogg_ends(tail):
        return "its last page is missing"
    is_cut = kind in ("mpegvideo", "mpeg2video") and counts.packets > counts.frames
    return "its last frame is incomplete" if is_cut or (kind == "mjpeg" and b"\xff\xd9" not in tail[-64:]) else ""


def _declared_end_s(container: InputContainer, stream: VideoStream) -> float | None:
    """When the stream ends by the header of a file that, cut short, ends with no error."""
    kind = container.format.name
    if kind == "mxf":
        return _seconds(stream.duration, stream.time_base)
    if "matroska" in kind and (tag := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))):
        hours, minutes, seconds = tag.groups()
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    if container.duration and len(container.streams) == 1 and ("matroska" in kind or kind == "flv"):
        return container.duration / av.time_base
    return None  # with sound, it may be the sound's


def _declared_size(path: Path, kind: str) -> int:
    """The size of a whole file by its header, 0 where that does not say it."""
    if "mp4" in kind:
        return _boxes_end(path)
    with path.open("rb") as file:
        head = file.read(2**16)
    if kind == "avi":
        return 8 + int.from_bytes(head[4:8], "little")
    if "matroska" in kind:  # RFC 8794: an EBML header, then one segment; a size of ones only is unknown
        at = 4 + sum(_ebml_size(head, 4))
        width, size = _ebml_size(head, at + 4)
        return at + 4 + width + size if head[at : at + 4] == b"\x18\x53\x80\x67" and size + 1 < 128**width else 0
    if kind == "asf":  # the File Properties Object (ASF specification, 3.2), unless of a broadcast
        at = head.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
        if at >= 0 and at + 92 <= len(head) and not head[at + 88] & 1:
            return int.from_bytes(head[at + 40 : at + 48], "little")
    return 0


def _boxes_end(path: Path) -> int:
    """Where the last of the boxes that follow one another ends (ISO 14496-12, section 4.2)."""
    at, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while at < size:
            file.seek(at)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                length = int.from_bytes(head[8:], "big")
            if length == 0 or not head[4:8].isalnum():  # up to the end of the file, or no box at all
                return 0
            at += max(length, 8)
    return at


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """Width and value of a size (RFC 8794, section 4)."""
    width = 9 - data[at].bit_length() if at < len(data) and data[at] else 1
    return width, int.from_bytes(data[at : at + width], "big") & (128**width - 1)


def _ogg_ends(tail: bytes) -> bool:
    """Whether the last page is marked as the last one of its stream, and whole (RFC 3533, section 6)."""
    at = tail.rfind(b"OggS")
    if at < 0 or at + 27 > len(tail):
        return False
    lengths = tail[at + 27 : at + 27 + tail[at + 26]]
    return bool(tail[at + 5] & 4) and at + 27 + len(lengths) + sum(lengths) <= len(tail)


def _to_rgb(path: Path, frame: av.VideoFrame, aspect: Fraction | None) -> Picture:
    """A decoded frame as it is meant to be seen: 8 bit RGB, over white, square pixels, upright."""
    if int(frame.color_trc or 0) in HDR_TRANSFERS:
        # not rgb48: swscale of 2025 overflows in it with these flags, in 4:2:0
        picture = tone_mapped(frame.to_ndarray(format="gbrp16le", interpolation=EXACT_COLOURS), int(frame.color_trc))
    elif any(component.is_alpha for component in frame.format.components) or frame.format.has_palette:
        picture = over_white(frame.to_ndarray(format="rgba", interpolation=EXACT_COLOURS))
    else:
        picture = frame.to_ndarray(format="rgb24", interpolation=EXACT_COLOURS)
    if aspect and aspect > 0 and aspect != 1:
        width = max(1, round(picture.shape[1] * aspect))
        check_pixels(path, width, picture.shape[0])
        picture = resized(picture, picture.shape[0], width)
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
