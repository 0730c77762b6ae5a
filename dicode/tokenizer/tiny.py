"""The tiny autoencoder of `diffusers` (TAESD, `AutoencoderTiny`): its weights' names and values, without its import."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dicode.shapes import ImageLatents, KeyFramePixels
from dicode.tokenizer.config import FirstStageConfig


class TinyAutoencoder(nn.Module):
    """Convolutions alone; every level is half the size of the one before."""

    def __init__(self, config: FirstStageConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = TinyEncoder(config), TinyDecoder(config)


class TinyEncoder(nn.Module):
    """Pixels −1…1 → latents of an eighth of the side, at four levels."""

    def __init__(self, config: FirstStageConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_encoder_layers(config))

    def forward(self, pixels: KeyFramePixels) -> ImageLatents:
        return self.layers(pixels.add(1).div(2))


class TinyDecoder(nn.Module):
    """Latents → pixels, about −1…1."""

    def __init__(self, config: FirstStageConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_decoder_layers(config))

    def forward(self, latents: ImageLatents) -> KeyFramePixels:
        return self.layers(torch.tanh(latents / 3) * 3).mul(2).sub(1)


class TinyBlock(nn.Module):
    """Three convolutions, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_same(width, width), nn.ReLU(), _same(width, width), nn.ReLU(), _same(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


def _encoder_layers(config: FirstStageConfig) -> Iterator[nn.Module]:
    for level, (width, blocks) in enumerate(zip(config.channels, config.encoder_blocks, strict=True)):
        yield nn.Conv2d(width, width, 3, 2, 1, bias=False) if level else _same(3, width)
        yield from (TinyBlock(width) for _ in range(blocks))
    yield _same(config.channels[-1], config.latent_channels)


def _decoder_layers(config: FirstStageConfig) -> Iterator[nn.Module]:
    # the list is read from fine to coarse here too, as `diffusers` does: with one width throughout it does not matter
    yield _same(config.latent_channels, config.channels[0])
    yield nn.ReLU()
    for level, (width, blocks) in enumerate(zip(config.channels, config.decoder_blocks, strict=True), start=1):
        yield from (TinyBlock(width) for _ in range(blocks))
        if level < len(config.channels):
            yield nn.Upsample(scale_factor=2)
            yield nn.Conv2d(width, width, 3, padding=1, bias=False)
    yield _same(config.channels[-1], 3)


def _same(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)
