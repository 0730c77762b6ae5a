"""Wider deep tokens: the first numbers stay what they were, the further ones tell what was left out."""

import dataclasses
from pathlib import Path

import pytest
import torch
from test_linear_code import CHANNELS, SIDE, TOKENS, WIDTH, error, fitted, key_frames, pictures
from test_linear_code import prepared as prepared  # a fixture
from test_tokenizer import known, tiny_config
from test_training import LM, loop
from torch import Tensor, nn

from dicode.hub import CheckpointError
from dicode.seeds import generator_for
from dicode.tokenizer.linear import LinearCode
from dicode.tokenizer.video_tokenizer import TokenizerConfig, VideoTokenizer
from dicode.train.clips import TokenizerRun, TokenizerTraining
from dicode.train.language import LanguageRun, LanguageTraining
from dicode.train.stages import run_recipe
from dicode.train.widen import widened

MORE = WIDTH + 3
FLOW = dataclasses.replace(LM, head="flow", order="keyframe", predicts_change=True, flow_width=16, dropout=0.0)
WIDE = dataclasses.replace(FLOW, token_width=MORE)


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


@pytest.fixture(scope="module")
def narrow(prepared: Path) -> Path:
    """A folder with key frames in tokens of 6, a denoiser and a language model of them."""
    model = tiny_config(linear_code=True)
    run_recipe(dataclasses.replace(key_frames(prepared), model=model), prepared / "keys", {})
    denoiser = dataclasses.replace(
        key_frames(prepared), init=str(prepared / "keys/best"), freeze_key_frames=True, denoises=True, images_per_step=0
    )
    run_recipe(denoiser, prepared / "denoiser", {})
    run_recipe(language(prepared, "keys"), prepared / "lm", {})
    return prepared


def language(root: Path, tokenizer: str, **changes: object) -> LanguageRun:
    run = LanguageRun(
        cache=str(root / "cache"), tokenizer=str(root / tokenizer / "best"), model=FLOW, loop=loop(4), longer=(),
        longer_share=(),
    )  # fmt: skip
    return dataclasses.replace(run, **changes)  # type: ignore[arg-type]


def wide_model() -> TokenizerConfig:
    model = tiny_config(linear_code=True)
    return dataclasses.replace(model, resampler=dataclasses.replace(model.resampler, token_width=MORE))


def widening(root: Path, **changes: object) -> TokenizerRun:
    run = dataclasses.replace(key_frames(root), model=wide_model(), widens=str(root / "keys/best"))
    return dataclasses.replace(run, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def wide(narrow: Path) -> Path:
    run_recipe(widening(narrow), narrow / "wide", {})
    return narrow


@torch.no_grad()
def test_training_keeps_the_code_that_it_widens(wide: Path) -> None:
    stage = TokenizerTraining(widening(wide))
    assert stage.module.linear_code is not None
    assert not any(weight.requires_grad for weight in stage.module.linear_code.parameters())
    trained, narrower = (VideoTokenizer.from_pretrained(wide / name / "best") for name in ("wide", "keys"))
    latents = stage.latents[stage.rows, 0].float()
    told = [held.key_latents(held.tokens_of(latents)) for held in (trained, narrower)]
    lost = [float((those - latents).square().mean()) for those in told]
    assert lost[0] < 0.9 * lost[1]
    for held in (trained, narrower):  # what the networks beside it have learnt is another matter
        held.resampler.norm_out.weight.zero_()
        held.resampler.norm_out.bias.zero_()
    kept = trained.tokens_of(latents)[..., :WIDTH]
    torch.testing.assert_close(kept, narrower.tokens_of(latents), rtol=0, atol=0.02)


@torch.no_grad()
def test_denoisers_say_what_they_said_whatever_the_further_numbers(wide: Path) -> None:
    frozen = dataclasses.replace(
        widening(wide), widens=None, init=str(wide / "wide/best"), init_denoiser=str(wide / "denoiser/best"),
        freeze_key_frames=True, denoises=True, images_per_step=0,
    )  # fmt: skip
    wider, held = TokenizerTraining(frozen).module, VideoTokenizer.from_pretrained(wide / "denoiser/best")
    noisy, time, told = torch.randn(2, 16, 5, 8, 8, generator=generator_for(1)), torch.tensor([100, 900]), known(2)
    more = torch.cat([told.tokens, torch.randn(2, 2, 4, 3, generator=generator_for(2))], dim=-1)
    expected = held.denoiser(noisy, time, told)
    torch.testing.assert_close(wider.denoiser(noisy, time, dataclasses.replace(told, tokens=more)), expected)
    assert expected.any()


@torch.no_grad()
def test_language_models_say_what_they_said_and_nothing_of_the_further_numbers(wide: Path) -> None:
    wider = LanguageTraining(language(wide, "wide", model=WIDE, init=str(wide / "lm/best"))).module.eval()
    held = LanguageTraining(language(wide, "keys", init=str(wide / "lm/best"))).module.eval()
    prompts = held.text.encode(["a red square", "a blue circle"], LM.text_length)
    tokens = torch.randn(2, 3, 4, MORE, generator=generator_for(1))
    hidden = [lm(prompts, read).hidden for lm, read in ((wider, tokens), (held, tokens[..., :WIDTH]))]
    torch.testing.assert_close(*hidden)
    means = [lm.head.mean(hidden[0]) for lm in (wider, held)]
    torch.testing.assert_close(means[0][..., :WIDTH], means[1])
    assert means[1].any() and not means[0][..., WIDTH:].any()


def test_a_mixture_cannot_be_widened(wide: Path, tmp_path: Path) -> None:
    run_recipe(language(wide, "keys", model=LM), tmp_path, {})
    wider = language(wide, "wide", model=dataclasses.replace(LM, token_width=MORE), init=str(tmp_path / "best"))
    with pytest.raises(CheckpointError, match=r"head\.mlp.* expected"):
        LanguageTraining(wider)


def test_widening_what_is_continued_or_has_no_code_is_refused(wide: Path) -> None:
    with pytest.raises(ValueError, match="widens: fits a linear code beside a narrower one"):
        TokenizerTraining(widening(wide, init=str(wide / "keys/best")))
    plain = dataclasses.replace(wide_model(), linear_code=False)
    with pytest.raises(ValueError, match="widens: fits a linear code beside a narrower one"):
        TokenizerTraining(widening(wide, model=plain))


def test_what_is_no_smaller_stays_and_what_is_not_named_is_not_grown() -> None:
    module = nn.Linear(3, 2)
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(4)}
    grown = widened(state, module, ("weight", "bias", "absent"))
    assert torch.equal(grown["weight"], torch.tensor([[1.0, 1, 0], [1, 1, 0]])) and grown["bias"] is state["bias"]
    assert widened(state, module, ()) == state
