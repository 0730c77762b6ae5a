"""The clips that a model's figures are measured on: real ones with their features, reconstructions, generated ones."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from dicode.checkpoint import content_hash, read_tensors
from dicode.data.cache import FrameCache
from dicode.data.cache_folder import INDEX
from dicode.data.columns import CAPTIONED, VALIDATION, CachedVideo, Videos
from dicode.features.extract import EfficientNetLite0Features, Features, Network
from dicode.files import put
from dicode.pipeline import DiCoDe
from dicode.shapes import KeyFrameTokens
from dicode.stopwatch import tracked
from dicode.tokenizer.config import TokenizerConfig
from dicode.video.timed import Video

BATCH = 10  # prompts generated together
MOST_VIDEOS = 10_000  # of a split, among which captions, images and near clips are looked for
CHUNK = 256  # clips whose features are one file: an interrupted evaluation loses no more than these
T = TypeVar("T")


class RealClips:
    """The first clip of each video of a cache, and its features by any network, computed when they are first needed.

    Files of features are named by hashes of the network, of the cache's index and of the clips: none is ever stale.
    Without a `folder` they are kept in memory alone.
    """

    def __init__(self, cache: FrameCache, config: TokenizerConfig, folder: Path | None = None) -> None:
        self.cache, self.config, self.folder = cache, config, folder
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._hashes: dict[Network, str] = {}
        self._cache_hash = "" if folder is None else content_hash(folder / INDEX)

    def clips(self, videos: Iterable[CachedVideo]) -> Iterator[Video]:
        """The first clips of some videos, without a tail key frame that is the next clip's first frame."""
        return (first_clip(self.config, self.cache, video)[: self.config.clip_frames] for video in videos)

    def features(self, network: Network, videos: Sequence[CachedVideo]) -> Features:
        """Features of some videos' first clips, in this order."""
        if not videos:
            raise ValueError("expected at least one clip, got none")
        parts = [self._part(network, videos[first : first + CHUNK]) for first in range(0, len(videos), CHUNK)]
        return Features(**{name: torch.cat([part[name] for part in parts]).double().numpy() for name in parts[0]})

    def missing(self, network: Network, videos: Sequence[CachedVideo]) -> int:
        """How many of these clips' features have yet to be computed."""
        parts = [videos[first : first + CHUNK] for first in range(0, len(videos), CHUNK)]
        return sum(len(part) for part in parts if self._read(self._name(network, part)) is None)

    def _part(self, network: Network, videos: Sequence[CachedVideo]) -> dict[str, Tensor]:
        name = self._name(network, videos)
        if (kept := self._read(name)) is not None:
            return kept
        clips = self.clips(tracked(videos, f"{network.name} of real clips", unit="clip"))
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

    def _name(self, network: Network, videos: Sequence[CachedVideo]) -> str:
        if network not in self._hashes:
            self._hashes[network] = network_hash(network)
        spans = [(v.first, v.count, v.period_s, v.loops) for v in videos]
        clip = (self.config.clip_frames, self.config.fps)
        of_clips = sha256(repr((self._cache_hash, clip, spans)).encode()).hexdigest()[:16]
        return f"features-{network.name}-{self._hashes[network]}-{of_clips}.safetensors"


