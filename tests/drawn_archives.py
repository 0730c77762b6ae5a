"""WebDataset archives of drawn videos, their index, and videos that are damaged where only decoding shows it."""

import io
import json
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from synthetic import draw_clip

from dicode.data.archive_index import ArchivedVideos, build_archive_index
from dicode.data.index import read_index
from dicode.video.write import VideoWriter

FPS = 24.0
SIZES = ((48, 48), (40, 64), (64, 40))  # height, width


def drawn_video(number: int, seconds: float, size: tuple[int, int] = (48, 48), suffix: str = ".mp4") -> bytes:
    """A file of one drawn clip, part of a square picture."""
    frames, _ = draw_clip(number, round(seconds * FPS), max(size))
    top, left = (max(size) - size[0]) // 2, (max(size) - size[1]) // 2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip{suffix}"
        with VideoWriter(path, FPS) as writer:
            writer.write(frames[:, top : top + size[0], left : left + size[1]])
        return path.read_bytes()


def damaged(video: bytes) -> bytes:
    """An mp4 whose header and first frames are whole, and whose later ones are zeros."""
    at = video.find(b"mdat") + 4
    start = at + (len(video) - at) // 2
    return video[:start] + bytes(len(video) - start)


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def write_archives(
    folder: Path,
    count: int = 12,
    sizes: Sequence[tuple[int, int]] = SIZES[:1],
    spoilt: Sequence[int] = (),
    validation: int = 6,
    **lines: Any,
) -> ArchivedVideos:
    """Two archives in folder/tars and their index in folder/index; every so many videos one is for validation."""
    archives: list[dict[str, bytes]] = [{}, {}]
    for number in range(count):
        video = drawn_video(number, 2.5 + number % 4, sizes[number % len(sizes)])
        note = {"caption": f"{draw_clip(number)[1]}, number {number}", "validation": number % validation == 0, **lines}
        own = archives[number * 2 // count]
        own[f"{number:03}.mp4"] = damaged(video) if number in spoilt else video
        own[f"{number:03}.json"] = json.dumps(note).encode()
    for number, members in enumerate(archives):
        write_tar(folder / f"tars/{number}.tar", members)
    return build_archive_index(read_index(folder / "tars"), folder / "index")[0]
