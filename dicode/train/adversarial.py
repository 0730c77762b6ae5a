"""Adversarial training of a decoder: a discriminator that sees an image network's features, and how sets compare."""

import warnings

import torch
from einops import reduce
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from dicode.features.extract import STAGE_WIDTHS
from dicode.features.metrics import FrechetStatistics, frechet_distance
from dicode.features.perceptual import mean, perceptual_distance

SLOPE = 0.2  # of the leaky rectifier


class ReconstructionStats:
    """How images of a validation compare with the real ones, batch by batch."""

    def __init__(self) -> None:
        self.distances: list[Tensor] = []
        self.made, self.real = FrechetStatistics(sum(STAGE_WIDTHS)), FrechetStatistics(sum(STAGE_WIDTHS))

    def add(self, made: list[Tensor], real: list[Tensor]) -> None:
        """`FeatureMaps` of as many images of either kind."""
        self.distances.append(perceptual_distance(made, real).cpu())
        for statistics, maps in ((self.made, made), (self.real, real)):
            pooled = [reduce(x, "b c y x -> b c", "mean") for x in maps]
            statistics.update(torch.cat(pooled, dim=1).cpu().numpy())

    def figures(self) -> dict[str, float]:
        """Mean `perceptual` distance, and the `frechet` distance of the two sets' maps, averaged over places.

        A discriminator trades the first, which is least for blurred images, for the second.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # biased by few images, but by as many every time
            distance = frechet_distance(self.made, self.real)
        return {"perceptual": torch.stack(self.distances).mean().item(), "frechet": distance}


class FeatureDiscriminator(nn.Module):
    """Verdicts on every place of every one of the `FeatureMaps`; larger is more real.

    Projected GANs (Sauer et al. 2021): what an image network sees tells real from made with far fewer images than
    pixels do. Theirs mix the maps at random first and have deeper heads.
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
        """Feature maps of `b` images → a verdict for every second of their places, `b 1 y x` a map."""
        return [head(x * x.shape[1] ** 0.5) for head, x in zip(self.heads, maps, strict=True)]


def adversarial_losses(discriminator: nn.Module, made: list[Tensor], real: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What the maker of `made` and what the discriminator shall minimise: the hinge losses of Lim & Ye 2017.

    Both are given as features; all maps weigh the same. Gradients stay apart, so that one optimizer may step both
    sides: the first loss reaches `made` alone, the second the discriminator alone.
    """
    fixed = {name: p.detach() for name, p in discriminator.named_parameters()}
    convincing = mean(functional_call(discriminator, fixed, (made,)))
    on_made = discriminator([x.detach() for x in made])
    on_real = discriminator([x.detach() for x in real])
    telling = mean([functional.relu(1 + x) for x in on_made]) + mean([functional.relu(1 - x) for x in on_real])
    return -convincing, telling
