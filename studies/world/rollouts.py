"""Measure ten seconds from real first images: how far frames are from real ones, and from the first.

    python studies/world/rollouts.py cache/world /tmp/rollouts.json world

results/world-rollouts.json holds this of four releases of `world`.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dicode.data.cache import CachedVideo, FrameCache
from dicode.features.extract import EfficientNetLite0Features
from dicode.features.metrics import frechet_distance
from dicode.pipeline import DiCoDe
from dicode.provenance import write_result
from dicode.video.timed import Video

VIDEOS, FRAMES, LEAST_S = 24, 16, 3.0  # of either split; frames of each that stand for it; how long it must be
FPS, EVERY_S, TOTAL_S = 8, 2, 10


def main(cache: str, output: str, *models: str) -> None:
    """Figures of both splits, for every model."""
    whole, network = FrameCache.load(cache), EfficientNetLite0Features()
    values: dict[str, Any] = {}
    for name in models:
        model, values[name] = DiCoDe.from_pretrained(name), {}
        for split in ("training", "validation"):
            videos = [v for v in whole.subset(split == "validation").videos if v.captions and v.period_s >= LEAST_S]
            videos = videos[:: max(1, len(videos) // VIDEOS)][:VIDEOS]
            real = [whole.frames[torch.arange(v.first, v.first + v.count)].numpy() for v in videos]
            values[name][split] = measure(network, real, rolled_out(model, videos, real))
    command = shlex.join(["python", "studies/world/rollouts.py", cache, output, *models])
    write_result(Path(output), "ten seconds from real first images", values, VIDEOS, 0, command)


def rolled_out(model: DiCoDe, videos: list[CachedVideo], real: list[Video]) -> list[Video]:
    """Each video's first frame, gone on from under its caption."""
    generated = []
    for i, (video, frames) in enumerate(zip(videos, real, strict=True)):
        given = model.given(image=frames[:1])
        clips = model.generate(video.captions[0], seconds=float(TOTAL_S), sample_index=i, given=given)
        generated.append(np.concatenate(list(clips)))
    return generated


def measure(network: EfficientNetLite0Features, real: list[Video], made: list[Video]) -> dict[str, Any]:
    """Of every two seconds: Fréchet distance of single frames' features, RMS of pixels from the first frame, step."""
    picked = [frames[np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)] for frames in real]
    truth = frame_features(network, picked)
    found = {}
    for end_s in range(EVERY_S, TOTAL_S + 1, EVERY_S):
        parts = [video[FPS * (end_s - EVERY_S) : FPS * end_s] for video in made]
        last = [part[-FPS:].astype(float) - frames[0] for part, frames in zip(parts, real, strict=True)]
        steps = [np.abs(np.diff(part.astype(float), axis=0)).mean() for part in parts]
        found[f"{end_s} s"] = {
            "distance": frechet_distance(frame_features(network, parts), truth),
            "from first": float(np.mean([np.sqrt(np.square(x).mean()) for x in last])),
            "step": float(np.mean(steps)),
        }
    return found


def frame_features(network: EfficientNetLite0Features, clips: list[Video]) -> np.ndarray:
    """Of the frames of clips, one by one."""
    return network.frame_features(np.concatenate(clips)).numpy()


if __name__ == "__main__":
    main(*sys.argv[1:])
