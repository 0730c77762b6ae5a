"""Sinks of frames: a folder of pictures, or one video stream in a container, encoded frame by frame."""

import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

from dicode.files import put

_BT709 = 1  # the number of ITU-R BT.709 for matrix, primaries and transfer alike (ISO 23091-2)
_RGB = 0  # the matrix of pixels that are red, green and blue
# Without BITEXACT swscale may take other roundings on other processors.
_SCALER = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT


@dataclass(frozen=True)
class Format:
    """A kind of file: its container and codec, and the options of muxer and encoder; the live ones add to those."""

    container: str
    codec: str
    pixels: str
    codec_options: Mapping[str, str] = field(default_factory=dict)
    container_options: Mapping[str, str] = field(default_factory=dict)
    live_codec_options: Mapping[str, str] = field(default_factory=dict)
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
_FASTSTART = {"movflags": "+faststart"}
FORMATS = {
    ".mp4": Format("mp4", "libx264", "yuv420p", {**_X264, "crf": "16"}, _FASTSTART, {"tune": "zerolatency"}, _LIVE_MP4),
    ".webm": Format("webm", "libvpx-vp9", "yuv420p", {**_VP9, "crf": "22"}, {}, {"lag-in-frames": "0"}, {"live": "1"}),
    ".gif": Format("gif", "gif", "pal8", container_options={"loop": "0"}),
}
LOSSLESS_FORMATS = {
    ".mp4": replace(FORMATS[".mp4"], codec="libx264rgb", pixels="rgb24", codec_options={**_X264, "qp": "0"}),
    ".webm": replace(FORMATS[".webm"], pixels="gbrp", codec_options={**_VP9, "lossless": "1"}),
}


class FolderSink:
    """Frames as 000000.png, 000001.png and so on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def write(self, frame: UInt8[ndarray, "h w c"], index: int) -> None:
        hidden = self.folder / f".{index:06d}.png"  # who watches the folder finds whole pictures only
        try:
            Image.fromarray(frame).save(hidden)
            os.replace(hidden, self.folder / f"{index:06d}.png")
        finally:
            hidden.unlink(missing_ok=True)


class MovieSink:
    """One video stream in a container, encoded frame by frame; if live, in a second file too, which can be watched."""

    def __init__(
        self, path: Path, form: Format, rate: Fraction, size: tuple[int, ...], metadata: Mapping[str, str], live: bool
    ) -> None:
        self.path, self.form, self.rate, self.metadata = path, form, rate, metadata
        self.live = live
        # bitexact: no random segment id, no date, no program version in the file
        container_options = {"fflags": "+bitexact", **form.container_options}
        self.container = av.open(f"file:{path}", "w", format=form.container, container_options=container_options)
        self.container.metadata.update(metadata)
        # Colour is averaged over 2x2 pixels, so it belongs in their middle; H.264's default is their left edge.
        options = {"flags": "+bitexact", "chroma_sample_location": "center", **form.codec_options}
        if live:
            options |= form.live_codec_options
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
        self.stream = stream
        self.durations: dict[int, int] = {}  # in ticks, of the frames in the encoder
        self.waiting: list[av.Packet] = []  # encoded and not yet in the live file
        self.num_clips = 0  # of the live file

    def write(self, frame: UInt8[ndarray, "h w c"], index: int) -> None:
        encoded = self._paletted(frame) if self.form.pixels == "pal8" else self._to_yuv(frame)
        encoded.time_base = self.time_base
        encoded.pts = self._tick(index)
        self.durations[encoded.pts] = self._tick(index + 1) - encoded.pts
        self._mux(self.stream.encode(encoded))

    def write_live(self, path: Path) -> None:
        """Append what was encoded since the last call to the live file; the first time it replaces what lies there.

        FFmpeg's muxers keep the last frame until the next one comes, and PyAV has no call that makes them write it. So
        each clip goes through a muxer of its own, as a fragment (mp4) or clusters (webm), and is appended without the
        header, which is the same every time.
        """
        buffer = io.BytesIO()
        options = {"fflags": "+bitexact", "flush_packets": "1", **self.form.live_container_options}
        options["fragment_index"] = str(self.num_clips + 1)  # mp4 numbers its fragments; webm takes no notice
        with av.open(buffer, "w", format=self.form.container, container_options=options) as container:
            container.metadata.update(self.metadata)
            container.add_stream_from_template(self.stream, opaque=True)
            container.start_encoding()
            header_bytes = buffer.tell()
            container.mux(self.waiting)
        data = buffer.getvalue()
        if self.num_clips:
            with path.open("ab") as file:
                file.write(data[header_bytes:])
        else:
            put(path, lambda partial: partial.write_bytes(data))
        self.waiting, self.num_clips = [], self.num_clips + 1

    def finish(self) -> None:
        self._mux(self.stream.encode(None))
        self.container.close()
        if self.form.container == "gif" and "comment" in self.metadata:
            _insert_gif_comment(self.path, self.metadata["comment"])

    def _tick(self, index: int) -> int:
        return math.floor(index / self.rate / self.time_base)

    def _mux(self, packets: list[av.Packet]) -> None:
        for packet in packets:
            assert packet.pts is not None
            packet.duration = self.durations.pop(packet.pts)  # encoders guess, and guess the last frame wrong
            self.container.mux(packet)
            if self.live:
                self.waiting.append(packet)

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


def _insert_gif_comment(path: Path, text: str) -> None:
    """Put a comment block (GIF89a §24) after the header; FFmpeg writes none."""
    data, comment = path.read_bytes(), text.encode()
    at = 13 + (3 * (2 << (data[10] & 7)) if data[10] & 0x80 else 0)
    blocks = [comment[start : start + 255] for start in range(0, len(comment), 255)]
    sized = b"".join(bytes([len(block)]) + block for block in blocks)
    path.write_bytes(data[:at] + b"\x21\xfe" + sized + b"\0" + data[at:])
