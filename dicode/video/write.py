"""Frames to video files: lazily encoded, complete or absent, the same bytes for the same frames and metadata."""

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from dicode import __version__
from dicode.files import check_parent, flush
from dicode.video.encode import FORMATS, LOSSLESS_FORMATS, FolderSink, Format, MovieSink, write_bytes
from dicode.video.timed import Video, checked_fps

FOLDER_METADATA = "metadata.json"
OWN_KEY = "dicode"  # the version, in every .json of ours
MOST_SCALE = 64
_MOST_NOTE = 2**24  # bytes


class VideoWriter:
    """Write clips to .mp4 (H.264), .webm (VP9), .gif, or a folder of PNG frames (`frames/`, or no suffix).

    Clips are encoded as they come: memory does not grow. The file appears under its name, whole, when `close` returns
    or the `with` block ends; an exception or Ctrl-C inside the block leaves nothing. To keep what was written so far,
    catch it inside the block and call `close`.

    With `stream` the file can be watched while it grows: it appears, whole up to there, with the first clip (and then
    replaces what was there), and after every `write` all frames so far can be decoded. Whatever stops the writer after
    that, `abort` and Ctrl-C included, they stay. In the end the file is an ordinary one, the same however the frames
    were split into clips, but not the one written without `stream`: the encoder may not look ahead.

    `metadata` (JSON values) is stored in the file, with its "prompt" as title and `scale` where that is not 1, and in a
    .json beside it (metadata.json in a folder) with the version of dicode, by which it is known to be ours and may be
    replaced; `read_metadata` reads it, `note` adds to the .json. `crf` is the quality of mp4 and webm (lower is better;
    default 16 and 22). `lossless` keeps every bit: VP9 in RGB in a .webm, which browsers play, or H.264 in RGB in an
    .mp4, which VLC, mpv and Chrome play and QuickTime does not. `scale` makes every pixel a square of that side, so
    that small pictures can be watched.
    H.264 with loss needs even sides: an odd one repeats its last row or column. A GIF counts time in 1/100 s: frame i
    starts at floor(100·i/fps), so it never drifts.

    Raises what `check_output` does, before anything is written.
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
        lossless: bool = False,
    ) -> None:
        self.path, self.fps, self.scale, self.stream = Path(path), float(fps), scale, stream
        self.num_frames = 0
        noted = metadata is not None
        self._format = check_output(path, fps, noted, crf=crf, scale=scale, stream=stream, lossless=lossless)
        if metadata is not None and scale != 1:
            metadata = {**metadata, "scale": scale}
        self._crf = crf
        self._comment = None if metadata is None else json.dumps(metadata, ensure_ascii=False, allow_nan=False)
        self._noted: dict[str, object] = {}
        self._title = str((metadata or {}).get("prompt", ""))
        self._partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
        self._sink: MovieSink | FolderSink | None = None
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
        if self._format is not None and self._comment is None:
            _check_own(self.path.with_suffix(".json"))
        self._noted |= json.loads(json.dumps(values, allow_nan=False))

    def close(self) -> None:
        """Finish the file and give it its name. A second call does nothing; no frames at all is an error."""
        if not self._open:
            return
        try:
            if self._sink is None:
                raise ValueError(f"{self.path}: no frames were written")
            self._sink.finish()
            if isinstance(self._sink, FolderSink):
                self._place_folder(self._sink)
            else:
                flush(self._partial)
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
        if isinstance(self._sink, MovieSink):
            with contextlib.suppress(Exception):  # the container wants its trailer, which may be what failed
                self._sink.close()
        if self._partial.is_dir():
            shutil.rmtree(self._partial)
        self._partial.unlink(missing_ok=True)

    def _show(self) -> None:
        """Let the clip just written be seen under the final name; the first one brings its metadata along."""
        if isinstance(self._sink, MovieSink):
            self._sink.show(self.path)
            if not self._shown:
                self._shown = True
                self._write_beside()
        elif isinstance(self._sink, FolderSink) and not self._shown:
            self._place_folder(self._sink)
            self._shown = True

    def _place_folder(self, sink: FolderSink) -> None:
        self._write_values(sink.folder / FOLDER_METADATA, {"fps": self.fps})
        if sink.folder != self.path:
            _replace_folder(sink.folder, self.path)
            sink.folder = self.path

    def _write_beside(self) -> None:
        if self._comment is not None or self._noted:
            self._write_values(self.path.with_suffix(".json"), {})

    def _write_values(self, path: Path, first: dict[str, object]) -> None:
        values = {**first, **json.loads(self._comment or "{}"), **self._noted}
        values.setdefault(OWN_KEY, __version__)
        write_bytes(path, f"{json.dumps(values, ensure_ascii=False, indent=2)}\n".encode())

    def _make_sink(self, first: UInt8[ndarray, "h w c"]) -> MovieSink | FolderSink:
        if self._format is None:
            return FolderSink(self._partial)
        rate = Fraction(self.fps).limit_denominator(1001)
        size, live = first.shape[:2], self.stream
        return MovieSink(self._partial, self._format, rate, size, self._crf, self._title, self._comment, live)


def check_output(
    path: str | Path,
    fps: float = 8.0,
    metadata: bool = True,
    *,
    crf: int | None = None,
    scale: int = 1,
    stream: bool = False,
    lossless: bool = False,
) -> Format | None:
    """What a `VideoWriter` of these arguments writes, None for a folder: to be asked before long work.

    Raises ValueError for an unknown suffix, rate or option, FileExistsError for a folder that holds anything but frames
    of ours, or a .json beside the file that is not, FileNotFoundError where the parent folder is missing.
    """
    suffix, is_folder = Path(path).suffix.lower(), str(path).endswith(("/", os.sep))
    form = None if is_folder or not suffix else (LOSSLESS_FORMATS if lossless else FORMATS).get(suffix)
    path, text = Path(path), str(path)
    if suffix and form is None and not is_folder:
        names = ", ".join(LOSSLESS_FORMATS if lossless else FORMATS)
        kind = " without loss" if lossless and suffix in FORMATS else ""
        raise ValueError(f"{text}: expected a name ending in {names}{kind}, or a folder 'name/'; got {suffix!r}")
    if not path.name:
        raise ValueError(f"expected the name of a file or a new folder to write, got {text!r}")
    checked_fps(fps, "fps")
    if form is FORMATS[".gif"] and fps > 50:
        raise ValueError(f"fps: a GIF shows at most 50 frames a second, got {fps:g}; write .mp4 or .webm")
    if form is FORMATS[".gif"] and stream:
        raise ValueError("stream: a GIF cannot be watched until it is whole; write .mp4, .webm or a folder 'name/'")
    if crf is not None and (form is None or form.crf is None):
        raise ValueError("crf: a quality for .mp4 and .webm with loss only; GIF and PNG frames have none")
    if not 1 <= scale <= MOST_SCALE:
        raise ValueError(f"scale: expected a whole number from 1 to {MOST_SCALE}, got {scale}")
    check_parent(path)
    if form is None:
        _check_replaceable(path)
    elif path.exists() and not path.is_file():
        raise FileExistsError(f"{path}: is a folder, a pipe or a device; expected the name of a file")
    elif metadata:
        _check_own(path.with_suffix(".json"))
    return form


def _check_own(note: Path) -> None:
    """Raise for a file in the place of our metadata that is not ours."""
    if note.exists() and not _is_own(note):
        raise FileExistsError(f"{note}: would be replaced and was not written by dicode; move it, or write elsewhere")


def _is_own(note: Path) -> bool:
    try:
        values = json.loads(note.read_bytes()) if note.is_file() and note.stat().st_size < _MOST_NOTE else None
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and OWN_KEY in values


def _check_replaceable(folder: Path) -> None:
    """A folder is replaced only if nothing but frames of an earlier run would be lost."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(
            f"{folder}: is a file; expected a folder for frames, or a name ending in .mp4, .webm or .gif"
        )
    names = [p.name for p in folder.iterdir()]
    others = [name for name in names if name != FOLDER_METADATA and not re.fullmatch(r"\.?\d{6,}\.png", name)]
    if others or (names and not _is_own(folder / FOLDER_METADATA)):
        raise FileExistsError(
            f"{folder}: holds files that dicode did not write ({(others or names)[0]}, …) and writing would remove;"
            " name a new folder"
        )


def _replace_folder(source: Path, target: Path) -> None:
    _check_replaceable(target)
    old = source.with_name(source.name + ".old")
    if target.exists():
        os.replace(target, old)
    os.replace(source, target)
    shutil.rmtree(old, ignore_errors=True)
