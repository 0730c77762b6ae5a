"""A cache as WebDataset archives: the writing half of `tars.py`, which needs no torch."""

import io
import json
import re
import tarfile
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dicode.files import Place, put
from dicode.video.shards import CachedVideo, FrameCache, Rows
from dicode.video.timed import Video
from dicode.video.writer import VideoWriter

UNEVEN = 0.25  # of the mean time between frames: a GIF at 8 fps has frames of 0.12 and 0.13 s


def write_tars(cache: FrameCache, output: Place) -> list[Place]:
    """Every shard of a cache as a tar of H.264 videos, their first caption as .txt and all else as .json.

    Equal caches give equal bytes. Raises `ValueError` where that would replace another file.
    """
    assert isinstance(cache.frames, Rows)
    made: list[Place] = []
    targets = [output / f"{file.stem}.tar" for file in cache.files]
    if foreign := [target for target in targets if target.exists() and not _is_ours(target)]:
        raise ValueError(f"{foreign[0]}: there is another file of this name; name another -o")
    for file, (start, stop) in zip(cache.files, pairwise(cache.frames.starts), strict=True):
        own = [v for v in cache.videos if start <= v.first < stop]
        target = output / f"{file.stem}.tar"
        put(target, partial(_write_tar, cache=cache, videos=own, stem=file.stem))
        made.append(target)
    return made


def _is_ours(path: Place) -> bool:
    """Whether `write_tars` has written a file: its first member is named as it names them."""
    with path.open("rb") as file:
        return re.fullmatch(rb"\d{5,}-\d{5,}\.mp4\0+", file.read(100)) is not None


def _write_tar(path: Path, cache: FrameCache, videos: list[CachedVideo], stem: str) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar, tempfile.TemporaryDirectory() as folder:
        for number, video in enumerate(videos):
            frames, fps = _even(cache, video)
            movie = Path(folder) / "clip.mp4"
            with VideoWriter(movie, fps) as writer:
                writer.write(frames)
            facts: dict[str, Any] = {
                **video.extra,
                "caption": (*video.captions, "")[0],
                "expanded": (*video.captions, "", "")[1],
            }
            facts |= {name: getattr(video, name) for name in ("source", "file", "loops", "validation")}
            facts |= {"captions": video.captions[2:], "scene_start_s": video.start_s}  # start_s would cut it once more
            contents = {
                "mp4": movie.read_bytes(),
                "txt": facts["caption"].encode(),
                "json": json.dumps(facts, ensure_ascii=False).encode(),
            }
            for ending, content in contents.items():
                entry = tarfile.TarInfo(f"{stem.removeprefix('shard-')}-{number:05}.{ending}")  # from 1970, nobody's
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
