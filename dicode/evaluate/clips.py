"""The clips of a model that its figures are measured on."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dicode.generate import DiCoDe
from dicode.progress import tracked
from dicode.shapes import KeyFrameTokens, Video
from dicode.video.shards import CachedVideo, FrameCache

BATCH = 10  # prompts generated together


class MadeClips:
    """Validation clips and what a model makes of them, for all parts of an evaluation: each once, when asked for.

    `options` are of `DiCoDe.generate`; sample i of the seeds is that of validation video i.
    """

    def __init__(self, model: DiCoDe, cache: FrameCache, seed: int = 0, **options: Any):
        self.model, self.cache, self.seed, self.options = model, cache, seed, options
        self.videos = [video for video in cache.videos if video.validation]
        self.captions = [caption_of(video) for video in self.videos]
        self.captioned = [i for i, caption in enumerate(self.captions) if caption]

    @cached_property
    def real(self) -> list[Video]:
        """The first clip of every validation video, and its tail key frame: 17 frames."""
        return [first_clip(self.model, self.cache, video) for video in self.videos]

    @cached_property
    def reconstructed(self) -> tuple[list[Video], list[KeyFrameTokens]]:
        """These clips through tokens and back, 16 frames each, and the tokens of their key frames, `2 n d`."""
        made: list[Video] = []
        tokens: list[KeyFrameTokens] = []
        for first in tracked(range(0, len(self.real), BATCH), "reconstructing", "batch"):
            part = self.model.tokenizer.encode(torch.from_numpy(np.stack(self.real[first : first + BATCH])))
            indices = list(range(first, first + len(part)))
            made += list(next(self.model.tokenizer.decode(part, seed=self.seed, sample_indices=indices)).cpu().numpy())
            tokens += list(part)
        return made, tokens

    @cached_property
    def generated(self) -> dict[int, Video]:
        """A clip of every caption, by the number of its validation video."""
        prompts = [self.captions[i] for i in self.captioned]
        clips = generated_clips(self.model, prompts, self.seed + 1, **self.options)
        return dict(zip(self.captioned, clips, strict=True))


def caption_of(video: CachedVideo) -> str:
    """A video's first caption, or nothing."""
    return video.captions[0] if video.captions else ""


def first_clip(model: DiCoDe, cache: FrameCache, video: CachedVideo) -> Video:
    """The real clip that starts where the video does, and its tail key frame: 17 frames at the model's rate."""
    config = model.tokenizer.config
    return cache.frames[cache.clip_rows(video, 0.0, config.clip_frames + 1, config.fps)].numpy()


def generated_clips(model: DiCoDe, prompts: Sequence[str], seed: int, **options: Any) -> list[Video]:
    """One 2-s clip a prompt; clip i is sample i of the seed, however they are batched."""
    clips: list[Video] = []
    for first in tracked(range(0, len(prompts), BATCH), "generating", "batch"):
        part = list(prompts[first : first + BATCH])
        indices = list(range(first, first + len(part)))
        seconds = model.tokenizer.config.clip_s
        made = list(model.generate_batch(part, seconds=seconds, seed=seed, sample_indices=indices, **options))
        clips += list(torch.cat(made, dim=1).numpy())
    return clips
