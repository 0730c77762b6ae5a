"""A denoiser, its conditioning, and the diffusion that trains and drives it.

    denoiser(noisy, timestep, conditioning) → a prediction of the latents' shape
    denoiser(noisy, timestep, conditioning, until) → of a flow map: the mean velocity from one time to an earlier one

`Hourglass` is a small convolution–transformer for two CPU cores: on 16×8×8 clips it trains 5 to 34 times as fast as
diffusers' networks of two to five times its size, because all its arithmetic is dense bf16 matrix products
(docs/log.md); those are in library.py. `DENOISERS` at the end of this file names all; docs/extend.md adds one.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from dicode.shapes import ClipLatents
from dicode.tokenizer.config import Objective, SamplingConfig, TokenizerConfig
from dicode.tokenizer.encoder import normal_start

Predict = Callable[[ClipLatents, Tensor, Tensor], ClipLatents]  # of latents, their timestep and the next one
UNTIL_SHARE = 0.25  # of a flow map's embedding of times: where a jump ends


@dataclass(frozen=True)
class ClipConditioning:
    """The denoiser's inputs beside noisy latents and time, a clip a batch entry."""

    tokens: Tensor  # b 2 n d: of the head and of the tail key frame; null tokens where dropped for guidance
    key_latents: Tensor  # b 2 c h w: the latents of both as the tokens give them back; zeros where dropped or none
    keys_mask: Tensor  # b: 1 where tokens and key latents are given, 0 where dropped
    context: Tensor  # b p c h w: the last p frames of the previous clip; zeros where absent
    context_mask: Tensor  # b: 1 where the context is given
    frame_stride: Tensor  # b: frames of the source video from one frame of the clip to the next, for `unet3d`
    motion: Tensor  # b m d: motion tokens; zeros where dropped
    expected: Tensor  # b f c h w: the clip by key latents and motion alone, `VideoTokenizer.expected`; zeros likewise

    def with_null(self, tokens: Tensor) -> "ClipConditioning":
        """These clips, then the same ones as guidance steers away from them: null tokens `1 n d`, no key latents."""
        null = replace(
            self,
            tokens=tokens.to(self.tokens).expand_as(self.tokens),
            motion=torch.zeros_like(self.motion),
            expected=torch.zeros_like(self.expected),
            key_latents=torch.zeros_like(self.key_latents),
            keys_mask=torch.zeros_like(self.keys_mask),
        )
        return ClipConditioning(*(torch.cat([getattr(own, f.name) for own in (self, null)]) for f in fields(self)))

    def channels(self, noisy: ClipLatents, config: TokenizerConfig) -> Tensor:
        """`noisy` with what else every frame has, as extra channels `b f channels y x`.

        Key-frame latents, context and its mask; with motion tokens the expected clip.
        """
        f, h, w = noisy.shape[1], *noisy.shape[-2:]
        parts = [noisy]
        if config.has_key_latents:
            parts.append(repeat(self.key_latents.to(noisy), "b two c h w -> b f (two c) h w", f=f))
        if config.denoiser.context_frames:
            parts.append(repeat(self.context.to(noisy), "b p c h w -> b f (p c) h w", f=f))
            parts.append(repeat(self.context_mask.to(noisy), "b -> b f 1 h w", f=f, h=h, w=w))
        if config.expects_motion:
            parts.append(self.expected.to(noisy))  # last, where a denoiser that began without it has zeros to grow from
        return torch.cat(parts, dim=2)


def input_channels(config: TokenizerConfig) -> int:
    """Channels of `ClipConditioning.channels`."""
    latents, frames = config.first_stage.latent_channels, config.denoiser.context_frames
    return latents * (1 + 2 * config.has_key_latents + frames + config.expects_motion) + bool(frames)


def cross_faded(keys: Tensor, frames: int) -> ClipLatents:
    """The simplest clip between head and tail latents `b 2 c h w`: frame i is i/f of the tail, the rest is head."""
    share = torch.arange(frames).to(keys)[:, None, None, None] / frames
    return (1 - share) * keys[:, :1] + share * keys[:, 1:]


