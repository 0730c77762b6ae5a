"""The networks whose names published figures carry, loaded from a file or a hub id: I3D, C3D, Inception, CLIP.

None of their weights come with this package. Each class says which file the literature uses; a figure of another
network must not carry its name.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32
from numpy import ndarray
from torch import Tensor
from torch.nn import functional

from dicode.config import CheckpointError
from dicode.features.extract import Features, mean_and_change
from dicode.features.metrics import Clips
from dicode.hub import downloaded
from dicode.tokenizer.library import CLIP_DEVIATION, CLIP_MEAN
from dicode.video.timed import Video

CLIP_FILES = ["config.json", "*.safetensors", "vocab.json", "merges.txt", "tokenizer*.json", "special_tokens_map.json"]


class I3D:
    """I3D, trained on Kinetics-400: 400 numbers before the softmax, the features of the published FVD.

    `path` is `i3d_torchscript.pt` of StyleGAN-V (arXiv 2112.14683), the TorchScript translation of Google's original;
    it scales and resizes frames itself (bilinear, to 224×224). The published protocol takes clips of 16 frames.
    """

    name, width, least_frames = "I3D", 400, 10

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        self._network, self._device = _torchscript(path, device), torch.device(device)

    def clip_vector(self, clip: Video) -> Float32[ndarray, "400"]:
        """The vector of one clip, uint8 `f h w c`. Raises `ValueError` for clips too short for its strides."""
        if len(clip) < self.least_frames:
            raise ValueError(f"I3D: expected clips of {self.least_frames} frames or more, got {len(clip)}")
        options = {"rescale": True, "resize": True, "return_features": True}
        return _vector_of_clip(self._network, clip, self._device, self.width, self.name, **options)

    def features(self, clips: Clips) -> Features:
        """As `Network.features`: vectors of clips."""
        return Features(np.stack([self.clip_vector(clip) for clip in clips]))


class C3D:
    """C3D, fine-tuned on UCF-101: probabilities of its 101 classes, for the published Inception Score.

    `path` is `c3d_ucf101.pt` of StyleGAN-V, the TorchScript translation of TGANv2's network (arXiv 1811.09245); it
    scales and resizes frames itself, and takes 16 of them.
    """

    name, width, frames = "C3D", 101, 16

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        self._network, self._device = _torchscript(path, device), torch.device(device)

    def clip_vector(self, clip: Video) -> Float32[ndarray, "101"]:
        """The probabilities of one clip, uint8 `f h w c`. Raises `ValueError` for clips of another length."""
        if len(clip) != self.frames:
            raise ValueError(f"C3D: expected clips of {self.frames} frames, got {len(clip)}")
        return _vector_of_clip(self._network, clip, self._device, self.width, self.name)

    def features(self, clips: Clips) -> Features:
        """As `Network.features`: class probabilities."""
        return Features(probabilities=np.stack([self.clip_vector(clip) for clip in clips]))


class Inception:
    """Inception-v3 of 2015: 2048 pooled features (FID) and probabilities of 1008 classes (Inception Score) a frame.

    `path` is `inception-2015-12-05.pt` of StyleGAN2-ADA (arXiv 2006.06676), the TorchScript translation of TensorFlow's
    graph; it resizes frames itself. Probabilities are without the last layer's bias, as in the original score.
    """

    name = "Inception"

    def __init__(self, path: str | Path, device: str | torch.device = "cpu", batch_size: int = 32) -> None:
        self._network, self._device, self._batch_size = _torchscript(path, device), torch.device(device), batch_size

    def features(self, clips: Clips) -> Features:
        """As `Network.features`: of every frame; probabilities are means over a clip's frames."""
        parts = [
            (self._of_frames(clip, return_features=True), self._of_frames(clip, no_output_bias=True).mean(0))
            for clip in clips
        ]
        frames, probabilities = (np.stack([own.numpy() for own in side]) for side in zip(*parts, strict=True))
        return Features(frames=frames, probabilities=probabilities)

    @torch.no_grad()
    def _of_frames(self, frames: Video, **options: bool) -> Tensor:
        images = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        batches = [self._network(part.to(self._device), **options) for part in images.split(self._batch_size)]
        return torch.cat(batches).float().cpu()


