"""Denoisers behind one interface: noisy clip latents, time and conditioning → a prediction of the latents' shape.

    denoiser(noisy, timestep, conditioning)

`UNet3D` is the published network (diffusers' UNet3DConditionModel), `Hourglass` a small convolution–transformer for two
CPU cores: on 16×8×8 clips it trains 5 to 34 times as fast as diffusers' networks of two to five times its size, because
all its arithmetic is dense bf16 matrix products (docs/log.md). `DENOISERS` at the end of this file names every
denoiser; docs/extend.md adds one.
"""

from collections.abc import Callable

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import get_timestep_embedding
from einops import rearrange
from torch import Tensor, nn

from dicode.shapes import ClipLatents
from dicode.tokenizer.conditioning import ClipConditioning, cross_faded, input_channels
from dicode.tokenizer.config import TokenizerConfig
from dicode.tokenizer.encoder import grid_positions, transformer
from dicode.tokenizer.unet3d import UNet3D


def build_denoiser(config: TokenizerConfig) -> nn.Module:
    """The denoiser of a tokenizer's configuration, with random weights."""
    network = DENOISERS[config.denoiser.kind](config)
    return ResidualDenoiser(network, config.clip_frames) if config.denoiser.predict_residual else network


class ResidualDenoiser(nn.Module):
    """Any denoiser, trained on a clip's residual to the cross-fade of its key frames. Flow matching only.

    Flow matching is linear in the clip: subtract (1 − t)·fade from the input and −fade from the target, and both are of
    the residual alone. `deviation` is the residual's for each frame, measured on training clips, small near a key
    frame; input, output and a skip connection are scaled by it, so that the network's inputs and targets have unit
    variance at every time (the preconditioning of Karras et al. 2022, for flow matching). Near its key frame a frame is
    copied by construction, where a plain network has to learn 16 channels' identity. Where the key frames are dropped
    the residual is the clip, of deviation 1.
    """

    deviation: Tensor

    def __init__(self, network: nn.Module, frames: int):
        super().__init__()
        self.network = network
        self.register_buffer("deviation", torch.ones(frames))

    def forward(self, noisy: ClipLatents, timestep: Tensor, conditioning: ClipConditioning) -> ClipLatents:
        """As `Hourglass.forward`."""
        fade = cross_faded(conditioning.key_latents, noisy.shape[1]).to(noisy)
        given = conditioning.keys_mask[:, None].to(noisy)
        deviation = (given * self.deviation + 1 - given)[..., None, None, None]
        t = (timestep / 1000).to(noisy)[:, None, None, None, None]
        residual = noisy - (1 - t) * fade
        variance = ((1 - t) * deviation).square() + t.square()
        skip = (t - (1 - t) * deviation.square()) / variance
        predicted = self.network(residual * variance.rsqrt(), timestep, conditioning)
        return skip * residual + deviation * variance.rsqrt() * predicted - fade

    @torch.no_grad()
    def fit_deviation(self, clips: ClipLatents, tails: Tensor, smallest: float = 0.2) -> None:
        """Measure each frame's deviation from the cross-fade, on clips `b f c h w` and their tail key frames `b c h w`.

        `smallest` stands for the error of the key-frame head.
        """
        keys = torch.stack([clips[:, 0], tails], dim=1)
        residual = clips - cross_faded(keys, clips.shape[1])
        self.deviation.copy_(residual.square().mean((0, 2, 3, 4)).sqrt().clamp_min(smallest))


