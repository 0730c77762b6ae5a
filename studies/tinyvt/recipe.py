"""TinyVT, the network of clips and captions that `dicode evaluate` measures with, without a download.

    dicode data cache ../shared/data/spells ../shared/data/emoji -o cache/sprites --size 64 --loops
    dicode data cache ../shared/data/{droid,rt1,bridge} -o cache/world --size 64 --validation-by lab=f147f077
    dicode train recipes/video_text.py:run --caches cache/sprites cache/world
    python recipes/video_text.py cache/sprites cache/world    # its accuracy: results/video-text.json

The box holds `runs/run/best` of it. Hours, and what failed: docs/log.md. What it tells: docs/evaluation.md.
"""

import shlex
import sys
from pathlib import Path

from dicode.data.cache import FrameCache
from dicode.features.tinyvt import BOX, TinyVT, accuracy
from dicode.provenance import write_result
from dicode.train.runs import LoopConfig, OptimConfig
from dicode.train.video_text import VideoTextRun, first_clips


def run() -> VideoTextRun:
    """All five folders of clips, 64 a step: 0.2 hours of one CPU core."""
    return VideoTextRun(
        loop=LoopConfig(
            evaluate_every=60,
            checkpoint_every=50,
            optim=OptimConfig(
                steps=520,
                batch_size=64,
                lr=2e-3,
                warmup_steps=40,
                decay_fraction=0.5,
                weight_decay=0.05,
                ema_decay=0.98,
            ),
        ),
    )


def main(caches: list[str]) -> None:
    """Measure the network in the box on the validation clips of these caches, a row a folder of clips."""
    network = TinyVT.from_pretrained(BOX)
    videos = [(cache, video) for cache in map(FrameCache.load, caches) for video in cache.videos]
    trained = {video.captions[0].lower() for _, video in videos if not video.validation and video.captions}
    rows = {}
    for source in sorted({video.source for _, video in videos}):
        clips, captions = first_clips([both for both in videos if both[1].validation and both[1].source == source])
        seen = sum(caption.lower() in trained for caption in set(captions) - {""})
        rows[source] = {**accuracy(network, clips, captions), "captions also in training": seen}
    values = {"folders": rows, "parameters": sum(p.numel() for p in network.parameters())}
    line = shlex.join(["python", *sys.argv])
    write_result(Path("results/video-text.json"), "TinyVT", values, sum(row["clips"] for row in rows.values()), 0, line)


if __name__ == "__main__":
    main(sys.argv[1:])
