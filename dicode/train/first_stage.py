"""Stage 0: the first stage learns to reconstruct single frames."""

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from numpy import ndarray
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from dicode.checkpoint import content_hash, load_weights
from dicode.checkpoint.saving import kept_tensors, save_weights, write_config
from dicode.config import config_to_dict
from dicode.data.cache import FrameCache
from dicode.data.cache_folder import INDEX
from dicode.data.columns import FrameRows, Videos
from dicode.device import autocast, pick_device
from dicode.features.extract import STAGE_WIDTHS, FeatureMaps, mean, perceptual_distance
from dicode.features.metrics import frechet_distance
from dicode.shapes import ImageLatents, KeyFramePixels
from dicode.stopwatch import tracked
from dicode.tokenizer.encoder import FirstStage
from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS as WEIGHTS
from dicode.tokenizer.video_tokenizer import WEIGHTS as TOKENIZER_WEIGHTS
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.cached import frames_to_pixels, pixels_to_frames, psnr_db, splits
from dicode.train.distributed import Processes
from dicode.train.runs import FirstStageRun

L1_WEIGHT = 0.1  # beside the squared error: keeps flat areas of pixel art flat
LATENT_NOISE = 0.05  # of the batch's latent deviation: latents will be imperfect in use
MOST_RENDERED = 4096  # clips whose rendered frames a decoder learns from: hours of work for a processor
VALIDATION_FRAMES = 2048  # of all sources together …
LEAST_FRAMES = 16  # … but at least so many of each
SLOPE = 0.2  # of the discriminator's leaky rectifiers


class ReconstructionStats:
    """How predicted images compare with real ones, batch by batch."""

    def __init__(self) -> None:
        self.distances: list[Tensor] = []
        self.pooled: list[list[ndarray]] = []  # of the predicted, and of the real

    def add(self, predicted: list[Tensor], real: list[Tensor]) -> None:
        """`FeatureMaps` of as many images of either kind."""
        self.distances.append(perceptual_distance(predicted, real).cpu())
        pooled = [[reduce(x, "b c y x -> b c", "mean") for x in maps] for maps in (predicted, real)]
        self.pooled.append([torch.cat(features, dim=1).cpu().numpy() for features in pooled])

    def figures(self) -> dict[str, float]:
        """Mean `perceptual` distance, and the `frechet` distance of the two sets' maps, averaged over places.

        A discriminator trades the first, which is least for blurred images, for the second.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # biased by few images, but by as many every time
            distance = frechet_distance(*map(np.concatenate, zip(*self.pooled, strict=True)))
        return {"perceptual": torch.stack(self.distances).mean().item(), "frechet": distance}


class FeatureDiscriminator(nn.Module):
    """Logits at every second place of each of the `FeatureMaps`; larger is more real.

    Projected GANs (Sauer et al. 2021): features of an image network separate real from generated with far fewer images
    than pixels do. Theirs mix the maps at random first and have deeper heads.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, width, 1),
                nn.LeakyReLU(SLOPE),
                nn.Conv2d(width, width, 3, stride=2, padding=1),
                nn.LeakyReLU(SLOPE),
                nn.Conv2d(width, 1, 1),
            )
            for channels in STAGE_WIDTHS
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Feature maps of `b` images → logits `b 1 y x` of each map."""
        return [head(x * x.shape[1] ** 0.5) for head, x in zip(self.heads, maps, strict=True)]


def adversarial_losses(discriminator: nn.Module, predicted: list[Tensor], real: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Losses of the decoder and of the discriminator, from feature maps: the hinge losses of Lim & Ye 2017.

    All maps weigh the same. Gradients stay apart, so that one optimizer may step both: the first loss reaches
    `predicted` alone, the second the discriminator alone.
    """
    fixed = {name: p.detach() for name, p in discriminator.named_parameters()}
    generator_loss = -mean(functional_call(discriminator, fixed, (predicted,)))
    on_predicted = discriminator([x.detach() for x in predicted])
    on_real = discriminator([x.detach() for x in real])
    hinge = mean([functional.relu(1 + x) for x in on_predicted]) + mean([functional.relu(1 - x) for x in on_real])
    return generator_loss, hinge


class Rendered(NamedTuple):
    """Frames rendered by a tokenizer, and the rows of the cached frames that they reconstruct."""

    rows: Tensor  # f
    latents: Tensor  # f c h w, float16, normalised


