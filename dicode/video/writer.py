"""Frames to video files: lazily encoded, complete or absent, the same bytes for the same frames and metadata."""

import contextlib
import io
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

from dicode.shapes import Video

FOLDER_METADATA = "metadata.json"
_BT709 = 1  # the number of ITU-R BT.709 for matrix, primaries and transfer alike (ISO 23091-2)
# Without BITEXACT swscale may take other roundings on other processors.
_SCALER = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT


@dataclass(frozen=True)
class _Format:
    container: str
    codec: str
    pixels: str
    crf: int | None = None
    codec_options: Mapping[str, str] = field(default_factory=dict)
    container_options: Mapping[str, str] = field(default_factory=dict)
    live_codec_options: Mapping[str, str] = field(default_factory=dict)  # on top of the others
    live_container_options: Mapping[str, str] = field(default_factory=dict)


# One thread each: encoders split the picture, and so change the bytes, by the number of threads. No macroblock
# tree: x264's vector code for it reads memory that nobody set, and the bytes vary with it (tests/test_video_writer.py).
_X264 = {"preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
_VP9 = {"deadline": "good", "cpu-used": "3", "threads": "1"}
# Every clip is muxed by itself: frag_discont and avoid_negative_ts keep it from starting at time 0 again.
_LIVE_MP4 = {
    "movflags": "+empty_moov+default_base_moof+frag_custom+frag_discont+skip_trailer",
    "avoid_negative_ts": "disabled",
}
_LIVE_KEY_FRAME_S = 2.0  # between pictures to start from; not once a clip, since bytes must not depend on the split
_FORMATS = {
    ".mp4": _Format(
        "mp4", "libx264", "yuv420p", 16, _X264, {"movflags": "+faststart"}, {"tune": "zerolatency"}, _LIVE_MP4
    ),
    ".webm": _Format("webm", "libvpx-vp9", "yuv420p", 22, _VP9, {}, {"lag-in-frames": "0"}, {"live": "1"}),
    ".gif": _Format("gif", "gif", "pal8", container_options={"loop": "0"}),
}


class VideoWriter:
    """Write clips to .mp4 (H.264), .webm (VP9), .gif, or a folder of PNG frames (`frames/`, or no suffix).

    Clips are encoded as they come: memory does not grow. The file appears under its name, whole, when `close` returns
    or the `with` block ends; an exception or Ctrl-C inside the block leaves nothing. To keep what was written so far,
    catch it inside the block and call `close`.

    With `stream` the file can be watched while it grows: it appears, whole up to there, with the first clip (and then
    replaces what was there), and after every `write` all frames so far can be decoded. Whatever stops the writer after
    that, `abort` and Ctrl-C included, they stay. In the end the file is an ordinary one, the same however the frames
    were split into clips, but not the one written without `stream`: the encoder may not look ahead.

    `metadata` (JSON values) is stored in the file, with its "prompt" as title, and in a .json beside it (metadata.json
    in a folder), replacing what is there; `read_metadata` reads it, `note` adds to the .json. `crf` is the quality of
    mp4 and webm (lower is better; default 16 and 22). `scale` makes every pixel a square of that side, so that small
    pictures can be watched.
    H.264 needs even sides: an odd one repeats its last row or column. A GIF counts time in 1/100 s: frame i starts at
    floor(100·i/fps), so it never drifts.

    Raises ValueError before anything is written for an unknown suffix, rate or option, FileExistsError for a folder
    that holds anything but frames, FileNotFoundError where the parent folder is missing.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float = 8.0,
        metadata: Mapping[str, object] | None = None,
        *,
        crf: int | None = None,
        scale: int = 1,
        stream: bool = False,
    ) -> None:
        self.path, self.fps, self.scale, self.stream = Path(path), float(fps), scale, stream
        self.num_frames = 0
        suffix = self.path.suffix.lower()
        self._format = None if not suffix or str(path).endswith(("/", os.sep)) else _FORMATS.get(suffix)
        if suffix and self._format is None and not str(path).endswith(("/", os.sep)):
            raise ValueError(
                f"{path}: expected a name ending in {', '.join(_FORMATS)}, or a folder 'name/'; got {suffix!r}"
            )
        if not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps: expected a positive rate, got {fps}")
        if self._format is _FORMATS[".gif"] and fps > 50:
            raise ValueError(f"fps: a GIF shows at most 50 frames a second, got {fps:g}; write .mp4 or .webm")
        if self._format is _FORMATS[".gif"] and stream:
            raise ValueError("stream: a GIF cannot be watched until it is whole; write .mp4, .webm or a folder 'name/'")
        if crf is not None and (self._format is None or self._format.crf is None):
            raise ValueError("crf: a quality for .mp4 and .webm only; GIF and PNG frames have none")
        if scale < 1:
            raise ValueError(f"scale: expected a whole number from 1 on, got {scale}")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{self.path.parent}: no such folder to write {self.path.name!r} in")
        if not os.access(self.path.parent, os.W_OK):
            raise PermissionError(f"{self.path.parent}: cannot write here")
        if self._format is None:
            _check_replaceable(self.path)
        elif self.path.is_dir():
            raise FileExistsError(f"{self.path}: is a folder; expected the name of a file")
        self._crf = crf
        self._comment = None if metadata is None else json.dumps(metadata, ensure_ascii=False, allow_nan=False)
        self._noted: dict[str, object] = {}
        self._title = str((metadata or {}).get("prompt", ""))
        self._partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
        self._sink: _MovieSink | _FolderSink | None = None
        self._frame_shape: tuple[int, ...] = ()
        self._open = True
        self._shown = False  # whether a first clip lies under the final name

    def write(self, clip: Video) -> None:
        """Append the frames of a clip; all clips have the size of the first."""
        if not self._open:
            raise ValueError(f"{self.path}: already closed")
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or 0 in clip.shape[1:]:
            raise ValueError(f"{self.path}: expected uint8 frames (f, h, w, 3), got {clip.dtype} {clip.shape}")
        self._frame_shape = self._frame_shape or clip.shape[1:]
        if clip.shape[1:] != self._frame_shape:
            raise ValueError(f"{self.path}: expected frames of {self._frame_shape}, as before, got {clip.shape[1:]}")
        for frame in clip:
            enlarged = frame.repeat(self.scale, axis=0).repeat(self.scale, axis=1)
            if self._sink is None:
                self._sink = self._make_sink(enlarged)
            self._sink.write(enlarged, self.num_frames)
            self.num_frames += 1
        if self.stream and len(clip):
            self._show()

    def note(self, **values: object) -> None:
        """Add JSON values to the .json beside the file (metadata.json in a folder), which is written at the end.

        For what is known only then, such as how many of the frames asked for were delivered. The header of the file
        itself is long written: it keeps `metadata` as given.
        """
        if not self._open:
            raise ValueError(f"{self.path}: already closed")
        self._noted |= json.loads(json.dumps(values, allow_nan=False))

    def close(self) -> None:
        """Finish the file and give it its name. A second call does nothing; no frames at all is an error."""
        if not self._open:
            return
        try:
            if self._sink is None:
                raise ValueError(f"{self.path}: no frames were written")
            self._sink.finish()
            if isinstance(self._sink, _FolderSink):
                self._place_folder(self._sink)
            else:
                _sync(self._partial)
                os.replace(self._partial, self.path)
                self._write_beside()
        except BaseException:
            self._discard()
            raise
        self._open = False

    def abort(self) -> None:
        """Give up: remove what was written so far. With `stream`, once the first clip is there, the same as `close`."""
        if self._open and self._shown:
            self.close()
        else:
            self._discard()

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        try:
            if self._open:
                self.abort()
        except Exception as second:
            assert error is not None  # it stays the one to be raised
            error.add_note(f"{self.path}: what was written until then could not be finished either ({second})")

    def _discard(self) -> None:
        """Remove everything that does not lie under the final name."""
        self._open = False
        if isinstance(self._sink, _MovieSink):
            with contextlib.suppress(Exception):  # the container wants its trailer, which may be what failed
                self._sink.close()
        if self._partial.is_dir():
            shutil.rmtree(self._partial)
        self._partial.unlink(missing_ok=True)

    def _show(self) -> None:
        """Let the clip just written be seen under the final name; the first one brings its metadata along."""
        if isinstance(self._sink, _MovieSink):
            self._sink.show(self.path)
            if not self._shown:
                self._shown = True
                self._write_beside()
        elif isinstance(self._sink, _FolderSink) and not self._shown:
            self._place_folder(self._sink)
            self._shown = True

    def _place_folder(self, sink: "_FolderSink") -> None:
        values = {"fps": self.fps, **json.loads(self._comment or "{}"), **self._noted}
        _write_text(sink.folder / FOLDER_METADATA, json.dumps(values, ensure_ascii=False, indent=2))
        if sink.folder != self.path:
            _replace_folder(sink.folder, self.path)
            sink.folder = self.path

    def _write_beside(self) -> None:
        if self._comment is not None or self._noted:
            values = {**json.loads(self._comment or "{}"), **self._noted}
            _write_text(self.path.with_suffix(".json"), json.dumps(values, ensure_ascii=False, indent=2))

    def _make_sink(self, first: UInt8[ndarray, "h w c"]) -> "_MovieSink | _FolderSink":
        if self._format is None:
            return _FolderSink(self._partial)
        rate = Fraction(self.fps).limit_denominator(1001)
        size, live = first.shape[:2], self.stream
        return _MovieSink(self._partial, self._format, rate, size, self._crf, self._title, self._comment, live)


class _FolderSink:
    """Frames as 000000.png, 000001.png and so on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def write(self, frame: UInt8[ndarray, "h w c"], index: int) -> None:
        hidden = self.folder / f".{index:06d}.png"  # whoever watches the folder sees whole pictures only
        try:
            Image.fromarray(frame).save(hidden)
            os.replace(hidden, self.folder / f"{index:06d}.png")
        finally:
            hidden.unlink(missing_ok=True)

    def finish(self) -> None:
        pass


class _MovieSink:
    """One video stream in a container, encoded frame by frame; if live, in a second one too, which can be watched."""

    def __init__(
        self,
        path: Path,
        form: _Format,
        rate: Fraction,
        size: tuple[int, ...],
        crf: int | None,
        title: str,
        note: str | None,
        live: bool,
    ) -> None:
        self.path, self.form, self.rate, self.note = path, form, rate, note
        self.live = _LiveFile(form) if live else None
        # bitexact: no random segment id, no date, no program version in the file
        container_options = {"fflags": "+bitexact", **form.container_options}
        self.container = av.open(f"file:{path}", "w", format=form.container, container_options=container_options)
        # Colour is averaged over 2x2 pixels, so it belongs in their middle; unsaid, H.264 would mean their left edge.
        options = {"flags": "+bitexact", "chroma_sample_location": "center", **form.codec_options}
        if live:
            options |= form.live_codec_options
        if form.crf is not None:
            options["crf"] = str(form.crf if crf is None else crf)
        stream = self.container.add_stream(form.codec, rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        even = 2 if form.codec == "libx264" else 1
        stream.height, stream.width = (side + side % even for side in size)
        stream.pix_fmt = form.pixels
        self.time_base = Fraction(1, 100) if form.pixels == "pal8" else 1 / rate
        stream.codec_context.time_base = self.time_base
        if form.pixels != "pal8":
            stream.bit_rate = 0  # quality by crf alone
            stream.color_range = ColorRange.MPEG
            stream.colorspace = stream.color_primaries = stream.color_trc = _BT709
        if live:
            stream.codec_context.gop_size = math.ceil(_LIVE_KEY_FRAME_S * rate)
        if note is not None:
            self.container.metadata.update({"title": title, "comment": note} if title else {"comment": note})
        self.stream = stream
        self.shown_for: dict[int, int] = {}

    def write(self, frame: UInt8[ndarray, "h w c"], index: int) -> None:
        encoded = self._paletted(frame) if self.form.pixels == "pal8" else self._to_yuv(frame)
        encoded.time_base = self.time_base
        encoded.pts = self._tick(index)
        self.shown_for[encoded.pts] = self._tick(index + 1) - encoded.pts
        self._mux(self.stream.encode(encoded))

    def show(self, path: Path) -> None:
        """Put what was encoded since the last call into the file to be watched."""
        assert self.live is not None
        self.live.append(path, self.stream, self.container.metadata)

    def finish(self) -> None:
        self._mux(self.stream.encode(None))
        self.close()
        if self.form.container == "gif" and self.note is not None:
            _insert_gif_comment(self.path, self.note)

    def close(self) -> None:
        if self.live is not None and self.live.file is not None:
            self.live.file.close()
        self.container.close()

    def _tick(self, index: int) -> int:
        return math.floor(index / self.rate / self.time_base)

    def _mux(self, packets: list[av.Packet]) -> None:
        for packet in packets:
            assert packet.pts is not None
            packet.duration = self.shown_for.pop(packet.pts)  # encoders guess, and guess the last frame wrong
            self.container.mux(packet)
            if self.live is not None:
                self.live.waiting.append(packet)

    def _to_yuv(self, frame: UInt8[ndarray, "h w c"]) -> av.VideoFrame:
        height, width = frame.shape[:2]
        padded = np.pad(frame, ((0, self.stream.height - height), (0, self.stream.width - width), (0, 0)), mode="edge")
        return av.VideoFrame.from_ndarray(padded, format="rgb24").reformat(
            format=self.form.pixels,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=_SCALER,
        )

    def _paletted(self, frame: UInt8[ndarray, "h w c"]) -> av.VideoFrame:
        """A palette of its own for every frame: exact up to 256 colours, beyond that the nearest, dithered."""
        image = Image.fromarray(frame)
        paletted = image.quantize(256, dither=Image.Dither.NONE)
        if image.getcolors(256) is None:
            paletted = image.quantize(palette=paletted, dither=Image.Dither.FLOYDSTEINBERG)
        palette = np.full((256, 4), 255, dtype=np.uint8)  # alpha red green blue
        colours = np.array(paletted.getpalette(), dtype=np.uint8).reshape(-1, 3)
        palette[: len(colours), 1:] = colours
        return av.VideoFrame.from_ndarray((np.asarray(paletted), palette), format="pal8")  # type: ignore[arg-type]


class _LiveFile:
    """A file to be watched while it grows: a header, then for every clip a fragment (mp4) or clusters (webm).

    FFmpeg's muxers keep the last frame until the next one comes, and PyAV has no call that makes them write it. So each
    clip goes through a muxer of its own and is appended without the header, which is the same every time.
    """

    def __init__(self, form: _Format) -> None:
        self.form = form
        self.waiting: list[av.Packet] = []  # encoded and not yet in the file
        self.num_clips = 0
        self.file: BinaryIO | None = None

    def append(self, path: Path, stream: av.VideoStream, metadata: Mapping[str, str]) -> None:
        """Move the waiting packets into the file; the first time it replaces what lies at `path`."""
        header, clip = self._muxed(stream, metadata)
        if self.file is None:
            _write_bytes(path, header + clip)
            self.file = path.open("ab")
        else:
            self.file.write(clip)
            self.file.flush()
        self.waiting, self.num_clips = [], self.num_clips + 1

    def _muxed(self, stream: av.VideoStream, metadata: Mapping[str, str]) -> tuple[bytes, bytes]:
        buffer = io.BytesIO()
        options = {"fflags": "+bitexact", "flush_packets": "1", **self.form.live_container_options}
        options["fragment_index"] = str(self.num_clips + 1)  # mp4 numbers its fragments; webm takes no notice
        with av.open(buffer, "w", format=self.form.container, container_options=options) as container:
            container.metadata.update(metadata)
            container.add_stream_from_template(stream, opaque=True)
            container.start_encoding()
            header_bytes = buffer.tell()
            container.mux(self.waiting)
        return buffer.getvalue()[:header_bytes], buffer.getvalue()[header_bytes:]


def _insert_gif_comment(path: Path, text: str) -> None:
    """Put a comment block (GIF89a §24) after the header; FFmpeg writes none. Copies by the piece."""
    with_comment = path.with_name(path.name + "2")
    data = text.encode()
    try:
        with path.open("rb") as source, with_comment.open("wb") as target:
            header = source.read(13)
            colours = 2 << (header[10] & 7) if header[10] & 0x80 else 0
            target.write(header + source.read(3 * colours) + b"\x21\xfe")
            for start in range(0, len(data), 255):
                piece = data[start : start + 255]
                target.write(bytes([len(piece)]) + piece)
            target.write(b"\0")
            shutil.copyfileobj(source, target)
        os.replace(with_comment, path)
    finally:
        with_comment.unlink(missing_ok=True)


def _check_replaceable(folder: Path) -> None:
    """A folder is replaced only if nothing but frames of an earlier run would be lost."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(
            f"{folder}: is a file; expected a folder for frames, or a name ending in .mp4, .webm or .gif"
        )
    others = [
        p.name for p in folder.iterdir() if p.name != FOLDER_METADATA and not re.fullmatch(r"\.?\d{6,}\.png", p.name)
    ]
    if others:
        raise FileExistsError(
            f"{folder}: holds other files ({others[0]}, …) that writing would remove; name a new folder"
        )


def _replace_folder(source: Path, target: Path) -> None:
    _check_replaceable(target)
    old = source.with_name(source.name + ".old")
    if target.exists():
        os.replace(target, old)
    os.replace(source, target)
    shutil.rmtree(old, ignore_errors=True)


def _write_text(path: Path, text: str) -> None:
    _write_bytes(path, f"{text}\n".encode())


def _write_bytes(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        temporary.write_bytes(data)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
