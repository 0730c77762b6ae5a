"""The linear part of small tokenizers: what it keeps, what noise costs it, where its tokens look."""

import dataclasses
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import Tensor
from toy_runs import runs, write_cache

from dicode.data.cache import FrameCache
from dicode.tokenizer.encoder import LinearCode
from dicode.tokenizer.linear import fit_projections
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.cached import frames_to_pixels
from dicode.train.linear_code import fit_of
from dicode.train.run_log import records
from dicode.train.stages import run_recipe

CHANNELS, SIDE, TOKENS, WIDTH = 3, 8, 4, 6


def pictures(count: int, rank: int, seed: int = 0) -> Tensor:
    """Latents in `rank` smooth directions of falling variance, around a mean of 0.5."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(rank, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(7))
    directions = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear").flatten(1)
    weights = torch.randn(count, rank, generator=g) * torch.linspace(2, 0.1, rank)
    return (weights @ directions + 0.5).unflatten(1, (CHANNELS, SIDE, SIDE))


def fitted(latents: Tensor) -> LinearCode:
    code = LinearCode(TOKENS, WIDTH, CHANNELS, SIDE)
    fit_projections(code, latents)
    return code


def error(code: LinearCode, tokens: Tensor, latents: Tensor) -> float:
    return float((code.latents(tokens) - latents).square().mean())


@torch.no_grad()
def test_what_fits_into_the_tokens_comes_back() -> None:
    code = fitted(pictures(500, TOKENS * WIDTH))
    unseen = pictures(20, TOKENS * WIDTH, seed=1)
    assert error(code, code.tokens(unseen), unseen) < 1e-6 * unseen.var()


@torch.no_grad()
def test_of_what_does_not_fit_the_leading_components_are_kept() -> None:
    latents = pictures(500, 40)
    code = fitted(latents)
    flat = latents.flatten(1)
    left = torch.linalg.svdvals(flat - flat.mean(0))[TOKENS * WIDTH :].square().sum() / flat.numel()
    assert error(code, code.tokens(latents), latents) == pytest.approx(float(left), rel=1e-3)


@torch.no_grad()
def test_noise_costs_what_the_best_linear_code_loses_and_less_than_whitening_does() -> None:
    latents = pictures(2000, TOKENS * WIDTH)
    code = fitted(latents)
    tokens = code.tokens(latents)
    assert tokens.flatten(1).mean(0).abs().max() < 1e-4
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
    code = fitted(latents)
    tokens = code.tokens(latents)
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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, a first stage of two steps, and a linear code fitted on both."""
    root = tmp_path_factory.mktemp("linear")
    write_cache(root / "cache")
    for name in ("first_stage", "linear_code"):
        run_recipe(runs(root)[name], root / name, {"recipe": name})
    return root


@torch.no_grad()
def test_a_run_fits_the_code_to_training_frames_and_measures_it_on_others(prepared: Path) -> None:
    tokenizer = VideoTokenizer.from_pretrained(prepared / "linear_code/best")
    cache = FrameCache.load(prepared / "cache")
    training, held_out = (cache.subset(validation=held).frame_rows()[:] for held in (False, True))
    latents = tokenizer.first_stage.encode(frames_to_pixels(cache.frames[:]))
    code = LinearCode(4, 6, 5, 8)
    fit_projections(code, latents[training].half().float())
    for own, expected in zip(tokenizer.linear_code.parameters(), code.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-2, atol=1e-2)
    tokens = tokenizer.encode_frames(cache.frames[training].numpy())
    assert tokens.mean().abs() < 0.01 and tokens.std().item() == pytest.approx(1, abs=0.01)
    found = tokenizer.key_latents(tokenizer.tokens_of(latents[held_out]))
    (line,) = records(prepared / "linear_code/log.jsonl")
    lost = float((found - latents[held_out]).square().mean())
    assert line["key_frame_error"] == pytest.approx(lost, rel=0.02)
    assert (prepared / "linear_code/sheets/0000000.png").is_file()


def test_a_mirrored_fit_knows_mirrored_frames_too(prepared: Path, tmp_path: Path) -> None:
    held = FrameCache.load(prepared / "cache")  # whose clips are those of a mirror, but in reverse
    frames = held.frames[:].clone()
    frames[:, :, :12] //= 4
    FrameCache(tuple(held.videos), frames, held.times_s).save(tmp_path / "cache")
    run = dataclasses.replace(runs(prepared)["linear_code"], cache=str(tmp_path / "cache"), mirror=True)
    run_recipe(run, tmp_path / "run", {})
    tokenizer = VideoTokenizer.from_pretrained(tmp_path / "run/best")
    cache = FrameCache.load(tmp_path / "cache").subset(validation=False)
    pixels = frames_to_pixels(cache.frames[cache.frame_rows()[:]])
    both = torch.cat([tokenizer.tokens_of(tokenizer.source_of(side)) for side in (pixels, pixels.flip(-1))])
    assert both.flatten(1).mean(0).abs().max() < 0.02
    assert both.flatten(1).var(0) == pytest.approx(torch.ones(24), rel=0.03)


def test_a_fit_that_is_done_is_not_done_again_but_for_another_run_or_other_data(prepared: Path, tmp_path: Path) -> None:
    run = runs(prepared)["linear_code"]
    metrics = run_recipe(run, tmp_path, {})
    weights = tmp_path / "best/tokenizer.safetensors"
    began = weights.stat().st_mtime_ns
    assert run_recipe(run, tmp_path, {}) == metrics and weights.stat().st_mtime_ns == began
    narrower = dataclasses.replace(run, model=dataclasses.replace(run.model, token_width=5))
    assert fit_of(tmp_path, narrower) is None
    assert run_recipe(narrower, tmp_path, {})["key_frame_error"] > metrics["key_frame_error"]
    assert weights.stat().st_mtime_ns > began
    write_cache(tmp_path / "other", 12)
    with pytest.raises(ValueError, match="was begun with other data"):
        run_recipe(dataclasses.replace(run, cache=str(tmp_path / "other")), tmp_path, {})


def test_minutes_are_refused_where_no_step_is_taken(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--minutes: a linear code is fitted without steps"):
        run_recipe(runs(prepared)["linear_code"], tmp_path, {}, minutes=1.0)


def test_the_projection_to_tokens_is_part_of_what_a_language_model_is_tied_to(prepared: Path) -> None:
    module = VideoTokenizer.from_pretrained(prepared / "linear_code/best")
    before = module.token_hash()
    with torch.no_grad():
        module.linear_code.decode.weight.add_(1)
    assert module.token_hash() == before
    with torch.no_grad():
        module.linear_code.encode.weight.add_(1)
    assert module.token_hash() != before
