"""Where frames go: a folder of pictures, or one video stream in a container, encoded as they come.

`VideoWriter` owns the names and what happens when something fails; sinks write where they are told.
"""

import io
import math
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

from dicode.files import flush

_BT709 = 1  # the number of ITU-R BT.709 for matrix, primaries and transfer alike (ISO 23091-2)
_RGB = 0  # the matrix of pixels that are red, green and blue
# Without BITEXACT swscale may take other roundings on other processors.
_SCALER = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT


@dataclass(frozen=True)
class Format:
    """A kind of file: its container and codec, and what the encoder and the muxer are told."""

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
FORMATS = {
    ".mp4": Format(
        "mp4", "libx264", "yuv420p", 16, _X264, {"movflags": "+faststart"}, {"tune": "zerolatency"}, _LIVE_MP4
    ),
    ".webm": Format("webm", "libvpx-vp9", "yuv420p", 22, _VP9, {}, {"lag-in-frames": "0"}, {"live": "1"}),
    ".gif": Format("gif", "gif", "pal8", container_options={"loop": "0"}),
}
LOSSLESS_FORMATS = {
    ".mp4": replace(FORMATS[".mp4"], codec="libx264rgb", pixels="rgb24", crf=None, codec_options={**_X264, "qp": "0"}),
    ".webm": replace(FORMATS[".webm"], pixels="gbrp", crf=None, codec_options={**_VP9, "lossless": "1"}),
}


class FolderSink:
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


class MovieSink:
    """One video stream in a container, encoded frame by frame; if live, in a second one too, which can be watched."""

    def __init__(
        self,
        path: Path,
        form: Format,
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
            stream.color_range = ColorRange.MPEG if form.pixels == "yuv420p" else ColorRange.JPEG
            stream.colorspace = _BT709 if form.pixels == "yuv420p" else _RGB
            stream.color_primaries = stream.color_trc = _BT709
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
        picture = av.VideoFrame.from_ndarray(padded, format="rgb24")
        if self.form.pixels != "yuv420p":
            return picture.reformat(format=self.form.pixels)
        return picture.reformat(
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

    def __init__(self, form: Format) -> None:
        self.form = form
        self.waiting: list[av.Packet] = []  # encoded and not yet in the file
        self.num_clips = 0
        self.file: BinaryIO | None = None

    def append(self, path: Path, stream: av.VideoStream, metadata: Mapping[str, str]) -> None:
        """Move the waiting packets into the file; the first time it replaces what lies at `path`."""
        header, clip = self._muxed(stream, metadata)
        if self.file is None:
            write_bytes(path, header + clip)
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


def write_bytes(path: Path, data: bytes) -> None:
    """A whole file or none, replacing what is there."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        temporary.write_bytes(data)
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
