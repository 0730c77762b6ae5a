"""Adversarial training of a decoder: a discriminator of feature maps, and statistics that compare sets of images."""

import warnings

import numpy as np
import torch
from einops import reduce
from numpy import ndarray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from dicode.features.extract import STAGE_WIDTHS, mean, perceptual_distance
from dicode.features.metrics import frechet_distance

SLOPE = 0.2  # of the leaky rectifier


class ReconstructionStats:
    """How predicted images compare with real ones, batch by batch."""

    def __init__(self) -> None:
        self.distances: list[Tensor] = []
        self.predicted: list[ndarray] = []
        self.real: list[ndarray] = []

    def add(self, predicted: list[Tensor], real: list[Tensor]) -> None:
        """`FeatureMaps` of as many images of either kind."""
        self.distances.append(perceptual_distance(predicted, real).cpu())
        for features, maps in ((self.predicted, predicted), (self.real, real)):
            pooled = [reduce(x, "b c y x -> b c", "mean") for x in maps]
            features.append(torch.cat(pooled, dim=1).cpu().numpy())

    def figures(self) -> dict[str, float]:
        """Mean `perceptual` distance, and the `frechet` distance of the two sets' maps, averaged over places.

        A discriminator trades the first, which is least for blurred images, for the second.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # biased by few images, but by as many every time
            distance = frechet_distance(np.concatenate(self.predicted), np.concatenate(self.real))
        return {"perceptual": torch.stack(self.distances).mean().item(), "frechet": distance}


class FeatureDiscriminator(nn.Module):
    """Logits at every second place of each of the `FeatureMaps`; larger is more real.

    Projected GANs (Sauer et al. 2021): features of an image network separate real from generated with far fewer images
    than pixels do. Theirs mix the maps at random first and have deeper heads.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, width, 1),
                nn.LeakyReLU(SLOPE),
                nn.Conv2d(width, width, 3, stride=2, padding=1),
                nn.LeakyReLU(SLOPE),
                nn.Conv2d(width, 1, 1),
            )
            for channels in STAGE_WIDTHS
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Feature maps of `b` images → logits `b 1 y x` of each map."""
        return [head(x * x.shape[1] ** 0.5) for head, x in zip(self.heads, maps, strict=True)]


def adversarial_losses(discriminator: nn.Module, predicted: list[Tensor], real: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Losses of the decoder and of the discriminator, from feature maps: the hinge losses of Lim & Ye 2017.

    All maps weigh the same. Gradients stay apart, so that one optimizer may step both: the first loss reaches
    `predicted` alone, the second the discriminator alone.
    """
    fixed = {name: p.detach() for name, p in discriminator.named_parameters()}
    generator_loss = -mean(functional_call(discriminator, fixed, (predicted,)))
    on_predicted = discriminator([x.detach() for x in predicted])
    on_real = discriminator([x.detach() for x in real])
    hinge = mean([functional.relu(1 + x) for x in on_predicted]) + mean([functional.relu(1 - x) for x in on_real])
    return generator_loss, hinge
