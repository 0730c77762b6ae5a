"""Train TinyVT, the bundled network of clips and captions, on which belong together and which order frames have.

dicode data cache ../shared/data/spells ../shared/data/emoji -o cache/sprites --size 64 --loops
dicode data cache ../shared/data/{droid,rt1,bridge} -o cache/world --size 64 --validation-by lab=f147f077
python studies/tinyvt train cache/sprites cache/world      # writes runs/tinyvt/best, 0.2 hours of a CPU core
python studies/tinyvt measure cache/sprites cache/world    # the bundled network: results/video-text.json
"""

import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor
from torch.nn import functional

from dicode.data.cache import CachedVideo, FrameCache
from dicode.features.tinyvt import BUNDLED, FPS, FRAMES, ORDERS, SIZE, TinyVT, TinyVTConfig
from dicode.lm.text import TextTokenizer
from dicode.provenance import write_result
from dicode.seeds import generator_for
from dicode.train.loop import train
from dicode.train.runs import LoopConfig, OptimConfig
from dicode.video.timed import Video

SIDES = re.compile(r"\b(left|right|leftwards?|rightwards?|clockwise|anticlockwise|counterclockwise)\b", re.IGNORECASE)
MARGIN = 4  # pixels by which a clip is shifted, edges repeated
WORDS = 16  # of a caption at most
MOST_SCALE = math.log(50)
HELD_OUT_EVERY = 16  # captions by their hash: clips held out of the training split to choose weights by
REORDERED_SHARE = 0.25  # of the clips come once more reversed, and as many of others shuffled
LONG_CAPTIONS = 0.4  # probability of a part of the expanded caption, where there is one
DROPPED_WORDS = 0.15  # probability of dropping a word
RECALLS = (1, 5, 10)

LOOP = LoopConfig(
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
)


@dataclass(frozen=True)
class VideoTextRun:
    """Train TinyVT on the training clips of caches, all kinds at once."""

    caches: tuple[str, ...] = ("cache/sprites", "cache/world")
    model: TinyVTConfig = field(default_factory=TinyVTConfig)
    loop: LoopConfig = LOOP

    @property
    def cache(self) -> str:
        """The first of the caches."""
        return self.caches[0]


