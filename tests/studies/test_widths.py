"""Wider deep tokens: the first numbers stay what they were, the further ones tell what was left out."""

import dataclasses
from pathlib import Path

import pytest
import torch
from test_linear_code import CHANNELS, SIDE, TOKENS, WIDTH, error, fitted, key_frames, pictures
from test_linear_code import prepared as prepared  # a fixture
from test_tokenizer import known, tiny_config
from test_training import FLOW, LM, loop
from torch import Tensor, nn

from dicode.cli.app import main
from dicode.data.cache import FrameCache
from dicode.lm.deep_lm import DeepTokenLM
from dicode.lm.flow_head import FlowHead
from dicode.pipeline import DiCoDe
from dicode.seeds import generator_for
from dicode.tokenizer.linear import LinearCode
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.assemble import assemble
from dicode.train.first_stage import frames_to_pixels
from dicode.train.runs import LanguageRun
from dicode.train.stages import run_recipe
from dicode.train.widen import widen

MORE = WIDTH + 3


def statistics(mean: Tensor, variance: Tensor) -> nn.BatchNorm1d:
    normalizer = nn.BatchNorm1d(len(mean), affine=False).eval()
    normalizer.running_mean, normalizer.running_var = mean, variance
    return normalizer


@torch.no_grad()
def test_a_code_stays_the_first_numbers_and_the_others_tell_the_rest() -> None:
    latents, unseen = pictures(500, 30), pictures(20, 30, seed=1)
    code, mean, variance = fitted(latents)
    wider = LinearCode(TOKENS, MORE, CHANNELS, SIDE)
    numbers = wider.extend(code, statistics(mean, variance), latents)
    kept = statistics(mean, variance)(code.tokens(unseen).flatten(1)).unflatten(1, (TOKENS, WIDTH))
    tokens = statistics(*numbers)(wider.tokens(unseen).flatten(1)).unflatten(1, (TOKENS, MORE))
    torch.testing.assert_close(tokens[..., :WIDTH], kept, rtol=1e-4, atol=1e-4)
    assert error(code, kept, unseen) > 1e-3 * unseen.var() > 1e3 * error(wider, tokens, unseen)  # 36 numbers hold all
    of_training = statistics(*numbers)(wider.tokens(latents).flatten(1))
    assert of_training.var(0) == pytest.approx(torch.ones(TOKENS * MORE), rel=0.01)


