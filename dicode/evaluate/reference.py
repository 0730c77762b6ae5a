"""The real clips of a cache and their features: computed when a part first needs them, kept in the cache folder."""

import warnings
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dicode.checkpoint import content_hash, read_tensors
from dicode.data.cache import FrameCache
from dicode.data.cache_folder import INDEX
from dicode.data.columns import CachedVideo
from dicode.features.extract import Features, Network
from dicode.files import put
from dicode.stopwatch import tracked
from dicode.tokenizer.config import TokenizerConfig
from dicode.video.timed import Video

CHUNK = 256  # clips a file: an interrupted evaluation loses no more than these


class RealClips:
    """The first clip of each video of a cache, and its features by any network.

    Files of features are named by hashes of the network, of the cache's index and of the clips: none is ever stale.
    Without a `folder` they are kept in memory alone.
    """

    def __init__(self, cache: FrameCache, config: TokenizerConfig, folder: Path | None = None) -> None:
        self.cache, self.config, self.folder = cache, config, folder
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._hashes: dict[Network, str] = {}
        self._cache_hash = "" if folder is None else content_hash(folder / INDEX)

    def clip(self, row: int) -> Video:
        """The first clip of video `row`."""
        return first_clip(self.config, self.cache, self.cache.videos[row])[: self.config.clip_frames]

    def clips(self, rows: Sequence[int]) -> list[Video]:
        """The first clips of some videos."""
        return [self.clip(row) for row in rows]

    def features(self, network: Network, rows: Sequence[int]) -> Features:
        """Features of some videos' first clips, in this order."""
        if not rows:
            raise ValueError("expected at least one clip, got none")
        parts = [self._part(network, part) for part in chunks(rows)]
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return Features(**{name: value.double().numpy() for name, value in whole.items()})

    def missing(self, network: Network, rows: Sequence[int]) -> int:
        """How many of these clips' features have yet to be computed."""
        return sum(len(part) for part in chunks(rows) if self._read(self._name(network, part)) is None)

    def _part(self, network: Network, rows: Sequence[int]) -> dict[str, Tensor]:
        name = self._name(network, rows)
        if (kept := self._read(name)) is not None:
            return kept
        clips = (self.clip(row) for row in tracked(rows, f"{network.name} of real clips", unit="clip"))
        features = network.features(clips)._asdict()
        tensors = {kind: torch.from_numpy(value) for kind, value in features.items() if value is not None}
        if "clips" in tensors:
            tensors["clips"] = tensors["clips"].float()  # half the space; the network's own precision
        self._kept[name] = tensors
        if self.folder is not None:
            try:
                put(self.folder / name, partial(save_file, tensors))
            except OSError as error:  # a cache that may only be read, or a full disk
                warnings.warn(f"{self.folder}: features of real clips are not kept there ({error})", stacklevel=2)
        return tensors

    def _read(self, name: str) -> dict[str, Tensor] | None:
        if name not in self._kept and self.folder is not None and (self.folder / name).is_file():
            tensors = read_tensors(self.folder / name)
            if tensors.keys() <= set(Features._fields):  # before 0.2 EffLite0's had other names
                self._kept[name] = tensors
        return self._kept.get(name)

    def _name(self, network: Network, rows: Sequence[int]) -> str:
        if network not in self._hashes:
            self._hashes[network] = network_hash(network)
        videos = [self.cache.videos[row] for row in rows]
        spans = [(v.first, v.count, v.period_s, v.loops) for v in videos]
        clip = (self.config.clip_frames, self.config.fps)
        of_clips = sha256(repr((self._cache_hash, clip, spans)).encode()).hexdigest()[:16]
        return f"features-{network.name}-{self._hashes[network]}-{of_clips}.safetensors"


def first_clip(config: TokenizerConfig, cache: FrameCache, video: CachedVideo) -> Video:
    """The real clip that starts where the video does, up to its tail key frame: 17 frames of ours, 16 published."""
    count = max(config.clip_frames, config.tail_frame + 1)
    return cache.frames[cache.clip_rows(video, 0.0, count, config.fps)].numpy()


def chunks(rows: Sequence[int]) -> list[Sequence[int]]:
    """Rows in the groups that are kept together."""
    return [rows[first : first + CHUNK] for first in range(0, len(rows), CHUNK)]


def network_hash(network: Network) -> str:
    """Eight hexadecimal digits of all weights of a network: a module, or with one called `_network`."""
    module = network if isinstance(network, torch.nn.Module) else getattr(network, "_network")  # noqa: B009
    digest = sha256(str(getattr(network, "image_size", "")).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]
