"""Containers through PyAV: frames with their times, and whether the file is whole."""

import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

from dicode.video.fit import resized
from dicode.video.hdr import HDR_TRANSFERS, tone_mapped
from dicode.video.images import over_white
from dicode.video.timed import (
    DEFAULT_FPS,
    MOST_FRAMES,
    MOST_PIXELS,
    Picture,
    Timed,
    VideoReadError,
    check_pixels,
    check_work,
)

CONTAINER_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "m2v", "vob", "ts", "mts", "m2ts", "wmv", "asf"),
        *("flv", "f4v", "3gp", "3g2", "ogv", "mxf", "mjpeg", "mjpg", "ivf"),
    )
)
# swscale's default loses 1 to 3 levels of colour each time a file is read; these flags round without bias and place
# colour samples where the file says. (POINT, which would undo our own writing exactly, shifts everyone else's colours.)
EXACT_COLOURS = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# Real containers only: FFmpeg would also open playlists, which read other files, and draw plain text as video.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,ogg,flv,asf,h264,hevc,ivf,m4v,mp3,wav,flac"
    ",mxf,mjpeg,dv,nut"
)
_SEEKABLE = ("mp4", "matroska")  # their index holds every key frame with its time
_SEEK_FROM_S, _SEEK_BEFORE_S = 2.0, 1.0
_MOST_WAITING = 32  # frames without a time that are held until one with a time comes
_ADVICE = "copy or download it again, or pass allow_partial=True to take these frames"


class _Frame(NamedTuple):
    frame: av.VideoFrame
    time_s: float
    length_s: float


class StreamFacts(NamedTuple):
    """What packets tell of a stream, none of them decoded."""

    height: int
    width: int
    num_frames: int
    duration_s: float
    hdr: bool


@contextmanager
def opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its moving picture: no cover art; of several the one of most frames."""
    with _container(path) as container:
        streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
        if not streams:
            kinds = " and ".join(sorted({s.type for s in container.streams})) or "nothing"
            raise VideoReadError(
                f"{path}: expected a video stream, found only {kinds}; a file cut off early looks like this too"
            )
        stream = max(streams, key=lambda stream: stream.frames)  # covers may be streams like any other, of one frame
        if not stream.frames and (best := container.streams.best("video")):
            stream = next((stream for stream in streams if stream.index == best.index), stream)
        check_pixels(path, stream.width, stream.height)
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
        yield container, stream


def container_frames(path: Path, start_s: float = 0.0) -> Iterator[Timed]:
    """The frames of a file, timed from its first one, from the one shown at `start_s` or an earlier one on.

    Raises `VideoReadError` after the last good frame of a file that is damaged or breaks off.
    """
    with opened(path) as (container, stream):
        tick_s = _tick_s(stream)
        origin_s, sought = 0.0, False
        if start_s > _SEEK_FROM_S and any(name in container.format.name for name in _SEEKABLE):
            first = next(_decoded(path, container, stream, _Packets()))
            origin_s = _seconds(first.pts, first.time_base) or 0.0
            sought = first.pts is not None and _decoder_name(stream) is None
            if sought and stream.time_base:
                target = math.floor((origin_s + start_s - _SEEK_BEFORE_S) / stream.time_base)
                container.seek(target, stream=stream, backward=True)
        packets, count, end_s = _Packets(), 0, 0.0
        for frame, time_s, length_s in _timed(_decoded(path, container, stream, packets), tick_s):
            if not count and not sought:
                origin_s = time_s
            elif not count and time_s > origin_s + start_s:
                break
            check_pixels(path, frame.width, frame.height)
            check_work(path, count * frame.width * frame.height)
            yield Timed(time_s - origin_s, length_s, partial(_to_rgb, path, frame, stream))
            count, end_s = count + 1, time_s + length_s
        else:
            if count and (
                fault := packets.fault or ("" if sought else _shortfall(path, container, stream, packets, end_s))
            ):
                raise VideoReadError(f"{path}: breaks off after {count} frames: {fault}; {_ADVICE}")
            return
    yield from container_frames(path)  # the index led past the moment: from the beginning


def stream_facts(path: Path) -> StreamFacts:
    """Size, length and colours of a file, from its packets."""
    with opened(path) as (container, stream):
        tick_s, count, first_s, end_s = _tick_s(stream), 0, math.inf, 0.0
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            count += 1
            length_s = _seconds(packet.duration, packet.time_base) or tick_s
            time_s = _seconds(packet.pts, packet.time_base)
            time_s = end_s if time_s is None else time_s
            first_s, end_s = min(first_s, time_s), max(end_s, time_s + length_s)
            if count > MOST_FRAMES:
                raise VideoReadError(f"{path}: expected at most {MOST_FRAMES:,} frames, got more; cut it into parts")
        if not count:
            raise VideoReadError(f"{path}: opens as a video but holds no frame that can be decoded")
        hdr = int(stream.codec_context.color_trc) in HDR_TRANSFERS
        return StreamFacts(stream.height, stream.width, count, end_s - first_s, hdr)


def container_comment(path: Path) -> str:
    """The comment in a file's metadata, or ''."""
    with _container(path) as container:
        return next((text for key, text in container.metadata.items() if key.lower() == "comment"), "")


