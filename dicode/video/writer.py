"""Frames to video files: lazily encoded, complete or absent, the same bytes for the same frames and metadata."""

import contextlib
import json
import math
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

from dicode.files import flush
from dicode.shapes import Video
from dicode.video.sinks import FORMATS, FolderSink, MovieSink, write_bytes

FOLDER_METADATA = "metadata.json"


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
        self._format = None if not suffix or str(path).endswith(("/", os.sep)) else FORMATS.get(suffix)
        if suffix and self._format is None and not str(path).endswith(("/", os.sep)):
            raise ValueError(
                f"{path}: expected a name ending in {', '.join(FORMATS)}, or a folder 'name/'; got {suffix!r}"
            )
        if not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps: expected a positive rate, got {fps}")
        if self._format is FORMATS[".gif"] and fps > 50:
            raise ValueError(f"fps: a GIF shows at most 50 frames a second, got {fps:g}; write .mp4 or .webm")
        if self._format is FORMATS[".gif"] and stream:
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
        values = {"fps": self.fps, **json.loads(self._comment or "{}"), **self._noted}
        _write_text(sink.folder / FOLDER_METADATA, json.dumps(values, ensure_ascii=False, indent=2))
        if sink.folder != self.path:
            _replace_folder(sink.folder, self.path)
            sink.folder = self.path

    def _write_beside(self) -> None:
        if self._comment is not None or self._noted:
            values = {**json.loads(self._comment or "{}"), **self._noted}
            _write_text(self.path.with_suffix(".json"), json.dumps(values, ensure_ascii=False, indent=2))

    def _make_sink(self, first: UInt8[ndarray, "h w c"]) -> MovieSink | FolderSink:
        if self._format is None:
            return FolderSink(self._partial)
        rate = Fraction(self.fps).limit_denominator(1001)
        size, live = first.shape[:2], self.stream
        return MovieSink(self._partial, self._format, rate, size, self._crf, self._title, self._comment, live)


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
    write_bytes(path, f"{text}\n".encode())
