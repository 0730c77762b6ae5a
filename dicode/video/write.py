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

from dicode import __version__
from dicode.files import check_file, check_parent, flush, put_text, read_json
from dicode.video.encode import FORMATS, LOSSLESS_FORMATS, FolderSink, Format, MovieSink
from dicode.video.timed import Video, checked_fps

FOLDER_METADATA = "metadata.json"
OWN_KEY = "dicode"  # the version, in every .json of ours
MOST_SCALE = 64
_MOST_JSON = 2**24  # bytes


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
        self._partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
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
            if self._sink is None:
                self._sink = self._new_sink(enlarged.shape[:2])
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
            _check_own(self.path.with_suffix(".json"))
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
                os.replace(self._partial, self.path)
            self._place()
        except BaseException:
            self._discard()
            raise
        self._open = False

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            if self._visible:
                self.close()
            else:
                self._discard()
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
        values = {**json.loads(self._tags.get("comment", "{}")), **self._notes}
        if isinstance(self._sink, FolderSink):
            self._write_json(self._sink.folder / FOLDER_METADATA, {"fps": self.fps, **values})
            if self._sink.folder != self.path:
                _replace_folder(self._sink.folder, self.path)
                self._sink.folder = self.path
        elif self._tags or self._notes:
            self._write_json(self.path.with_suffix(".json"), values)

    def _write_json(self, path: Path, values: dict[str, object]) -> None:
        values.setdefault(OWN_KEY, __version__)
        put_text(path, f"{json.dumps(values, ensure_ascii=False, indent=2)}\n")

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
        kind = " without loss" if lossless and suffix in FORMATS else ""
        raise ValueError(
            f"{path}: expected a name ending in {', '.join(formats)}{kind}, or a folder 'name/'; got {suffix!r}"
        )
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
        check_file(path)
        if metadata:
            _check_own(path.with_suffix(".json"))
    return form


def _is_own(note: Path) -> bool:
    try:
        values = read_json(note, _MOST_JSON)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and OWN_KEY in values


def _check_own(note: Path) -> None:
    """Raise for a file in the place of our metadata that is not ours."""
    if note.exists() and not _is_own(note):
        raise FileExistsError(f"{note}: would be replaced and was not written by dicode; move it, or write elsewhere")


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
