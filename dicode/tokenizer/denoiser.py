"""Denoisers behind one interface: noisy clip latents and everything known about the clip → a prediction.

    denoiser(noisy, timestep, known) → prediction of the same shape as `noisy`

`UNet3D` is the published network (diffusers' UNet3DConditionModel, DESIGN §2.2), `Wan` a diffusion transformer from
diffusers, `Hourglass` a small convolution–transformer made for two CPU cores: on a 16×8×8 clip it trains far faster
than `Wan` at equal size, because all its arithmetic is dense bf16 matrix products (measured in docs/log.md).
"""

from dataclasses import replace

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import get_timestep_embedding
from einops import rearrange
from torch import Tensor, nn

from dicode.shapes import ClipLatents
from dicode.tokenizer.conditioning import ClipConditioning, cross_faded, input_channels
from dicode.tokenizer.config import DenoiserConfig
from dicode.tokenizer.encoder import grid_positions, transformer
from dicode.tokenizer.unet3d import UNet3D


def build_denoiser(
    config: DenoiserConfig, latent_channels: int, num_tokens: int, token_width: int, frames: int, size: int
) -> nn.Module:
    """The denoiser of a configuration, with random weights, for clips of `frames` latents of `size`×`size`."""
    if config.predict_residual:
        plain = replace(config, predict_residual=False)
        return ResidualDenoiser(build_denoiser(plain, latent_channels, num_tokens, token_width, frames, size), frames)
    if config.kind == "hourglass":
        return Hourglass(config, latent_channels, num_tokens, token_width, frames, size)
    if config.kind == "wan":
        return Wan(config, latent_channels, num_tokens, token_width)
    return UNet3D(config, latent_channels, token_width)


class ResidualDenoiser(nn.Module):
    """Any denoiser, made to predict what a clip adds to the cross-fade of its key frames. Flow matching only.

    Flow matching is linear in the clip: take (1 − t)·fade from what is seen and −fade from what is said, and both speak
    of the change alone. A frame near a key frame changes little, which `deviation` knows for each frame, measured on
    training clips; input, output and a skip are scaled by it so that the network sees and says unit variance at every
    time (the preconditioning of Karras et al. 2022, for flow matching). Near its key frame a frame is copied by
    construction, where a plain network has to learn 16 channels' identity. Where the key frames are dropped the change
    is the clip, of deviation 1.
    """

    deviation: Tensor

    def __init__(self, network: nn.Module, frames: int):
        super().__init__()
        self.network = network
        self.register_buffer("deviation", torch.ones(frames))

    def forward(self, noisy: ClipLatents, timestep: Tensor, known: ClipConditioning) -> ClipLatents:
        """As `Hourglass.forward`."""
        fade = cross_faded(known.key_latents, noisy.shape[1]).to(noisy)
        given = known.keys_mask[:, None].to(noisy)
        deviation = (given * self.deviation + 1 - given)[..., None, None, None]
        t = (timestep / 1000).to(noisy)[:, None, None, None, None]
        change = noisy - (1 - t) * fade
        variance = ((1 - t) * deviation).square() + t.square()
        skip = (t - (1 - t) * deviation.square()) / variance
        said = self.network(change * variance.rsqrt(), timestep, known)
        return skip * change + deviation * variance.rsqrt() * said - fade

    @torch.no_grad()
    def fit_deviation(self, clips: ClipLatents, tails: Tensor, smallest: float = 0.2) -> None:
        """Measure each frame's deviation from the cross-fade, on clips `b f c h w` and their tail key frames `b c h w`.

        `smallest` stands for what the key-frame head gets wrong.
        """
        keys = torch.stack([clips[:, 0], tails], dim=1)
        change = clips - cross_faded(keys, clips.shape[1])
        self.deviation.copy_(change.square().mean((0, 2, 3, 4)).sqrt().clamp_min(smallest))


