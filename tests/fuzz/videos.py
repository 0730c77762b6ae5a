"""Damaged video files: small drawn videos of every container that is written here, changed by a seed.

What is accepted must agree, up to the first changed byte, with what PyAV or Pillow alone decode of the undamaged file;
a file that says how long it is must not be accepted when it is cut off.
"""

import io
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image

from tests.fuzz import guarded

COUNT, SIDE = 10, 32
# name: format of the muxer (or of Pillow), codec, pixels
KINDS = {
    "h264.mp4": ("mp4", "libx264", "yuv420p"),
    "fast.mp4": ("mp4", "libx264", "yuv420p"),
    "fragments.mp4": ("mp4", "libx264", "yuv420p"),
    "mjpeg.mov": ("mov", "mjpeg", "yuvj420p"),
    "h264.mkv": ("matroska", "libx264", "yuv420p"),
    "ffv1.mkv": ("matroska", "ffv1", "bgr0"),
    "vp9.webm": ("webm", "libvpx-vp9", "yuv420p"),
    "mjpeg.avi": ("avi", "mjpeg", "yuvj420p"),
    "mpeg4.avi": ("avi", "mpeg4", "yuv420p"),
    "mpeg1.mpg": ("mpeg", "mpeg1video", "yuv420p"),
    "mpeg2.vob": ("vob", "mpeg2video", "yuv420p"),
    "h264.ts": ("mpegts", "libx264", "yuv420p"),
    "mpeg2.m2ts": ("mpegts", "mpeg2video", "yuv420p"),
    "h264.flv": ("flv", "libx264", "yuv420p"),
    "flv1.flv": ("flv", "flv", "yuv420p"),
    "wmv2.wmv": ("asf", "wmv2", "yuv420p"),
    "mpeg4.3gp": ("3gp", "mpeg4", "yuv420p"),
    "vp8.ogv": ("ogv", "libvpx", "yuv420p"),
    "mpeg2.mxf": ("mxf", "mpeg2video", "yuv420p"),
    "raw.mjpeg": ("mjpeg", "mjpeg", "yuvj420p"),
    "a.gif": ("GIF", "", ""),
    "a.apng": ("PNG", "", ""),
    "a.webp": ("WEBP", "", ""),
    "a.avif": ("AVIF", "", ""),
    "still.png": ("PNG", "", ""),
    "still.jpg": ("JPEG", "", ""),
    "still.avif": ("AVIF", "", ""),
}
NO_LENGTH = (".mpg", ".vob", ".ts", ".m2ts", ".mjpeg", ".jpg")  # without a length: cut between frames, they are whole
INDEXED = (".mp4", ".mov", ".3gp", ".avif")  # what lies where is said elsewhere
OPTIONS = {"fast.mp4": {"movflags": "+faststart"}, "fragments.mp4": {"movflags": "frag_keyframe+empty_moov"}}
EXTREMES = (0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 13_000)
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


@dataclass(frozen=True)
class Case:
    """A file to make: what it was, what is done to it, and the seed of that."""

    kind: str
    change: str
    seed: int


@dataclass(frozen=True)
class Source:
    """An undamaged file, its frames as decoded without us, and where in the file each one ends."""

    data: bytes
    frames: np.ndarray
    ends: tuple[int, ...]