@contextmanager
def _container(path: Path) -> Iterator[InputContainer]:
    """The file by its content: FFmpeg believes names such as a.png, and JPEGs in a row may be anything to it."""
    with ExitStack() as stack:
        name: Any = f"file:{path}"  # "file:" since a name may hold a colon
        file = stack.enter_context(path.open("rb"))
        form = "mjpeg" if file.read(3) == b"\xff\xd8\xff" else None
        if path.suffix.lower() not in CONTAINER_SUFFIXES:
            name = stack.enter_context(open(os.open(path, os.O_RDONLY), "rb"))  # which has no name
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
        yield stack.enter_context(av.open(name, format=form, options=options, metadata_errors="replace"))


class _Packets:
    """What went by while frames were decoded."""

    count = decoded = 0
    fault = ""


def _decoded(path: Path, container: InputContainer, stream: VideoStream, packets: _Packets) -> Iterator[av.VideoFrame]:
    """Decode one stream up to the first damaged frame."""
    name = _decoder_name(stream)
    decoder: Any = av.VideoCodecContext.create(name, "r") if name else None
    shown = 0
    failure: Exception | None = None
    for packet in container.demux(stream):
        packets.count += packet.size > 0
        if packet.is_corrupt:
            packets.fault = packets.fault or "a packet is incomplete"
        try:
            frames = decoder.decode(packet if packet.size else None) if decoder else packet.decode()
        except av.FFmpegError as error:
            failure, waiting = error, decoder or stream.codec_context
            frames = waiting.decode(None)  # those that wait for their turn are whole
        for frame in frames:
            assert isinstance(frame, av.VideoFrame)
            if frame.is_corrupt and (shown or "mpegts" not in container.format.name):
                raise VideoReadError(f"{path}: breaks off after {shown} frames: the next one is damaged; {_ADVICE}")
            packets.decoded += 1
            if not frame.is_corrupt:  # recordings of broadcasts begin anywhere
                shown += 1
                if frame.time_base is None and stream.time_base is not None:
                    frame.time_base = stream.time_base  # of those that waited
                yield frame
        if failure is not None:
            raise failure


def _decoder_name(stream: VideoStream) -> str | None:
    """The decoder to take in place of FFmpeg's own, whose VP8 and VP9 drop transparency."""
    if stream.metadata.get("alpha_mode") != "1":
        return None
    return {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)


def _tick_s(stream: VideoStream) -> float:
    rate = stream.average_rate or stream.guessed_rate
    return float(1 / rate) if rate else 1 / DEFAULT_FPS


def _seconds(ticks: int | None, tick: Fraction | None) -> float | None:
    return None if ticks is None or tick is None else float(ticks * tick)


