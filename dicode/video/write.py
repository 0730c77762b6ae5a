"""Frames to video files: lazily encoded, complete or absent, the same bytes for the same frames and metadata."""

import contextlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from PIL import Image

from dicode import __version__
from dicode.files import (
    check_file,
    check_folder,
    check_parent,
    flush,
    put,
    put_text,
    read_json,
    replace_folder,
    unfinished,
)
from dicode.video.timed import Picture, Video, checked_fps

FOLDER_METADATA = "metadata.json"
OWN_KEY = "dicode"  # the version, in every .json of ours
MOST_SCALE = 64
_MOST_JSON = 2**24  # bytes
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

    def write(self, frame: Picture, index: int) -> None:
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
        self.path, self.form, self.rate, self.metadata, self.live = path, form, rate, metadata, live
        # bitexact: no random segment id, no date, no program version in the file
        container_options = {"fflags": "+bitexact", **form.container_options}
        self.container = av.open(f"file:{path}", "w", format=form.container, container_options=container_options)
        self.container.metadata.update(metadata)
        # Colour is averaged over 2x2 pixels, so it belongs in their middle; H.264's default is their left edge.
        options = {"flags": "+bitexact", "chroma_sample_location": "center", **form.codec_options}
        options |= form.live_codec_options if live else {}
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

    def write(self, frame: Picture, index: int) -> None:
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

    def _to_yuv(self, frame: Picture) -> av.VideoFrame:
        height, width = frame.shape[:2]
        padded = np.pad(frame, ((0, self.stream.height - height), (0, self.stream.width - width), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(padded, format="rgb24")
        if self.form.pixels != "yuv420p":
            return picture.reformat(format=self.form.pixels)
        matrix, levels = Colorspace.ITU709, ColorRange.MPEG
        return picture.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=levels, interpolation=_SCALER)

    def _paletted(self, frame: Picture) -> av.VideoFrame:
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


class VideoWriter:
    """Write clips to .mp4 (H.264), .webm (VP9), .gif, or a folder of PNG frames (`frames/`, or no suffix).

    Clips are encoded as they come: memory does not grow. The file appears under its name, whole, when `close` returns
    or the `with` block ends; an exception or Ctrl-C inside the block leaves nothing, unless `close` was called there.

    `stream`: the file appears with the first clip, and after every `write` all frames so far can be decoded, whatever
    stops the writer. In the end it is an ordinary file, the same however the frames were split into clips, but not the
    one written without `stream`: the encoder may not look ahead.
    `metadata`: JSON values, stored in the file, with its "prompt" as title, and with the version of dicode in a .json
    beside it (metadata.json in a folder).
    `lossless`: VP9 in RGB in a .webm, which browsers play, or H.264 in RGB in an .mp4, which VLC, mpv and Chrome play
    and QuickTime does not.
    `scale`: the side of the square that every pixel becomes.

    H.264 with loss needs even sides: an odd one repeats its last row or column. A GIF counts time in 1/100 s: frame i
    starts at floor(100·i/fps), so it never drifts. Raises what `check_output` does, before anything is written.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float = 8.0,
        metadata: Mapping[str, object] | None = None,
        *,
        scale: int = 1,
        stream: bool = False,
        lossless: bool = False,
    ) -> None:
        self.path, self.fps, self.scale, self.stream = Path(path), float(fps), scale, stream
        self.num_frames = 0
        self._format = check_output(path, fps, metadata is not None, scale=scale, stream=stream, lossless=lossless)
        self._tags: dict[str, str] = {}
        if metadata is not None:
            values = {**metadata, "scale": scale} if scale != 1 else {**metadata}
            comment = json.dumps(values, ensure_ascii=False, allow_nan=False)
            tags = {"title": str(values.get("prompt", "")), "comment": comment}
            self._tags = {key: text for key, text in tags.items() if text}
        self._notes: dict[str, object] = {}
        self._partial = unfinished(self.path if self._format else self.path.resolve())  # a folder takes a link's target
        self._sink: MovieSink | FolderSink | None = None
        self._frame_shape: tuple[int, ...] = ()
        self._open = True
        self._visible = False  # whether a first clip lies under the final name

    def write(self, clip: Video) -> None:
        """Append the frames of a clip; all clips have the size of the first."""
        self._check_open()
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or 0 in clip.shape[1:]:
            raise ValueError(f"{self.path}: expected uint8 frames (f, h, w, 3), got {clip.dtype} {clip.shape}")
        self._frame_shape = self._frame_shape or clip.shape[1:]
        if clip.shape[1:] != self._frame_shape:
            raise ValueError(f"{self.path}: expected frames of {self._frame_shape}, as before, got {clip.shape[1:]}")
        for frame in clip:
            enlarged = frame.repeat(self.scale, axis=0).repeat(self.scale, axis=1)
            self._sink = self._sink or self._new_sink(enlarged.shape[:2])
            self._sink.write(enlarged, self.num_frames)
            self.num_frames += 1
        if self.stream and len(clip):
            if isinstance(self._sink, MovieSink):
                self._sink.write_live(self.path)
            if not self._visible:
                self._place()
                self._visible = True

    def note(self, **values: object) -> None:
        """Add JSON values to the .json beside the file (metadata.json in a folder), which is written at the end.

        For what is known only then, such as how many of the frames asked for were delivered; the file itself keeps
        `metadata` as given.
        """
        self._check_open()
        if self._format is not None and not self._tags:
            check_file(self.path.with_suffix(".json"), is_own_note)
        self._notes |= json.loads(json.dumps(values, allow_nan=False))

    def close(self) -> None:
        """Finish the file and give it its name. A second call does nothing; no frames at all is an error."""
        if not self._open:
            return
        try:
            if self._sink is None:
                raise ValueError(f"{self.path}: no frames were written")
            if isinstance(self._sink, MovieSink):
                self._sink.finish()
                flush(self._partial)
            self._place()  # the note first: without it, a movie would not be known as ours
            if isinstance(self._sink, MovieSink):
                os.replace(self._partial, self.path)
        except BaseException:
            self._discard()
            raise
        self._open = False

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close() if self._visible else self._discard()
        except Exception as second:  # the first one is raised
            error.add_note(f"{self.path}: what was written until then could not be finished either ({second})")

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError(f"{self.path}: already closed")

    def _new_sink(self, size: tuple[int, ...]) -> MovieSink | FolderSink:
        if self._format is None:
            return FolderSink(self._partial)
        rate = Fraction(self.fps).limit_denominator(1001)
        return MovieSink(self._partial, self._format, rate, size, self._tags, self.stream)

    def _place(self) -> None:
        """Write the metadata, and give a folder its name."""
        note = self.path.with_suffix(".json")
        first: dict[str, object] = {}
        if isinstance(self._sink, FolderSink):
            note, first = self._sink.folder / FOLDER_METADATA, {"fps": self.fps}
        if first or self._tags or self._notes:
            values = {**first, **json.loads(self._tags.get("comment", "{}")), **self._notes}
            values.setdefault(OWN_KEY, __version__)
            put_text(note, f"{json.dumps(values, ensure_ascii=False, indent=2)}\n")
        if isinstance(self._sink, FolderSink) and self._sink.folder != self.path:
            _check_replaceable(self.path)  # once more: something may have come there meanwhile
            replace_folder(self._sink.folder, self.path)
            self._sink.folder = self.path

    def _discard(self) -> None:
        """Remove everything that does not lie under the final name."""
        self._open = False
        if isinstance(self._sink, MovieSink):
            with contextlib.suppress(Exception):  # the container wants its trailer, which may be what failed
                self._sink.container.close()
        if self._partial.is_dir():
            shutil.rmtree(self._partial)
        self._partial.unlink(missing_ok=True)


def check_output(
    path: str | Path,
    fps: float = 8.0,
    metadata: bool = True,
    *,
    scale: int = 1,
    stream: bool = False,
    lossless: bool = False,
) -> Format | None:
    """The format that a `VideoWriter` of these arguments writes, None for a folder: to be asked before long work.

    Raises ValueError for an unknown suffix, rate or option, FileExistsError for a folder that holds anything but frames
    of ours, or a .json beside the file that is not, FileNotFoundError where the parent folder is missing.
    """
    suffix, is_folder = Path(path).suffix.lower(), str(path).endswith(("/", os.sep))
    formats = LOSSLESS_FORMATS if lossless else FORMATS
    form = None if is_folder else formats.get(suffix)
    path = Path(path)
    if suffix and form is None and not is_folder:
        endings = ", ".join(formats) + (" without loss" if lossless and suffix in FORMATS else "")
        raise ValueError(f"{path}: expected a name ending in {endings}, or a folder 'name/'; got {suffix!r}")
    if not path.name:
        raise ValueError(f"expected the name of a file or a new folder to write, got {str(path)!r}")
    checked_fps(fps, "fps")
    if suffix == ".gif" and form and fps > 50:
        raise ValueError(f"fps: a GIF shows at most 50 frames a second, got {fps:g}; write .mp4 or .webm")
    if suffix == ".gif" and form and stream:
        raise ValueError("stream: a GIF cannot be watched until it is whole; write .mp4, .webm or a folder 'name/'")
    if not 1 <= scale <= MOST_SCALE:
        raise ValueError(f"scale: expected a whole number from 1 to {MOST_SCALE}, got {scale}")
    check_parent(path)
    if form is None:
        _check_replaceable(path)
    else:
        note = path.with_suffix(".json")
        check_file(path, (lambda _: is_own_note(note)) if metadata else None)
        if metadata:
            check_file(note, is_own_note)
    return form


def is_own_note(note: Path) -> bool:
    """Whether a .json is the metadata of a video that was written here."""
    try:
        values = read_json(note, _MOST_JSON)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and OWN_KEY in values


def _check_replaceable(folder: Path) -> None:
    """A folder is replaced only if nothing but frames of an earlier run would be lost."""
    check_folder(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file; expected a folder for frames, or a name such as out.mp4")
    names = [p.name for p in folder.iterdir()]
    others = [name for name in names if name != FOLDER_METADATA and not re.fullmatch(r"\.?\d{6,}\.png", name)]
    if others or (names and not is_own_note(folder / FOLDER_METADATA)):
        held = f"holds files that dicode did not write ({(others or names)[0]}, …) and writing would remove"
        raise FileExistsError(f"{folder}: {held}; name a new folder")
