"""The linear part of small tokenizers: what it keeps, what noise costs it, where its tokens look."""

import dataclasses
from pathlib import Path

import pytest
import torch
from einops import rearrange
from test_tokenizer import tiny_config
from torch import Tensor
from toy_runs import loop, write_cache

from dicode.tokenizer.encoder import LinearCode
from dicode.tokenizer.linear import fit_projections
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.runs import FirstStageRun, TokenizerRun
from dicode.train.stages import run_recipe
from dicode.train.tokenizer import TokenizerTraining

CHANNELS, SIDE, TOKENS, WIDTH = 3, 8, 4, 6


def pictures(count: int, rank: int, seed: int = 0) -> Tensor:
    """Latents in `rank` smooth directions of falling variance, around a mean of 0.5."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(rank, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(7))
    directions = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear").flatten(1)
    weights = torch.randn(count, rank, generator=g) * torch.linspace(2, 0.1, rank)
    return (weights @ directions + 0.5).unflatten(1, (CHANNELS, SIDE, SIDE))


def fitted(latents: Tensor) -> tuple[LinearCode, Tensor]:
    code = LinearCode(TOKENS, WIDTH, CHANNELS, SIDE)
    return code, fit_projections(code, latents)


def normalised(code: LinearCode, latents: Tensor, variance: Tensor) -> Tensor:
    return (code.tokens(latents).flatten(1) / variance.sqrt()).unflatten(1, (TOKENS, WIDTH))


def error(code: LinearCode, tokens: Tensor, latents: Tensor) -> float:
    return float((code.latents(tokens) - latents).square().mean())


@torch.no_grad()
def test_what_fits_into_the_tokens_comes_back() -> None:
    code, variance = fitted(pictures(500, TOKENS * WIDTH))
    unseen = pictures(20, TOKENS * WIDTH, seed=1)
    assert error(code, normalised(code, unseen, variance), unseen) < 1e-6 * unseen.var()


@torch.no_grad()
def test_of_what_does_not_fit_the_leading_components_are_kept() -> None:
    latents = pictures(500, 40)
    code, variance = fitted(latents)
    flat = latents.flatten(1)
    left = torch.linalg.svdvals(flat - flat.mean(0))[TOKENS * WIDTH :].square().sum() / flat.numel()
    assert error(code, normalised(code, latents, variance), latents) == pytest.approx(float(left), rel=1e-3)


@torch.no_grad()
def test_noise_costs_what_the_best_linear_code_loses_and_less_than_whitening_does() -> None:
    latents = pictures(2000, TOKENS * WIDTH)
    code, variance = fitted(latents)
    tokens = normalised(code, latents, variance)
    assert tokens.flatten(1).var(0) == pytest.approx(torch.ones(TOKENS * WIDTH), rel=0.01)
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2))
    lost = error(code, tokens + 0.3 * noise, latents)
    flat = latents.flatten(1)
    deviations = torch.linalg.svdvals(flat - flat.mean(0))[: TOKENS * WIDTH] / len(flat) ** 0.5
    best = 0.3**2 * float(deviations.sum().square()) / (TOKENS * WIDTH * flat.shape[1])
    whitened = 0.3**2 * float(deviations.square().sum()) / flat.shape[1]
    assert best * 0.97 < lost < best * 1.15 < whitened  # tokens differ in variance, by their places


@torch.no_grad()
def test_every_token_tells_most_of_what_is_under_it() -> None:
    latents = pictures(1000, TOKENS * WIDTH)
    code, variance = fitted(latents)
    tokens = normalised(code, latents, variance)
    cells = rearrange(latents, "f c (h i) (w j) -> (h w) f (c i j)", h=2, w=2)
    told = torch.zeros(TOKENS, TOKENS)
    for token in range(TOKENS):
        known = torch.cat([tokens[:, token], torch.ones(len(tokens), 1)], dim=1)
        for place, cell in enumerate(cells):
            left = cell - known @ torch.linalg.lstsq(known, cell).solution
            told[token, place] = 1 - left.var() / cell.var()
    assert (told.argmax(1) == torch.arange(TOKENS)).all(), told


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens of 24 numbers: expected at most 192, of at least 24 images"):
        fit_projections(LinearCode(TOKENS, WIDTH, CHANNELS, SIDE), pictures(20, 10))
    with pytest.raises(ValueError, match="3 tokens are no square grid over 8×8 latents"):
        fit_projections(LinearCode(3, WIDTH, CHANNELS, SIDE), pictures(50, 30))
    no_keys = dataclasses.replace(tiny_config(linear_code=True).denoiser, uses_key_latents=False)
    with pytest.raises(ValueError, match="linear_code: projects latents to latents"):
        VideoTokenizer(tiny_config(linear_code=True, denoiser=no_keys))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("linear")
    write_cache(root / "cache")
    run_recipe(FirstStageRun(str(root / "cache"), model=tiny_config().first_stage, loop=loop(2)), root / "first", {})
    return root


def key_frames(root: Path) -> TokenizerRun:
    return TokenizerRun(
        cache=str(root / "cache"),
        first_stage=str(root / "first/best"),
        model=tiny_config(linear_code=True),
        loop=loop(4),
        images_per_step=16,
        train_denoiser=False,
    )


def test_training_begins_with_the_linear_code_and_the_networks_learn_beside_it(prepared: Path, tmp_path: Path) -> None:
    stage = TokenizerTraining(key_frames(prepared))
    latents = stage.latents[stage.rows[:], 0].float()
    code = LinearCode(4, 6, 5, 8)
    variance = fit_projections(code, latents)
    with torch.no_grad():
        expected = code.latents((code.tokens(latents).flatten(1) / (variance + 1e-5).sqrt()).unflatten(1, (4, 6)))
        module = stage.module.eval()
        torch.testing.assert_close(module.key_latents(module.tokens_of(latents)), expected, rtol=1e-4, atol=1e-4)
    before = module.token_hash()
    metrics = run_recipe(key_frames(prepared), tmp_path, {})
    trained = VideoTokenizer.from_pretrained(tmp_path / "best")
    assert trained.token_hash() != before
    assert trained.linear_code is not None and trained.key_head is not None
    for learnt in (trained.resampler.norm_out.weight, trained.key_head.out.weight, trained.linear_code.decode.weight):
        assert learnt.any()
    held_out = stage.validation.frame_rows()[:]
    with torch.no_grad():
        found = trained.key_latents(trained.tokens_of(stage.latents[held_out, 0].float()))
    assert (found - stage.latents[held_out, 0]).square().mean() < 2 * metrics["key_frame_error"] < 0.5


def test_the_projection_to_tokens_is_part_of_what_a_language_model_is_tied_to(prepared: Path) -> None:
    module = TokenizerTraining(key_frames(prepared)).module
    assert module.linear_code is not None
    before = module.token_hash()
    with torch.no_grad():
        module.linear_code.decode.weight.add_(1)
    assert module.token_hash() == before
    with torch.no_grad():
        module.linear_code.encode.weight.add_(1)
    assert module.token_hash() != before
