"""The configuration of a tokenizer, as plain values: importing it needs no torch, so that help comes at once."""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, get_args

from dicode.config import (
    Depth,
    Factor,
    Guidance,
    Items,
    Range,
    Share,
    Side,
    Steps,
    StepsOrNone,
    UpTo1000,
    Whole,
    Width,
    check_ranges,
)

Widths = Annotated[tuple[Width, ...], Items(1, 8)]
Depths = Annotated[tuple[Depth, ...], Items(1, 8)]
Joins = Literal["chained", "parallel", "independent"]
DenoiserName = Literal["hourglass", "unet3d", "wan"]  # the keys of `denoiser.DENOISERS`
# `flow`: flow matching with logit-normal times. `v_prediction`: the published schedule, of zero terminal SNR.
# `epsilon`: the same schedule before it is rescaled to zero terminal SNR; DynamiCrafter-256 was trained so.
Objective = Literal["flow", "v_prediction", "epsilon"]


@dataclass(frozen=True)
class FirstStageConfig:
    """`tiny` is diffusers' AutoencoderTiny, `kl` its AutoencoderKL; `channels` lists the widths from fine to coarse.

    `wan` is its AutoencoderKLWan, which codes a clip as a whole: a latent for the first frame, then one every four.
    `wan22` is the same as Wan 2.2 has it: residual, of patches of 2×2 pixels.
    """

    kind: Literal["tiny", "kl", "wan", "wan22"] = "tiny"
    channels: Widths = (64, 64, 64, 64)
    latent_channels: Width = 16
    encoder_blocks: Depths = (0, 2, 2, 3)
    decoder_blocks: Depths = (3, 2, 2, 1)
    decoder_width: Width | None = None  # `wan22`: of its decoder, where the encoder has the first of `channels`

    @property
    def downsampling(self) -> int:
        """Image pixels a latent position spans, along each side."""
        return 2 ** (len(self.channels) - 1 + (self.kind == "wan22"))

    @property
    def frames_a_latent(self) -> int:
        """Frames that a latent holds, but for the first, which is of one."""
        return 4 if self.kind in ("wan", "wan22") else 1


@dataclass(frozen=True)
class EncoderConfig:
    """A vision tower of CLIP or SigLIP, frozen; the defaults are those of the published ViT-H/14."""

    width: Width = 1280
    depth: Depth = 32
    heads: Width = 16
    size: Side = 224  # of the image, in pixels
    patch: Side = 14
    kind: Literal["clip", "siglip"] = "clip"
    feed_forward: Width | None = None  # `siglip`: between the two layers of a block; None: four times its width


@dataclass(frozen=True)
class ResamplerConfig:
    """Deep tokens from the features of `encoder`, by a Perceiver resampler; the defaults are the published ones."""

    width: Width = 1024
    depth: Depth = 4
    heads: Width = 12
    head_width: Width = 64
    feedforward_factor: Annotated[int, Range(1, 64)] = 4
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


@dataclass(frozen=True)
class CodeConfig:
    """A learned code of key frames: a transformer from first-stage latents to tokens, and one back."""

    width: Width = 160
    depth: Depth = 3
    heads: Width = 5


@dataclass(frozen=True)
class MotionConfig:
    """Motion tokens: what happens in a clip between its two key frames (docs/motion-tokens.md)."""

    tokens: Annotated[int, Range(1, 256)] = 16  # of a clip, as wide as a key frame's; any first ones of them decode
    width: Width = 192  # of the transformers that compute them from a clip's latents, and the clip from them
    depth: Depth = 3
    heads: Width = 6


@dataclass(frozen=True)
class DenoiserConfig:
    """Which network, and its sizes; a network reads only the fields that name it.

    `context_frames` of the clip before, and key latents where there are any, are extra input channels of every network.
    """

    kind: DenoiserName = "hourglass"
    context_frames: Annotated[int, Range(0, 256)] = 2
    predict_residual: bool = False  # predict the difference from the expected clip (`ResidualDenoiser`)
    flow_map: bool = False  # `hourglass`, `wan`: jumps to any earlier time, for few steps (dicode.train.flow_map)
    fused_guidance: Annotated[float, Range(1, 1000)] = 1.0  # that a flow map has learnt, and sampling need not add
    depth: Depth = 2  # transformer blocks; `unet3d`: residual layers a level
    heads: Width = 4  # of attention; `unet3d`: at its finest level
    width: Width = 224  # `hourglass`: of the transformer
    fine_width: Width = 128  # `hourglass`: of the convolutions around it
    fine_blocks: Depth = 3  # `hourglass`: on either side
    channels: Widths = (320, 640, 1280, 1280)  # `unet3d`: fine to coarse
    text_width: Width = 1024  # `unet3d`, `wan`: of the null text's tokens
    text_tokens: Width = 77  # `unet3d`, `wan`
    feed_forward: Width | None = None  # `wan`: between the two layers of a block; None: four times its width
    time_shift: Annotated[float, Range(0, 100, above=True)] = 1.0  # of a flow's times, towards noise: see `shifted`
    frame_stride: Annotated[int, Range(1, 256)] = 6  # `unet3d`: of clips at the tokenizer's own rate; public demos: 6


