"""Stage 0: the first stage learns to reconstruct single frames."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from dicode.hub import config_to_dict, load_weights, save_weights, write_config
from dicode.shapes import ImageLatents, KeyFramePixels
from dicode.tokenizer.first_stage import FirstStage, FirstStageConfig
from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS as WEIGHTS
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.loop import LoopConfig
from dicode.train.perceptual import PerceptualDistance
from dicode.video.shards import FrameCache


@dataclass(frozen=True)
class FirstStageRun:
    """Train the image autoencoder on all frames of a cache; `init` continues from a checkpoint folder's weights.

    With `freeze_encoder` the decoder is trained alone: latents, hence deep tokens and what was trained on them, stay.
    """

    cache: str = "cache/sprites"
    init: str | None = None
    freeze_encoder: bool = False
    tokenizer: str | None = None  # on this first stage: half of the latents come from deep tokens, as they will in use
    model: FirstStageConfig = field(default_factory=FirstStageConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    l1_weight: float = 0.1  # beside the squared error: keeps flat areas of pixel art flat
    perceptual_weight: float = 0.0  # of `PerceptualDistance`, which squared error alone leaves blurred
    latent_noise: float = 0.05  # of the batch's latent deviation: the decoder will see imperfect latents


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


class FirstStageTraining:
    """The `Stage` of a `FirstStageRun`."""

    def __init__(self, run: FirstStageRun):
        if run.freeze_encoder and not run.init:
            raise ValueError("freeze_encoder: name the trained first stage in init; a random encoder would stay random")
        if run.tokenizer and not run.freeze_encoder:
            raise ValueError("tokenizer: its tokens stand for the latents of a frozen encoder; set freeze_encoder")
        self.run = run
        self.tokenizer = VideoTokenizer.from_pretrained(run.tokenizer).requires_grad_(False) if run.tokenizer else None
        self.best = "-perceptual" if run.perceptual_weight else "psnr_db"
        self.perceptual = PerceptualDistance() if run.perceptual_weight else None
        cache = FrameCache.load(run.cache)
        self.frames = cache.frames
        self.rows = cache.subset(validation=False).frame_rows()
        validation = cache.subset(validation=True)
        self.validation = {
            source: torch.cat(
                [torch.arange(v.first, v.first + v.count, 5) for v in validation.videos if v.source == source]
            )
            for source in sorted({v.source for v in validation.videos})
        }
        torch.manual_seed(run.loop.seed)
        self.module = FirstStage(run.model)
        if run.init:
            load_weights(self.module, Path(run.init) / WEIGHTS)
        if run.freeze_encoder:
            self.module.freeze_encoder()

    def num_samples(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        pixels = frames_to_pixels(self.frames[self.rows[indices]])
        flipped = torch.rand(len(pixels), generator=generator) < 0.5
        return torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)

    def loss(self, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = batch.to(self.module.latent_mean.device).contiguous(memory_format=torch.channels_last)
        latents = self.module.raw_latents(pixels)
        if self.tokenizer is not None:
            half = len(latents) // 2
            latents = torch.cat([self.through_tokens(pixels[:half]), latents[half:]])
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        latents = latents + self.run.latent_noise * latents.detach().std() * noise
        decoded = self.module.raw_decode(latents)
        error = decoded - pixels
        parts = {"squared": error.square().mean(), "absolute": error.abs().mean()}
        loss = parts["squared"] + self.run.l1_weight * parts["absolute"]
        if self.perceptual:
            parts["perceptual"] = self.perceptual(decoded, pixels)
            loss = loss + self.run.perceptual_weight * parts["perceptual"]
        return loss, {name: part.detach() for name, part in parts.items()}

    @torch.no_grad()
    def through_tokens(self, pixels: KeyFramePixels) -> ImageLatents:
        """Raw latents as the key-frame head tells them from an image's deep tokens: smoother than the encoder's."""
        assert self.tokenizer is not None
        tokenizer = self.tokenizer.to(pixels.device)
        latents = tokenizer.key_latents(tokenizer.tokens_of(tokenizer.source_of(pixels)))
        return latents * self.module.latent_deviation[:, None, None] + self.module.latent_mean[:, None, None]

    def validate(self) -> tuple[dict[str, float], Image.Image]:
        device = self.module.latent_mean.device
        sample = frames_to_pixels(self.frames[self.rows[:: max(1, len(self.rows) // 512)]]).to(device)
        if not self.run.freeze_encoder:
            self.module.fit_statistics(torch.cat([self.module.raw_latents(part) for part in sample.split(64)]))
        metrics: dict[str, float] = {}
        strips, distances = [], []
        for source, rows in self.validation.items():
            pixels = frames_to_pixels(self.frames[rows])
            decoded = torch.cat(
                [self.module.decode(self.module.encode(part.to(device))).cpu() for part in pixels.split(64)]
            )
            metrics[f"psnr_{source}_db"] = psnr_db(decoded, pixels).mean().item()
            if self.perceptual:
                shown = [decoded]
                if self.tokenizer is not None:
                    parts = (part.to(device) for part in pixels.split(64))
                    shown.append(torch.cat([self.module.raw_decode(self.through_tokens(part)).cpu() for part in parts]))
                    metrics[f"psnr_{source}_of_tokens_db"] = psnr_db(shown[1], pixels).mean().item()
                pairs = ((a, b) for made in shown for a, b in zip(made.split(64), pixels.split(64), strict=True))
                distances += [self.perceptual(a.to(device), b.to(device)).cpu() for a, b in pairs]
            picks = torch.arange(0, len(rows), max(1, len(rows) // 16))[:16]
            strips += [pixels[picks], decoded[picks].clamp(-1, 1)]
        metrics["psnr_db"] = sum(metrics.values()) / len(metrics)  # of all kinds
        if distances:
            metrics["perceptual"] = torch.stack(distances).mean().item()
        sheet = torch.cat([rearrange(pixels_to_frames(s), "b h w c -> h (b w) c") for s in strips])
        return metrics, Image.fromarray(sheet.numpy())

    def export(self, folder: Path) -> None:
        write_config(folder, {"first_stage": config_to_dict(self.run.model)})
        save_weights(self.module, folder / WEIGHTS)