class VideoTextTraining:
    """The `Stage` of a `VideoTextRun`: symmetric InfoNCE (arXiv 2103.00020), equal captions being right for each other.

    Shuffled clips are wrong for every caption, their own included, so that the comparison depends on order as well.
    """

    best = "percentile"

    def __init__(self, run: VideoTextRun) -> None:
        self.run = run
        caches = [FrameCache.load(folder) for folder in run.caches]
        if wrong := [tuple(cache.frames.shape[1:]) for cache in caches if cache.frames.shape[1:] != (SIZE, SIZE, 3)]:
            raise ValueError(f"caches: expected frames {SIZE}×{SIZE}×3, got {wrong[0]}")
        training = [(cache, video) for cache in caches for video in cache.videos if not video.validation]
        held = {i for i, (_, video) in enumerate(training) if self._held_out(video)}
        self.held_out = [training[i] for i in sorted(held)]
        self.clips = [clip for i, clip in enumerate(training) if i not in held]
        if not self.clips:
            raise ValueError("caches: expected training clips, got none")
        captions = sorted({caption.lower() for _, video in self.clips for caption in video.captions[:1]})
        self.number = {caption: i for i, caption in enumerate(captions)}
        texts = [caption for _, video in self.clips for caption in video.captions]
        torch.manual_seed(run.loop.seed)
        self.module = TinyVT(run.model, TextTokenizer.train(texts, run.model.vocab_size))

    def _held_out(self, video: CachedVideo) -> bool:
        name = video.captions[0].lower() if video.captions and video.captions[0] else video.file
        return crc32(name.encode()) % HELD_OUT_EVERY == 0

    def num_samples(self) -> int:
        return len(self.clips)

    def by_size(self, indices: Tensor) -> Tensor:
        return indices

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, object]:
        frames, texts, numbers = [], [], []
        for i in indices.tolist():
            cache, video = self.clips[i]
            clip, text = self.drawn(cache, video, generator)
            frames.append(clip)
            texts.append(text)
            numbers.append(self.number[video.captions[0].lower()] if text else -1)
        return {"frames": torch.stack(frames), "texts": texts, "numbers": torch.tensor(numbers)}

    def drawn(self, cache: FrameCache, video: CachedVideo, generator: torch.Generator) -> tuple[Tensor, str]:
        """One clip from anywhere in a video, at 0.8 to 1.25 of its speed, mirrored, moved; and a caption of it."""
        chance = torch.rand(6, generator=generator).tolist()
        fps = FPS * 1.25 ** (2 * chance[0] - 1)
        latest = video.period_s if video.loops else max(0.0, video.period_s - FRAMES / fps)
        clip = cache.frames[cache.clip_rows(video, latest * chance[1], FRAMES, fps)]
        if chance[2] < 0.5 and not any(SIDES.search(caption) for caption in video.captions):
            clip = clip.flip(2)
        y, x = (torch.randint(-MARGIN, MARGIN + 1, (2,), generator=generator)).tolist()
        places = torch.arange(SIZE)
        clip = clip[:, (places + y).clamp(0, SIZE - 1)][:, :, (places + x).clamp(0, SIZE - 1)]
        captions = [caption for caption in video.captions if caption]
        if not captions:
            return clip, ""
        number = -1 if chance[3] < LONG_CAPTIONS else 0
        number = int(chance[3] * len(captions)) if len(captions) > 2 else number  # of several each is as likely
        words = captions[number].split()
        first = int(chance[4] * max(1, len(words) - WORDS + 1))
        words = words[first : first + WORDS]
        kept = torch.rand(len(words), generator=generator) >= DROPPED_WORDS
        return clip, " ".join(word for word, keep in zip(words, kept, strict=True) if keep) or words[0]

    def loss(self, batch: dict[str, object], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        module, frames, numbers = self.module, batch["frames"], batch["numbers"]
        assert isinstance(frames, Tensor) and isinstance(numbers, Tensor)
        own, count = len(frames), max(1, round(REORDERED_SHARE * len(frames)))
        mixed = [shuffled(clip, generator) for clip in frames[-count:]]
        frames = torch.cat([frames, frames[:count].flip(1), torch.stack(mixed)])
        light = torch.rand(len(frames), 2, generator=generator) * torch.tensor([0.4, 0.3]) + torch.tensor([0.8, -0.15])
        device = module.places.device
        vectors = module(frames.to(device), light.to(device))
        scores = module.in_order(vectors).float()  # of pairs of a clip and its own frames in another order
        from_reversed = scores[:count, 0] - scores[own : own + count, 0]
        from_shuffled = scores[own - count : own, 1] - scores[-count:, 1]
        order = functional.softplus(-torch.cat([from_reversed, from_shuffled])).mean()
        captioned = (numbers >= 0).to(device)
        numbers = numbers.to(device)[captioned]
        clips = module.compared(vectors)
        texts = module.read([text for text in batch["texts"] if text])  # type: ignore[attr-defined]
        scale = module.log_scale.clamp(max=MOST_SCALE).exp()
        right = (numbers[:, None] == numbers).float()
        of_clips = functional.cross_entropy(
            scale * clips[:own][captioned] @ texts.T, right / right.sum(1, keepdim=True)
        )
        never = torch.zeros(len(numbers), count, device=device)  # shuffled clips
        against = torch.cat([clips[:own][captioned], clips[-count:]])
        of_texts = functional.cross_entropy(
            scale * texts @ against.T, torch.cat([right / right.sum(1, keepdim=True), never], dim=1)
        )
        loss = (of_clips + of_texts) / 2 + order
        parts = {
            "caption_of_clip": of_clips,
            "clip_of_caption": of_texts,
            "order": order,
            "reversed_found": (from_reversed > 0).float().mean(),
            "shuffled_found": (from_shuffled > 0).float().mean(),
            "scale": scale,
        }
        return loss, {name: part.detach() for name, part in parts.items()}

    def weight(self, batch: dict[str, object]) -> float:
        return 1.0

    def validate(self) -> tuple[dict[str, float], None]:
        """Of the clips held out of the training split, never of the validation split: weights are chosen by this."""
        metrics: dict[str, float] = {}
        percentiles = []
        for source in sorted({video.source for _, video in self.held_out}):
            own = [(cache, video) for cache, video in self.held_out if video.source == source]
            found = accuracy(self.module, *first_clips(own))
            metrics |= {f"{kind}_{source}": share for kind, share in found["order"].items()}
            if "caption of a clip" in found:
                percentiles.append(found["caption of a clip"]["percentile"])
                metrics[f"percentile_{source}"] = percentiles[-1]
        metrics["percentile"] = sum(percentiles) / len(percentiles) if percentiles else 50.0
        return metrics, None

    def export(self, folder: Path) -> None:
        self.module.save_pretrained(folder)


def first_clips(videos: list[tuple[FrameCache, CachedVideo]]) -> tuple[list[Video], list[str]]:
    """The clip that each video begins with, and its short caption, empty where it has none."""
    clips = [cache.frames[cache.clip_rows(video, 0.0, FRAMES, FPS)].numpy() for cache, video in videos]
    return clips, [video.captions[0] if video.captions else "" for _, video in videos]


def shuffled(clip: Any, generator: torch.Generator) -> Any:
    """A clip's frames in another order than their own or its reverse; a numpy array or a tensor."""
    while True:
        order = torch.randperm(len(clip), generator=generator)
        if (order.diff() != 1).any() and (order.diff() != -1).any():
            return clip[order if isinstance(clip, Tensor) else order.numpy()]


def accuracy(network: TinyVT, clips: Sequence[Video], captions: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """How well clips find their captions among all different ones and captions their clips; accuracy of order scores.

    `percentile` is the share of wrong ones that are farther than the right one, in percent (chance 50); `recall` maps
    k to the share whose right one is among the nearest k, `chance` the same of a guess. `order` is the share of clips
    recognised against themselves reversed, and shuffled, by a score of each on its own (chance ½). Clips without a
    caption are scored by order alone.
    """
    vectors = np.stack([network.clip_vector(clip) for clip in clips])
    rows = [i for i, caption in enumerate(captions) if caption]
    different = sorted({captions[i] for i in rows})
    figures: dict[str, Any] = {"clips": len(clips), "told": len(rows), "captions": len(different)}
    if len(different) > 1:
        cosines = network.similarities(vectors[rows], different)
        right = np.array([[captions[i] == caption for caption in different] for i in rows])
        figures["caption of a clip"] = found(cosines, right)
        figures["clip of a caption"] = found(cosines.T, right.T)
    shuffles = [shuffled(clip, generator_for(seed, "shuffled", i)) for i, clip in enumerate(clips)]
    own = order_scores(network, vectors)
    figures["order"] = {}
    for i, others in enumerate(([clip[::-1] for clip in clips], shuffles)):
        other = order_scores(network, np.stack([network.clip_vector(clip) for clip in others]))
        figures["order"][ORDERS[i]] = float(((own > other) + 0.5 * (own == other))[:, i].mean())
    return figures


def found(scores: Float[ndarray, "q n"], right: ndarray) -> dict[str, Any]:
    """Retrieval with one or more right entries a query (`right`, of bools): the nearest of them counts."""
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    wrong = ~right
    nearer = ((scores > best) & wrong).sum(axis=1) + 0.5 * ((scores == best) & wrong).sum(axis=1)
    guesses = {k: float(np.minimum(1, k * right.sum(axis=1) / right.shape[1]).mean()) for k in RECALLS}
    return {
        "percentile": float((100 * (1 - nearer / wrong.sum(axis=1))).mean()),
        "recall": {str(k): float((nearer < k).mean()) for k in RECALLS},
        "chance": {str(k): share for k, share in guesses.items()},
    }


@torch.no_grad()
def order_scores(network: TinyVT, vectors: Float[ndarray, "n width"]) -> Float[ndarray, "n orders"]:
    """How little clips look reversed, and shuffled, by their vectors: to compare a clip with its own frames in another
    order."""
    scores: ndarray = network.in_order(torch.from_numpy(vectors).to(network.places.device)).cpu().numpy()
    return scores


def measure(caches: tuple[str, ...]) -> None:
    """Measure the bundled network on the validation clips of these caches, a row a folder of clips."""
    network = TinyVT.from_pretrained(BUNDLED)
    videos = [(cache, video) for cache in map(FrameCache.load, caches) for video in cache.videos]
    trained = {video.captions[0].lower() for _, video in videos if not video.validation and video.captions}
    rows = {}
    for source in sorted({video.source for _, video in videos}):
        clips, captions = first_clips([both for both in videos if both[1].validation and both[1].source == source])
        overlap = sum(caption.lower() in trained for caption in set(captions) - {""})
        rows[source] = {**accuracy(network, clips, captions), "captions also in training": overlap}
    values = {"folders": rows, "parameters": sum(p.numel() for p in network.parameters())}
    line = shlex.join(["python", *sys.argv])
    write_result(Path("results/video-text.json"), "TinyVT", values, sum(row["clips"] for row in rows.values()), 0, line)


def main(action: str, *caches: str) -> None:
    """Train, or continue; or measure."""
    if action == "measure":
        measure(caches)
    else:
        run = VideoTextRun(caches)
        print(train(VideoTextTraining(run), run.loop, Path("runs/tinyvt"), {}))


if __name__ == "__main__":
    main(*sys.argv[1:])
