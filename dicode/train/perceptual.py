"""A perceptual distance of images in the manner of LPIPS (Zhang et al. 2018), on features that install offline."""

import torch
from torch.nn import functional

from dicode.evaluate.features import EfficientNetLite0Features
from dicode.shapes import KeyFramePixels


class PerceptualDistance:
    """Squared distance of EfficientNet-lite0's feature maps, each position's channels of unit length.

    The maps are equally weighted; LPIPS learns weights from human judgements, which do not exist for this network. The
    metrics of this library read the same network's last, pooled features: a model trained with this distance is
    favoured by them, and its card has to say so.
    """

    def __init__(self) -> None:
        self._network: EfficientNetLite0Features | None = None  # on the device of the first images

    def __call__(self, pixels: KeyFramePixels, target: KeyFramePixels) -> torch.Tensor:
        """Scalar mean distance of pixels `b 3 h w` in −1…1 to `target`; gradients flow into `pixels`."""
        if self._network is None:
            self._network = EfficientNetLite0Features(device=pixels.device)
        maps, target_maps = (self._network.stage_features(x) for x in (pixels, target))
        distances = [
            (functional.normalize(a.float(), dim=1) - functional.normalize(b.float(), dim=1)).square().sum(1).mean()
            for a, b in zip(maps, target_maps, strict=True)
        ]
        return torch.stack(distances).mean()
