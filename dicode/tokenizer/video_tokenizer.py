"""Frames ⇄ deep tokens: the whole tokenizer, from key frames to rendered clips."""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dicode.hub import (
    CheckpointError,
    cast_parameters,
    config_from_dict,
    config_to_dict,
    load_weights,
    read_config,
    resolve,
    save_weights,
    without_initialisation,
)
from dicode.seeds import generator_for, normal
from dicode.shapes import (
    ClipLatents,
    ContextLatents,
    DeepTokens,
    FrameStack,
    ImageLatents,
    KeyFramePixels,
    KeyFrameTokens,
)
from dicode.tokenizer.denoiser import build_denoiser
from dicode.tokenizer.diffusion import DiffusionConfig, sample
from dicode.tokenizer.encoder import EncoderConfig, KeyFrameHead, build_encoder
from dicode.tokenizer.first_stage import DECODER, FirstStage, FirstStageConfig
from dicode.tokenizer.known import DenoiserConfig, Known
from dicode.tokenizer.resampler import Resampler, ResamplerConfig
from dicode.video.clips import key_frame_indices

WEIGHTS = "tokenizer.safetensors"
FIRST_STAGE_WEIGHTS = "first_stage.safetensors"


@dataclass(frozen=True)
class TokenizerConfig:
    """Every part of a tokenizer, and the clip it works on.

    A clip of ours is frames 0…15 between key frames at 0 and 16, the next clip's first. Published: `tail_frame` 15, so
    that both key frames are the clip's own and the next clip begins with the same frame again (shown once).
    """

    size: int = 64
    fps: float = 8.0
    clip_frames: int = 16
    tail_frame: int = 16  # where a clip's tail key frame lies: `clip_frames`, or one less
    null_image: Literal["none", "black"] = "none"  # whose tokens guidance steers away from; none: zeros
    key_head_width: int = 192
    key_head_depth: int = 3
    first_stage: FirstStageConfig = field(default_factory=FirstStageConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    resampler: ResamplerConfig = field(
        default_factory=lambda: ResamplerConfig(
            width=192,
            depth=2,
            heads=3,
            head_width=64,
            queries=16,
            feature_width=192,
            features=64,
            token_width=32,
            grid_queries=True,
        )
    )
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    steps: int = 12  # sampling steps where the caller names none
    guidance: float = 1.0
    temperature: float = 1.0  # of the noise a clip starts from: below 1 clips hold together better and move less

    @property
    def latent_size(self) -> int:
        """Latent positions along a side."""
        return self.size // self.first_stage.downsampling

    @property
    def clip_s(self) -> float:
        """Seconds from one key frame to the next."""
        return self.tail_frame / self.fps

    @property
    def repeated_frames(self) -> int:
        """Frames at a clip's start that the clip before it has shown."""
        return self.clip_frames - self.tail_frame

    def num_clips(self, frames: int) -> int:
        """Clips that hold a video of this many frames."""
        return max(1, math.ceil((frames - self.repeated_frames) / self.tail_frame))


class VideoTokenizer(nn.Module):
    """Deep tokens of key frames, and clips rendered from them."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        if config.denoiser.predicts_change and config.diffusion.objective != "flow":
            raise ValueError("predicts_change: only the objective 'flow' is linear in the clip, found v_prediction")
        if config.tail_frame not in (config.clip_frames, config.clip_frames - 1):
            raise ValueError(f"tail_frame: expected the clip's last frame or the one after it, got {config.tail_frame}")
        if config.denoiser.predicts_change and (config.repeated_frames or not config.denoiser.uses_key_latents):
            raise ValueError("predicts_change: needs key latents, and the tail key frame after the clip")
        self.config = config
        n, d = config.resampler.queries, config.resampler.token_width
        channels = config.first_stage.latent_channels
        self.first_stage = FirstStage(config.first_stage).requires_grad_(False)
        self.encoder = build_encoder(config.encoder)
        self.resampler = Resampler(config.resampler)
        # Token statistics: BatchNorm without affine part is a running mean and deviation a token place and dimension
        self.normalizer = nn.BatchNorm1d(n * d, affine=False, momentum=0.01)
        self.key_head = (
            KeyFrameHead(n, d, channels, config.latent_size, config.key_head_width, config.key_head_depth, 3)
            if config.denoiser.uses_key_latents
            else None
        )
        self.denoiser = build_denoiser(config.denoiser, channels, n, d, config.clip_frames, config.latent_size)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "VideoTokenizer":
        """Load what `DiCoDe.from_pretrained` takes; strict, in eval mode, parameters of `dtype` (default: float32).

        Frames, tokens, latents and statistics are float32 whatever the parameters are.
        """
        folder = resolve(name_or_folder, revision)
        sections = read_config(folder)
        if "tokenizer" not in sections:
            raise CheckpointError(f"{folder}/config.json: no section 'tokenizer'; it has {sorted(sections)}")
        config = config_from_dict(TokenizerConfig, sections["tokenizer"], f"{folder}/config.json: tokenizer")
        with without_initialisation():
            tokenizer = cls(config)
        cast_parameters(tokenizer, dtype)
        load_weights(tokenizer.first_stage, folder / FIRST_STAGE_WEIGHTS)
        load_weights(TokenizerParts(tokenizer), folder / WEIGHTS)
        return tokenizer.eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Write the weights into a checkpoint folder; returns what belongs under "tokenizer" in its `config.json`."""
        save_weights(self.first_stage, Path(folder) / FIRST_STAGE_WEIGHTS, dtype)
        save_weights(TokenizerParts(self), Path(folder) / WEIGHTS, dtype)
        return config_to_dict(self.config)

    # frames → tokens

    @torch.no_grad()
    def encode(self, frames: FrameStack) -> DeepTokens:
        """uint8 frames `b f h w c` of the tokenizer's size and rate → normalised deep tokens `b k n d`."""
        expected = (self.config.size, self.config.size, 3)
        if tuple(frames.shape[2:]) != expected:
            raise ValueError(f"expected frames of {expected}, got {tuple(frames.shape[2:])}; resize them first")
        keys = frames[:, key_frame_indices(frames.shape[1], self.config.tail_frame)]
        pixels = rearrange(keys, "b k h w c -> (b k) c h w").to(self.device).float() / 127.5 - 1
        return rearrange(self.tokens_of(self.source_of(pixels)), "(b k) n d -> b k n d", b=len(frames))

    def source_of(self, pixels: KeyFramePixels) -> Tensor:
        """What the encoder reads of pixels in −1…1: the first stage's latents, or the pixels themselves."""
        return self.first_stage.encode(pixels) if self.config.encoder.reads_latents else pixels

    def tokens_of(self, source: Tensor) -> KeyFrameTokens:
        """What the encoder reads, one key frame a batch entry → normalised tokens, with gradients."""
        tokens = self.resampler(self.encoder(source)).float()
        return self.normalizer(tokens.flatten(1)).view_as(tokens)

    def token_hash(self, dtype: torch.dtype | None = None) -> str:
        """Sixteen hexadecimal digits that stand for all weights which decide what the deep tokens of a frame are.

        With a `dtype`, of these weights as saved in it.
        """
        return hash_of_tokens(self.first_stage.state_dict(), TokenizerParts(self).state_dict(), dtype)

    @torch.no_grad()
    def fit_statistics(self, sources: Sequence[Tensor]) -> None:
        """Set mean and deviation of the tokens from what the encoder reads of training frames, batch by batch.

        The running estimate lags behind the weights, and behind their average more so; what is saved must not.
        """
        tokens = torch.cat([self.resampler(self.encoder(source)).float().flatten(1) for source in sources])
        mean, variance = self.normalizer.running_mean, self.normalizer.running_var
        assert mean is not None and variance is not None  # BatchNorm has both unless told not to track
        mean.copy_(tokens.mean(0))
        variance.copy_(tokens.var(0))

    # tokens → frames

    def decode(
        self,
        tokens: DeepTokens,
        *,
        seed: int = 0,
        sample_indices: Sequence[int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        joins: Literal["chained", "parallel"] = "chained",
    ) -> Iterator[FrameStack]:
        """Render N key frames' tokens `b k n d` as k−1 clips, each uint8 `b 16 h w c`, one after the other.

        Where clips share a frame (see `TokenizerConfig`), all but the first come without it.

        `chained` gives every clip the last frames of the one before as clean context. A sample's noise depends on
        (seed, its sample index, clip number) only.
        """
        if tokens.shape[1] < 2:
            raise ValueError(f"expected at least 2 key frames (one clip), got {tokens.shape[1]}")
        pairs = (tokens[:, i : i + 2] for i in range(tokens.shape[1] - 1))
        return self.decode_pairs(
            pairs,
            seed=seed,
            sample_indices=sample_indices,
            steps=steps,
            guidance=guidance,
            temperature=temperature,
            joins=joins,
        )

    def decode_pairs(
        self,
        pairs: Iterator[DeepTokens],
        *,
        seed: int = 0,
        sample_indices: Sequence[int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        joins: Literal["chained", "parallel"] = "chained",
    ) -> Iterator[FrameStack]:
        """As `decode`, from a stream of (head, tail) token pairs `b 2 n d`; draws the next pair only when asked."""
        steps = self.config.steps if steps is None else steps
        guidance = self.config.guidance if guidance is None else guidance
        temperature = self.config.temperature if temperature is None else temperature
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        if temperature < 0:
            raise ValueError(f"temperature of the decoder: expected 0 or more, got {temperature}")
        if joins not in ("chained", "parallel"):
            raise ValueError(f"joins: expected 'chained' or 'parallel', got {joins!r}")
        return self._decode_pairs(pairs, seed, sample_indices, steps, guidance, temperature, joins == "chained")

    def _decode_pairs(
        self,
        pairs: Iterator[DeepTokens],
        seed: int,
        sample_indices: Sequence[int] | None,
        steps: int,
        guidance: float,
        temperature: float,
        chained: bool,
    ) -> Iterator[FrameStack]:
        before: ContextLatents | None = None
        for clip, pair in enumerate(pairs):
            with torch.no_grad():
                indices = sample_indices or range(len(pair))
                latents = self._render(pair.to(self.device), before, seed, indices, clip, steps, guidance, temperature)
                if chained and self.config.denoiser.context_frames:
                    before = latents[:, -self.config.denoiser.context_frames :]
                yield self.frames_of(latents[:, self.config.repeated_frames if clip else 0 :])

    def _render(
        self,
        pair: DeepTokens,
        before: ContextLatents | None,
        seed: int,
        indices: Sequence[int],
        clip: int,
        steps: int,
        guidance: float,
        temperature: float,
    ) -> ClipLatents:
        config = self.config
        side = config.latent_size
        shape = (config.clip_frames, config.first_stage.latent_channels, side, side)
        noise = torch.stack([normal(shape, seed, "clip", i, clip) for i in indices]).to(self.device)
        known = self.known(pair, before)
        null = dataclasses.replace(
            known,
            tokens=self.null_tokens().to(known.tokens).expand_as(known.tokens),
            key_latents=torch.zeros_like(known.key_latents),
            keys_mask=torch.zeros_like(known.keys_mask),
        )
        return sample(
            config.diffusion,
            lambda latents, timestep: self.denoiser(latents, timestep, known),
            None if guidance == 1.0 else lambda latents, timestep: self.denoiser(latents, timestep, null),
            temperature * noise,
            steps,
            guidance,
            [generator_for(seed, "sampler", i, clip) for i in indices],
        )

    def known(self, pair: DeepTokens, before: ContextLatents | None = None) -> Known:
        """What the denoiser is told about clips with these head and tail tokens `b 2 n d` and these frames before."""
        b = len(pair)
        keys = rearrange(self.key_latents(rearrange(pair, "b two n d -> (b two) n d")), "(b two) ... -> b two ...", b=b)
        frames = self.config.denoiser.context_frames
        context = keys.new_zeros(b, frames, *keys.shape[2:]) if before is None else before
        return Known(pair, keys, keys.new_ones(b), context, keys.new_full((b,), float(before is not None)))

    def frames_of(self, latents: ClipLatents) -> FrameStack:
        """First-stage latents of clips → uint8 frames."""
        pixels = self.first_stage.decode(rearrange(latents, "b f c h w -> (b f) c h w"))
        frames = (pixels * 127.5 + 127.5).round().clamp(0, 255).byte()
        return rearrange(frames, "(b f) c h w -> b f h w c", b=len(latents))

    def key_latents(self, tokens: KeyFrameTokens) -> ImageLatents:
        """The coarse latents of single key frames: a preview without diffusion. Zeros where no head predicts them."""
        if self.key_head is None:
            side = self.config.latent_size
            return tokens.new_zeros(len(tokens), self.config.first_stage.latent_channels, side, side)
        return self.key_head(tokens)

    def null_tokens(self) -> Float[Tensor, "1 n d"]:
        """What the denoiser sees in place of tokens that guidance drops: zeros, or the tokens of a black image."""
        resampler, size = self.config.resampler, self.config.size
        if self.config.null_image == "none":
            return torch.zeros(1, resampler.queries, resampler.token_width, device=self.device)
        return self.tokens_of(self.source_of(torch.full((1, 3, size, size), -1.0, device=self.device)))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.first_stage.latent_mean.device


class TokenizerParts(nn.Module):
    """The trained parts of a tokenizer without its first stage, under their own names: the content of one file."""

    def __init__(self, tokenizer: VideoTokenizer):
        super().__init__()
        self.encoder = tokenizer.encoder
        self.resampler = tokenizer.resampler
        self.normalizer = tokenizer.normalizer
        self.key_head = tokenizer.key_head
        self.denoiser = tokenizer.denoiser


def hash_of_tokens(
    first_stage: Mapping[str, Tensor], parts: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> str:
    """`VideoTokenizer.token_hash`, of the states of a first stage and of `TokenizerParts`."""
    digest = hashlib.sha256()
    named = [(name, value) for name, value in first_stage.items() if not name.startswith(DECODER)]
    for part in ("encoder.", "resampler.", "normalizer."):
        named += [(name.removeprefix(part), value) for name, value in parts.items() if name.startswith(part)]
    for name, value in named:
        saved = value.to(dtype) if dtype and value.is_floating_point() else value
        digest.update(name.encode() + saved.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
