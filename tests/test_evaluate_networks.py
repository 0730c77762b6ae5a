"""Networks of published figures: called as the literature calls them, on stand-ins of the same form."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

from dicode.config import CheckpointError
from dicode.features.networks import Clip, ClipNetwork, Inception, clip_similarity


class StandIn3D(nn.Module):
    """The interface of StyleGAN-V's I3D; features that depend on `rescale` and `resize`."""

    def forward(
        self, video: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        if not (rescale and resize and return_features):
            return torch.zeros(len(video), 7)
        scaled = 2 * video / 255 - 1
        return functional.interpolate(scaled.mean((1, 2)).flatten(1)[:, None], 400)[:, 0]


class Narrow(nn.Module):
    def forward(self, video: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        return video.new_zeros(len(video), 101)


class StandInC3D(nn.Module):
    def forward(self, video: Tensor) -> Tensor:
        return torch.softmax(functional.interpolate(video.mean((1, 2)).flatten(1)[:, None], 101)[:, 0] / 50, dim=-1)


class StandInInception(nn.Module):
    def forward(self, images: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        pooled = functional.interpolate(images.float().mean(1).flatten(1)[:, None], 2048)[:, 0]
        if return_features:
            return pooled
        logits = pooled[:, :1008] / 255
        return torch.softmax(logits if no_output_bias else logits + 1 / (1 + torch.arange(1008)), dim=-1)


def saved(module: nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(str(path))
    return path


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (16, 24, 40, 3), dtype=np.uint8) for _ in range(3)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_i3d_is_called_as_published(clips: list[np.ndarray], tmp_path: Path) -> None:
    network = ClipNetwork("I3D", saved(StandIn3D(), tmp_path / "i3d.pt"))
    vector = network.clip_vector(clips[0])
    expected = StandIn3D()(torch.from_numpy(clips[0]).permute(3, 0, 1, 2)[None].float(), True, True, True)
    np.testing.assert_allclose(vector, expected[0].numpy(), rtol=1e-6)
    with pytest.raises(ValueError, match="expected clips of 10 frames or more, got 9"):
        network.clip_vector(clips[0][:9])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_c3d_gives_probabilities_of_clips_of_sixteen_frames(clips: list[np.ndarray], tmp_path: Path) -> None:
    network = ClipNetwork("C3D", saved(StandInC3D(), tmp_path / "c3d.pt"))
    assert network.clip_vector(clips[0]).sum() == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="expected clips of 16 frames, got 15"):
        network.clip_vector(clips[0][:15])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inception_gives_features_and_unbiased_probabilities(clips: list[np.ndarray], tmp_path: Path) -> None:
    network = Inception(saved(StandInInception(), tmp_path / "inception.pt"), batch_size=5)
    images = torch.from_numpy(clips[0]).permute(0, 3, 1, 2)
    features = network.features(clips)
    np.testing.assert_allclose(features.frames[0], StandInInception()(images, return_features=True), rtol=1e-6)
    probabilities = StandInInception()(images, no_output_bias=True).mean(0)
    np.testing.assert_allclose(features.probabilities[0], probabilities, rtol=1e-5)
    assert features.frames.shape == (3, 16, 2048) and features.clips is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_files_that_are_not_such_networks_are_refused(clips: list[np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pt: expected a TorchScript file, found none"):
        ClipNetwork("I3D", tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(CheckpointError, match=r"text\.pt: not a TorchScript file"):
        ClipNetwork("I3D", tmp_path / "text.pt")
    with pytest.raises(CheckpointError, match=r"I3D: expected 400 numbers a clip, its file gave \(1, 101\)"):
        ClipNetwork("I3D", saved(Narrow(), tmp_path / "narrow.pt")).clip_vector(clips[0])


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of two tiny random towers and a byte-pair vocabulary of single letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(33, 127)]
    words = letters + [f"{letter}</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizerFast(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.save_pretrained(folder)
    text = {
        "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 20, "patch_size": 10,
    }  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    return folder


def test_clip_vectors_are_those_of_transformers(clips: list[np.ndarray], clip_folder: Path) -> None:
    network = Clip(clip_folder, batch_size=5)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(clip_folder)
    texts = ["a spark", "it grows into a fireball"]
    square = clips[0][:, 2:22, 10:30]  # of the shorter side's size already: nothing to scale
    network_square = network.frame_features(square)
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.from_numpy((square / 255 - mean) / deviation).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        output = model(**tokenizer(texts, padding=True, return_tensors="pt"), pixel_values=pixels)
    torch.testing.assert_close(network_square, output.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.text_features(texts), output.text_embeds, rtol=1e-4, atol=1e-5)
    expected = (output.image_embeds @ output.text_embeds[1]).mean()
    assert clip_similarity(network, square, texts[1]) == pytest.approx(float(expected), abs=1e-5)
    vectors = network.features([square]).clips
    assert network.similarities(vectors, texts)[0, 1] == pytest.approx(float(expected), abs=1e-5)


def test_clip_sees_the_centre_at_its_own_size(clips: list[np.ndarray], clip_folder: Path) -> None:
    network = Clip(clip_folder)
    wide = np.repeat(np.repeat(clips[0][:2, :20, :20], 3, axis=1), 3, axis=2)
    margins = np.pad(wide, ((0, 0), (0, 0), (30, 30), (0, 0)))
    torch.testing.assert_close(
        network._input(torch.from_numpy(margins).permute(0, 3, 1, 2))[..., 2:-2],
        network._input(torch.from_numpy(wide).permute(0, 3, 1, 2))[..., 2:-2],
    )
