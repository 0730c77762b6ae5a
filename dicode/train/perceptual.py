"""A perceptual distance of images in the manner of LPIPS (Zhang et al. 2018), on features that install offline."""

from torch import Tensor
from torch.nn import functional

from dicode.evaluate.features import EfficientNetLite0Features


class PerceptualDistance:
    """Squared distance of EfficientNet-lite0's feature maps, each position's channels of unit length.

    The maps are equally weighted; LPIPS learns weights from human judgements, which do not exist for this network. The
    metrics of this library read the same network's last, pooled features: a model trained with this distance is
    favoured by them, and its card has to say so.
    """

    def __init__(self) -> None:
        self.network = EfficientNetLite0Features()

    def __call__(self, pixels: Tensor, target: Tensor) -> Tensor:
        """Scalar mean distance of pixels `b 3 h w` in −1…1 to `target`; gradients flow into `pixels`."""
        maps, target_maps = (self.network.stage_features(x) for x in (pixels, target))
        distances = [
            (functional.normalize(a, dim=1) - functional.normalize(b, dim=1)).float().square().sum(1).mean()
            for a, b in zip(maps, target_maps, strict=True)
        ]
        return sum(distances[1:], distances[0]) / len(distances)
