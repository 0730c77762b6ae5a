"""The public code's weights, renamed, give the public code's outputs in our networks."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from dicode.convert.names import unet_state, vae_state
from dicode.hub import load_state
from dicode.tokenizer.diffusion import DiffusionConfig, sample
from dicode.tokenizer.known import DenoiserConfig, Known
from dicode.tokenizer.unet3d import UNet3D

REFERENCE = Path(os.environ.get("DICODE_REFERENCE", Path(__file__).parent / "reference"))


@pytest.fixture(scope="module")
def unet_vectors() -> dict[str, Tensor]:
    return load_file(REFERENCE / "unet.io.safetensors")


def published_unet(null_text: Tensor, frame_stride: int) -> UNet3D:
    values = json.loads((REFERENCE / "unet.json").read_text())
    channels = tuple(values["model_channels"] * factor for factor in values["channel_mult"])
    config = DenoiserConfig(
        kind="unet3d",
        context_frames=0,
        uses_key_latents=False,
        depth=values["num_res_blocks"],
        heads=values["model_channels"] // values["num_head_channels"],
        channels=channels,
        text_width=values["context_dim"],
        text_tokens=null_text.shape[1],
        frame_stride=frame_stride,
    )
    network = UNet3D(config, values["in_channels"], values["context_dim"]).eval()
    weights = load_file(REFERENCE / "unet.weights.safetensors")
    state = unet_state(weights, len(channels), values["num_res_blocks"])
    assert len(state) == len(weights)
    load_state(network, {**state, "null_text": null_text}, "unet.weights")
    return network


def told(head: Tensor, tail: Tensor) -> Known:
    b, nothing = len(head), torch.zeros(len(head), 0)
    return Known(torch.stack([head, tail], dim=1), nothing, torch.ones(b), nothing, torch.zeros(b))


def test_unet_prediction_is_the_published_one(unet_vectors: dict[str, Tensor]) -> None:
    v = unet_vectors
    for i, stride in enumerate(v["frame_stride"].tolist()):
        network = published_unet(v["null_text"], int(stride))
        noisy = v["latents"][i : i + 1].transpose(1, 2)  # public: b c f h w
        known = told(v["head_tokens"][i : i + 1], v["tail_tokens"][i : i + 1])
        with torch.no_grad():
            prediction = network(noisy, v["timesteps"][i : i + 1], known).transpose(1, 2)
        torch.testing.assert_close(prediction, v["prediction"][i : i + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [4, 10])
def test_guided_sampling_is_the_published_one(unet_vectors: dict[str, Tensor], steps: int) -> None:
    values = json.loads((REFERENCE / "ddim.json").read_text())
    v, d = unet_vectors, load_file(REFERENCE / "ddim.io.safetensors")
    config = DiffusionConfig(objective="v_prediction", eta=values["eta"], guidance_rescale=values["guidance_rescale"])
    guidance = values["guidance_scale"]
    for i, stride in enumerate(values["frame_stride"]):
        network = published_unet(v["null_text"], int(stride))
        known = told(v["head_tokens"][i : i + 1], v["tail_tokens"][i : i + 1])
        null = told(d["uncond_tokens"], d["uncond_tokens"])
        noise = d["noise"][i : i + 1].transpose(1, 2)
        with torch.no_grad():
            made = sample(
                config, partial(network, known=known), partial(network, known=null), noise, steps, guidance
            ).transpose(1, 2)
        expected = d[f"latents_{steps}_steps"][i : i + 1]
        assert ((made - expected).norm() / expected.norm()).item() < 1e-4


def test_vae_is_the_published_one() -> None:
    values = json.loads((REFERENCE / "vae.json").read_text())["ddconfig"]
    channels = tuple(values["ch"] * factor for factor in values["ch_mult"])
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=values["num_res_blocks"],
        latent_channels=values["z_channels"],
        norm_num_groups=32,
    ).eval()
    load_state(vae, vae_state(load_file(REFERENCE / "vae.weights.safetensors"), len(channels)), "vae.weights")
    v = load_file(REFERENCE / "vae.io.safetensors")
    with torch.no_grad():
        latents = vae.encode(v["pixels"]).latent_dist
        torch.testing.assert_close(latents.mode(), v["latent_mode"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(latents.logvar, v["logvar"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vae.decode(v["latent_mode"]).sample, v["decoded"], rtol=1e-5, atol=1e-5)


def test_a_tensor_that_no_such_network_has_is_named() -> None:
    for name in ("input_blocks.9.0.in_layers.0.weight", "middle_block.0.strange.weight", "elsewhere.weight"):
        with pytest.raises(KeyError, match=name.split(".")[-2]):
            unet_state({name: torch.zeros(1)}, levels=2, layers=2)