class Clip:
    """CLIP from `transformers`: unit vectors of frames and of texts, whose products are CLIPSIM (arXiv 2104.14806).

    `source` is a folder or a hub id; published CLIPSIM figures are of `openai/clip-vit-base-patch32`. Frames are scaled
    by their shorter side (bicubic) and cropped at the centre, as CLIP's own preprocessing does.
    """

    name = "CLIP"

    def __init__(self, source: str | Path, device: str | torch.device = "cpu", batch_size: int = 32) -> None:
        from transformers import CLIPModel, CLIPTokenizerFast

        self.alignment = f"CLIPSIM-{Path(source).name}"  # which CLIP is part of the name
        folder = Path(source) if Path(source).is_dir() else downloaded(str(source), CLIP_FILES)
        try:
            self._network = CLIPModel.from_pretrained(folder, local_files_only=True).eval().to(device)
            self._tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: not a CLIP model of transformers ({error})") from error
        self._device, self._batch_size = torch.device(device), batch_size
        self._size: int = self._network.config.vision_config.image_size
        self.width: int = self._network.config.projection_dim

    @torch.no_grad()
    def frame_features(self, frames: Video) -> Float32[Tensor, "f width"]:
        """One vector a frame, of length 1."""
        images = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        outputs = [self._network.get_image_features(self._input(part)) for part in images.split(self._batch_size)]
        return functional.normalize(torch.cat([own.pooler_output for own in outputs]).float().cpu(), dim=-1)

    def features(self, clips: Clips) -> Features:
        """As `Network.features`: `mean_and_change` of frames."""
        return Features(mean_and_change(self.frame_features(clip) for clip in clips))

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Float32[Tensor, "n width"]:
        """One vector a text, of length 1; texts beyond CLIP's 77 tokens are cut, as in the literature."""
        outputs = []
        for first in range(0, len(texts), self._batch_size):
            batch = list(texts[first : first + self._batch_size])
            ids = self._tokenizer(batch, padding=True, truncation=True, max_length=77, return_tensors="pt")
            outputs.append(self._network.get_text_features(**ids.to(self._device)).pooler_output)
        return functional.normalize(torch.cat(outputs).float().cpu(), dim=-1)

    def similarities(self, vectors: Float[ndarray, "n width"], texts: Sequence[str]) -> Float[ndarray, "n texts"]:
        """As `TextNetwork.similarities`: CLIPSIM, the mean product of a clip's frames with a text, −1…1."""
        cosines: ndarray = vectors[:, : self.width] @ self.text_features(texts).double().numpy().T
        return cosines

    def _input(self, images: Tensor) -> Tensor:
        scale = self._size / min(images.shape[-2:])
        size = [max(self._size, round(side * scale)) for side in images.shape[-2:]]
        resized = functional.interpolate(images.float().to(self._device), size, mode="bicubic", antialias=True).clamp(
            0, 255
        )
        top, left = ((side - self._size) // 2 for side in size)
        square = resized[:, :, top : top + self._size, left : left + self._size].round() / 255
        mean, deviation = (torch.tensor(of, device=self._device)[:, None, None] for of in (CLIP_MEAN, CLIP_DEVIATION))
        return (square - mean) / deviation


def clip_similarity(network: Clip, clip: Video, text: str) -> float:
    """CLIPSIM of one video: the mean product of its frames' vectors with the text's, −1…1 (arXiv 2104.14806)."""
    return float((network.frame_features(clip) @ network.text_features([text])[0]).mean())


def _torchscript(path: str | Path, device: str | torch.device) -> torch.jit.ScriptModule:
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: expected a TorchScript file, found none")
    try:
        network: torch.jit.ScriptModule = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise CheckpointError(f"{path}: not a TorchScript file ({str(error).splitlines()[0]})") from error
    return network


@torch.no_grad()
def _vector_of_clip(
    network: torch.jit.ScriptModule, clip: Video, device: torch.device, width: int, name: str, **options: bool
) -> Float32[ndarray, "width"]:
    video = torch.from_numpy(np.ascontiguousarray(clip)).permute(3, 0, 1, 2)[None].float().to(device)
    output = network(video, **options)
    if tuple(output.shape) != (1, width):
        raise CheckpointError(f"{name}: expected {width} numbers a clip, its file gave {tuple(output.shape)}")
    vector: ndarray = output[0].float().cpu().numpy()
    return vector
