"""The networks whose names published figures carry, loaded from a file or a hub id: I3D, C3D, Inception, CLIP.

None of their weights come with this package. Each class says which file the literature uses, and `checked_file` and
`clip_file` whether a given one is that: a figure of another must not carry its name.
"""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32
from numpy import ndarray
from torch import Tensor
from torch.nn import functional

from dicode.checkpoint.hub import downloaded
from dicode.config import CheckpointError
from dicode.features.extract import Features, mean_and_change
from dicode.features.metrics import Clips
from dicode.files import sha256_of
from dicode.tokenizer.library import CLIP_DEVIATION, CLIP_MEAN
from dicode.video.timed import Video

CLIP_FILES = ["config.json", "*.safetensors", "vocab.json", "merges.txt", "tokenizer*.json", "special_tokens_map.json"]
FILES = {
    "I3D": "i3d_torchscript.pt of StyleGAN-V (https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt)",
    "C3D": "c3d_ucf101.pt of StyleGAN-V (https://www.dropbox.com/s/jxpu7avzdc9n97q/c3d_ucf101.pt)",
    "CLIP": "openai/clip-vit-base-patch32",
}
# As public repositories, ten or so each, pin them for these files. No such sum is known here for C3D.
PUBLISHED = {"I3D": "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"}
CLIP_PICKLE_SHA256 = "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f"


class ClipNetwork:
    """I3D or C3D, which take whole clips, as StyleGAN-V (arXiv 2112.14683) translated them to TorchScript.

    I3D, `i3d_torchscript.pt`, is Google's original, trained on Kinetics-400: 400 numbers before the softmax, the
    features of the published FVD. C3D, `c3d_ucf101.pt`, is TGANv2's (arXiv 1811.09245), fine-tuned on UCF-101:
    probabilities of its 101 classes, for the published Inception Score. Both scale and resize frames themselves; the
    protocols take clips of 16 frames.
    """

    def __init__(self, name: Literal["I3D", "C3D"], path: str | Path, device: str | torch.device = "cpu") -> None:
        self.name: str = name
        self.width = 400 if name == "I3D" else 101
        self._network, self._device = _torchscript(path, device), torch.device(device)

    @torch.no_grad()
    def clip_vector(self, clip: Video) -> Float32[ndarray, "width"]:
        """The vector of one clip, uint8 `f h w c`. Raises `ValueError` for a clip of another length than it takes."""
        is_i3d = self.name == "I3D"
        if len(clip) < 10 if is_i3d else len(clip) != 16:  # I3D's strides need ten
            expected = "10 frames or more" if is_i3d else "16 frames"
            raise ValueError(f"{self.name}: expected clips of {expected}, got {len(clip)}")
        options = {"rescale": True, "resize": True, "return_features": True} if is_i3d else {}
        video = torch.from_numpy(np.ascontiguousarray(clip)).permute(3, 0, 1, 2)[None].float().to(self._device)
        output = self._network(video, **options)
        if tuple(output.shape) != (1, self.width):
            found = tuple(output.shape)
            raise CheckpointError(f"{self.name}: expected {self.width} numbers a clip, its file gave {found}")
        vector: ndarray = output[0].float().cpu().numpy()
        return vector

    def features(self, clips: Clips) -> Features:
        """As `Network.features`: vectors of clips, or class probabilities."""
        vectors = np.stack([self.clip_vector(clip) for clip in clips])
        return Features(vectors) if self.name == "I3D" else Features(probabilities=vectors)


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
        resized = functional.interpolate(images.float().to(self._device), size, mode="bicubic", antialias=True)
        top, left = ((side - self._size) // 2 for side in size)
        square = resized[:, :, top : top + self._size, left : left + self._size].clamp(0, 255).round() / 255
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


@dataclass(frozen=True)
class NetworkFile:
    """The file of one network, and whether it is known to be the one that the literature uses (`expected`)."""

    network: str
    expected: str
    sha256: str
    confirmed: bool

    def figure(self, metric: str) -> str:
        """The name of its figure of a metric: the published one only for the published file."""
        return metric if self.confirmed else f"{metric}-unconfirmed-{self.network}"


def checked_file(
    network: str, path: Path | None, confirm: Collection[str], known: Collection[str] = ()
) -> tuple[Path, NetworkFile]:
    """The file that `--i3d`, `--c3d` or `--clip` names; a warning where nothing says that it is the published one.

    That are `PUBLISHED`, further `known` sums, and those that the user confirms.
    """
    if path is None or not path.is_file():
        given = "nothing" if path is None else f"{path}, where no file is"
        raise FileNotFoundError(f"--{network.lower()}: expected {FILES[network]}, got {given}; see docs/benchmarks.md")
    found = sha256_of(path)
    file = NetworkFile(network, FILES[network], found, found in {PUBLISHED.get(network), *known, *confirm})
    if not file.confirmed:
        warnings.warn(
            f"{path}: not known to be {file.expected}; figures made with it get another name. If you know that it is, "
            f"add --confirm {file.sha256}",
            stacklevel=2,
        )
    return path, file


def clip_file(source: str, confirm: Collection[str]) -> tuple[Path, NetworkFile]:
    """The folder that `--clip` names, or that of the Hub: what comes from the published place is the published one.

    Where there are no safetensors (as at that place's older commits), pytorch_model.bin is read if it is the published
    one: a pickle, of which `transformers` takes tensors only.
    """
    on_disk = Path(source).is_dir()
    folder = Path(source) if on_disk else downloaded(source, CLIP_FILES)
    weights, known = folder / "model.safetensors", [CLIP_PICKLE_SHA256]
    if not weights.is_file():
        folder = folder if on_disk else downloaded(source, [*CLIP_FILES, "pytorch_model.bin"])
        pickle = folder / "pytorch_model.bin"
        if pickle.is_file() and sha256_of(pickle) == CLIP_PICKLE_SHA256:
            weights = pickle
    elif source == FILES["CLIP"] and not on_disk:
        known = [sha256_of(weights)]
    _, file = checked_file("CLIP", weights, confirm, known)
    return weights.parent, file
