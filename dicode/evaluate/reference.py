"""The real clips of a cache and their features: computed when a part first needs them, kept in the cache folder."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from dicode.checkpoint import content_hash, read_tensors
from dicode.data.cache import FrameCache
from dicode.data.cache_folder import INDEX
from dicode.data.columns import CachedVideo
from dicode.evaluate.scores import Seen, seen, seen_by_efflite
from dicode.features.extract import ClipFeatures, EfficientNetLite0Features, Network, features_of_clips
from dicode.files import put
from dicode.stopwatch import tracked
from dicode.tokenizer.config import TokenizerConfig
from dicode.video.timed import Video

CHUNK = 256  # clips a file: an interrupted evaluation loses no more than these
Measured = dict[str, Tensor]


class RealClips:
    """The first clip of each video of a cache, and what networks make of it.

    Files of features are named by hashes of the network, of the cache's index and of the clips: none is ever stale.
    Without a `folder` they are kept in memory alone.
    """

    def __init__(self, cache: FrameCache, config: TokenizerConfig, folder: Path | None = None) -> None:
        self.cache, self.config, self.folder = cache, config, folder
        self._held: dict[str, Measured] = {}
        self._hashes: dict[Network, str] = {}
        self._cache_hash = "" if folder is None else content_hash(folder / INDEX)

    def clip(self, row: int) -> Video:
        """The first clip of video `row`."""
        return first_clip(self.config, self.cache, self.cache.videos[row])[: self.config.clip_frames]

    def clips(self, rows: Sequence[int]) -> list[Video]:
        """The first clips of some videos."""
        return [self.clip(row) for row in rows]

    def features(self, network: EfficientNetLite0Features, rows: Sequence[int]) -> ClipFeatures:
        """EffLite0's features of some videos' first clips, in this order."""

        def measured(clips: Sequence[Video]) -> Measured:
            own = features_of_clips(network, clips)._asdict()
            return {name: torch.from_numpy(value).float() for name, value in own.items()}

        kept = self._measured(network, rows, measured)
        return ClipFeatures(**{name: value.double().numpy() for name, value in kept.items()})

    def seen(self, network: Network, rows: Sequence[int]) -> Seen:
        """What a network makes of some videos' first clips, in this order."""
        if isinstance(network, EfficientNetLite0Features):
            return seen_by_efflite(network, self.features(network, rows))

        def measured(clips: Sequence[Video]) -> Measured:
            own = seen(network, clips)._asdict()
            return {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in own.items() if v is not None}

        kept = self._measured(network, rows, measured)
        return Seen(*(kept[name].numpy() if name in kept else None for name in Seen._fields))

    def missing(self, network: Network, rows: Sequence[int]) -> int:
        """How many of these clips' features have yet to be computed."""
        parts = chunks(rows)
        return sum(len(part) for part in parts if not self._known(self._name(network, part)))

    def _measured(self, network: Network, rows: Sequence[int], make: Callable[[Sequence[Video]], Measured]) -> Measured:
        parts = [self._part(network, part, make) for part in chunks(rows)]
        if not parts:
            raise ValueError("expected at least one clip, got none")
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _part(self, network: Network, rows: Sequence[int], make: Callable[[Sequence[Video]], Measured]) -> Measured:
        name = self._name(network, rows)
        if name in self._held:
            return self._held[name]
        path = None if self.folder is None else self.folder / name
        if path is not None and path.is_file():
            self._held[name] = read_tensors(path)
            return self._held[name]
        clips = tracked(rows, f"{network.name} of real clips", unit="clip")
        parts = [make([self.clip(row)]) for row in clips]
        made = self._held[name] = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        if path is not None:
            try:
                put(path, partial(save_file, made))
            except OSError as error:  # a cache that may only be read, or a full disk
                warnings.warn(f"{self.folder}: features of real clips are not kept there ({error})", stacklevel=2)
        return made

    def _known(self, name: str) -> bool:
        return name in self._held or (self.folder is not None and (self.folder / name).is_file())

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
    """Rows in the pieces that are kept together."""
    return [rows[first : first + CHUNK] for first in range(0, len(rows), CHUNK)]


def network_hash(network: Network) -> str:
    """Eight hexadecimal digits of all weights of a network."""
    module = network if isinstance(network, torch.nn.Module) else network._network
    digest = sha256(str(getattr(network, "image_size", "")).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]
