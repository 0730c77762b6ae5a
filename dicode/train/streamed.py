"""What a tokenizer's run reads of an index of archives: clips that worker processes decode while it trains."""

import math
from collections.abc import Iterable, Iterator
from itertools import starmap

import numpy as np
import torch
from torch import Tensor

from dicode.data.archive_index import ArchivedVideos
from dicode.data.columns import CachedVideo, Videos
from dicode.data.decoding import ArchivedClip, ClipSpan, archived_clip, decoded_batches
from dicode.device import pick_device
from dicode.train.places import ClipPlaces
from dicode.train.runs import TokenizerRun

# Clips that may stand in for a damaged one: of 1 % damaged videos, one clip in 10^16 and all of these are.
STAND_INS = 7


def check_buckets(run: TokenizerRun) -> None:
    """Raise `ValueError` for frames of other shapes than a model takes."""
    model, denoiser = run.model, run.model.denoiser
    if run.stream.buckets and (denoiser.kind == "hourglass" or model.resampler is None or model.motion):
        kinds = f"{denoiser.kind!r}, {'no resampler' if model.resampler is None else 'a resampler'}"
        raise ValueError(
            "stream.buckets: expected a denoiser 'unet3d' or 'wan', and a resampler without motion tokens; other parts "
            f"learn places of a square of {model.size}; got {kinds}{', motion tokens' if model.motion else ''}"
        )
    area = math.prod(model.frame_shape)
    unit = model.first_stage.downsampling * (2 if denoiser.kind == "wan" else 2 ** (len(denoiser.channels) - 1))
    for bucket in run.stream.buckets:
        height, width = bucket
        if height % unit or width % unit or not 0.75 <= height * width / area <= 1.25:
            raise ValueError(
                f"stream.buckets: expected height and width in multiples of {unit}, of about the area of "
                f"{'×'.join(map(str, model.frame_shape))} (to a quarter), got {height}×{width}"
            )


class StreamedClips:
    """Clips of archived videos; which ones depends on samples and generators alone, not on who decodes them."""

    def __init__(self, run: TokenizerRun, shards: ArchivedVideos, videos: Videos):
        """`videos` are those to train on. Raises `ValueError` for a bucket without any."""
        self.run, self.shards, self.places = run, shards, ClipPlaces(run)
        self.buckets = [*run.stream.buckets] or [run.model.frame_shape]  # height, width
        shapes = np.log(videos.column("width") / videos.column("height"))
        offers = [math.log(width / height) for height, width in self.buckets]
        nearest = np.abs(shapes[:, None] - offers).argmin(1)
        self.videos: Videos = videos[np.argsort(nearest, kind="stable")]  # bucket after bucket
        self.sizes: list[int] = np.bincount(nearest, minlength=len(self.buckets)).tolist()
        if 0 in self.sizes:
            height, width = self.buckets[self.sizes.index(0)]
            raise ValueError(f"stream.buckets: no training video is nearest to {height}×{width} in shape; leave it out")

    def batches(self, jobs: Iterable[tuple[Tensor, torch.Generator]]) -> Iterator[dict[str, Tensor]]:
        """Batches of these samples, in turn."""
        return self.decoded(starmap(self.asked, jobs))

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """One batch, decoded here."""
        return next(decoded_batches([self.asked(indices, generator)]))

    def decoded(self, batches: Iterable[list[list[ArchivedClip]]]) -> Iterator[dict[str, Tensor]]:
        """These batches, decoded by the workers of the run."""
        pinned = pick_device(self.run.loop.device).type == "cuda"
        return decoded_batches(batches, self.run.stream.workers, pinned)

    def asked(self, indices: Tensor, generator: torch.Generator) -> list[list[ArchivedClip]]:
        """The clips to decode, each before those of other samples of its bucket that stand in if it is damaged."""
        last = np.cumsum(self.sizes).tolist()
        bucket = int(np.searchsorted(last, int(indices[0]), side="right"))
        first, size = last[bucket] - self.sizes[bucket], self.buckets[bucket]
        places, mirrored = self.places.drawn(self.videos, indices, generator)
        turns = [(indices.tolist(), places)]
        for _ in range(STAND_INS):
            others = torch.randint(first, last[bucket], indices.shape, generator=generator)
            turns.append((others.tolist(), self.places.drawn(self.videos, others, generator)[0]))
        return [
            [self.clip(self.videos, numbers[i], places[i], size, flip == 1) for numbers, places in turns]
            for i, flip in enumerate(mirrored.tolist())
        ]

    def fixed(self, videos: Videos, at_most: int) -> Iterator[dict[str, Tensor]]:
        """Batches of the first clip of each video, of the model's own rate and size, without context."""
        size = self.run.model.frame_shape

        def first(number: int) -> ArchivedClip:
            return self.clip(videos, number % len(videos), (videos[number % len(videos)], 0.0, None), size)

        def candidates(number: int) -> list[ArchivedClip]:
            return [first(number + turn) for turn in range(1 + STAND_INS)]

        parts = torch.arange(len(videos)).split(at_most)
        for batch in self.decoded([candidates(n) for n in part.tolist()] for part in parts):
            yield {**batch, "has_context": torch.zeros(len(batch["frames"]), dtype=torch.bool)}

    def clip(
        self,
        videos: Videos,
        number: int,
        at: tuple[CachedVideo, float, int | None],
        size: tuple[int, int],
        mirrored: bool = False,
    ) -> ArchivedClip:
        """A clip of one of these videos; `at` is the same video, a start and a stride, as `ClipPlaces` has them."""
        stride = self.run.model.denoiser.frame_stride if at[2] is None else at[2]
        facts = self.places.first_s(*at), self.places.frames, self.places.fps_of(at[2])
        part = ClipSpan(*facts, stride, self.places.has_context(*at))
        return archived_clip(self.shards, videos, number, part, size, mirrored)