def test_codes_that_are_no_narrower_part_are_refused() -> None:
    code, mean, variance = fitted(pictures(500, 30))
    for tokens, width, size in ((TOKENS, WIDTH, SIDE), (TOKENS // 2, MORE, SIDE), (TOKENS, MORE, SIDE // 2)):
        with pytest.raises(ValueError, match="4 tokens of 6 for 192 latents"):
            LinearCode(tokens, width, CHANNELS, size).extend(code, statistics(mean, variance), pictures(500, 30))


def language(root: Path, tokenizer: str, **changes: object) -> LanguageRun:
    run = LanguageRun(
        cache=str(root / "cache"), tokenizer=str(root / tokenizer / "best"), model=FLOW, loop=loop(4), longer=(),
        longer_share=(),
    )  # fmt: skip
    return dataclasses.replace(run, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "change"])
def narrow(prepared: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A model of tokens of 6 numbers, its denoiser and language model trained for four steps each."""
    root = tmp_path_factory.mktemp("widen")
    denoiser = dataclasses.replace(tiny_config().denoiser, predict_residual=request.param)
    keys = dataclasses.replace(key_frames(prepared), model=tiny_config(linear_code=True, denoiser=denoiser))
    run_recipe(keys, root / "keys", {})
    whole = dataclasses.replace(
        keys, init=str(root / "keys/best"), freeze_key_frames=True, train_denoiser=True, images_per_step=0
    )
    run_recipe(whole, root / "denoiser", {})
    run_recipe(dataclasses.replace(language(root, "keys"), cache=keys.cache), root / "lm", {})
    assemble(root / "denoiser/best", root / "lm/best", root / "model", guidance=3.5)
    return root


@pytest.fixture(scope="module")
def wide(prepared: Path, narrow: Path) -> DiCoDe:
    command = ["widen", str(narrow / "model"), "--token-width", str(MORE), "--cache", str(prepared / "cache")]
    assert main([*command, "-o", str(narrow / "wide")]) == 0
    return DiCoDe.from_pretrained(narrow / "wide")


@pytest.fixture(scope="module")
def held(narrow: Path) -> DiCoDe:
    return DiCoDe.from_pretrained(narrow / "model")


@torch.no_grad()
def test_the_first_numbers_are_those_of_the_narrower_code_and_more_is_told(
    prepared: Path, wide: DiCoDe, held: DiCoDe
) -> None:
    cache = FrameCache.load(prepared / "cache").subset(validation=False)
    pixels = frames_to_pixels(cache.frames[cache.frame_rows()[:]])
    latents, same = (model.tokenizer.first_stage.encode(pixels) for model in (wide, held))
    assert torch.equal(latents, same)
    told = [model.tokenizer.key_latents(model.tokenizer.tokens_of(latents)) for model in (wide, held)]
    lost = [float((those - latents).square().mean()) for those in told]
    assert lost[0] < 0.9 * lost[1]
    assert not wide.tokenizer.resampler(wide.tokenizer.encoder(latents)).any()  # and what the narrower's add goes:
    held.tokenizer.resampler.norm_out.weight.zero_()
    held.tokenizer.resampler.norm_out.bias.zero_()
    kept = wide.tokenizer.tokens_of(latents)[..., :WIDTH]
    torch.testing.assert_close(kept, held.tokenizer.tokens_of(latents), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_denoiser_says_what_it_said_whatever_the_further_numbers(wide: DiCoDe, held: DiCoDe) -> None:
    noisy, time, told = torch.randn(2, 16, 5, 8, 8, generator=generator_for(1)), torch.tensor([100, 900]), known(2)
    more = torch.cat([told.tokens, torch.randn(2, 2, 4, MORE - WIDTH, generator=generator_for(2))], dim=-1)
    expected = held.tokenizer.denoiser(noisy, time, told)
    torch.testing.assert_close(wide.tokenizer.denoiser(noisy, time, dataclasses.replace(told, tokens=more)), expected)
    other = dataclasses.replace(told, tokens=told.tokens + 1)
    assert not torch.allclose(held.tokenizer.denoiser(noisy, time, other), expected, atol=1e-4)


@torch.no_grad()
def test_the_language_model_says_what_it_said_and_nothing_of_the_further_numbers(wide: DiCoDe, held: DiCoDe) -> None:
    prompts = held.text.encode(["a red square", "a blue circle"], LM.text_length)
    tokens = torch.randn(2, 3, 4, MORE, generator=generator_for(1))
    hidden = [model.lm(prompts, read).hidden for model, read in ((wide, tokens), (held, tokens[..., :WIDTH]))]
    torch.testing.assert_close(*hidden)
    assert isinstance(wide.lm.head, FlowHead) and isinstance(held.lm.head, FlowHead)
    means = [head.mean(hidden[0]) for head in (wide.lm.head, held.lm.head)]
    torch.testing.assert_close(means[0][..., :WIDTH], means[1])
    assert means[1].any() and not means[0][..., WIDTH:].any()
    assert wide.sampling == held.sampling == tiny_config().sampling.changed(guidance=3.5)


def test_training_goes_on_from_what_was_written(prepared: Path, narrow: Path, wide: DiCoDe, tmp_path: Path) -> None:
    written = str(narrow / "wide")
    frozen = dataclasses.replace(
        key_frames(prepared), model=wide.tokenizer.config, init=written, first_stage=written, freeze_key_frames=True,
        train_denoiser=True, images_per_step=0,
    )  # fmt: skip
    run_recipe(frozen, tmp_path / "denoiser", {})
    assert VideoTokenizer.from_pretrained(tmp_path / "denoiser/best").token_hash() == wide.tokenizer.token_hash()
    lm = LanguageRun(
        cache=frozen.cache, tokenizer=written, init=written, model=wide.lm.config, loop=loop(4), longer=(),
        longer_share=(),
    )  # fmt: skip
    run_recipe(lm, tmp_path / "lm", {})
    trained = DeepTokenLM.from_pretrained(tmp_path / "lm/best").head
    assert isinstance(trained, FlowHead)
    assert trained.write.weight[WIDTH:].any() and trained.read.weight[:, WIDTH:].any()
    made = assemble(tmp_path / "denoiser/best", tmp_path / "lm/best", tmp_path / "model")
    assert next(made.generate("a red square", seconds=2.0)).shape == (16, 32, 32, 3)


def test_a_tokenizer_without_a_language_model_is_widened_alone(prepared: Path, narrow: Path, tmp_path: Path) -> None:
    cache = FrameCache.load(prepared / "cache")
    widen(narrow / "denoiser/best", MORE, cache, tmp_path)
    assert VideoTokenizer.from_pretrained(tmp_path).config.resampler.token_width == MORE
    assert not (tmp_path / "lm.safetensors").exists()
    with pytest.raises(ValueError, match="4 tokens of at most 80 beside 4 tokens of 6 for 320 latents, got 81"):
        widen(narrow / "model", 81, cache, tmp_path)
    with pytest.raises(ValueError, match="4 tokens of less than 6 for 320 latents"):
        widen(narrow / "model", WIDTH, cache, tmp_path)


def test_parts_that_cannot_be_widened_are_refused(
    prepared: Path, narrow: Path, tiny_model: Path, tmp_path: Path
) -> None:
    cache = FrameCache.load(prepared / "cache")
    with pytest.raises(ValueError, match="expected a linear code and a denoiser 'hourglass'"):
        widen(tiny_model, MORE, cache, tmp_path / "wide")
    mixture = dataclasses.replace(language(narrow, "keys"), cache=str(prepared / "cache"), model=LM)
    run_recipe(mixture, tmp_path / "lm", {})
    assemble(narrow / "denoiser/best", tmp_path / "lm/best", tmp_path / "model")
    with pytest.raises(ValueError, match="expected a language model with head 'flow', got 'mixture'"):
        widen(tmp_path / "model", MORE, cache, tmp_path / "wide")
    assert not (tmp_path / "wide").exists()
