"""The first stage: an image autoencoder from diffusers, frame by frame, with normalised latents."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from dicode.checkpoint import load_state
from dicode.config import CheckpointError
from dicode.shapes import ImageLatents, KeyFramePixels
from dicode.tokenizer.config import FirstStageConfig

DECODER = ("autoencoder.decoder.", "autoencoder.post_quant_conv.")  # what may change without changing a latent


class FirstStage(nn.Module):
    """Pixels −1…1 ⇄ latents of zero mean and unit variance a channel (statistics are part of the weights)."""

    latent_mean: Tensor
    latent_deviation: Tensor

    def __init__(self, config: FirstStageConfig):
        super().__init__()
        self.config = config
        if config.kind == "tiny":
            self.autoencoder: Any = AutoencoderTiny(
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
        # faster on CPUs; a KL autoencoder's outputs differ by 1.3e-5 in it, more than the reference vectors allow
        self.layout = torch.channels_last if config.kind == "tiny" else torch.contiguous_format
        self.to(memory_format=self.layout)  # type: ignore[call-overload]

    @classmethod
    def from_diffusers(cls, folder: str | Path) -> "FirstStage":
        """A first stage from a diffusers folder of an AutoencoderKL or AutoencoderTiny (as Stable Diffusion's `vae/`).

        Latents are scaled by its `scaling_factor` and `shift_factor`. Raises `CheckpointError` for another class and
        for an architecture that `FirstStageConfig` cannot describe.
        """
        path = Path(folder) / "config.json"
        try:
            values = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
        kind = values.get("_class_name")
        if kind not in ("AutoencoderKL", "AutoencoderTiny"):
            raise CheckpointError(f"{path}: expected AutoencoderKL or AutoencoderTiny, got {kind!r}")
        library = AutoencoderKL if kind == "AutoencoderKL" else AutoencoderTiny
        loaded = library.from_pretrained(folder, local_files_only=True)
        own = loaded.config
        if kind == "AutoencoderKL":
            channels, blocks = tuple(own.block_out_channels), (own.layers_per_block,)
            config = FirstStageConfig("kl", channels, own.latent_channels, blocks, blocks)
        else:
            channels, blocks = tuple(own.encoder_block_out_channels), tuple(own.num_encoder_blocks)
            config = FirstStageConfig("tiny", channels, own.latent_channels, blocks, tuple(own.num_decoder_blocks))
        stage = cls(config)
        load_state(stage.autoencoder, loaded.state_dict(), str(folder))
        stage.latent_mean.fill_(own.get("shift_factor") or 0.0)
        stage.latent_deviation.fill_(1 / own.scaling_factor)
        return stage

    def raw_latents(self, pixels: KeyFramePixels) -> ImageLatents:
        """Latents before normalisation; a KL autoencoder gives the mode of its posterior."""
        pixels = pixels.to(self.autoencoder.dtype)
        if self.config.kind == "kl":
            return self.autoencoder.encode(pixels).latent_dist.mode()
        return self.autoencoder.encoder(pixels)

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
        latents = latents.to(self.autoencoder.dtype)
        if self.config.kind == "kl":
            return self.autoencoder.decode(latents).sample.float()
        return self.autoencoder.decoder(latents).float()

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