@dataclass(frozen=True)
class SamplingConfig:
    """How a video is sampled: fields of the language model, then of the decoder.

    A checkpoint holds one in its tokenizer's configuration, the default for what a caller leaves out. Raises
    `ValueError` that names a field out of its range.
    """

    guidance: Guidance = 1.0  # of the language model against the null prompt; 1: the plain conditional
    variance_scale: Factor = 1.0  # of the next deep token's distribution, or of a flow's first noise; 0: the mean
    first_variance_scale: Factor | None = None  # the same for the first key frame; None: as for the others
    temperature: Factor = 1.0  # of the choice between the mixture's components; 0: the likeliest
    flow_steps: Steps = 8  # Euler steps of the flow head
    context_key_frames: Whole = 0  # most key frames in the language model's sequence, for any length; 0: no limit
    steps: StepsOrNone = 12  # of the denoiser a clip; 0: the expected clip (`VideoTokenizer.expected`)
    decoder_guidance: Guidance = 1.0  # of the denoiser against null tokens
    decoder_temperature: Factor = 1.0  # of its noise; below 1 clips are more consistent and move less
    guidance_rescale: Share = 0.0  # pulls the deviation of a guided prediction back; published: 0.7
    eta: Share = 0.0  # DDIM's noise; published: 1.0
    motion_scale: Factor = 1.0  # factor on each frame's distance from its clip's mean: `scale_motion`
    dead_band: Factor = 0.0  # grey levels by which a pixel has to change to change at all: what stands still is still
    joins: Joins = "chained"
    motion_tokens: Whole | None = None  # most a clip, that are written and rendered from; None: all that there are

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.joins not in get_args(Joins):
            raise ValueError(f"joins: expected one of {', '.join(get_args(Joins))}, got {self.joins!r}")

    def changed(self, **options: object) -> "SamplingConfig":
        """With these fields changed; None leaves a field. Raises `ValueError` for one that does not exist."""
        names = self.__dataclass_fields__.keys()
        if unknown := options.keys() - names:
            raise ValueError(f"unknown options {sorted(unknown)}; known: {list(names)}")
        return replace(self, **{name: value for name, value in options.items() if value is not None})  # type: ignore[arg-type]


@dataclass(frozen=True)
class TokenizerConfig:
    """Every part of a tokenizer, and the clip it works on.

    A clip of ours is frames 0…15 between key frames at 0 and 16, the next clip's first. Published: `tail_frame` 15, so
    that both key frames are the clip's own and the next clip begins with the same frame again (output once).
    """

    size: Side = 64  # of frames in pixels; their height, where `frame_width` is given
    frame_width: Side | None = None  # `wan` with a resampler: of frames that are not square; None: as `size`
    fps: UpTo1000 = 8.0
    clip_frames: Annotated[int, Range(2, 4096)] = 16
    tail_frame: Annotated[int, Range(1, 4096)] = 16  # where a clip's tail key frame lies: `clip_frames`, or one less
    null_tokens: Literal["zeros", "grey_image"] = "zeros"  # guidance steers away from them; published: of mid-grey
    tokens_per_keyframe: Width = 16
    token_width: Width = 32
    first_stage: FirstStageConfig = field(default_factory=FirstStageConfig)
    # of pixels, as published, trained with the denoiser; None: a code of latents, which also decodes them
    resampler: ResamplerConfig | None = None
    code: CodeConfig | None = None  # None: the linear one
    motion: MotionConfig | None = None  # published: none
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    objective: Objective = "flow"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # the defaults of generation

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Height and width of frames in pixels."""
        return self.size, self.frame_width or self.size

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Latent positions along the height and along the width."""
        height, width = self.frame_shape
        return height // self.first_stage.downsampling, width // self.first_stage.downsampling

    @property
    def latent_size(self) -> int:
        """Latent positions along a side of a square frame."""
        return self.size // self.first_stage.downsampling

    @property
    def latent_frames(self) -> int:
        """Latents of a clip."""
        return 1 + (self.clip_frames - 1) // self.first_stage.frames_a_latent

    @property
    def motion_tokens(self) -> int:
        """Motion tokens of a clip."""
        return 0 if self.motion is None else self.motion.tokens

    @property
    def block_tokens(self) -> int:
        """Tokens of a key frame and of the motion that leads to it from the one before."""
        return self.tokens_per_keyframe + self.motion_tokens

    @property
    def has_key_latents(self) -> bool:
        """Whether deep tokens decode to their key frame's latents, which are then extra channels of the denoiser."""
        return self.resampler is None

    @property
    def expects_motion(self) -> bool:
        """Whether motion tokens and key latents give a clip without diffusion (`MotionDecoder`)."""
        return self.motion is not None and self.has_key_latents

    @property
    def clip_s(self) -> float:
        """Seconds from one key frame to the next."""
        return self.tail_frame / self.fps

    @property
    def clip_span(self) -> int:
        """Frames of a clip and its tail key frame, where that comes after them."""
        return max(self.clip_frames, self.tail_frame + 1)

    @property
    def repeated_frames(self) -> int:
        """Frames at a clip's start that are also the end of the clip before it."""
        return self.clip_frames - self.tail_frame

    def num_clips(self, frames: int) -> int:
        """Clips that hold a video of this many frames."""
        return max(1, math.ceil((frames - self.repeated_frames) / self.tail_frame))
