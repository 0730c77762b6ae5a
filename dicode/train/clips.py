"""Stage 1: encoder, resampler, key-frame head and denoiser learn on cached first-stage latents.

A step holds clips (for the denoiser) and single frames (for the key-frame regression, at a sixteenth of the cost).
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from dicode.hub import (
    config_from_dict,
    content_hash,
    kept_tensors,
    load_state,
    load_weights,
    read_config,
    read_tensors,
    write_config,
)
from dicode.seeds import generator_for
from dicode.tokenizer.denoiser import ChangeDenoiser
from dicode.tokenizer.diffusion import noised
from dicode.tokenizer.first_stage import FirstStageConfig
from dicode.tokenizer.known import Known
from dicode.tokenizer.video_tokenizer import (
    FIRST_STAGE_WEIGHTS,
    WEIGHTS,
    TokenizerConfig,
    TokenizerParts,
    VideoTokenizer,
)
from dicode.train.images import frames_to_pixels, pixels_to_frames, psnr_db
from dicode.train.loop import LoopConfig
from dicode.video.shards import CachedVideo, FrameCache


@dataclass(frozen=True)
class TokenizerRun:
    """Train a tokenizer; `init` continues from another run's weights, `freeze_key_frames` trains the denoiser alone."""

    cache: str = "cache/sprites"
    first_stage: str = "runs/first_stage/best"
    init: str | None = None
    freeze_key_frames: bool = False  # encoder, resampler, token statistics and key-frame head stay as they are
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    images_per_step: int = 64  # single frames beside the clips, for the key-frame regression
    denoises: bool = True  # False: images only
    token_noise: float = 0.2  # highest deviation of noise on the tokens the decoder sees (DESIGN §2.4)
    drop_tokens: float = 0.1  # share of clips that learn the null condition of guidance
    drop_context: float = 0.5  # share of clips that see nothing of the clip before


def first_stage_latents(tokenizer: VideoTokenizer, cache: FrameCache, folder: Path, weights: Path) -> Tensor:
    """Latents of all cached frames and of their mirror images, float16 `2 f z y x`.

    Computed once and kept in the cache's `folder`, under a name that tells the first stage's `weights` file.
    """

    def computed() -> dict[str, Tensor]:
        parts = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for part in tqdm(cache.frames.split(128), desc="first-stage latents", delay=2, disable=None, leave=False):
                pixels = frames_to_pixels(part)
                parts.append(tokenizer.first_stage.encode(torch.cat([pixels, pixels.flip(-1)])))
        both = torch.cat([rearrange(part, "(two f) c h w -> two f c h w", two=2) for part in parts], dim=1)
        return {"latents": both.half()}

    return kept_tensors(folder / f"latents-{content_hash(weights)}.safetensors", computed)["latents"]