def validation_rows(videos: Videos) -> dict[str, Tensor]:
    """Rows of frames to validate with, of each source as many: `VALIDATION_FRAMES` in all, evenly over the videos."""
    numbers = videos.column("source")
    held = np.unique(numbers)
    each = max(LEAST_FRAMES, VALIDATION_FRAMES // len(held))
    chosen = sorted((videos.sources[i], i) for i in held.tolist())
    return {source: FrameRows(videos[np.flatnonzero(numbers == i)]).spread(each) for source, i in chosen}


def rendered_clips(tokenizer: VideoTokenizer, cache: FrameCache, run: FirstStageRun) -> Rendered:
    """The first clips of up to 4,096 videos from their own key frames: all frames but the head, which is not rendered.

    Computed once and kept in the cache's folder, under a hash of all that decides them: the tokenizer's weights and
    configuration, sampling included, the cache and the videos.
    """
    config, source = tokenizer.config, Path(str(run.tokenizer))
    chosen = cache.columns.lasting(config.clip_s).spread(MOST_RENDERED)
    if not chosen:
        raise ValueError(f"{run.cache}: none of its videos lasts {config.clip_s:g} s, as a rendered clip does")
    rows = torch.stack([cache.clip_rows(video, 0.0, config.tail_frame + 1, config.fps) for video in chosen])

    def computed() -> dict[str, Tensor]:
        parts = []
        for number, part in enumerate(tracked(rows.split(16), "rendering clips", "batch")):
            tokens = tokenizer.encode(cache.frames[part])
            indices = list(range(16 * number, 16 * number + len(part)))
            with autocast(tokenizer.device, run.loop.precision):
                parts.append(tokenizer.render(tokens, sample_indices=indices).half().cpu())
        return {"latents": torch.cat(parts)}

    weights = content_hash(source / WEIGHTS, source / TOKENIZER_WEIGHTS)
    data = content_hash(Path(run.cache) / INDEX)
    asked = json.dumps([data, config_to_dict(config)]).encode() + rows.numpy().tobytes()
    name = f"rendered-{weights}-{hashlib.sha256(asked).hexdigest()[:16]}.safetensors"
    with Processes().one_first():
        latents = kept_tensors(Path(run.cache) / name, computed)["latents"]
    return Rendered(rows[:, 1 : config.clip_frames].flatten(), latents[:, 1:].flatten(0, 1))


def check(run: FirstStageRun) -> None:
    """Raise `ValueError` for options that need others."""
    if run.model.frames_a_latent > 1:
        raise ValueError(
            f"model.kind: {run.model.kind!r} codes clips; it is converted (dicode convert wan), not trained"
        )
    if run.freeze_encoder and not run.init:
        raise ValueError("freeze_encoder: name the trained first stage in init; a random encoder would stay random")
    if run.tokenizer and not run.freeze_encoder:
        raise ValueError("tokenizer: its tokens stand for the latents of a frozen encoder; set freeze_encoder")
    if not 0 <= run.rendered_share <= 1 or (run.rendered_share and not run.tokenizer):
        raise ValueError(f"rendered_share: expected 0…1, and a tokenizer that renders, got {run.rendered_share}")
    if run.adversarial_weight and not run.perceptual_weight:
        raise ValueError("adversarial_weight: its discriminator reads feature maps; set a perceptual_weight as well")


class FirstStageTraining:
    """The `Stage` of a `FirstStageRun`."""

    def __init__(self, run: FirstStageRun):
        check(run)
        self.run = run
        self.tokenizer = VideoTokenizer.from_pretrained(run.tokenizer).requires_grad_(False) if run.tokenizer else None
        self.best = "-frechet" if run.adversarial_weight else "-perceptual" if run.perceptual_weight else "psnr_db"
        self.feature_maps = FeatureMaps() if run.perceptual_weight else None
        cache, training, validation = splits(run.cache)
        self.frames, self.rows = cache.frames, training.frame_rows()
        self.validation = validation_rows(validation.columns)
        torch.manual_seed(run.loop.seed)
        first_stage = FirstStage(run.model)
        if run.init:
            load_weights(first_stage, Path(run.init) / WEIGHTS)
        if run.freeze_encoder:
            first_stage.freeze_encoder()
        self.module: nn.Module = first_stage
        if run.adversarial_weight:
            self.module = nn.ModuleDict({"first_stage": first_stage, "discriminator": FeatureDiscriminator()})
        self.rendered: Rendered | None = None
        if run.rendered_share and self.tokenizer is not None:
            self.tokenizer.to(pick_device(run.loop.device))
            options = {"decoder_guidance": run.rendered_guidance, "motion_scale": run.rendered_motion_scale}
            config = self.tokenizer.config
            self.tokenizer.config = replace(config, sampling=config.sampling.changed(**options))
            self.rendered = rendered_clips(self.tokenizer, training, run)
            self.rendered_validation = rendered_clips(self.tokenizer, validation, run)

    @property
    def first_stage(self) -> FirstStage:
        """The part of the module that is exported."""
        found = self.module["first_stage"] if isinstance(self.module, nn.ModuleDict) else self.module
        assert isinstance(found, FirstStage)
        return found

    def num_samples(self) -> int:
        return len(self.rows)

    def by_size(self, indices: Tensor) -> Tensor:
        return indices  # all are of one size

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        pixels = frames_to_pixels(self.frames[self.rows[indices]])
        flipped = torch.rand(len(pixels), generator=generator) < 0.5 * self.run.mirror
        pixels = torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)
        if self.rendered is None:
            return {"pixels": pixels}
        count = round(self.run.rendered_share * len(indices))
        chosen = torch.randint(len(self.rendered.rows), (count,), generator=generator)
        targets = frames_to_pixels(self.frames[self.rendered.rows[chosen]])
        return {
            "pixels": torch.cat([pixels[: len(indices) - count], targets]),
            "rendered": self.rendered.latents[chosen].float(),  # of the last of these images
        }

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        first_stage, device = self.first_stage, self.first_stage.latent_mean.device
        pixels = batch["pixels"].to(device).contiguous(memory_format=torch.channels_last)
        latents = first_stage.raw_latents(pixels[: len(pixels) - len(batch.get("rendered", ()))])
        if self.tokenizer is not None:
            half = len(latents) // 2
            latents = torch.cat([self.through_tokens(pixels[:half]), latents[half:]])
        if "rendered" in batch:
            latents = torch.cat([latents, self.raw(batch["rendered"].to(device))])
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        decoded = first_stage.raw_decode(latents + LATENT_NOISE * latents.detach().std() * noise)
        error = decoded - pixels
        parts = {"squared": error.square().mean(), "absolute": error.abs().mean()}
        loss = parts["squared"] + L1_WEIGHT * parts["absolute"]
        if self.feature_maps:
            predicted, real = self.feature_maps(decoded), self.feature_maps(pixels)
            parts["perceptual"] = perceptual_distance(predicted, real)
            loss = loss + self.run.perceptual_weight * parts["perceptual"]
            if isinstance(self.module, nn.ModuleDict):
                adversarial, discriminator = adversarial_losses(self.module["discriminator"], predicted, real)
                parts |= {"adversarial": adversarial, "discriminator": discriminator}
                loss = loss + self.run.adversarial_weight * adversarial + discriminator
        return loss, {name: part.detach() for name, part in parts.items()}

    def weight(self, batch: dict[str, Tensor]) -> float:
        return 1.0

    @torch.no_grad()
    def through_tokens(self, pixels: KeyFramePixels) -> ImageLatents:
        """Raw latents that an image's deep tokens decode to: smoother than the encoder's."""
        assert self.tokenizer is not None
        tokenizer = self.tokenizer.to(pixels.device)
        return self.raw(tokenizer.key_latents(tokenizer.tokens_of(tokenizer.source_of(pixels))))

    def raw(self, latents: ImageLatents) -> ImageLatents:
        """Latents before they were normalised."""
        return latents * self.first_stage.latent_deviation[:, None, None] + self.first_stage.latent_mean[:, None, None]

    def validate(self) -> tuple[dict[str, float], Image.Image]:
        first_stage, device = self.first_stage, self.first_stage.latent_mean.device
        sample = frames_to_pixels(self.frames[self.rows.spread(1024)]).to(device)
        if not self.run.freeze_encoder:
            first_stage.fit_statistics(torch.cat([first_stage.raw_latents(part) for part in sample.split(64)]))

        def mapped(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
            return torch.cat([function(part.to(device)).cpu() for part in values.split(64)])

        metrics: dict[str, float] = {}
        strips, stats = [], ReconstructionStats()
        for source, rows in self.validation.items():
            pixels = frames_to_pixels(self.frames[rows])
            decoded = mapped(lambda part: first_stage.decode(first_stage.encode(part)), pixels)
            metrics[f"psnr_{source}_db"] = psnr_db(decoded, pixels).mean().item()
            self.compare(decoded, pixels, stats)
            if self.tokenizer is not None:
                of_tokens = mapped(lambda part: first_stage.raw_decode(self.through_tokens(part)), pixels)
                metrics[f"psnr_{source}_of_tokens_db"] = psnr_db(of_tokens, pixels).mean().item()
                self.compare(of_tokens, pixels, stats)
            picks = torch.arange(0, len(rows), max(1, len(rows) // 16))[:16]
            strips += [pixels[picks], decoded[picks].clamp(-1, 1)]
        metrics["psnr_db"] = sum(metrics.values()) / len(metrics)  # of all kinds
        if self.rendered is not None:
            rows, latents = self.rendered_validation
            some, of_rendered = slice(None, None, max(1, len(rows) // 480)), ReconstructionStats()
            rendered = mapped(lambda part: first_stage.decode(part.float()), latents[some])
            self.compare(rendered, frames_to_pixels(self.frames[rows[some]]), stats, of_rendered)
            if of_rendered.distances:
                metrics |= {f"{name}_of_rendered": value for name, value in of_rendered.figures().items()}
        if stats.distances:
            metrics |= stats.figures()
        sheet = torch.cat([rearrange(pixels_to_frames(s), "b h w c -> h (b w) c") for s in strips])
        return metrics, Image.fromarray(sheet.numpy())

    def compare(self, decoded: Tensor, real: Tensor, *stats: ReconstructionStats) -> None:
        """Add images to statistics, where this run has feature maps to compare them by."""
        if self.feature_maps is None:
            return
        device = self.first_stage.latent_mean.device
        for pair in zip(decoded.split(64), real.split(64), strict=True):
            maps = [self.feature_maps(pixels.to(device)) for pixels in pair]
            for each in stats:
                each.add(*maps)

    def export(self, folder: Path) -> None:
        write_config(folder, {"first_stage": config_to_dict(self.run.model)})
        save_weights(self.first_stage, folder / WEIGHTS)
