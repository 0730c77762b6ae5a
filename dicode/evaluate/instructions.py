"""Given the first image, does the caption decide what happens? The same image with its own and with other captions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from dicode.data.cache import CachedVideo, FrameCache
from dicode.evaluate.generation import motion_ratio
from dicode.evaluate.metrics import scores_of_sets
from dicode.evaluate.reconstruction import hold_head
from dicode.evaluate.samples import MOST_VIDEOS, Samples, batches, first_clip, one_clip_s, split_videos
from dicode.evaluate.scores import mean_score
from dicode.features.extract import EfficientNetLite0Features
from dicode.features.metrics import Clips
from dicode.pipeline import DiCoDe, Given
from dicode.seeds import generator_for
from dicode.video.sheet import contact_sheet
from dicode.video.timed import Video

IMAGES = 60  # of each split
ON_SHEET = 6  # images of each split


class Continuation(NamedTuple):
    """Two seconds that begin with one image: real, and generated for its own and for another caption."""

    real: Video
    own: Video
    other: Video
    sample: Video  # its own caption again, other noise
    captions: tuple[str, str]


def evaluate_instructions(samples: Samples, count: int = IMAGES) -> tuple[dict[str, Any], Image.Image]:
    """Clips that go on from the first frames of up to `count` videos of each split, for their own and other captions.

    `nearer` is the share of images whose own caption's clip comes nearer to the real one than another caption's of the
    same noise does: chance is a half. `effect` is how much another caption changes of a clip, over what another sample
    of the same caption does: 0 where captions have no effect.
    """
    cache, seed = samples.cache, samples.seed
    figures: dict[str, Any] = {}
    total, rows = 0, []
    for split, validation in (("training", False), ("validation", True)):
        found = split_videos(cache, validation, captioned=True, most=MOST_VIDEOS)
        videos, picked = list(found), found.spread(count)
        clips: list[Continuation] = []
        for part, indices in batches(picked, f"{split} images"):
            others = [another_caption(videos, video, seed, i) for video, i in zip(part, indices, strict=True)]
            clips += continuations(samples.model, cache, part, others, seed, indices)
        total += len(clips)
        for metric, values in figures_of(clips, samples.extractor, seed).items():
            figures.setdefault(metric, {}).update({f"{split}: {case}": value for case, value in values.items()})
        for one in clips[:: max(1, len(clips) // ON_SHEET)][:ON_SHEET]:
            rows += [(one.real, f"real: {one.captions[0]}"), (one.own, f"own caption: {one.captions[0]}")]
            rows += [(one.other, f"other caption: {one.captions[1]}")]
    return {**figures, "n": total}, contact_sheet([clip for clip, _ in rows], [label for _, label in rows])


def another_caption(videos: Sequence[CachedVideo], video: CachedVideo, seed: int, index: int) -> str:
    """A caption that differs from this video's, drawn among those of its own data set.

    One of another data set describes other rooms, into which the picture changes: its own caption's clip is then nearer
    whether or not the instruction has an effect. Raises `ValueError` where there is no other.
    """
    others = sorted({v.captions[0] for v in videos if v.source == video.source} - {video.captions[0]})
    if not others:
        raise ValueError(f"{video.source}: expected captions other than {video.captions[0]!r}, got none")
    return others[int(torch.randint(len(others), (), generator=generator_for(seed, "other caption", index)))]


def continuations(
    model: DiCoDe,
    cache: FrameCache,
    videos: Sequence[CachedVideo],
    others: Sequence[str],
    seed: int,
    indices: Sequence[int],
) -> list[Continuation]:
    """The first images of videos with both captions and the same noise, and once more with their own and other noise.

    `indices` are the numbers of the samples.
    """
    config, own = model.tokenizer.config, [video.captions[0] for video in videos]
    real = [first_clip(config, cache, video)[: config.clip_frames] for video in videos]
    images = rearrange(model.tokenizer.encode_frames(np.stack([clip[0] for clip in real])), "1 b n d -> b 1 n d")
    parts = model.generate_batch(
        [*own, *others, *own],
        seconds=one_clip_s(model),
        seed=seed,
        sample_indices=[*indices, *indices, *(i + len(cache.videos) for i in indices)],
        given=Given(images.repeat(3, 1, 1, 1)),
    )
    clips = torch.cat(list(parts), dim=1).numpy().reshape(3, len(videos), *real[0].shape)
    return [Continuation(*made) for made in zip(real, *clips, zip(own, others, strict=True), strict=True)]


def figures_of(clips: Sequence[Continuation], extractor: EfficientNetLite0Features, seed: int = 0) -> dict[str, Any]:
    """The figures of one split, a metric with one value or several."""
    real, own, other, again = ([getattr(one, name) for one in clips] for name in Continuation._fields[:4])
    sets = {"own caption": own, "other caption": other, "first frame held": [hold_head(clip) for clip in real]}
    truth = extractor.features(real)
    features = {name: extractor.features(those) for name, those in sets.items()}
    off = {name: np.linalg.norm(those.vectors - truth.vectors, axis=1) for name, those in features.items()}
    by_features = (off["own caption"] < off["other caption"]).astype(float)
    by_pixels = (pixel_distances(own, real) < pixel_distances(other, real)).astype(float)
    changed, resampled = pixel_distances(own, other), pixel_distances(own, again)
    ratios = changed[resampled > 0] / resampled[resampled > 0]
    return {
        "nearer_by_pixels": {"own caption": mean_score(by_pixels, seed)},
        f"nearer_by_features-{extractor.name}": {"own caption": mean_score(by_features, seed)},
        "effect": {"other caption": mean_score(ratios, seed)},
        "motion": {"own caption": motion_ratio(own, real, seed)},
        **scores_of_sets(extractor, truth, features, seed=seed),
    }


def pixel_distances(clips: Clips, others: Clips) -> np.ndarray:
    """Root mean square difference of clips to others, pair by pair, in steps of 0…255."""
    pairs = zip(clips, others, strict=True)
    return np.array([np.sqrt(np.square(a.astype(np.float64) - b).mean()) for a, b in pairs])