class Hourglass(nn.Module):
    """Convolution blocks on every frame and position, around a transformer on a 2×2×2 coarser grid.

    The transformer attends jointly to all coarse positions, the deep tokens of both key frames and the time.
    Layout is channels-last throughout: `b f h w c` in memory.
    """

    def __init__(
        self, config: DenoiserConfig, latent_channels: int, num_tokens: int, token_width: int, frames: int, size: int
    ):
        super().__init__()
        fine, coarse = config.fine_width, config.width
        self.config = config
        self.stem = nn.Conv2d(input_channels(config, latent_channels), fine, 3, padding=1)
        self.frame_positions = nn.Parameter(torch.randn(frames, 1, 1, fine) * 0.02)
        self.time = nn.Sequential(nn.Linear(fine, fine), nn.SiLU(), nn.Linear(fine, fine))
        self.time_token = nn.Linear(fine, coarse)
        self.down_blocks = nn.ModuleList(FineBlock(fine) for _ in range(config.fine_blocks))
        self.down = nn.Linear(fine * 8, coarse)
        self.positions = nn.Parameter(grid_positions((size // 2) ** 2, coarse).repeat(frames // 2, 1))
        self.moments = nn.Parameter(torch.randn(frames // 2, 1, coarse))
        self.tokens = nn.Linear(token_width, coarse)
        self.token_positions = nn.Parameter(grid_positions(num_tokens, coarse).repeat(2, 1, 1))
        self.token_moments = nn.Parameter(torch.randn(2, 1, coarse))
        self.blocks = transformer(coarse, config.depth, config.heads)
        self.up = nn.Linear(coarse, fine * 8)
        self.up_blocks = nn.ModuleList(FineBlock(fine) for _ in range(config.fine_blocks))
        self.norm = nn.LayerNorm(fine)
        self.out = nn.Conv2d(fine, latent_channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.get_parameter("bias"))

    def forward(self, noisy: ClipLatents, timestep: Tensor, known: ClipConditioning) -> ClipLatents:
        """Noisy latents `b f c h w`, timestep `b` in 0…1000 → prediction `b f c h w`, float32."""
        f = noisy.shape[1]
        h, w = (side // 2 for side in noisy.shape[-2:])
        noisy = noisy.to(self.frame_positions.dtype)
        time = self.time(get_timestep_embedding(timestep, self.config.fine_width, flip_sin_to_cos=True).to(noisy))
        x = frames_convolved(self.stem, rearrange(known.channels(noisy, self.config), "b f c h w -> b f h w c"))
        x = x + self.frame_positions
        for block in self.down_blocks:
            x = block(x, time)
        coarse = self.down(rearrange(x, "b (f i) (h j) (w k) c -> b (f h w) (i j k c)", i=2, j=2, k=2))
        places = self.positions + self.moments.expand(-1, h * w, -1).flatten(0, 1)
        token_places = self.token_positions + self.token_moments
        tokens = rearrange(self.tokens(known.tokens.to(noisy)) + token_places, "b two n c -> b (two n) c")
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
    """diffusers' WanTransformer3DModel: full attention over all positions, deep tokens as its context.

    To its cross-attention the context is a set, so the tokens carry learned places: head or tail, and which of the n.
    """

    def __init__(self, config: DenoiserConfig, latent_channels: int, num_tokens: int, token_width: int):
        super().__init__()
        self.config = config
        self.token_places = nn.Parameter(torch.randn(2, num_tokens, token_width) * 0.5)
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=config.heads,
            attention_head_dim=config.width // config.heads,
            in_channels=input_channels(config, latent_channels),
            out_channels=latent_channels,
            text_dim=token_width,
            ffn_dim=config.width * 4,
            num_layers=config.depth,
        )

    def forward(self, noisy: ClipLatents, timestep: Tensor, known: ClipConditioning) -> ClipLatents:
        """As `Hourglass.forward`."""
        noisy = noisy.to(self.token_places.dtype)
        x = rearrange(known.channels(noisy, self.config), "b f c h w -> b c f h w")
        tokens = rearrange(known.tokens + self.token_places, "b two n d -> b (two n) d").to(x)
        y = self.transformer(x, timestep, tokens, return_dict=False)[0]
        return rearrange(y, "b c f h w -> b f c h w").float()
