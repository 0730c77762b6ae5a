"""A cache as WebDataset archives, for `dicode data export`."""

import io
import json
import re
import tarfile
import tempfile
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dicode.data.cache import CachedVideo, FrameCache, Rows
from dicode.data.columns import Videos
from dicode.files import Place, check_folder, put, whole_folder
from dicode.video.timed import Video
from dicode.video.write import VideoWriter

UNEVEN = 0.25  # of the mean time between frames: a GIF at 8 fps has frames of 0.12 and 0.13 s


def write_tars(cache: FrameCache, output: Place) -> list[Place]:
    """Every shard of a cache as a tar of H.264 videos, their first caption as .txt and all else as .json.

    Equal caches give equal bytes. A folder here is written whole or not at all, in place of an earlier export. Raises
    `ValueError` where it holds other files.
    """
    check_export(output)
    assert isinstance(cache.frames, Rows)
    with whole_folder(output) if isinstance(output, Path) else nullcontext(output) as folder:
        for file, (start, stop) in zip(cache.files, pairwise(cache.frames.starts), strict=True):
            videos, prefix = cache.of_rows(range(start, stop)), file.stem.removeprefix("shard-")
            put(folder / f"{file.stem}.tar", partial(_write_tar, cache=cache, videos=videos, prefix=prefix))
    return [output / f"{file.stem}.tar" for file in cache.files]


def check_export(output: Place) -> None:
    """Raise `ValueError` for a folder that holds anything but archives of `write_tars`."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: expected a folder to write, or none yet, got a file")
    if isinstance(output, Path):
        check_folder(output)
    for path in output.iterdir() if output.exists() else ():
        if path.is_dir() or not (path.suffix == ".tar" and _is_own(path)):
            raise ValueError(f"{path}: is no archive of this command's; name an empty or a new folder with -o")


def _is_own(path: Place) -> bool:
    """Whether `write_tars` has written a file: its first member is named as it names them."""
    with path.open("rb") as file:
        return re.fullmatch(rb"\d{5,}-\d{5,}\.mp4\0+", file.read(100)) is not None


def _write_tar(path: Path, cache: FrameCache, videos: Videos, prefix: str) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar, tempfile.TemporaryDirectory() as folder:
        for number, video in enumerate(videos):
            frames, fps = _even(cache, video)
            movie = Path(folder) / "clip.mp4"
            with VideoWriter(movie, fps) as writer:
                writer.write(frames)
            caption, expanded = (*video.captions, "", "")[:2]
            facts: dict[str, Any] = {**video.extra, "caption": caption, "expanded": expanded}
            facts |= {name: getattr(video, name) for name in ("source", "file", "loops", "validation")}
            facts |= {"captions": video.captions[2:], "scene_start_s": video.start_s}  # start_s would cut it once more
            text = json.dumps(facts, ensure_ascii=False)
            contents = {"mp4": movie.read_bytes(), "txt": caption.encode(), "json": text.encode()}
            for ending, content in contents.items():
                entry = tarfile.TarInfo(f"{prefix}-{number:05}.{ending}")  # from 1970, nobody's
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def _even(cache: FrameCache, video: CachedVideo) -> tuple[Video, float]:
    """Frames at a constant rate: the mean one where they come evenly, else that of the two that are closest."""
    own = slice(video.first, video.first + video.count)
    gaps_s = np.diff(cache.times_s[own].numpy())
    if video.count == 1 or np.ptp(gaps_s) <= UNEVEN * gaps_s.mean():
        return cache.frames[own].numpy(), video.count / video.period_s
    fps = float(1 / gaps_s.min())
    return cache.frames[cache.clip_rows(video, 0.0, round(video.period_s * fps), fps)].numpy(), fps
