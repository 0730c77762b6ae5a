"""A user's own scorer on real videos, their reconstructions and generated ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from dicode.data.columns import CachedVideo
from dicode.evaluate.samples import Samples, batches, split_videos
from dicode.evaluate.scores import Score
from dicode.features.scorer import Scorer, scorer_metrics, truth_of
from dicode.stopwatch import tracked
from dicode.video.sheet import contact_sheet
from dicode.video.timed import Video

MOST_CLIPS = 4  # of a video: longer ones are scored by their beginning


def evaluate_scorer(samples: Samples, scorer: Scorer, count: int = 100) -> tuple[dict[str, Any], Image.Image]:
    """Accuracy for real videos, which no model can be expected to exceed, their reconstructions, and generated ones.

    Of up to `count` videos of each split that have a caption. `…, shuffled` is chance: the same answers compared with
    the caption lines of all other videos.
    """
    clips = clips_of_videos(samples)
    figures: dict[str, Any] = {"seconds": length_frames(samples, clips) / samples.model.tokenizer.config.fps}
    rows, labels, total = [], [], 0
    for split, validation in (("training", False), ("validation", True)):
        videos = list(split_videos(samples.cache, validation, captioned=True, most=count))
        if not videos:
            continue
        total += len(videos)
        truths = [truth_of(video) for video in videos]
        cases = videos_of(samples, videos, clips)
        for case, frames in cases.items():
            for key, own in scorer_metrics(scorer, tracked(frames, f"scoring {split}: {case}"), truths).items():
                metric = figures.setdefault(f"accuracy of {key}", {})
                metric[f"{split}: {case}"] = Score(own.value, own.interval, own.n)
                metric[f"{split}: {case}, shuffled"] = Score(own.chance, None, own.n)
        for i in range(min(4, len(videos))):
            rows += [frames[i] for frames in cases.values()]
            labels += [f"{split}, {case}: {videos[i].caption}" for case in cases]
    return {**figures, "n": total}, contact_sheet(rows, labels)


def clips_of_videos(samples: Samples) -> int:
    """Clips that hold the median video of a cache, at most `MOST_CLIPS` and what the language model holds."""
    length_s = float(np.median(samples.cache.columns.column("period_s")))
    most = min(MOST_CLIPS, samples.model.lm.config.keyframe_limit - 1)
    return max(1, min(most, round(length_s / samples.model.tokenizer.config.clip_s)))


def length_frames(samples: Samples, clips: int) -> int:
    """Frames of so many clips in a row."""
    config = samples.model.tokenizer.config
    return clips * config.tail_frame + config.repeated_frames


def videos_of(samples: Samples, videos: Sequence[CachedVideo], clips: int) -> dict[str, list[Video]]:
    """The beginnings of videos, of so many clips: real, through tokens and back, generated for their captions."""
    model, cache, config = samples.model, samples.cache, samples.model.tokenizer.config
    length, cases = length_frames(samples, clips), ("real", "reconstruction", "generated")
    by_case: dict[str, list[Video]] = {case: [] for case in cases}
    for part, indices in batches(videos, "videos to score"):
        rows = [cache.clip_rows(video, 0.0, clips * config.tail_frame + 1, config.fps) for video in part]
        real = torch.stack([cache.frames[own] for own in rows])
        decoded = model.tokenizer.decode(model.tokenizer.encode(real), seed=samples.seed, sample_indices=indices)
        options: dict[str, Any] = {"seconds": length / config.fps, "seed": samples.seed + 3, "sample_indices": indices}
        generated = model.generate_batch([video.caption for video in part], **options)
        for case, frames in zip(cases, ([real], decoded, generated), strict=True):
            by_case[case] += list(torch.cat([own.cpu() for own in frames], dim=1)[:, :length].numpy())
    return by_case
