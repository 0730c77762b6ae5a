"""Images ⇄ first-stage latents ⇄ deep tokens: autoencoder, linear code, resampler."""

from typing import Any, cast

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from dicode.shapes import ClipLatents, ImageLatents, KeyFramePixels, KeyFrameTokens, PatchFeatures
from dicode.tokenizer.config import FirstStageConfig, ResamplerConfig
from dicode.tokenizer.tiny import TinyAutoencoder

DECODER = ("autoencoder.decoder.", "autoencoder.post_quant_conv.")  # what may change without changing a latent


class FirstStage(nn.Module):
    """Pixels −1…1 ⇄ latents of zero mean and unit variance a channel (statistics are part of the weights)."""

    latent_mean: Tensor
    latent_deviation: Tensor

    def __init__(self, config: FirstStageConfig):
        super().__init__()
        self.config = config
        if config.kind == "tiny":
            self.autoencoder: Any = TinyAutoencoder(config)
        elif config.frames_a_latent > 1:
            from dicode.tokenizer.wan import autoencoder

            self.autoencoder = autoencoder(config)
        else:
            from dicode.tokenizer.library import kl_autoencoder

            self.autoencoder = kl_autoencoder(config)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_deviation", torch.ones(config.latent_channels))
        # faster on CPUs; a KL autoencoder's outputs differ by 1.3e-5 in it, more than the reference vectors allow
        self.layout = torch.channels_last if config.kind == "tiny" else torch.contiguous_format
        self.to(memory_format=self.layout)  # type: ignore[call-overload]

    @property
    def dtype(self) -> torch.dtype:
        """Of the autoencoder's weights."""
        return next(self.autoencoder.parameters()).dtype

    def raw_latents(self, pixels: KeyFramePixels) -> ImageLatents:
        """Latents before normalisation; a KL autoencoder gives the mode of its posterior."""
        pixels = pixels.to(self.dtype)
        if self.config.frames_a_latent > 1:
            return self._raw_clip_latents(pixels[:, None])[:, 0]
        if self.config.kind == "kl":
            return self.autoencoder.encode(pixels).latent_dist.mode()
        return self.autoencoder.encoder(pixels)

    def encode_clips(self, pixels: Float[Tensor, "b all 3 py px"]) -> ClipLatents:
        """Pixels of clips in −1…1 → their normalised latents, as many as there are frames but for `wan`.

        Raises `ValueError` for a number of frames that `wan` would cut short.
        """
        if self.config.frames_a_latent == 1:
            latents = self.encode(rearrange(pixels, "b f c y x -> (b f) c y x"))
            return rearrange(latents, "(b f) c h w -> b f c h w", b=len(pixels))
        if (pixels.shape[1] - 1) % self.config.frames_a_latent:
            raise ValueError(f"wan: expected 4 n + 1 frames, got {pixels.shape[1]}")
        raw = self._raw_clip_latents(pixels.to(self.dtype)).float()
        return (raw - self.latent_mean[:, None, None]) / self.latent_deviation[:, None, None]

    def decode_clips(self, latents: ClipLatents) -> Float[Tensor, "b all 3 py px"]:
        """Normalised latents of clips → float32 pixels, not clamped."""
        if self.config.frames_a_latent == 1:
            pixels = self.decode(rearrange(latents, "b f c h w -> (b f) c h w"))
            return rearrange(pixels, "(b f) c y x -> b f c y x", b=len(latents))
        raw = latents * self.latent_deviation[:, None, None] + self.latent_mean[:, None, None]
        return self._raw_decoded_clips(raw.to(self.dtype))

    def _raw_clip_latents(self, pixels: Tensor) -> Tensor:
        """Of `wan`, the mode of its distribution: `b f 3 y x` → `b 1+(f-1)/4 c h w`; latent 0 is of frame 0 alone."""
        latents = self.autoencoder.encode(rearrange(pixels, "b f c y x -> b c f y x")).latent_dist.mode()
        return rearrange(latents, "b c f h w -> b f c h w")

    def _raw_decoded_clips(self, latents: Tensor) -> Tensor:
        pixels = self.autoencoder.decode(rearrange(latents, "b f c h w -> b c f h w"), return_dict=False)[0]
        return rearrange(pixels, "b c f y x -> b f c y x").float()

    def encode(self, pixels: KeyFramePixels) -> ImageLatents:
        """Pixels `b 3 h w` in −1…1 → normalised float32 latents `b c h/8 w/8`."""
        latents = self.raw_latents(pixels.contiguous(memory_format=self.layout)).float()
        return (latents - self.latent_mean[:, None, None]) / self.latent_deviation[:, None, None]

    def decode(self, latents: ImageLatents) -> KeyFramePixels:
        """Normalised latents → float32 pixels, not clamped."""
        raw = latents * self.latent_deviation[:, None, None] + self.latent_mean[:, None, None]
        return self.raw_decode(raw.contiguous(memory_format=self.layout))

    def raw_decode(self, latents: ImageLatents) -> KeyFramePixels:
        """Latents before normalisation → float32 pixels."""
        latents = latents.to(self.dtype)
        if self.config.frames_a_latent > 1:
            return self._raw_decoded_clips(latents[:, None])[:, 0]
        if self.config.kind == "kl":
            return self.autoencoder.decode(latents).sample.float()
        return self.autoencoder.decoder(latents).float()

    def enable_tiling(self, side: int = 256) -> None:
        """Encode and decode frames in tiles of so many pixels a side, which overlap by a quarter, a sample at a time.

        Frames no larger are coded whole. Raises `ValueError` for an autoencoder without tiles.
        """
        if self.config.frames_a_latent == 1:
            raise ValueError(f"vae_tiling: for the video autoencoders of Wan, this one is {self.config.kind!r}")
        self.autoencoder.enable_tiling(side, side, side * 3 // 4, side * 3 // 4)
        self.autoencoder.enable_slicing()

    def freeze_encoder(self) -> None:
        """Leave gradients to what acts after the latents alone (see `DECODER`)."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(DECODER))

    @torch.no_grad()
    def fit_statistics(self, latents: ImageLatents) -> None:
        """Set the normalisation from raw latents of training images."""
        rows = latents.float().transpose(0, 1).flatten(1)
        self.latent_mean.copy_(rows.mean(1))
        self.latent_deviation.copy_(rows.std(1).clamp_min(1e-4))


def normal_start(*shape: int, deviation: float = 0.02) -> Tensor:
    """Normal starting values. By `torch.nn.init`, which loading skips and a meta device has without more imports."""
    return nn.init.normal_(torch.empty(*shape), std=deviation)


class Resampler(nn.Module):
    """Learned queries attend `depth` times to the features and to themselves."""

    def __init__(self, config: ResamplerConfig, num_tokens: int, token_width: int):
        super().__init__()
        self.latents = nn.Parameter(normal_start(1, num_tokens, config.width, deviation=config.width**-0.5))
        self.proj_in = nn.Linear(config.encoder.width, config.width)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(config), feed_forward(config.width, config.feedforward_factor)])
            for _ in range(config.depth)
        )
        self.proj_out = nn.Linear(config.width, token_width)
        self.norm_out = nn.LayerNorm(token_width)

    def forward(self, features: PatchFeatures) -> KeyFrameTokens:
        """Features `b p width` of one key frame → its deep tokens `b n d`."""
        queries: Tensor = repeat(self.latents, "1 n width -> b n width", b=len(features))
        features = self.proj_in(features)
        for layer in self.layers:
            attention, feedforward = cast(nn.ModuleList, layer)
            queries = queries + attention(features, queries)
            queries = queries + feedforward(queries)
        return self.norm_out(self.proj_out(queries))


class PerceiverAttention(nn.Module):
    """Queries attend to features and queries together; no biases, both sides normalised."""

    def __init__(self, config: ResamplerConfig):
        super().__init__()
        inner = config.heads * config.head_width
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.to_q = nn.Linear(config.width, inner, bias=False)
        self.to_kv = nn.Linear(config.width, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, config.width, bias=False)

    def forward(self, features: Tensor, queries: Tensor) -> Tensor:
        queries = self.norm2(queries)
        source = torch.cat([self.norm1(features), queries], dim=1)
        q, k, v = (
            rearrange(x, "b p (heads e) -> b heads p e", heads=self.heads)
            for x in (self.to_q(queries), *self.to_kv(source).chunk(2, dim=-1))
        )
        return self.to_out(rearrange(functional.scaled_dot_product_attention(q, k, v), "b heads n e -> b n (heads e)"))


def feed_forward(width: int, factor: int) -> nn.Sequential:
    """Pre-normed two-layer network without biases, indices as in the public weights."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, width * factor, bias=False),
        nn.GELU(),
        nn.Linear(width * factor, width, bias=False),
    )


class LinearCode(nn.Module):
    """A projection of all of an image's latents to its deep tokens, and one back; `fit_projections` fits both.

    Not trained: after training, attention had not found what principal components give, and networks beside them added
    nothing (studies/tokens).
    """

    def __init__(self, num_tokens: int, token_width: int, latent_channels: int, size: int):
        super().__init__()
        self.num_tokens = num_tokens
        self.size = size
        self.encode = nn.Linear(latent_channels * size * size, num_tokens * token_width)
        self.decode = nn.Linear(num_tokens * token_width, latent_channels * size * size)

    def tokens(self, latents: ImageLatents) -> KeyFrameTokens:
        """Latents `b c h w` → tokens `b n d`."""
        return self.encode(latents.flatten(1).to(self.encode.weight.dtype)).unflatten(1, (self.num_tokens, -1)).float()

    def latents(self, tokens: KeyFrameTokens) -> ImageLatents:
        """Tokens `b n d` → latents `b c h w`."""
        decoded = self.decode(tokens.flatten(1).to(self.decode.weight.dtype))
        return decoded.unflatten(1, (-1, self.size, self.size)).float()
