"""WebDataset archives: plain tars in which KEY.mp4 and KEY.txt or KEY.json are one sample."""

import io
import json
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dicode.files import Place, put
from dicode.shapes import Video
from dicode.video.io import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from dicode.video.shards import CachedVideo, FrameCache, Rows
from dicode.video.writer import VideoWriter

TAR_SUFFIX = ".tar"
NOTES = (".json", ".txt")
UNEVEN = 0.25  # of the mean time between frames: a GIF at 8 fps has frames of 0.12 and 0.13 s


class Member(NamedTuple):
    """A file within an archive, which can be read without looking at those before it."""

    archive: Place
    span: tuple[int, int]  # offset and length in bytes


def samples(archive: Place) -> Iterator[tuple[str, Member, Mapping[str, bytes]]]:
    """Name and place of every video of an archive, with its .json and .txt, in the order of the archive.

    A sample is what has one name up to its first dot; of several videos in it the first that is no image counts.
    Raises `tarfile.ReadError` where the archive is damaged or compressed, after what comes before that.
    """
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    damage: tarfile.ReadError | None = None
    with archive.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        try:
            for entry in tar:
                folder, _, name = entry.name.rpartition("/")
                key, _, ending = name.partition(".")
                if entry.isfile():
                    found.setdefault(f"{folder}/{key}", {})[ending.lower()] = entry
        except tarfile.ReadError as error:
            damage = error
        for entries in found.values():
            videos = [ending for ending in entries if _suffix(ending) in VIDEO_SUFFIXES]
            if videos:
                chosen = entries[min(videos, key=lambda ending: _suffix(ending) in IMAGE_SUFFIXES)]
                notes = {_suffix(ending): entry for ending, entry in entries.items() if _suffix(ending) in NOTES}
                texts = {suffix: tar.extractfile(entry).read() for suffix, entry in notes.items()}  # type: ignore[union-attr]
                yield chosen.name, Member(archive, (chosen.offset_data, chosen.size)), texts
    if damage is not None:
        raise damage


def _suffix(ending: str) -> str:
    return "." + ending.rpartition(".")[2]


def write_tars(cache: FrameCache, output: Place) -> list[Place]:
    """Every shard of a cache as a tar of H.264 videos, their first caption as .txt and all else as .json.

    Equal caches give equal bytes.
    """
    assert isinstance(cache.frames, Rows)
    made = []
    for file, (start, stop) in zip(cache.files, pairwise(cache.frames.starts), strict=True):
        own = [v for v in cache.videos if start <= v.first < stop]
        target = output / f"{file.stem}.tar"
        put(target, partial(_write_tar, cache=cache, videos=own, stem=file.stem))
        made.append(target)
    return made


def _write_tar(path: Path, cache: FrameCache, videos: list[CachedVideo], stem: str) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar, tempfile.TemporaryDirectory() as folder:
        for number, video in enumerate(videos):
            frames, fps = _even(cache, video)
            movie = Path(folder) / "clip.mp4"
            with VideoWriter(movie, fps) as writer:
                writer.write(frames)
            facts = {"caption": (*video.captions, "")[0], "expanded": (*video.captions, "", "")[1]}
            facts |= {name: getattr(video, name) for name in ("source", "file", "start_s", "loops", "validation")}
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
