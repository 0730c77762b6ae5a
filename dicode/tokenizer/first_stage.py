"""The first stage: an image autoencoder from diffusers, frame by frame, with normalised latents."""

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from dicode.shapes import ImageLatents, KeyFramePixels


@dataclass(frozen=True)
class FirstStageConfig:
    """`tiny` is diffusers' AutoencoderTiny, `kl` its AutoencoderKL; `channels` lists the widths from fine to coarse."""

    kind: Literal["tiny", "kl"] = "tiny"
    channels: tuple[int, ...] = (64, 64, 64, 64)
    latent_channels: int = 16
    encoder_blocks: tuple[int, ...] = (0, 2, 2, 3)
    decoder_blocks: tuple[int, ...] = (3, 2, 2, 1)

    @property
    def downsampling(self) -> int:
        """Image pixels a latent position spans, along each side."""
        return 2 ** (len(self.channels) - 1)


class FirstStage(nn.Module):
    """Pixels −1…1 ⇄ latents of zero mean and unit variance a channel (statistics are part of the weights)."""

    latent_mean: Tensor
    latent_deviation: Tensor

    def __init__(self, config: FirstStageConfig):
        super().__init__()
        self.config = config
        if config.kind == "tiny":
            self.autoencoder: nn.Module = AutoencoderTiny(
                encoder_block_out_channels=config.channels,
                # diffusers' decoder reads the list from fine to coarse too, and keeps one width throughout
                decoder_block_out_channels=config.channels,
                latent_channels=config.latent_channels,
                num_encoder_blocks=config.encoder_blocks,
                num_decoder_blocks=config.decoder_blocks,
            )
        else:
            self.autoencoder = AutoencoderKL(
                block_out_channels=config.channels,
                down_block_types=("DownEncoderBlock2D",) * len(config.channels),
                up_block_types=("UpDecoderBlock2D",) * len(config.channels),
                layers_per_block=config.encoder_blocks[0],
                latent_channels=config.latent_channels,
                norm_num_groups=min(32, config.channels[0]),
            )
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_deviation", torch.ones(config.latent_channels))
        self.to(memory_format=torch.channels_last)

    def raw_latents(self, pixels: KeyFramePixels) -> ImageLatents:
        """Latents before normalisation; a KL autoencoder gives the mode of its posterior."""
        if self.config.kind == "kl":
            return self.autoencoder.encode(pixels).latent_dist.mode()
        return self.autoencoder.encoder(pixels)

    def encode(self, pixels: KeyFramePixels) -> ImageLatents:
        """Pixels `b 3 h w` in −1…1 → normalised float32 latents `b c h/8 w/8`."""
        latents = self.raw_latents(pixels.contiguous(memory_format=torch.channels_last)).float()
        return (latents - self.latent_mean[:, None, None]) / self.latent_deviation[:, None, None]

    def decode(self, latents: ImageLatents) -> KeyFramePixels:
        """Normalised latents → float32 pixels, not clamped."""
        raw = latents * self.latent_deviation[:, None, None] + self.latent_mean[:, None, None]
        raw = raw.contiguous(memory_format=torch.channels_last)
        if self.config.kind == "kl":
            return self.autoencoder.decode(raw).sample.float()
        return self.autoencoder.decoder(raw).float()

    @torch.no_grad()
    def fit_statistics(self, latents: ImageLatents) -> None:
        """Set the normalisation from raw latents of training images."""
        rows = latents.float().transpose(0, 1).flatten(1)
        self.latent_mean.copy_(rows.mean(1))
        self.latent_deviation.copy_(rows.std(1).clamp_min(1e-4))
