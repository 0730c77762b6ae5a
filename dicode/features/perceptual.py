"""A perceptual distance of images in the manner of LPIPS, on features that install offline."""

import torch
from torch import Tensor
from torch.nn import functional

from dicode.features.extract import EfficientNetLite0Features
from dicode.shapes import KeyFramePixels


class FeatureMaps:
    """EfficientNet-lite0's feature maps of images at four scales, each position's channels of unit length.

    The metrics of this library read the same network's last, pooled features: a model trained on these maps is favoured
    by them, and its card has to say so. No other such network installs offline.
    """

    def __init__(self, network: EfficientNetLite0Features | None = None) -> None:
        self._network = network  # none: one on the device of the first images

    def __call__(self, pixels: KeyFramePixels) -> list[Tensor]:
        """Of pixels `b 3 h w` in −1…1, with gradients: maps `b c y x`, fine to coarse."""
        if self._network is None:
            self._network = EfficientNetLite0Features(device=pixels.device)
        return [functional.normalize(x.float(), dim=1) for x in self._network.stage_features(pixels)]


def perceptual_distance(maps: list[Tensor], target: list[Tensor]) -> Tensor:
    """Scalar mean squared distance in the manner of LPIPS (Zhang et al. 2018), all `FeatureMaps` equally weighted.

    LPIPS learns weights from human judgements, which do not exist for this network.
    """
    return mean([(a - b).square().sum(1) for a, b in zip(maps, target, strict=True)])


def mean(maps: list[Tensor]) -> Tensor:
    """Of the means of maps of different sizes."""
    return torch.stack([x.float().mean() for x in maps]).mean()
