"""What stages read of a cache: pixels, first-stage latents and deep tokens, the latter two computed once and kept."""

from collections.abc import Iterator
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from dicode.config import Precision
from dicode.data.cache import FrameCache, Rows
from dicode.data.columns import CachedVideo
from dicode.device import autocast
from dicode.files import read_json
from dicode.tokenizer.config import TokenizerConfig
from dicode.tokenizer.video_tokenizer import VideoTokenizer
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


def latents_name(tokenizer: VideoTokenizer, mirror: bool) -> str:
    """Name of cached latents: of a first stage, with those of mirror images or without."""
    return f"latents-{tokenizer.latent_hash()}" + ("-mirrored" if mirror else "")


def first_stage_latents(
    tokenizer: VideoTokenizer, cache: FrameCache, precision: Precision = "auto", mirror: bool = False
) -> Rows:
    """Latents of all cached frames, float16 `f 1 z y x`, or of them and their mirror images, `f 2 z y x`.

    Kept beside the shards, under a hash of the first stage's weights.
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

    return cache.computed(latents_name(tokenizer, mirror), latents)


def trained_part(folder: Path) -> str:
    """What the run that wrote a tokenizer's folder had trained: its `trains`, or 'code' for a linear one."""
    note = folder.parent / "recipe.json"
    run = read_json(note)["recipe"].get("run", {}) if note.is_file() else {}
    return run.get("trains", "all" if "loop" in run or not run else "code")


def key_frames_of(video: CachedVideo, clip_s: float) -> int:
    """Number of key frames, one clip apart from its start on, of a video that does not loop; 1 of a still image."""
    count = 1 + int(video.period_s / clip_s)
    return 1 if video.count == 1 else count + video.lasts(count * clip_s)


def key_frames_in(cache: FrameCache, clip_s: float, rows: range) -> Iterator[tuple[CachedVideo, Tensor, list[float]]]:
    """Videos that begin in these rows, the rows of frames that can be their key frames, and the moments of these."""
    for video in cache.of_rows(rows):
        if video.loops:
            every = slice(video.first, video.first + video.count)
            yield video, torch.arange(every.start, every.stop), cache.times_s[every].tolist()
            continue
        keys = cache.clip_rows(video, 0.0, key_frames_of(video, clip_s), 1 / clip_s)
        first = torch.cat([torch.tensor([True]), keys[1:] != keys[:-1]])
        yield video, keys[first], [number * clip_s for number in first.nonzero()[:, 0].tolist()]


def clips_that_end(rows: Tensor, cache: FrameCache, config: TokenizerConfig) -> tuple[Tensor, Tensor]:
    """Of each key frame the rows of the first clip that it ends, and whether there is one."""
    ended: dict[int, Tensor] = {}
    for video, keys, moments_s in key_frames_in(cache, config.clip_s, range(int(rows[0]), int(rows[-1]) + 1)):
        for row, at_s in zip(keys.tolist(), moments_s, strict=True):
            if row not in ended and video.count > 1 and (video.loops or at_s > 0):
                ended[row] = cache.clip_rows(video, at_s - config.clip_s, config.clip_span, config.fps)
    found = [ended.get(row, torch.full((config.clip_span,), row)) for row in rows.tolist()]
    return torch.stack(found), torch.tensor([row in ended for row in rows.tolist()])[:, None, None]


def frame_tokens(
    tokenizer: VideoTokenizer, cache: FrameCache, view: View | None = None, precision: Precision = "auto"
) -> Rows:
    """Deep tokens of the frames that can be key frames, or of a view of them, float16 `f n d`, motion tokens included.

    Those are all frames of a loop, and those a whole number of clips after the start of another video. Kept beside the
    shards, under a hash of the weights that they depend on; computed from first-stage latents where training left them
    there. Where one frame is two key frames, its motion is that of the first clip which ends there.
    """
    config, clip_s = tokenizer.config, tokenizer.config.clip_s
    reads_latents = config.resampler is None or config.motion is not None
    names = [latents_name(tokenizer, mirror) for mirror in (False, True)]

    def chosen(rows: range) -> Tensor:
        found = [keys for _, keys, _ in key_frames_in(cache, clip_s, rows)]
        return torch.cat([torch.empty(0, dtype=torch.long), *found]).unique()  # videos may share frames

    def pixels(rows: Tensor) -> Tensor:
        frames = cache.frames[rows]
        return frames_to_pixels(frames if view is None else view.of_frames(frames)).to(tokenizer.device)

    def latents_of(rows: Tensor) -> Tensor:
        kept = (cache.kept(name, rows) for name in names if view is None)
        if (values := next((values for values in kept if values is not None), None)) is not None:
            return values[:, 0]
        encode = tokenizer.source_of if config.resampler is None else tokenizer.first_stage.encode
        return torch.cat([encode(pixels(part)).cpu() for part in rows.split(at_once(128, config.size))])

    def tokens(rows: Tensor) -> Tensor:
        parts = [torch.empty(0, config.block_tokens, config.token_width, dtype=torch.half)]
        if len(rows) == 0:
            return parts[0]
        ended, held = clips_that_end(rows, cache, config) if config.motion else (rows[:, None], None)
        needed = torch.cat([rows, ended.flatten()]).unique()
        latents: Tensor | None = None

        def read(rows: Tensor) -> Tensor:
            assert latents is not None
            return latents[torch.searchsorted(needed, rows)].float().to(tokenizer.device)

        with torch.no_grad(), autocast(tokenizer.device, precision):
            latents = latents_of(needed) if reads_latents else None
            for at in torch.arange(len(rows)).split(at_once(128, config.size)):
                keys = read(rows[at]) if config.resampler is None else tokenizer.source_of(pixels(rows[at]))
                own = tokenizer.tokens_of(keys)
                if held is not None:
                    own = torch.cat([own, tokenizer.motion_of(read(ended[at])) * held[at].to(own)], dim=1)
                parts.append(own.half().cpu())
        return torch.cat(parts)

    name = f"tokens-{tokenizer.token_hash()}-{clip_s:g}s"
    return cache.computed_of(name if view is None else f"{name}-{view.name}", chosen, tokens)
