"""What stages read of a cache: pixels, first-stage latents and deep tokens, the latter two computed once and kept."""

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from dicode.checkpoint import content_hash
from dicode.config import Precision
from dicode.data.cache import FrameCache, Rows
from dicode.data.columns import CachedVideo
from dicode.device import autocast
from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS, WEIGHTS, VideoTokenizer
from dicode.train.augment import View


def frames_to_pixels(frames: Tensor) -> Tensor:
    """uint8 `… h w c` → float32 `… c h w` in −1…1."""
    return rearrange(frames, "... h w c -> ... c h w").float() / 127.5 - 1


def pixels_to_frames(pixels: Tensor) -> Tensor:
    """Float `… c h w` → uint8 `… h w c`, clamped."""
    return rearrange((pixels * 127.5 + 127.5).round().clamp(0, 255).byte(), "... c h w -> ... h w c")


def psnr_db(pixels: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, for pixels in −1…1 (clamped first)."""
    error = ((pixels.clamp(-1, 1) - target) / 2).square().mean((1, 2, 3))
    return -10 * error.clamp_min(1e-10).log10()


def at_once(count: int, size: int) -> int:
    """How many images of `size`×`size` to handle at a time: `count`, fewer of those above 64×64."""
    return max(1, min(count, count * 64**2 // size**2))


def splits(folder: str) -> tuple[FrameCache, FrameCache, FrameCache]:
    """A cache whole, its training videos, and its validation videos. Raises `ValueError` where it lacks either."""
    cache = FrameCache.load(folder)
    return cache, cache.subset(validation=False), cache.subset(validation=True)


def latents_name(weights: Path, mirror: bool) -> str:
    """Name of cached latents: of a first stage, with those of mirror images or without."""
    return f"latents-{content_hash(weights)}" + ("-mirrored" if mirror else "")


def first_stage_latents(
    tokenizer: VideoTokenizer, cache: FrameCache, weights: Path, precision: Precision = "auto", mirror: bool = False
) -> Rows:
    """Latents of all cached frames, float16 `f 1 z y x`, or of them and their mirror images, `f 2 z y x`.

    Kept beside the shards, under a hash of the first stage's `weights` file.
    """
    sides, device = 2 if mirror else 1, tokenizer.device

    def latents(frames: Tensor) -> Tensor:
        parts = []
        with torch.no_grad(), autocast(device, precision):
            for part in frames.split(at_once(128, frames.shape[1])):
                pixels = frames_to_pixels(part).to(device)
                both = tokenizer.first_stage.encode(torch.cat([pixels, pixels.flip(-1)][:sides]))
                parts.append(rearrange(both.half().cpu(), "(side f) c h w -> f side c h w", side=sides))
        return torch.cat(parts)

    return cache.computed(latents_name(weights, mirror), latents)


def key_frames_of(video: CachedVideo, clip_s: float) -> int:
    """Number of key frames, one clip apart from its start on, of a video that does not loop; 1 of a still image."""
    count = 1 + int(video.period_s / clip_s)
    return 1 if video.count == 1 else count + video.lasts(count * clip_s)


def frame_tokens(
    tokenizer: VideoTokenizer, cache: FrameCache, source: Path, view: View | None = None, precision: Precision = "auto"
) -> Rows:
    """Deep tokens of the frames that can be key frames, or of a view of them, float16 `f n d`.

    Those are all frames of a loop, and those a whole number of clips after the start of another video. Kept beside the
    shards, under a hash of the tokenizer's weights in `source`; computed from first-stage latents where a tokenizer's
    training left them there.
    """
    config, clip_s = tokenizer.config, tokenizer.config.clip_s
    reads_latents = config.resampler is None and view is None
    names = [latents_name(source / FIRST_STAGE_WEIGHTS, mirror) for mirror in (False, True)]

    def chosen(rows: range) -> Tensor:
        found = [torch.empty(0, dtype=torch.long)]
        for video in cache.of_rows(rows):
            every = torch.arange(video.first, video.first + video.count)
            count = key_frames_of(video, clip_s)
            found.append(every if video.loops else cache.clip_rows(video, 0.0, count, 1 / clip_s))
        return torch.cat(found).unique()

    def tokens(rows: Tensor) -> Tensor:
        kept = (cache.kept(name, rows) for name in names if reads_latents)
        latents = next((values for values in kept if values is not None), None)
        parts = [torch.empty(0, config.tokens_per_keyframe, config.token_width, dtype=torch.half)]
        with torch.no_grad(), autocast(tokenizer.device, precision):
            for at in torch.arange(len(rows)).split(at_once(128, config.size)):
                if latents is not None:
                    read = latents[at, 0].float().to(tokenizer.device)
                else:
                    frames = cache.frames[rows[at]]
                    pixels = frames_to_pixels(frames if view is None else view.of_frames(frames))
                    read = tokenizer.source_of(pixels.to(tokenizer.device))
                parts.append(tokenizer.tokens_of(read).half().cpu())
        return torch.cat(parts)

    name = f"tokens-{content_hash(source / FIRST_STAGE_WEIGHTS, source / WEIGHTS)}-{clip_s:g}s"
    return cache.computed_of(name if view is None else f"{name}-{view.name}", chosen, tokens)
