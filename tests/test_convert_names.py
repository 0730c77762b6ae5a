"""The public code's weights, renamed, give the public code's outputs in our networks."""

import dataclasses
from functools import partial

import pytest
import torch
from published import values_of, vectors_of, weights_of
from torch import Tensor

from dicode.convert.configs import denoiser_config, first_stage_config, first_stage_of
from dicode.convert.names import unet_state, vae_state
from dicode.hub import load_state
from dicode.sampling import SamplingConfig
from dicode.tokenizer.config import DiffusionConfig
from dicode.tokenizer.diffusion import sample
from dicode.tokenizer.first_stage import FirstStage
from dicode.tokenizer.known import Known
from dicode.tokenizer.unet3d import UNet3D


@pytest.fixture(scope="module")
def unet_vectors() -> dict[str, Tensor]:
    return vectors_of("unet")


def published_unet(null_text: Tensor, frame_stride: int) -> UNet3D:
    values = values_of("unet")
    config = dataclasses.replace(denoiser_config(values, null_text.shape[1]), frame_stride=frame_stride)
    network = UNet3D(config, values["in_channels"], values["context_dim"]).eval()
    weights = weights_of("unet")
    state = unet_state(weights, len(config.channels), config.depth)
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
    values = values_of("ddim")
    v, d = unet_vectors, vectors_of("ddim")
    sampling = SamplingConfig(
        steps=steps,
        decoder_guidance=values["guidance_scale"],
        guidance_rescale=values["guidance_rescale"],
        eta=values["eta"],
    )
    for i, stride in enumerate(values["frame_stride"]):
        network = published_unet(v["null_text"], int(stride))
        known = told(v["head_tokens"][i : i + 1], v["tail_tokens"][i : i + 1])
        null = told(d["uncond_tokens"], d["uncond_tokens"])
        noise = d["noise"][i : i + 1].transpose(1, 2)
        with torch.no_grad():
            predict, predict_null = partial(network, known=known), partial(network, known=null)
            made = sample(DiffusionConfig("v_prediction"), sampling, predict, predict_null, noise).transpose(1, 2)
        expected = d[f"latents_{steps}_steps"][i : i + 1]
        assert ((made - expected).norm() / expected.norm()).item() < 1e-4


def test_vae_is_the_published_one() -> None:
    weights = weights_of("vae")
    config = first_stage_config(values_of("vae")["ddconfig"])
    assert first_stage_of(weights) == config
    vae = FirstStage(config).autoencoder.eval()
    load_state(vae, vae_state(weights, len(config.channels)), "vae.weights")
    v = vectors_of("vae")
    with torch.no_grad():
        latents = vae.encode(v["pixels"]).latent_dist
        torch.testing.assert_close(latents.mode(), v["latent_mode"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(latents.logvar, v["logvar"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vae.decode(v["latent_mode"]).sample, v["decoded"], rtol=1e-5, atol=1e-5)


def test_a_tensor_that_no_such_network_has_is_named() -> None:
    for name in ("input_blocks.9.0.in_layers.0.weight", "middle_block.0.strange.weight", "elsewhere.weight"):
        with pytest.raises(KeyError, match=name.split(".")[-2]):
            unet_state({name: torch.zeros(1)}, levels=2, layers=2)