def grid_positions(count: int, width: int) -> Tensor:
    """Starting values for `count` learned positions: a square grid's sine embedding, all grids over the same area."""
    side = round(count**0.5)
    if side * side != count or width % 4:
        return normal_start(count, width)
    steps = partial(torch.arange, device="cpu")  # arithmetic on a meta device imports sympy
    rates = 1 / 10_000 ** (steps(width // 4).double() / (width / 4))
    angles = torch.outer((steps(side) / (side / 8)).double(), rates)
    along = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    grid = torch.cat([along.repeat(side, 1), along.repeat_interleave(side, dim=0)], dim=1)
    return grid.to(torch.get_default_device())


def transformer(width: int, depth: int, heads: int) -> nn.TransformerEncoder:
    """A pre-norm transformer stack from torch, normalised at its end; no dropout."""
    layer = nn.TransformerEncoderLayer(
        width, heads, width * 4, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)


def build_denoiser(config: TokenizerConfig) -> nn.Module:
    """The denoiser of a tokenizer's configuration, with random weights."""
    if config.denoiser.flow_map and (config.denoiser.kind == "unet3d" or config.objective != "flow"):
        found = f"{config.denoiser.kind!r}, {config.objective!r}"
        raise ValueError(f"flow_map: expected 'hourglass' or 'wan', and 'flow', got {found}")
    if config.denoiser.fused_guidance != 1.0 and not config.denoiser.flow_map:
        raise ValueError("fused_guidance: for a flow map; set flow_map too")
    network = DENOISERS[config.denoiser.kind](config)
    return ResidualDenoiser(network, config.latent_frames) if config.denoiser.predict_residual else network


class ResidualDenoiser(nn.Module):
    """Any denoiser, trained on a clip's residual to the clip that is expected of its tokens. Flow matching only.

    That is the cross-fade of its key frames, or what motion tokens make of it. Flow matching is linear in the clip:
    subtract (1 − t)·expected from the input and −expected from the target, and both are of the residual alone.
    `deviation` is the residual's for each frame, measured on training clips, small near a key frame; input, output and
    a skip connection are scaled by it, so that the network's inputs and targets have unit variance at every time (the
    preconditioning of Karras et al. 2022, for flow matching). Near its key frame a frame is copied by construction,
    where a plain network has to learn 16 channels' identity. Where the key frames are dropped the residual is the clip,
    of deviation 1.
    """

    deviation: Tensor

    def __init__(self, network: nn.Module, frames: int):
        super().__init__()
        self.network = network
        self.register_buffer("deviation", torch.ones(frames))

    def forward(
        self, noisy: ClipLatents, timestep: Tensor, conditioning: ClipConditioning, *until: Tensor
    ) -> ClipLatents:
        """As `Hourglass.forward`."""
        expected = conditioning.expected.to(noisy)
        given = conditioning.keys_mask[:, None].to(noisy)
        deviation = (given * self.deviation + 1 - given)[..., None, None, None]
        t = (timestep / 1000).to(noisy)[:, None, None, None, None]
        share = 1 - t
        residual, faded = noisy - share * expected, share * deviation
        scale = (faded.square() + t.square()).rsqrt()
        skip = (t - faded * deviation) * scale.square()
        predicted = self.network(residual * scale, timestep, conditioning, *until)
        return skip * residual + deviation * scale * predicted - expected

    @torch.no_grad()
    def fit_deviation(self, clips: ClipLatents, expected: ClipLatents, smallest: float = 0.2) -> None:
        """Measure each frame's deviation from the clip that is expected, on clips `b f c h w`.

        `smallest` stands for the error of the key latents.
        """
        self.deviation.copy_((clips - expected).square().mean((0, 2, 3, 4)).sqrt().clamp_min(smallest))


class Hourglass(nn.Module):
    """Convolution blocks on every frame and position, around a transformer on a 2×2×2 coarser grid.

    The transformer attends jointly to all coarse positions, the deep tokens of both key frames and of motion, and the
    time.
    Layout is channels-last throughout: `b f h w c` in memory.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config, sizes = config, config.denoiser
        fine, coarse = sizes.fine_width, sizes.width
        channels, frames, size = config.first_stage.latent_channels, config.clip_frames, config.latent_size
        self.stem = nn.Conv2d(input_channels(config), fine, 3, padding=1)
        self.frame_positions = nn.Parameter(normal_start(frames, 1, 1, fine))
        self.time = nn.Sequential(nn.Linear(fine, fine), nn.SiLU(), nn.Linear(fine, fine))
        if sizes.flow_map:
            self.until = copy.deepcopy(self.time)
        self.time_token = nn.Linear(fine, coarse)
        self.down_blocks = nn.ModuleList(FineBlock(fine) for _ in range(sizes.fine_blocks))
        self.down = nn.Linear(fine * 8, coarse)
        self.positions = nn.Parameter(grid_positions((size // 2) ** 2, coarse).repeat(frames // 2, 1))
        self.moments = nn.Parameter(normal_start(frames // 2, 1, coarse, deviation=1.0))
        self.tokens = nn.Linear(config.token_width, coarse)
        self.token_positions = nn.Parameter(grid_positions(config.tokens_per_keyframe, coarse).repeat(2, 1, 1))
        self.token_moments = nn.Parameter(normal_start(2, 1, coarse, deviation=1.0))
        if config.motion:
            self.motion = nn.Linear(config.token_width, coarse)
            self.motion_places = nn.Parameter(normal_start(config.motion_tokens, coarse, deviation=1.0))
        self.blocks = transformer(coarse, sizes.depth, sizes.heads)
        self.up = nn.Linear(coarse, fine * 8)
        self.up_blocks = nn.ModuleList(FineBlock(fine) for _ in range(sizes.fine_blocks))
        self.norm = nn.LayerNorm(fine)
        self.out = nn.Conv2d(fine, channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.get_parameter("bias"))

    def forward(
        self, noisy: ClipLatents, timestep: Tensor, conditioning: ClipConditioning, until: Tensor | None = None
    ) -> ClipLatents:
        """Noisy latents `b f c h w`, timestep `b` in 0…1000 → prediction `b f c h w`, float32.

        Of a flow map the mean velocity from `timestep` to `until`; by default both are the same.
        """
        f = noisy.shape[1]
        h, w = (side // 2 for side in noisy.shape[-2:])
        noisy = noisy.to(self.frame_positions.dtype)
        width = self.config.denoiser.fine_width
        if self.config.denoiser.flow_map:
            ends = torch.cat([timestep, timestep if until is None else until])
            begins, ends = time_waves(ends, width).to(noisy).chunk(2)
            time = torch.lerp(self.time(begins), self.until(ends), UNTIL_SHARE)
        else:
            time = self.time(time_waves(timestep, width).to(noisy))
        x = frames_convolved(self.stem, rearrange(conditioning.channels(noisy, self.config), "b f c h w -> b f h w c"))
        x = x + self.frame_positions
        for block in self.down_blocks:
            x = block(x, time)
        coarse = self.down(rearrange(x, "b (f i) (h j) (w k) c -> b (f h w) (i j k c)", i=2, j=2, k=2))
        places = self.positions + self.moments.expand(-1, h * w, -1).flatten(0, 1)
        token_places = self.token_positions + self.token_moments
        tokens = rearrange(self.tokens(conditioning.tokens.to(noisy)) + token_places, "b two n c -> b (two n) c")
        if self.config.motion:
            tokens = torch.cat([tokens, self.motion(conditioning.motion.to(noisy)) + self.motion_places], dim=1)
        sequence = torch.cat([coarse + places, tokens, self.time_token(time)[:, None]], dim=1)
        coarse = self.up(self.blocks(sequence)[:, : coarse.shape[1]])
        x = x + rearrange(coarse, "b (f h w) (i j k c) -> b (f i) (h j) (w k) c", f=f // 2, h=h, w=w, i=2, j=2, k=2)
        for block in self.up_blocks:
            x = block(x, time)
        return rearrange(frames_convolved(self.out, self.norm(x)), "b f h w c -> b f c h w").float()


def time_waves(timestep: Tensor, width: int) -> Tensor:
    """Cosines and sines of timesteps `b` in 0…1000, `b width`, with periods from 2π to 20,000π (Ho et al. 2020)."""
    half = width // 2
    rates = torch.exp(-math.log(10_000) * torch.arange(half, device=timestep.device).float() / (half - 1))
    angles = timestep[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class FineBlock(nn.Module):
    """Residual: normalise, modulate by time, 3×3 convolution in space, 3-tap convolution in time."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.space = nn.Conv2d(width, width, 3, padding=1)
        self.frames = nn.Linear(3 * width, width)
        nn.init.zeros_(self.frames.weight)
        nn.init.zeros_(self.frames.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """`b f h w c` → the same."""
        scale, shift = self.modulation(time)[:, None, None, None].chunk(2, dim=-1)
        y = nn.functional.gelu(frames_convolved(self.space, self.norm(x) * (1 + scale) + shift))
        padded = nn.functional.pad(y, (0, 0, 0, 0, 0, 0, 1, 1))
        return x + self.frames(torch.cat([padded[:, :-2], y, padded[:, 2:]], dim=-1))


def frames_convolved(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A 2-D convolution on each frame of `b f h w c`, without leaving the channels-last layout."""
    y = convolution(rearrange(x, "b f h w c -> (b f) c h w"))
    return rearrange(y, "(b f) c h w -> b f h w c", f=x.shape[1])


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Shares of noise 0…1 moved towards 1, as larger pictures need it (Esser et al. 2024, arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def noised(
    objective: Objective, latents: ClipLatents, noise: ClipLatents, generator: torch.Generator, shift: float = 1.0
) -> tuple[ClipLatents, Tensor, ClipLatents]:
    """Latents at a random time: (noisy latents, timestep `b` in 0…1000, the denoiser's target)."""
    b = len(latents)
    if objective == "flow":
        sigma = shifted(torch.sigmoid(torch.randn(b, generator=generator)), shift).to(latents.device)
        mix = sigma[:, None, None, None, None]
        return (1 - mix) * latents + mix * noise, sigma * 1000, noise - latents
    from dicode.tokenizer.library import ddim_scheduler

    timesteps = torch.randint(0, 1000, (b,), generator=generator).to(latents.device)
    scheduler = ddim_scheduler(objective)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = noise if objective == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    return noisy, timesteps.float(), target


def sample(
    objective: Objective,
    sampling: SamplingConfig,
    predict: Predict,
    noise: ClipLatents,
    generators: list[torch.Generator] | None = None,
    shift: float = 1.0,
) -> ClipLatents:
    """Noise → clean latents, by a scheduler of `diffusers`, or in equal Euler steps, which are a flow map's jumps too.

    With a guidance other than 1 `predict` gets all latents twice in a row, for conditional and null predictions; the
    prediction is null + guidance·(conditional − null) (Ho & Salimans 2022), its deviation pulled back by
    `guidance_rescale` (Lin et al. 2024, section 3.4).
    """

    def guided(latents: ClipLatents, timestep: Tensor, until: Tensor) -> ClipLatents:
        if sampling.decoder_guidance == 1.0:
            return predict(latents, timestep, until)
        conditional, null = predict(*(torch.cat([own, own]) for own in (latents, timestep, until))).chunk(2)
        prediction = null + sampling.decoder_guidance * (conditional - null)
        if sampling.guidance_rescale == 0.0:
            return prediction
        axes = tuple(range(1, prediction.ndim))
        ratio = conditional.std(axes, keepdim=True) / prediction.std(axes, keepdim=True)
        return prediction * (sampling.guidance_rescale * ratio + 1 - sampling.guidance_rescale)

    latents = sampling.decoder_temperature * noise
    if objective == "flow":  # Euler steps through equally spaced times, from 1 to 0
        sigmas = shifted(torch.linspace(1, 0, sampling.steps + 1, dtype=torch.float64), shift).float()
        for sigma, following in pairwise(sigmas):
            times = ((own * 1000).expand(len(latents)).to(noise) for own in (sigma, following))
            latents = latents + (following - sigma).to(noise) * guided(latents, *times)
        return latents
    from dicode.tokenizer.library import ddim_scheduler

    scheduler = ddim_scheduler(objective)
    scheduler.set_timesteps(sampling.steps, device=noise.device)
    for timestep in scheduler.timesteps:
        time = timestep.expand(len(latents)).to(noise)
        prediction = guided(latents, time, time)
        latents = scheduler.step(prediction, timestep, latents, eta=sampling.eta, generator=generators).prev_sample
    return latents


def scale_motion(clips: ClipLatents, scale: float, keys: list[int]) -> ClipLatents:
    """Move every frame of clips `b f c h w` away from its clip's mean, `scale` times as far; key frames stay.

    A denoiser uncertain about what happens between key frames renders frames that are too similar. Latents are
    normalised, so that one factor, measured on training clips, restores their variance over time (studies/motion).
    """
    if scale == 1.0:
        return clips
    scaled = torch.lerp(clips.mean(1, keepdim=True), clips, scale)
    scaled[:, keys] = clips[:, keys]
    return scaled


def _unet3d(config: TokenizerConfig) -> nn.Module:
    from dicode.tokenizer.library import UNet3D

    return UNet3D(config)


def _wan(config: TokenizerConfig) -> nn.Module:
    from dicode.tokenizer.wan import Wan

    return Wan(config)


DENOISERS: dict[str, Callable[[TokenizerConfig], nn.Module]] = {"hourglass": Hourglass, "unet3d": _unet3d, "wan": _wan}
