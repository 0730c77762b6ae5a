"""The public code's weights, renamed, give the public code's outputs in our networks."""

import pytest
import torch
from published import (
    assert_near,
    reference_config,
    reference_first_stage_config,
    values_of,
    vectors_of,
    weights_of,
)
from torch import Tensor

from dicode.checkpoint import load_state
from dicode.convert.names import unet_state, vae_state
from dicode.convert.priors import first_stage_of
from dicode.tokenizer.config import SamplingConfig
from dicode.tokenizer.denoiser import ClipConditioning, sample
from dicode.tokenizer.encoder import FirstStage
from dicode.tokenizer.library import UNet3D


@pytest.fixture(scope="module")
def unet_vectors() -> dict[str, Tensor]:
    return vectors_of("unet")


def published_unet(null_text: Tensor) -> UNet3D:
    tokenizer = reference_config(null_text.shape[1])
    network = UNet3D(tokenizer).eval()
    weights = weights_of("unet")
    state = unet_state(weights, tokenizer.denoiser.depth)
    assert len(state) == len(weights)
    load_state(network, {**state, "null_text": null_text}, "unet.weights")
    return network


def told(head: Tensor, tail: Tensor, stride: Tensor) -> ClipConditioning:
    b, nothing = len(head), torch.zeros(len(head), 0)
    pair = torch.stack([head, tail], dim=1)
    return ClipConditioning(pair, nothing, torch.ones(b), nothing, torch.zeros(b), stride, nothing, nothing)


def test_unet_prediction_is_the_published_one(unet_vectors: dict[str, Tensor]) -> None:
    """Each clip of a batch with its own stride, and one at a time."""
    v = unet_vectors
    network = published_unet(v["null_text"])
    assert len(v["frame_stride"].unique()) > 1
    for part in (slice(None), *(slice(i, i + 1) for i in range(len(v["latents"])))):
        noisy = v["latents"][part].transpose(1, 2)  # public: b c f h w
        conditioning = told(v["head_tokens"][part], v["tail_tokens"][part], v["frame_stride"][part].float())
        with torch.no_grad():
            prediction = network(noisy, v["timesteps"][part], conditioning).transpose(1, 2)
        assert_near(prediction, v["prediction"][part])


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
        network, strides = published_unet(v["null_text"]), torch.tensor([float(stride)])
        conditioning = told(v["head_tokens"][i : i + 1], v["tail_tokens"][i : i + 1], strides)
        both = conditioning.with_null(d["uncond_tokens"])
        noise = d["noise"][i : i + 1].transpose(1, 2)
        with torch.no_grad():
            predict = lambda x, t, _, own=both, net=network: net(x, t, own)  # noqa: E731
            made = sample("v_prediction", sampling, predict, noise).transpose(1, 2)
        expected = d[f"latents_{steps}_steps"][i : i + 1]
        assert ((made - expected).norm() / expected.norm()).item() < 1e-4


def test_vae_is_the_published_one() -> None:
    weights = weights_of("vae")
    config = reference_first_stage_config()
    assert first_stage_of(weights) == config
    vae = FirstStage(config).autoencoder.eval()
    load_state(vae, vae_state(weights, len(config.channels)), "vae.weights")
    v = vectors_of("vae")
    with torch.no_grad():
        latents = vae.encode(v["pixels"]).latent_dist
        assert_near(latents.mode(), v["latent_mode"])
        assert_near(latents.logvar, v["logvar"])
        assert_near(vae.decode(v["latent_mode"]).sample, v["decoded"])


def test_unknown_tensors_keep_their_names_and_never_replace_another() -> None:
    for name in ("input_blocks.1.3.weight", "middle_block.4.strange.weight", "elsewhere.weight"):
        assert unet_state({name: torch.zeros(1)}, layers=2).keys() == {f"unet.{name}"}