class Hourglass(nn.Module):
    """Convolution blocks on every frame and position, around a transformer on a 2×2×2 coarser grid.

    The transformer attends jointly to all coarse positions, the deep tokens of both key frames and the time.
    Layout is channels-last throughout: `b f h w c` in memory.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config.denoiser
        fine, coarse = self.config.fine_width, self.config.width
        n, d = config.resampler.queries, config.resampler.token_width
        channels, frames, size = config.first_stage.latent_channels, config.clip_frames, config.latent_size
        self.stem = nn.Conv2d(input_channels(self.config, channels), fine, 3, padding=1)
        self.frame_positions = nn.Parameter(torch.randn(frames, 1, 1, fine) * 0.02)
        self.time = nn.Sequential(nn.Linear(fine, fine), nn.SiLU(), nn.Linear(fine, fine))
        self.time_token = nn.Linear(fine, coarse)
        self.down_blocks = nn.ModuleList(FineBlock(fine) for _ in range(self.config.fine_blocks))
        self.down = nn.Linear(fine * 8, coarse)
        self.positions = nn.Parameter(grid_positions((size // 2) ** 2, coarse).repeat(frames // 2, 1))
        self.moments = nn.Parameter(torch.randn(frames // 2, 1, coarse))
        self.tokens = nn.Linear(d, coarse)
        self.token_positions = nn.Parameter(grid_positions(n, coarse).repeat(2, 1, 1))
        self.token_moments = nn.Parameter(torch.randn(2, 1, coarse))
        self.blocks = transformer(coarse, self.config.depth, self.config.heads)
        self.up = nn.Linear(coarse, fine * 8)
        self.up_blocks = nn.ModuleList(FineBlock(fine) for _ in range(self.config.fine_blocks))
        self.norm = nn.LayerNorm(fine)
        self.out = nn.Conv2d(fine, channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.get_parameter("bias"))

    def forward(self, noisy: ClipLatents, timestep: Tensor, conditioning: ClipConditioning) -> ClipLatents:
        """Noisy latents `b f c h w`, timestep `b` in 0…1000 → prediction `b f c h w`, float32."""
        f = noisy.shape[1]
        h, w = (side // 2 for side in noisy.shape[-2:])
        noisy = noisy.to(self.frame_positions.dtype)
        time = self.time(get_timestep_embedding(timestep, self.config.fine_width, flip_sin_to_cos=True).to(noisy))
        x = frames_convolved(self.stem, rearrange(conditioning.channels(noisy, self.config), "b f c h w -> b f h w c"))
        x = x + self.frame_positions
        for block in self.down_blocks:
            x = block(x, time)
        coarse = self.down(rearrange(x, "b (f i) (h j) (w k) c -> b (f h w) (i j k c)", i=2, j=2, k=2))
        places = self.positions + self.moments.expand(-1, h * w, -1).flatten(0, 1)
        token_places = self.token_positions + self.token_moments
        tokens = rearrange(self.tokens(conditioning.tokens.to(noisy)) + token_places, "b two n c -> b (two n) c")
        sequence = torch.cat([coarse + places, tokens, self.time_token(time)[:, None]], dim=1)
        coarse = self.up(self.blocks(sequence)[:, : coarse.shape[1]])
        x = x + rearrange(coarse, "b (f h w) (i j k c) -> b (f i) (h j) (w k) c", f=f // 2, h=h, w=w, i=2, j=2, k=2)
        for block in self.up_blocks:
            x = block(x, time)
        return rearrange(frames_convolved(self.out, self.norm(x)), "b f h w c -> b f c h w").float()


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


class Wan(nn.Module):
    """diffusers' WanTransformer3DModel: full attention over all positions of a clip, deep tokens as its context.

    To its cross-attention the context is a set, so tokens carry learned places: head or tail, and which of the n.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = sizes = config.denoiser
        resampler, latent_channels = config.resampler, config.first_stage.latent_channels
        self.token_places = nn.Parameter(torch.randn(2, resampler.queries, resampler.token_width) * 0.5)
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=sizes.heads,
            attention_head_dim=sizes.width // sizes.heads,
            in_channels=input_channels(sizes, latent_channels),
            out_channels=latent_channels,
            text_dim=resampler.token_width,
            ffn_dim=sizes.width * 4,
            num_layers=sizes.depth,
        )

    def forward(self, noisy: ClipLatents, timestep: Tensor, conditioning: ClipConditioning) -> ClipLatents:
        """As `Hourglass.forward`."""
        noisy = noisy.to(self.token_places.dtype)
        x = rearrange(conditioning.channels(noisy, self.config), "b f c h w -> b c f h w")
        tokens = rearrange(conditioning.tokens + self.token_places, "b two n d -> b (two n) d").to(x)
        y = self.transformer(x, timestep, tokens, return_dict=False)[0]
        return rearrange(y, "b c f h w -> b f c h w").float()


DENOISERS: dict[str, Callable[[TokenizerConfig], nn.Module]] = {"hourglass": Hourglass, "unet3d": UNet3D, "wan": Wan}
