"""Several caches as one, without copying them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dicode.data.cache import CachedVideo, Shard, read_cache_index, write_index
from dicode.data.cache_folder import check_own


def join_caches(folders: Sequence[str | Path], output: Path) -> None:
    """Write an index of all their shards; these, and what is computed of them, stay where they are.

    Raises `ValueError` where `output` holds other files than a cache's.
    """
    check_own(output)
    shards: list[Shard] = []
    videos: list[CachedVideo] = []
    for folder in (Path(folder).resolve() for folder in folders):
        own_shards, own_videos = read_cache_index(folder)
        frames = sum(shard.frames for shard in shards)
        shards += [replace(shard, file=str(folder / shard.file)) for shard in own_shards]
        videos += [replace(video, first=frames + video.first) for video in own_videos]
    write_index(output, shards, videos)
