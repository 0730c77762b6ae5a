"""The clips of a model that its figures are measured on."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dicode.data.cache import FrameCache
from dicode.data.columns import CAPTIONED, VALIDATION, CachedVideo, Videos
from dicode.evaluate.reference import RealClips, first_clip
from dicode.features.extract import EfficientNetLite0Features, Network
from dicode.pipeline import DiCoDe
from dicode.shapes import KeyFrameTokens
from dicode.stopwatch import tracked
from dicode.video.timed import Video

BATCH = 10  # prompts generated together
MOST_VIDEOS = 10_000  # of a split, among which captions, images and near clips are looked for


class Samples:
    """Validation clips with their reconstructions and generated clips, for all parts of an evaluation: each once.

    Sample i of the seeds is that of validation video i. `folder` is the cache's, where features of real clips are kept;
    `most` limits the validation clips, spread over all.
    """

    def __init__(
        self,
        model: DiCoDe,
        cache: FrameCache,
        seed: int = 0,
        folder: Path | None = None,
        most: int | None = None,
    ):
        self.model, self.cache, self.seed = model, cache, seed
        self.real_clips = RealClips(cache, model.tokenizer.config, folder)
        self.rows = spread(split_rows(cache, True, lasting_s=one_clip_s(model)), most)
        self.videos = [cache.videos[i] for i in self.rows]
        self.captions = [caption_of(video) for video in self.videos]
        self.captioned = [i for i, caption in enumerate(self.captions) if caption]

    def training(self, most: int) -> list[int]:
        """The rows of up to so many training videos, spread over all."""
        return spread(split_rows(self.cache, False, lasting_s=one_clip_s(self.model)), most)

    def networks(self, others: Mapping[str, Network] | None = None) -> list[Network]:
        """The network that always measures, and others beside it."""
        return [self.extractor, *(others or {}).values()]

    @cached_property
    def extractor(self) -> EfficientNetLite0Features:
        """The network that always measures."""
        return EfficientNetLite0Features(device=self.model.tokenizer.device)

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
        for first in tracked(range(0, len(self.real), BATCH), "reconstructing", "batch"):
            part = self.model.tokenizer.encode(torch.from_numpy(np.stack(self.real[first : first + BATCH])))
            indices = list(range(first, first + len(part)))
            clips += list(next(self.model.tokenizer.decode(part, seed=self.seed, sample_indices=indices)).cpu().numpy())
            tokens += list(part)
        return clips, tokens

    @cached_property
    def generated(self) -> dict[int, Video]:
        """A clip of every caption, by the number of its validation video."""
        prompts = [self.captions[i] for i in self.captioned]
        clips = generated_clips(self.model, prompts, self.seed + 1)
        return dict(zip(self.captioned, clips, strict=True))


def caption_of(video: CachedVideo) -> str:
    """A video's first caption, or nothing."""
    return video.captions[0] if video.captions else ""


def split_rows(cache: FrameCache, validation: bool, captioned: bool = False, lasting_s: float = 0.0) -> list[int]:
    """The numbers of a split's videos; only those with a caption, or that last so long, if asked for.

    The real side of a comparison takes none that are shorter than a clip: they would be still at the end.
    """
    videos = Videos.of(cache.videos)
    flags = videos.column("flags")
    chosen = (flags & VALIDATION != 0) == validation
    if lasting_s:
        chosen &= videos.last(lasting_s)
    return np.flatnonzero(chosen & ((flags & CAPTIONED != 0) | (not captioned))).tolist()


def spread(rows: Sequence[int], most: int | None) -> list[int]:
    """At most so many of these, evenly spread; None: all."""
    if most is None or len(rows) <= most:
        return list(rows)
    return [rows[i] for i in np.linspace(0, len(rows) - 1, most).round().astype(int)]


def one_clip_s(model: DiCoDe) -> float:
    """Seconds of one whole clip, with its tail key frame where that is its own last frame."""
    return model.tokenizer.config.clip_frames / model.tokenizer.config.fps


def generated_clips(
    model: DiCoDe, prompts: Sequence[str], seed: int, seconds: float | None = None, **options: Any
) -> list[Video]:
    """One clip a prompt, or as many as these seconds take; clip i is sample i of the seed, however they are batched."""
    clips: list[Video] = []
    length_s = one_clip_s(model) if seconds is None else seconds
    for first in tracked(range(0, len(prompts), BATCH), "generating", "batch"):
        part = list(prompts[first : first + BATCH])
        indices = list(range(first, first + len(part)))
        parts = model.generate_batch(part, seconds=length_s, seed=seed, sample_indices=indices, **options)
        clips += list(torch.cat(list(parts), dim=1).numpy())
    return clips
