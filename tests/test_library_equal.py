"""Small parts of `diffusers` that are written again here equal the library's: bit for bit, Euler steps to 1e-6."""

import pytest
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding

from dicode.tokenizer.config import FirstStageConfig, SamplingConfig
from dicode.tokenizer.denoiser import grid_positions, sample, time_waves
from dicode.tokenizer.tiny import TinyAutoencoder


@torch.no_grad()
@pytest.mark.parametrize("blocks", [(0, 1, 2, 2), (1, 1)])
def test_the_tiny_autoencoder_is_the_librarys(blocks: tuple[int, ...]) -> None:
    channels = (12,) * len(blocks)
    ours = TinyAutoencoder(FirstStageConfig(channels=channels, encoder_blocks=blocks, decoder_blocks=blocks[::-1]))
    theirs = AutoencoderTiny(
        encoder_block_out_channels=channels, decoder_block_out_channels=channels, latent_channels=16,
        num_encoder_blocks=blocks, num_decoder_blocks=blocks[::-1],
    )  # fmt: skip
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = ours.encoder(pixels)
    assert torch.equal(latents, theirs.encode(pixels).latents)
    assert torch.equal(ours.decoder(latents), theirs.decode(latents).sample)


def test_it_starts_with_the_same_weights() -> None:
    networks = []
    for make in (
        lambda: TinyAutoencoder(FirstStageConfig(channels=(8, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1))),
        lambda: AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), latent_channels=16,
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
        ),
    ):  # fmt: skip
        torch.manual_seed(0)
        networks.append(make().state_dict())
    assert list(networks[0]) == list(networks[1])
    assert all(torch.equal(value, networks[1][name]) for name, value in networks[0].items())


@pytest.mark.parametrize(("side", "width"), [(2, 8), (4, 256), (8, 48), (6, 20)])
def test_positions_are_the_librarys(side: int, width: int) -> None:
    expected = get_2d_sincos_pos_embed(width, side, base_size=8, output_type="pt").float()
    assert torch.equal(grid_positions(side * side, width), expected)


@pytest.mark.parametrize("width", [8, 96, 128])
def test_waves_of_time_are_the_librarys(width: int) -> None:
    timestep = torch.tensor([0.0, 0.37, 500.0, 1000.0])
    assert torch.equal(time_waves(timestep, width), get_timestep_embedding(timestep, width, flip_sin_to_cos=True))


@pytest.mark.parametrize("steps", [1, 3, 12, 50])
def test_euler_steps_are_the_librarys(steps: int) -> None:
    noise = torch.randn(2, 4, 3, 2, 2)

    def predict(latents: torch.Tensor, timestep: torch.Tensor, until: torch.Tensor | None = None) -> torch.Tensor:
        return (latents * timestep[:, None, None, None, None] / 700).sin()

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist())
    expected = noise
    for timestep in scheduler.timesteps:
        expected = scheduler.step(predict(expected, timestep.expand(2)), timestep, expected).prev_sample
    found = sample("flow", SamplingConfig(steps=steps), predict, noise)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