class TokenizerTraining:
    """The `Stage` of a `TokenizerRun`."""

    def __init__(self, run: TokenizerRun):
        if not run.model.encoder.reads_latents:
            raise ValueError("cached latents train encoders that read latents; got encoder kind 'clip'")
        self.run = run
        self.best = "-denoising_loss" if run.denoises else "-key_frame_error"
        torch.manual_seed(run.loop.seed)
        self.module = VideoTokenizer(run.model)
        weights = Path(run.first_stage) / FIRST_STAGE_WEIGHTS
        section = read_config(Path(run.first_stage))
        section = section["first_stage"] if "first_stage" in section else section["tokenizer"]["first_stage"]
        held = config_from_dict(FirstStageConfig, section)
        if held != run.model.first_stage:
            raise ValueError(f"{run.first_stage} holds {held}, the recipe names {run.model.first_stage}")
        load_weights(self.module.first_stage, weights)
        if run.freeze_key_frames and not run.init:
            raise ValueError("freeze_key_frames: name the trained tokenizer in init; random parts would stay random")
        if run.init:
            self._start_from(Path(run.init))
        if run.freeze_key_frames:
            module = self.module
            for part in (module.encoder, module.resampler, module.key_head):
                part.requires_grad_(False)
        if not run.denoises:
            self.module.denoiser.requires_grad_(False)
        if run.loop.compile:
            self.module.denoiser.compile(dynamic=False)
        cache = FrameCache.load(run.cache)
        self.cache, self.validation = cache.subset(validation=False), cache.subset(validation=True)
        self.rows = self.cache.frame_rows()
        self.latents = first_stage_latents(self.module, cache, Path(run.cache), weights)
        if isinstance(self.module.denoiser, ChangeDenoiser):
            self._measure_change(self.module.denoiser)

    def _measure_change(self, denoiser: ChangeDenoiser) -> None:
        """Tell the denoiser how far frames lie from a cross-fade of their key frames, from up to 512 training clips."""
        chosen = self.cache.videos[:: len(self.cache.videos) // 512 + 1]
        clips = torch.stack([self.clip(video, 0.0) for video in chosen]).float()
        clips = clips[:, self.run.model.denoiser.context_frames :]
        denoiser.fit_deviation(clips[:, :-1], clips[:, -1])

    def _start_from(self, folder: Path) -> None:
        """Take another run's weights, all of them; where its denoiser is another network, ours starts afresh."""
        held = config_from_dict(TokenizerConfig, read_config(folder)["tokenizer"], f"{folder}: tokenizer")
        parts = TokenizerParts(self.module)
        if held.denoiser == self.run.model.denoiser:
            load_weights(parts, folder / WEIGHTS)
            return
        print(
            f"{folder} holds another denoiser ({held.denoiser.kind}): this one starts with random weights", flush=True
        )
        theirs = {n: t for n, t in read_tensors(folder / WEIGHTS).items() if not n.startswith("denoiser.")}
        ours = {n: t for n, t in parts.state_dict().items() if n.startswith("denoiser.")}
        load_state(parts, {**theirs, **ours}, str(folder / WEIGHTS))

    def num_samples(self) -> int:
        return len(self.cache.videos)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        starts = torch.rand(len(indices), generator=generator)
        mirrored = torch.rand(len(indices), generator=generator) < 0.5
        clips = [
            self.clip(self.cache.videos[int(i)], float(start), int(flip))
            for i, start, flip in zip(indices, starts, mirrored, strict=True)
        ]
        rows = self.rows[torch.randint(len(self.rows), (self.run.images_per_step,), generator=generator)]
        flips = torch.randint(2, (len(rows),), generator=generator)
        return {"clips": torch.stack(clips).float(), "images": self.latents[flips, rows].float()}

    def clip(self, video: CachedVideo, start: float, mirrored: int = 0) -> Tensor:
        """Latents: context frames, the 16 frames of a clip, its tail key frame, from `start` (0…1 of where it may be).

        A looping clip may start anywhere; another where it still lasts to its end, if it is long enough.
        """
        config = self.run.model
        before = config.denoiser.context_frames
        start_s = (1 + start) * video.period_s if video.loops else start * max(0.0, video.period_s - config.clip_s)
        rows = self.cache.clip_rows(video, start_s - before / config.fps, before + config.clip_frames + 1, config.fps)
        return self.latents[mirrored, rows]

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        if self.run.freeze_key_frames:
            self.module.normalizer.eval()
        device = self.module.device
        clips, images = batch["clips"].to(device), batch["images"].to(device)
        before = self.run.model.denoiser.context_frames
        context, clips, tails = clips[:, :before], clips[:, before:-1], clips[:, -1]
        b = len(clips)
        keys = torch.cat([clips[:, 0], tails, images]) if self.run.denoises else images
        tokens = self.module.tokens_of(keys)
        level = self.run.token_noise * torch.rand(len(tokens), 1, 1, generator=generator)
        noisy_tokens = tokens + (level * torch.randn(tokens.shape, generator=generator)).to(tokens)
        predicted = self.module.key_head(noisy_tokens)
        key_frame_error = functional.mse_loss(predicted, keys)
        if not self.run.denoises:
            return key_frame_error, {"key_frame_error": key_frame_error.detach()}
        kept = (torch.rand(b, generator=generator) >= self.run.drop_tokens).to(tokens)
        known = Known(
            tokens=rearrange(noisy_tokens[: 2 * b], "(two b) n d -> b two n d", two=2) * kept[:, None, None, None],
            key_latents=rearrange(predicted[: 2 * b].detach(), "(two b) c h w -> b two c h w", two=2)
            * kept[:, None, None, None, None],
            keys_mask=kept,
            context=context,
            context_mask=(torch.rand(b, generator=generator) >= self.run.drop_context).to(tokens),
        )
        denoising_loss = self.denoising_loss(clips, known, generator)
        total = denoising_loss if self.run.freeze_key_frames else denoising_loss + key_frame_error
        return total, {
            "key_frame_error": key_frame_error.detach(),
            "denoising_loss": denoising_loss.detach(),
        }

    def denoising_loss(self, clips: Tensor, known: Known, generator: torch.Generator) -> Tensor:
        """Mean squared error of the denoiser's prediction at random times; hidden context is zeroed by its mask."""
        known = replace(known, context=known.context * known.context_mask[:, None, None, None, None])
        noise = torch.randn(clips.shape, generator=generator).to(clips)
        noisy, timestep, target = noised(self.run.model.diffusion, clips, noise, generator)
        return functional.mse_loss(self.module.denoiser(noisy, timestep, known), target)

    def validate(self) -> tuple[dict[str, float], Image.Image]:
        """Key-frame error and PSNR, denoising loss with fixed noise; a sheet of real, key-head and rendered frames."""
        module, device = self.module, self.module.device
        if not self.run.freeze_key_frames:
            rows = self.rows[:: max(1, len(self.rows) // 2048)]
            module.fit_statistics([part.float().to(device) for part in self.latents[0, rows].split(64)])
        generator = generator_for(0, "validation")
        before = self.run.model.denoiser.context_frames
        clips = torch.stack([self.clip(v, 0.0) for v in self.validation.videos]).float()
        errors, psnrs, losses = [], [], []
        for part in clips.split(32):
            head, tail = part[:, before], part[:, -1]
            tokens = module.tokens_of(torch.cat([head, tail]).to(device))
            predicted = module.key_head(tokens)
            errors.append(functional.mse_loss(predicted[: len(part)].cpu(), head))
            psnrs.append(
                psnr_db(
                    module.first_stage.decode(predicted[: len(part)]).cpu(),
                    module.first_stage.decode(head.to(device)).cpu(),
                )
            )
            if self.run.denoises:
                pair = rearrange(tokens, "(two b) n d -> b two n d", two=2)
                known = module.known(pair, part[:, :before].to(device))
                losses.append(self.denoising_loss(part[:, before:-1].to(device), known, generator))
        metrics = {
            "key_frame_error": torch.stack(errors).mean().item(),
            "key_frame_psnr_db": torch.cat(psnrs).mean().item(),
        }
        if losses:
            metrics["denoising_loss"] = torch.stack(losses).mean().item()
        shown = clips[:: max(1, len(clips) // 8)][:8].to(device)
        return metrics, self.sheet(shown[:, before:])

    def sheet(self, clips: Tensor) -> Image.Image:
        """Three strips a clip: the frames through the first stage, through tokens and key-frame head, and rendered."""
        module = self.module
        keys = torch.cat([clips[:, 0], clips[:, -1]])
        pair = rearrange(module.tokens_of(keys), "(two b) n d -> b two n d", two=2)
        real = module.frames_of(clips[:, 0:-1:3])
        coarse = pixels_to_frames(module.first_stage.decode(module.key_head(pair[:, 0])))[:, None]
        columns = [real.cpu(), coarse.cpu()]
        if self.run.denoises:
            columns.append(next(module.decode(pair, seed=0))[:, ::3].cpu())
        rows = [rearrange(column, "b f h w c -> (b h) (f w) c") for column in columns]
        return Image.fromarray(torch.cat(rows, dim=1).numpy())

    def export(self, folder: Path) -> None:
        write_config(folder, {"tokenizer": self.module.save_pretrained(folder)})