def _timed(frames: Iterable[av.VideoFrame], tick_s: float) -> Iterator[_Frame]:
    """Give every frame a time; those without one of their own are spread by their durations, or by the frame rate."""
    waiting: list[tuple[av.VideoFrame, float]] = []
    next_s: float | None = None  # when a frame without a time would follow
    for frame in frames:
        time_s = _seconds(frame.pts, frame.time_base)
        length_s = _seconds(frame.duration, frame.time_base) or tick_s
        if time_s is None:
            waiting.append((frame, length_s))
            if len(waiting) < _MOST_WAITING:
                continue
        held_s = sum(length for _, length in waiting)
        at_s, pace = next_s or 0.0, 1.0
        if time_s is not None and next_s is None:
            at_s = time_s - held_s
        elif time_s is not None and next_s is not None and held_s:
            pace = min(1.0, max(0.0, (time_s - next_s) / held_s))
        for held, length in waiting:
            yield _Frame(held, at_s, length * pace)
            at_s += length * pace
        waiting, next_s = [], at_s
        if time_s is not None:
            yield _Frame(frame, time_s, length_s)
            next_s = time_s + length_s
    for held, length in waiting:
        yield _Frame(held, next_s or 0.0, length)
        next_s = (next_s or 0.0) + length


def _shortfall(path: Path, container: InputContainer, stream: VideoStream, packets: _Packets, end_s: float) -> str:
    """What is missing by the file's own word, or ''."""
    kind, tick_s = container.format.name, _tick_s(stream)
    declared_s = _declared_end_s(container, stream)
    if kind == "mxf" and declared_s and packets.count < round(declared_s / tick_s):
        return f"{packets.count} of the {round(declared_s / tick_s)} frames its header names"
    slack_s = 2 * tick_s + 0.05 if "matroska" in kind else 0.5 * tick_s  # the last frame of a .mkv may be longer
    if declared_s is not None and declared_s - end_s > slack_s:
        return f"{end_s:.2f} s of the {declared_s:.2f} s its header names"
    if packets.count < stream.frames and (kind == "avi" or "mp4" in kind):
        start_s = _seconds(stream.start_time, stream.time_base) or 0.0
        mean_s = (end_s - start_s) / packets.count  # an AVI counts frames that repeat the one before, too
        if end_s + (0.5 * tick_s if mean_s < 1.1 * tick_s else 2 * mean_s) < start_s + stream.frames * tick_s:
            return f"{packets.count} of the {stream.frames} its header names"
    size = path.stat().st_size
    if kind == "mpegts" and all(size % step for step in (188, 192, 204)):
        return "it ends within a packet"
    if (declared := _declared_size(path, kind)) > size:
        return f"{size:,} of the {declared:,} bytes its header names"
    if kind == "ogg" and not _ogg_ends(path):
        return "its last page is missing"
    incomplete = packets.count > packets.decoded if kind in ("mpegvideo", "mpeg2video") else not _jpeg_ends(path, kind)
    if incomplete:
        return "its last frame is incomplete"
    return ""


def _declared_end_s(container: InputContainer, stream: VideoStream) -> float | None:
    """When the stream ends by the header of a file that, cut short, ends with no error."""
    kind = container.format.name
    if kind == "mxf":
        return _seconds(stream.duration, stream.time_base)
    if "matroska" not in kind and kind != "flv":
        return None
    if match := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = match.groups()
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    alone = len(container.streams) == 1  # else the sound may be the longer one
    return container.duration / av.time_base if container.duration and alone else None


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
        known = at >= 0 and at + 92 <= len(head) and not head[at + 88] & 1
        return int.from_bytes(head[at + 40 : at + 48], "little") if known else 0
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


def _jpeg_ends(path: Path, kind: str) -> bool:
    """Whether the last of JPEGs in a row has its end; true for other kinds."""
    if kind != "mjpeg":
        return True
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**12))
        return b"\xff\xd9" in file.read()[-64:]


def _ogg_ends(path: Path) -> bool:
    """Whether the last page is marked as the last one of its stream, and whole (RFC 3533, section 6)."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**17))
        tail = file.read()
    at = tail.rfind(b"OggS")
    if at < 0 or at + 27 > len(tail):
        return False
    lengths = tail[at + 27 : at + 27 + tail[at + 26]]
    return bool(tail[at + 5] & 4) and at + 27 + len(lengths) + sum(lengths) <= len(tail)


def _to_rgb(path: Path, frame: av.VideoFrame, stream: VideoStream) -> Picture:
    """A decoded frame as it is meant to be seen: 8 bit RGB, over white, square pixels, upright."""
    aspect = stream.sample_aspect_ratio
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
