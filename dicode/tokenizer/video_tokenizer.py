"""Frames ⇄ deep tokens: the whole tokenizer, from key frames to rendered clips."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dicode.checkpoint import load_model, read_section, resolve
from dicode.checkpoint.saving import as_saved, save_weights
from dicode.config import config_to_dict
from dicode.seeds import SeedPlan, generator_for, normal, seed_of_clip
from dicode.shapes import (
    ClipLatents,
    ContextLatents,
    DeepTokens,
    Frames,
    FrameStack,
    ImageLatents,
    KeyFramePixels,
    KeyFrameTokens,
    MotionTokens,
)
from dicode.tokenizer.boundaries import blended_stream, key_frame_indices
from dicode.tokenizer.config import SamplingConfig, TokenizerConfig
from dicode.tokenizer.denoiser import ClipConditioning, build_denoiser, cross_faded, sample, scale_motion
from dicode.tokenizer.encoder import DECODER, FirstStage, LinearCode, Resampler
from dicode.tokenizer.learned_code import LearnedCode
from dicode.tokenizer.motion import MotionDecoder, MotionEncoder, limited
from dicode.video.timed import Video

WEIGHTS = "tokenizer.safetensors"
FIRST_STAGE_WEIGHTS = "first_stage.safetensors"


@dataclass(frozen=True)
class Draws:
    """How the clips of a stream are sampled."""

    sampling: SamplingConfig
    seed: int | SeedPlan
    sample_indices: Sequence[int] | None  # of the batch entries; None: 0, 1, …


class VideoTokenizer(nn.Module):
    """Deep tokens of key frames, and clips rendered from them."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        residual = config.denoiser.predict_residual
        if residual and config.objective != "flow":
            raise ValueError(f"predict_residual: expected the objective 'flow', got {config.objective!r}")
        if residual and (config.repeated_frames or not config.has_key_latents):
            raise ValueError(
                "predict_residual: needs key latents (no resampler), and the tail key frame after the clip"
            )
        if config.tail_frame not in (config.clip_frames, config.clip_frames - 1):
            raise ValueError(f"tail_frame: expected the clip's last frame or the one after it, got {config.tail_frame}")
        whole = config.first_stage.frames_a_latent
        if whole > 1 and ((config.clip_frames - 1) % whole or not config.repeated_frames or config.motion):
            raise ValueError(
                f"clip_frames: 'wan' codes {whole} n + 1 frames, both key frames among them, without motion tokens; "
                f"got {config.clip_frames}, tail_frame {config.tail_frame}"
            )
        if len({*config.frame_shape}) == 2 and (config.resampler is None or config.denoiser.kind != "wan"):
            raise ValueError(
                f"frame_width: expected {config.size}, got {config.frame_width}; only the denoiser 'wan' with a "
                "resampler renders frames that are not square"
            )
        if config.resampler is not None and config.code is not None:
            raise ValueError("code: expected none beside a resampler, which makes the tokens")
        self.config = config
        self.first_stage = FirstStage(config.first_stage).requires_grad_(False)
        tokens = config.tokens_per_keyframe, config.token_width
        if config.resampler is None:
            if config.code is None:
                self.linear_code = LinearCode(*tokens, config.first_stage.latent_channels, config.latent_size)
            else:
                self.learned_code = LearnedCode(config)
            self.code.requires_grad_(False)
        else:
            from dicode.tokenizer.library import image_encoder

            self.encoder = image_encoder(config.resampler.encoder)
            self.resampler = Resampler(config.resampler, *tokens)
        if config.motion:
            if config.clip_frames % 2 or config.latent_size % 2:
                raise ValueError("motion: needs an even number of frames and of latent positions a side")
            if config.motion.width % config.motion.heads:
                raise ValueError(f"motion: {config.motion.heads} heads do not divide a width of {config.motion.width}")
            self.motion_encoder = MotionEncoder(config)
        if config.expects_motion:
            self.motion_decoder = MotionDecoder(config)
        self.denoiser = build_denoiser(config)

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
        config = read_section(folder, "tokenizer", TokenizerConfig)
        return load_model(
            folder,
            lambda: cls(config),
            lambda tokenizer: {FIRST_STAGE_WEIGHTS: tokenizer.first_stage, WEIGHTS: TokenizerParts(tokenizer)},
            dtype,
        )

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Write the weights into a checkpoint folder; returns what belongs under "tokenizer" in its `config.json`."""
        save_weights(self.first_stage, Path(folder) / FIRST_STAGE_WEIGHTS, dtype)
        save_weights(TokenizerParts(self), Path(folder) / WEIGHTS, dtype)
        return config_to_dict(self.config)

    # frames → tokens

    @torch.no_grad()
    def encode(self, frames: FrameStack) -> DeepTokens:
        """uint8 frames `b f h w c` of the tokenizer's size and rate → deep tokens `b k n d`.

        A key frame's own come first, then the motion tokens of the clip that it ends: zeros for the first one.
        """
        return self.encode_at(frames, key_frame_indices(frames.shape[1], self.config.tail_frame))

    @torch.no_grad()
    def encode_at(self, frames: FrameStack, places: Sequence[int]) -> DeepTokens:
        """As `encode`, with key frames at these places. Of two that are nearer than a clip the later one is held."""
        tokens = self.tokens_of(self.source_of(self._pixels_of(frames[:, list(places)])))
        tokens = rearrange(tokens, "(b k) n d -> b k n d", b=len(frames))
        if self.config.motion is None or len(places) < 2:
            return self.with_motion(tokens)
        span, motion = torch.arange(self.config.clip_span), []
        for head, tail in pairwise(places):  # of a minute all frames at once would take gigabytes
            latents = self.first_stage.encode(self._pixels_of(frames[:, (head + span).clamp(max=tail)]))
            motion.append(self.motion_of(rearrange(latents, "(b f) ... -> b f ...", f=len(span))))
        return self.with_motion(tokens, torch.stack(motion, dim=1))

    @torch.no_grad()
    def encode_frames(self, frames: Video) -> DeepTokens:
        """Every frame, uint8 `f h w c` of the tokenizer's size, as a key frame of its own: tokens `1 f n d`."""
        pixels = self._pixels_of(torch.from_numpy(np.ascontiguousarray(frames))[None])
        return self.with_motion(self.tokens_of(self.source_of(pixels))[None])

    def with_motion(
        self, tokens: Float[Tensor, "b k own d"], motion: Float[Tensor, "b clips m d"] | None = None
    ) -> DeepTokens:
        """Tokens of k key frames, each followed by the motion tokens of the clip that it ends, k−1 in all; or zeros."""
        beside = tokens.new_zeros(*tokens.shape[:2], self.config.motion_tokens, tokens.shape[3])
        if motion is not None:
            beside[:, 1:] = motion
        return torch.cat([tokens, beside], dim=2)

    def motion_of(self, clips: ClipLatents) -> MotionTokens:
        """Latents of clips `b f c h w`, `TokenizerConfig.clip_span` frames each → motion tokens, with gradients."""
        keys = clips[:, [0, self.config.tail_frame]]
        return self.motion_encoder(clips[:, : self.config.clip_frames], keys)

    def _pixels_of(self, frames: FrameStack) -> Tensor:
        """uint8 frames `b f h w c` → pixels `(b f) c h w`; raises `ValueError` for a size not the tokenizer's."""
        expected = (*self.config.frame_shape, 3)
        if tuple(frames.shape[2:]) != expected:
            raise ValueError(f"expected frames of {expected}, got {tuple(frames.shape[2:])}; resize them first")
        return rearrange(frames, "b f h w c -> (b f) c h w").to(self.device).float() / 127.5 - 1

    def source_of(self, pixels: KeyFramePixels) -> Tensor:
        """What tokens are computed from, for pixels in −1…1: the first stage's latents, or the pixels themselves."""
        return self.first_stage.encode(pixels) if self.config.resampler is None else pixels

    def tokens_of(self, source: Tensor) -> KeyFrameTokens:
        """`source_of`, one key frame a batch entry → tokens, with gradients."""
        if self.config.resampler is None:
            return self.code.tokens(source)
        return self.resampler(self.encoder(source)).float()

    def token_hash(self, dtype: torch.dtype | None = None) -> str:
        """Sixteen hexadecimal digits: a hash of all weights that deep tokens depend on, as saved in `dtype`."""
        return hash_of_tokens(self.first_stage.state_dict(), TokenizerParts(self).state_dict(), dtype)

    def latent_hash(self) -> str:
        """As `token_hash`, of all weights that first-stage latents depend on."""
        return hash_of_tokens(self.first_stage.state_dict(), {})

    # tokens → frames

    def decode(self, tokens: DeepTokens, **options: Any) -> Iterator[FrameStack]:
        """Render k key frames' tokens `b k n d` as k−1 clips, each uint8 `b 16 h w c`; options as of `decode_pairs`."""
        if tokens.shape[1] < 2:
            raise ValueError(f"expected at least 2 key frames (one clip), got {tokens.shape[1]}")
        return self.decode_pairs((tokens[:, i : i + 2] for i in range(tokens.shape[1] - 1)), **options)

    def decode_pairs(
        self,
        pairs: Iterator[DeepTokens],
        *,
        sampling: SamplingConfig | None = None,
        seed: int | SeedPlan = 0,
        sample_indices: Sequence[int] | None = None,
        clips_at_once: int = 4,
        before: FrameStack | None = None,
        first_clip: int = 0,
    ) -> Iterator[FrameStack]:
        """A stream of (head, tail) token pairs `b 2 n d` → clips, uint8 `b 16 h w c`, one after the other.

        Where clips share a frame (see `TokenizerConfig`), all but the first come without it. `sampling` defaults to the
        tokenizer's own.

        Joins `chained` condition every clip on the last frames of the one before, the first clip on those of `before`
        (uint8 frames `b f h w c` of the tokenizer's size that end where the stream begins); a pair is drawn when its
        clip is asked for. `parallel` renders `clips_at_once` clips as one batch without context and blends their joins:
        at most `clips_at_once` + 1 pairs are drawn ahead of the output. `independent` does not blend. These two ignore
        `before`.

        A sample's noise depends on (seed, its sample index, clip number) only; the first clip's number is `first_clip`.
        Raises `ValueError` at the call for options out of range, and for `before` too short or of another size.
        """
        sampling = sampling or self.config.sampling
        draws = Draws(sampling, seed, sample_indices)
        if sampling.motion_tokens and not self.config.motion:
            raise ValueError("motion_tokens: this model has none; leave the option out")
        if sampling.joins == "parallel" and self.config.first_stage.frames_a_latent > 1:
            raise ValueError("joins: 'parallel' blends frames' latents; this model's hold four frames each")
        if sampling.steps == 0 and not self.config.has_key_latents:
            raise ValueError("steps: 0 is for models whose deep tokens decode to key frames; take 1 or more")
        for name, value, least in (("clips_at_once", clips_at_once, 1), ("first_clip", first_clip, 0)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        context = self.context_of(before) if before is not None and sampling.joins == "chained" else None
        clips = self._clips(enumerate(pairs, first_clip), context, draws, clips_at_once)
        if sampling.joins == "parallel":
            # with residual prediction a clip's first frame is exact, the key frame itself
            moves_later = not self.config.denoiser.predict_residual
            clips = blended_stream(clips, shares_frame=self.config.repeated_frames > 0, moves_later=moves_later)
        return self._frames_of_stream(clips, sampling.dead_band, None if before is None else before[:, -1])

    def render(self, pair: DeepTokens, sample_indices: Sequence[int]) -> ClipLatents:
        """The first-stage latents of the single clips that `decode` renders from head and tail tokens `b 2 n d`."""
        return self._render([pair], None, [0], Draws(self.config.sampling, 0, sample_indices))[0]

    def _frames_of_stream(
        self, clips: Iterator[ClipLatents], dead_band: float, last: Frames | None
    ) -> Iterator[FrameStack]:
        for position, latents in enumerate(clips):
            first = self.config.repeated_frames if position else 0
            with torch.no_grad():
                whole = self.config.first_stage.frames_a_latent > 1  # a clip is decoded as one
                frames = self.frames_of(latents)[:, first:] if whole else self.frames_of(latents[:, first:])
            if dead_band:
                frames = steadied(frames, dead_band, last)
                last = frames[:, -1]
            yield frames

    def _clips(
        self,
        numbered: Iterator[tuple[int, DeepTokens]],
        context: ContextLatents | None,
        draws: Draws,
        clips_at_once: int,
    ) -> Iterator[ClipLatents]:
        joins, frames = draws.sampling.joins, self.config.denoiser.context_frames
        while drawn := list(islice(numbered, clips_at_once if joins == "parallel" else 1)):
            clips, pairs = [clip for clip, _ in drawn], [pair for _, pair in drawn]
            if context is not None and len(context) != len(pairs[0]):
                raise ValueError(f"before: expected a batch of {len(pairs[0])}, as the tokens, got {len(context)}")
            rendered = self._render(pairs, context, clips, draws)
            if joins == "chained" and frames:
                context = self._context_after(rendered[-1])
            yield from rendered

    @torch.no_grad()
    def _render(
        self, pairs: list[DeepTokens], before: ContextLatents | None, clips: list[int], draws: Draws
    ) -> Sequence[ClipLatents]:
        """The latents of some clips, rendered as one batch of the denoiser; `before` is the context of every one."""
        config = self.config
        shape = (config.latent_frames, config.first_stage.latent_channels, *config.latent_shape)
        places = [
            (seed_of_clip(draws.seed, clip), i, clip)
            for clip, pair in zip(clips, pairs, strict=True)
            for i in draws.sample_indices or range(len(pair))
        ]
        noise = torch.stack([normal(shape, seed, "clip", i, clip) for seed, i, clip in places]).to(self.device)
        conditioning = self.conditioning(torch.cat(pairs).to(self.device), before, draws.sampling.motion_tokens)
        keys = [0, config.latent_frames - 1] if config.repeated_frames else [0]  # the key frames among a clip's latents
        if draws.sampling.steps == 0:
            return scale_motion(conditioning.expected, draws.sampling.motion_scale, keys).split([*map(len, pairs)])
        if draws.sampling.decoder_guidance != 1.0:
            conditioning = conditioning.with_null(self.null_tokens())
        latents = sample(
            config.objective,
            draws.sampling,
            partial(self.velocity, conditioning),
            noise,
            [generator_for(seed, "sampler", i, clip) for seed, i, clip in places],
            config.denoiser.time_shift,
        )
        if before is not None and config.first_stage.frames_a_latent > 1:
            latents[:, :1] = before  # it was given, not rendered
        return scale_motion(latents, draws.sampling.motion_scale, keys).split([*map(len, pairs)])

    def velocity(
        self, conditioning: ClipConditioning, noisy: ClipLatents, timestep: Tensor, until: Tensor
    ) -> ClipLatents:
        """The denoiser's prediction; of a flow map that of its jump from `timestep` to `until`."""
        ends = (until,) if self.config.denoiser.flow_map else ()
        return self.denoiser(noisy, timestep, conditioning, *ends)

    @torch.no_grad()
    def context_of(self, before: FrameStack) -> ContextLatents | None:
        """The context of a clip after these frames: the last ones' latents; None where the denoiser takes none."""
        frames = self.config.denoiser.context_frames
        if before.shape[1] < frames:
            raise ValueError(f"before: expected at least {frames} frames, the decoder's context, got {before.shape[1]}")
        if not frames:
            return None
        latents = self.first_stage.encode(self._pixels_of(before[:, -frames:]))
        return rearrange(latents, "(b f) c h w -> b f c h w", f=frames)

    @torch.no_grad()
    def _context_after(self, latents: ClipLatents) -> ContextLatents | None:
        """The context of the clip after this one: its last latents, or those of its last frames alone."""
        if self.config.first_stage.frames_a_latent > 1:
            return self.context_of(self.frames_of(latents))
        return latents[:, -self.config.denoiser.context_frames :]

    def conditioning(
        self, pair: DeepTokens, before: ContextLatents | None = None, motion_tokens: int | None = None
    ) -> ClipConditioning:
        """The conditioning of clips with these head and tail tokens `b 2 n d` and the latents `before` as context.

        Of the tail's motion tokens at most `motion_tokens` are read; there may be fewer.
        """
        b, own = len(pair), self.config.tokens_per_keyframe
        missing = own + self.config.motion_tokens - pair.shape[2]
        motion = nn.functional.pad(pair[:, 1, own:], (0, 0, 0, missing))
        pair, motion = pair[:, :, :own], limited(motion, motion_tokens)
        keys = rearrange(self.key_latents(rearrange(pair, "b two n d -> (b two) n d")), "(b two) ... -> b two ...", b=b)
        frames = self.config.denoiser.context_frames
        context = keys.new_zeros(b, frames, *keys.shape[2:]) if before is None else before
        given = keys.new_full((b,), float(before is not None))
        stride = keys.new_full((b,), self.config.denoiser.frame_stride)
        expected = self.expected(keys, motion)
        return ClipConditioning(pair, keys, keys.new_ones(b), context, given, stride, motion, expected)

    def expected(self, keys: Float[Tensor, "b two c h w"], motion: MotionTokens) -> ClipLatents:
        """Clips predicted from key latents and motion tokens `b m d`, without diffusion; without motion cross-fades."""
        if self.config.expects_motion:
            return self.motion_decoder(keys, motion)
        return cross_faded(keys, self.config.latent_frames)

    def frames_of(self, latents: ClipLatents) -> UInt8[Tensor, "b all py px 3"]:
        """First-stage latents of clips → uint8 frames."""
        pixels = self.first_stage.decode_clips(latents)
        if not pixels.isfinite().all():
            raise ValueError("rendered frames hold values that are not finite: the model's weights are damaged")
        return rearrange((pixels * 127.5 + 127.5).round().clamp(0, 255).byte(), "b f c h w -> b f h w c")

    def key_latents(self, tokens: KeyFrameTokens) -> ImageLatents:
        """The latents of single key frames: a preview without diffusion. Zeros where tokens do not give them back."""
        if self.config.has_key_latents:
            return self.code.latents(tokens[:, : self.config.tokens_per_keyframe])
        return tokens.new_zeros(len(tokens), self.config.first_stage.latent_channels, *self.config.latent_shape)

    def null_tokens(self) -> Float[Tensor, "1 n d"]:
        """In place of tokens that guidance drops: zeros, or the tokens of a mid-grey image, zeros in −1…1."""
        config = self.config
        if config.null_tokens == "zeros":
            return torch.zeros(1, config.tokens_per_keyframe, config.token_width, device=self.device)
        return self.tokens_of(self.source_of(torch.zeros(1, 3, *config.frame_shape, device=self.device)))

    @property
    def code(self) -> LinearCode | LearnedCode:
        """Of key frames, where there is no resampler."""
        return self.linear_code if self.config.code is None else self.learned_code

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.first_stage.latent_mean.device


def steadied(frames: FrameStack, band: float, last: Frames | None = None) -> FrameStack:
    """Frames in which a pixel keeps its colour until a channel differs from it by more than `band` grey levels.

    `last` is the frame before them. An image decoder changes pixels a little wherever something moves in the picture:
    by a quarter of a grey level a frame in those of `blocks` that stand still (docs/log.md).
    """
    shown = []
    for frame in frames.unbind(1):
        if last is not None:
            change = (frame.short() - last.to(frame).short()).abs().amax(-1, keepdim=True)
            frame = torch.where(change > band, frame, last.to(frame))
        shown.append(last := frame)
    return torch.stack(shown, dim=1)


class TokenizerParts(nn.ModuleDict):
    """The trained parts of a tokenizer without its first stage, under their own names: the content of one file."""

    def __init__(self, tokenizer: VideoTokenizer):
        super().__init__({name: part for name, part in tokenizer.named_children() if name != "first_stage"})


def hash_of_tokens(
    first_stage: Mapping[str, Tensor], parts: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> str:
    """`VideoTokenizer.token_hash`, of the states of a first stage and of `TokenizerParts`."""
    digest = hashlib.sha256()
    named = [(name, value) for name, value in first_stage.items() if not name.startswith(DECODER)]
    for part in ("linear_code.encode.", "learned_code.encode.", "encoder.", "resampler.", "motion_encoder."):
        named += [(name.removeprefix(part), value) for name, value in parts.items() if name.startswith(part)]
    for name, value in named:
        digest.update(name.encode() + as_saved(value.detach().cpu(), dtype).float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