def cases(seed: int, count: int) -> Iterator[Case]:
    """Every kind with every change in turn."""
    rng = np.random.default_rng([seed, 20])
    for number in range(count):
        kinds, changes = list(KINDS), list(CHANGES)
        kind = kinds[number % len(kinds)]
        change = changes[(number // len(kinds) + number % len(kinds)) % len(changes)]
        yield Case(kind, change, int(rng.integers(2**31)))


def run(case: Case, folder: Path) -> str:
    """Make the file, read it, and compare."""
    whole = source(case.kind)
    rng = np.random.default_rng(case.seed)
    name, data, changed_at = CHANGES[case.change](case.kind, whole.data, rng)
    path = folder / name
    path.write_bytes(data)
    if case.change == "clock" and KINDS[case.kind][1]:
        try:
            whole, changed_at = Source(data, *of_video(data)), len(data)  # muxers may reorder what runs backwards
        except (ValueError, av.FFmpegError):  # nothing is left to be decoded
            case, changed_at = replace(case, change="flip"), 0
    return guarded(lambda: outcome(case, whole, path, len(data), changed_at), processor_s=20)


def outcome(case: Case, whole: Source, path: Path, size: int, changed_at: int) -> str:
    """How reading the file came out."""
    from dicode.video.read import VideoReadError, check_frames, native_frames, read_video

    safe = sum(end <= changed_at for end in whole.ends)
    cut = case.change == "truncate" and size < len(whole.data)
    results: list[str] = []
    for read, partial in ((native_frames, False), (read_video, True), (check_frames, None)):
        try:
            if partial is None:
                read(path, SIDE)
                continue
            value = read(path, fps=None, allow_partial=True) if partial else read(path)
            frames = value.frames if partial else value[0]
        except VideoReadError as error:
            if str(path) not in str(error):
                return f"wrong: the error does not name the file: {error}"
            results.append("refused")
            if case.change in ("intact", "suffix") and partial is not None:
                return f"wrong: refused, {str(error).replace(str(path), case.kind)}"
            continue
        alike = min(safe, len(frames))
        if frames.shape[1:] != whole.frames.shape[1:] and alike:
            return f"wrong: {'partial ' * partial}frames of {frames.shape}"
        if alike and not np.array_equal(frames[:alike], whole.frames[:alike]):
            first = next(i for i in range(alike) if not np.array_equal(frames[i], whole.frames[i]))
            return f"wrong: {'partial ' * partial}frame {first} differs, {safe} are undamaged, {len(frames)} were read"
        if partial:
            continue
        has_length = not case.kind.endswith(NO_LENGTH)
        if len(frames) < safe or (cut and has_length and len(frames) < len(whole.frames)):
            return f"wrong: accepted with {len(frames)} of {len(whole.frames)} frames, {safe} undamaged"
        if case.change in ("intact", "suffix", "clock") and len(frames) != len(whole.frames):
            return f"wrong: {len(frames)} frames of {len(whole.frames)}"
        results.append("ok")
    return "ok" if "ok" in results[:1] else "refused"


@cache
def source(kind: str) -> Source:
    """The undamaged file of a kind."""
    data = drawn(kind)
    if not KINDS[kind][1]:
        return Source(data, *of_image(data, kind))
    frames, ends = of_video(data)
    return Source(data, frames, ends if not kind.endswith(INDEXED) else tuple(min(end, len(data)) for end in ends))


def pictures() -> np.ndarray:
    """A pattern that moves and grows brighter: no two frames are alike."""
    blocks = np.random.default_rng(0).integers(0, 256, (SIDE // 4, SIDE // 4, 3)).repeat(4, 0).repeat(4, 1)
    return np.stack([np.roll(blocks, 2 * i, 1) // 2 + 12 * i for i in range(COUNT)]).astype(np.uint8)


def drawn(kind: str, times: Callable[[int], int | None] = lambda i: i) -> bytes:
    """A file of this kind; `times` gives when packet i is to be shown, in tenths of seconds (None: unsaid)."""
    form, codec, _ = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / kind  # a real file: --movflags faststart opens it a second time
        if codec:
            write_video(path, kind, times)
        else:
            images = [Image.fromarray(frame) for frame in pictures()[: 1 if kind.startswith("still") else None]]
            more = {"save_all": True, "append_images": images[1:], "duration": 100} if len(images) > 1 else {}
            images[0].save(path, form, **more)
        return path.read_bytes()


def write_video(path: Path, kind: str, times: Callable[[int], int | None]) -> None:
    """The drawn pictures through PyAV."""
    form, codec, pixels = KINDS[kind]
    rate = 25 if codec in ("mpeg1video", "mpeg2video") else 10
    options = OPTIONS.get(kind, {"mpegts_m2ts_mode": "1"} if kind.endswith("m2ts") else {})
    with av.open(str(path), "w", format=form, container_options={"fflags": "+bitexact", **options}) as container:
        stream = container.add_stream(codec, rate=rate, options={"threads": "1", "flags": "+bitexact"})
        stream.height = stream.width = SIDE
        stream.pix_fmt = pixels
        stream.codec_context.gop_size = 4
        packets = []
        for i, picture in enumerate([*pictures(), None]):
            frame = None
            if picture is not None:
                frame = av.VideoFrame.from_ndarray(picture, "rgb24")
                frame.pts, frame.time_base = i, Fraction(1, rate)
            packets += stream.encode(frame)
        for i, packet in enumerate(packets):
            moved = times(i)
            if moved is None:
                packet.pts = None
            elif moved != i:
                shift = int((moved - i) / rate / packet.time_base)
                packet.pts += shift
                packet.dts = None if packet.dts is None else packet.dts + shift
            container.mux(packet)


def of_video(data: bytes) -> tuple[np.ndarray, tuple[int, ...]]:
    """Frames in order, and where the last byte that each one needs lies, by PyAV alone."""
    shown: list[tuple[int, np.ndarray]] = []
    starts: dict[int, int] = {}
    positions: list[int] = []
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            if packet.size:
                starts[packet.pts if packet.pts is not None else len(positions)] = len(positions)
                known = packet.pos if packet.pos is not None and packet.pos >= 0 else None
                positions.append(known if known is not None else (positions[-1] if positions else 0))
            for frame in packet.decode():
                picture = frame.to_ndarray(format="rgb24", interpolation=EXACT)
                shown.append((frame.pts if frame.pts is not None else len(shown), picture))
    # A packet ends at the latest where the next one that lies behind it begins.
    packet_ends = [min([p for p in positions if p > own], default=len(data)) for own in positions]
    needed = np.maximum.accumulate(packet_ends)
    ends = np.maximum.accumulate([needed[starts.get(pts, i)] for i, (pts, _) in enumerate(shown)])
    return np.stack([picture for _, picture in shown]), tuple(int(end) for end in ends)


def of_image(data: bytes, kind: str) -> tuple[np.ndarray, tuple[int, ...]]:
    """Frames by Pillow alone; where they lie is not known."""
    with Image.open(io.BytesIO(data)) as image:
        frames = []
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames), tuple([len(data)] * len(frames))


Changed = tuple[str, bytes, int]  # name, content, first byte that is another (for what is indexed: 0 within the index)


def _damage_at(kind: str, data: bytes, at: int) -> int:
    """Where damage begins to matter: at once, if it lies in an index."""
    if not kind.endswith(INDEXED):
        return at
    start = data.find(b"mdat")
    size = int.from_bytes(data[start - 4 : start], "big")
    return at if start <= at < start - 4 + size and kind != "fragments.mp4" else 0


def intact(kind: str, data: bytes, rng: np.random.Generator) -> Changed:
    """Nothing is changed."""
    return kind, data, len(data)


def suffix(kind: str, data: bytes, rng: np.random.Generator) -> Changed:
    """The name says another kind."""
    return f"a{rng.choice(['.mp4', '.gif', '.avi', '.png', '.ts', '', '.txt', '.MKV'])}", data, len(data)


def truncate(kind: str, data: bytes, rng: np.random.Generator) -> Changed:
    """The end is missing."""
    at = int(rng.integers(1, len(data)))
    return kind, data[:at], _damage_at(kind, data, at)


def flip(kind: str, data: bytes, rng: np.random.Generator) -> Changed:
    """Single bits are others."""
    changed = bytearray(data)
    places = rng.integers(0, len(data), int(rng.integers(1, 12)))
    for at in places:
        changed[at] ^= 1 << int(rng.integers(8))
    return kind, bytes(changed), min(_damage_at(kind, data, int(at)) for at in places)


def overwrite(kind: str, data: bytes, rng: np.random.Generator) -> Changed:
    """A run of bytes is zero, or noise."""
    at, length = int(rng.integers(0, len(data))), int(rng.integers(1, 400))
    run = bytes(length) if rng.integers(2) else rng.bytes(length)
    return kind, (data[:at] + run[: len(data) - at] + data[at + length :]), _damage_at(kind, data, at)


def field(kind: str, data: bytes, rng: np.random.Generator) -> Changed:
    """A number in a header is an extreme one."""
    start = max(0, data.rfind(b"moov")) if kind.endswith(INDEXED) and rng.integers(2) else 0
    at = start + int(rng.integers(0, min(600, len(data) - start - 4)))
    width, order = int(rng.choice([2, 4])), str(rng.choice(["big", "little"]))
    value = (int(rng.choice(EXTREMES)) & (256**width - 1)).to_bytes(width, order)  # type: ignore[arg-type]
    return kind, data[:at] + value + data[at + width :], _damage_at(kind, data, at) if at > start else 0


def box(kind: str, data: bytes, rng: np.random.Generator) -> Changed:
    """A box or chunk claims another size."""
    names = [b"moov", b"mdat", b"trak", b"stsz", b"stts", b"stsc", b"stco", b"ctts", b"avcC", b"moof", b"ftyp"]
    names += [b"RIFF", b"LIST", b"strf", b"idx1", b"movi", b"IHDR", b"IDAT", b"fcTL", b"fdAT", b"VP8 ", b"iloc"]
    found = [at for name in names for at in [data.find(name)] if at >= 0]
    if not found:
        return field(kind, data, rng)
    at = int(rng.choice(found))
    value = int(rng.choice(EXTREMES)).to_bytes(4, "big" if data[:4] != b"RIFF" else "little")
    first = at + 4 if data[:4] == b"RIFF" else at - 4
    return kind, data[:first] + value + data[first + 4 :], 0


def claim(kind: str, data: bytes, rng: np.random.Generator) -> Changed:
    """The picture claims to be gigantic."""
    big, changed = int(rng.choice([16_000, 30_000, 60_000])), bytearray(data)
    if data[:4] == b"\x89PNG":
        changed[16:24] = big.to_bytes(4, "big") * 2
        changed[29:33] = zlib.crc32(changed[12:29]).to_bytes(4, "big")
    elif data[:3] == b"GIF":
        changed[6:10] = big.to_bytes(2, "little") * 2
    else:
        for order in ("big", "little"):
            side, other = (n.to_bytes(2, order) for n in (SIDE, big))  # type: ignore[arg-type]
            at = data.find(side * 2)
            if at >= 0:
                changed[at : at + 4] = other * 2
    return kind, bytes(changed), 0


def splice(kind: str, data: bytes, rng: np.random.Generator) -> Changed:
    """A part is missing, is there twice, or lies elsewhere."""
    first, last = sorted(int(at) for at in rng.integers(0, len(data), 2))
    how, part = int(rng.integers(3)), data[first:last]
    if how == 0:
        return kind, data[:first] + data[last:], _damage_at(kind, data, first)
    if how == 1:
        return kind, data[:last] + part + data[last:], _damage_at(kind, data, last)
    rest = data[:first] + data[last:]
    at = int(rng.integers(0, len(rest) + 1))
    return kind, rest[:at] + part + rest[at:], min(_damage_at(kind, data, first), _damage_at(kind, data, at))


def join(kind: str, data: bytes, rng: np.random.Generator) -> Changed:
    """Another file follows in the same one."""
    other = source(str(rng.choice(list(KINDS)))).data if rng.integers(2) else data
    if kind == "still.jpg" and other[:2] == data[:2]:  # JPEGs in a row are a video
        other = source("a.gif").data
    return kind, data + other, len(data)


def clock(kind: str, data: bytes, rng: np.random.Generator) -> Changed:
    """Times jump, run backwards, are equal or are missing; every frame is whole."""
    if not KINDS[kind][1]:
        return intact(kind, data, rng)
    at, how = int(rng.integers(1, COUNT)), int(rng.integers(5))
    jump = int(rng.choice([3, 500, 5000, 10_000_000]))
    moves: list[Callable[[int], int | None]] = [
        lambda i: i + jump * (i >= at),
        lambda i: i - 2 * (i == at),
        lambda i: i - jump,
        lambda i: None if i == at else i,
        lambda i: None if i < at else i,
    ]
    try:
        return kind, drawn(kind, moves[how]), len(data)
    except Exception:  # muxers refuse much of this
        return intact(kind, data, rng)


def noise(kind: str, data: bytes, rng: np.random.Generator) -> Changed:
    """A beginning, then noise."""
    at = int(rng.integers(0, min(400, len(data))))
    return kind, data[:at] + rng.bytes(int(rng.integers(0, 4000))), _damage_at(kind, data, at)


CHANGES: dict[str, Callable[[str, bytes, np.random.Generator], Changed]] = {
    change.__name__: change
    for change in (intact, suffix, truncate, flip, overwrite, field, box, claim, splice, join, clock, noise)
}
