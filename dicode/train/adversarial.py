"""Adversarial training of a decoder: a discriminator says how real its images look, where no single one is right."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from dicode.shapes import KeyFramePixels

SLOPE = 0.2  # of the leaky rectifier, as in pix2pix


class PatchDiscriminator(nn.Module):
    """One verdict on every patch of an image, each of 38×38 pixels (Isola et al. 2017, section 3.2.2).

    Three convolutions that halve the image and one that judges; group norms, which do not tie the images of a batch
    together as the published batch norms do. Larger is more real.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for wide in (2 * width, 4 * width):
            layers += [nn.Conv2d(wide // 2, wide, 4, stride=2, padding=1), nn.GroupNorm(8, wide), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 3, padding=1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: KeyFramePixels) -> Float[Tensor, "b 1 y x"]:
        """Pixels `b 3 h w` in −1…1 → verdicts, one for every 8×8 pixels."""
        return self.layers(pixels)


def adversarial_losses(discriminator: nn.Module, made: KeyFramePixels, real: KeyFramePixels) -> tuple[Tensor, Tensor]:
    """What the maker of `made` and what the discriminator shall minimise: the hinge losses of Lim & Ye 2017.

    Their gradients stay apart, so that one optimizer may step both: the first reaches `made` alone, the second the
    discriminator alone.
    """
    fixed = {name: p.detach() for name, p in discriminator.named_parameters()}
    convincing = -functional_call(discriminator, fixed, (made,)).mean()
    verdicts = discriminator(torch.cat([made.detach(), real]))
    on_made, on_real = verdicts.split([len(made), len(real)])
    return convincing, functional.relu(1 + on_made).mean() + functional.relu(1 - on_real).mean()