class Samples:
    """Validation clips with their reconstructions and generated clips, for all parts of an evaluation: each once.

    Sample i of the seeds is that of validation video i. `folder` is the cache's, where features of real clips are kept;
    `most` limits the validation clips, spread over all. `networks` measure beside EffLite0.
    """

    def __init__(
        self,
        model: DiCoDe,
        cache: FrameCache,
        seed: int = 0,
        folder: Path | None = None,
        most: int | None = None,
        networks: Iterable[Network] = (),
    ):
        self.model, self.cache, self.seed, self._others = model, cache, seed, list(networks)
        self.real_clips = RealClips(cache, model.tokenizer.config, folder)
        self.videos = split_videos(cache, True, lasting_s=one_clip_s(model), most=most)
        self.captions = [video.caption for video in self.videos]
        self.captioned = [i for i, caption in enumerate(self.captions) if caption]

    def training(self, most: int | None = None) -> Videos:
        """The training videos that last a clip, or up to so many, spread over all."""
        return split_videos(self.cache, False, lasting_s=one_clip_s(self.model), most=most)

    @cached_property
    def extractor(self) -> EfficientNetLite0Features:
        """The network that always measures."""
        return EfficientNetLite0Features(device=self.model.tokenizer.device)

    @property
    def networks(self) -> list[Network]:
        """All that measure, EffLite0 first."""
        return [self.extractor, *self._others]

    @cached_property
    def real(self) -> list[Video]:
        """The first clip of every validation video, up to its tail key frame."""
        if not self.videos:
            found, clip_s = len(self.cache.videos), one_clip_s(self.model)
            raise ValueError(f"none of the {found} videos is for validation and lasts {clip_s:g} s; make another cache")
        return [first_clip(self.model.tokenizer.config, self.cache, video) for video in self.videos]

    @property
    def clips(self) -> list[Video]:
        """The same without a tail key frame that is the next clip's first frame: 16 frames."""
        return [clip[: self.model.tokenizer.config.clip_frames] for clip in self.real]

    @cached_property
    def reconstructed(self) -> tuple[list[Video], list[KeyFrameTokens]]:
        """These clips through tokens and back, 16 frames each, and the tokens of their key frames, `2 n d`."""
        clips: list[Video] = []
        tokens: list[KeyFrameTokens] = []
        for part, indices in batches(self.real, "reconstructing"):
            own = self.model.tokenizer.encode(torch.from_numpy(np.stack(part)))
            clips += list(next(self.model.tokenizer.decode(own, seed=self.seed, sample_indices=indices)).cpu().numpy())
            tokens += list(own)
        return clips, tokens

    @cached_property
    def generated(self) -> dict[int, Video]:
        """A clip of every caption, by the number of its validation video."""
        prompts = [self.captions[i] for i in self.captioned]
        return dict(zip(self.captioned, generated_clips(self.model, prompts, self.seed + 1), strict=True))


def first_clip(config: TokenizerConfig, cache: FrameCache, video: CachedVideo) -> Video:
    """The real clip that starts where the video does, up to its tail key frame: 17 frames of ours, 16 published."""
    return cache.frames[cache.clip_rows(video, 0.0, config.clip_span, config.fps)].numpy()


def split_videos(
    cache: FrameCache, validation: bool, captioned: bool = False, lasting_s: float = 0.0, most: int | None = None
) -> Videos:
    """The videos of a split, or up to so many, spread over all; with a caption, or that last so long, if asked for.

    The real side of a comparison takes none that are shorter than a clip: they would be still at the end.
    """
    videos = cache.columns.having(VALIDATION, validation)
    videos = videos.having(CAPTIONED) if captioned else videos
    videos = videos.lasting(lasting_s) if lasting_s else videos
    return videos if most is None else videos.spread(most)


def one_clip_s(model: DiCoDe) -> float:
    """Seconds of one whole clip, with its tail key frame where that is its own last frame."""
    return model.tokenizer.config.clip_frames / model.tokenizer.config.fps


def batches(items: Sequence[T], what: str) -> Iterator[tuple[Sequence[T], list[int]]]:
    """Some of the items at a time, and their numbers."""
    for first in tracked(range(0, len(items), BATCH), what, "batch"):
        part = items[first : first + BATCH]
        yield part, list(range(first, first + len(part)))


def generated_clips(
    model: DiCoDe, prompts: Sequence[str], seed: int, seconds: float | None = None, **options: Any
) -> list[Video]:
    """One clip a prompt, or as many as these seconds take; clip i is sample i of the seed, however they are batched."""
    clips: list[Video] = []
    length_s = one_clip_s(model) if seconds is None else seconds
    for part, indices in batches(prompts, "generating"):
        parts = model.generate_batch(part, seconds=length_s, seed=seed, sample_indices=indices, **options)
        clips += list(torch.cat(list(parts), dim=1).numpy())
    return clips


def network_hash(network: Network) -> str:
    """Eight hexadecimal digits of all weights of a network: a module, or with one called `_network`."""
    module: Any = getattr(network, "_network", network)
    digest = sha256(str(getattr(network, "image_size", "")).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]
