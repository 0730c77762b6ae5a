"""A learned code of key frames: trained alone by squared error, then fixed."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_model
from test_motion import MOTION, run_of
from test_tokenizer import RESAMPLER, tiny_config, tiny_tokenizer
from test_train_samples import plain_cache

from dicode.seeds import generator_for
from dicode.tokenizer.config import CodeConfig
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.runs import LinearCodeRun
from dicode.train.stages import run_recipe
from dicode.train.tokenizer import TokenizerTraining

CODE = CodeConfig(width=16, depth=1, heads=2)


@pytest.fixture(scope="module")
def coded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("coded") / "tiny", code=CODE, motion=MOTION)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_cache(tmp_path_factory.mktemp("plain") / "cache", [1, 32, 72])


def test_a_token_stands_for_a_cell_and_has_unit_variance() -> None:
    tokenizer = tiny_tokenizer(code=CODE)
    latents = torch.randn(3, 5, 8, 8)
    tokens = tokenizer.tokens_of(latents)
    assert tokens.shape == (3, 4, 6) and tokenizer.key_latents(tokens).shape == latents.shape
    torch.testing.assert_close(tokens.var(-1, unbiased=False), torch.ones(3, 4), atol=1e-2, rtol=0)
    alone = tiny_tokenizer(code=dataclasses.replace(CODE, depth=1)).code
    for block in (alone.encode.blocks, alone.decode.blocks):  # without attention each cell is on its own
        for layer in block.layers:
            torch.nn.init.zeros_(layer.self_attn.out_proj.weight)
    changed = latents.clone()
    changed[:, :, 4:, :4] += 1
    differs = (alone.tokens(changed) - alone.tokens(latents)).abs().amax((0, 2)) > 1e-6
    assert differs.tolist() == [False, False, True, False]
    before = alone.tokens(latents)
    moved = before + torch.tensor([0.0, 1.0, 0.0, 0.0])[:, None]
    differs = (alone.latents(moved) - alone.latents(before)).abs().amax((0, 1)) > 1e-6
    assert differs[:4, 4:].all() and not differs[:, :4].any() and not differs[4:].any()


def test_what_fits_no_grid_is_refused() -> None:
    for changes in ({"tokens_per_keyframe": 5}, {"tokens_per_keyframe": 9}):
        with pytest.raises(ValueError, match="code: expected tokens in a square grid that divides the latents, got"):
            VideoTokenizer(tiny_config(code=CODE, **changes))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="code: 3 heads do not divide a width of 16"):
        VideoTokenizer(tiny_config(code=dataclasses.replace(CODE, heads=3)))
    with pytest.raises(ValueError, match="code: expected none beside a resampler"):
        VideoTokenizer(tiny_config(code=CODE, resampler=RESAMPLER))


def test_the_hash_of_tokens_is_of_the_encoding_half() -> None:
    tokenizer = tiny_tokenizer(code=CODE)
    before = tokenizer.token_hash()
    torch.nn.init.ones_(tokenizer.code.decode.write.bias)
    assert tokenizer.token_hash() == before
    torch.nn.init.ones_(tokenizer.code.encode.write.bias)
    assert tokenizer.token_hash() != before


def test_it_is_trained_alone_and_stays_afterwards(tmp_path: Path, coded_model: Path, cache: Path) -> None:
    run = run_of(coded_model, cache)
    held = VideoTokenizer.from_pretrained(coded_model).state_dict()
    for name, trained in (("code", {"learned_code"}), ("motion", {"motion_encoder", "motion_decoder"})):
        run_recipe(dataclasses.replace(run, trains=name), tmp_path / name, {})
        run = dataclasses.replace(run, init=str(tmp_path / name / "best"))
        state = VideoTokenizer.from_pretrained(tmp_path / name / "best").state_dict()
        own = {key: t for key, t in state.items() if key in held}
        changed = {key.split(".")[0] for key, t in own.items() if not torch.equal(t, held[key]) and t.ndim > 1}
        assert changed == trained
        held = state


def test_it_learns_key_frames(coded_model: Path, cache: Path) -> None:
    stage = TokenizerTraining(dataclasses.replace(run_of(coded_model, cache), trains="code", token_noise=0.0))
    optimizer = torch.optim.Adam([p for p in stage.module.parameters() if p.requires_grad], 0.01)
    losses = []
    for step in range(60):
        loss, found = stage.loss(stage.batch(torch.arange(2), generator_for(step)), generator_for(step))
        assert found.keys() == {"code_loss"}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    metrics, sheet = stage.validate()
    assert metrics.keys() == {"code_loss"} and sheet.height > 0


def test_a_new_code_takes_what_does_not_depend_on_it(
    tmp_path: Path, tiny_model: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tiny_model, cache, code=CODE, token_width=3)
    stage = TokenizerTraining(dataclasses.replace(run, trains="code"))
    assert "tensors are taken; the others have random weights" in capsys.readouterr().out
    held, ours = VideoTokenizer.from_pretrained(tiny_model).state_dict(), stage.module.state_dict()
    assert torch.equal(ours["denoiser.stem.weight"], held["denoiser.stem.weight"])
    assert ours["denoiser.tokens.weight"].shape[1] == 3


def test_a_code_is_trained_where_there_is_one(tiny_model: Path, cache: Path, tmp_path: Path) -> None:
    for run in (run_of(tiny_model, cache), run_of(tiny_model, cache, resampler=RESAMPLER)):
        with pytest.raises(ValueError, match=r"trains: 'code' needs model\.code, and no adapters"):
            TokenizerTraining(dataclasses.replace(run, trains="code"))
    with pytest.raises(ValueError, match=r"model\.resampler and model\.code: expected neither"):
        run_recipe(LinearCodeRun(str(cache), str(tiny_model), tiny_config(code=CODE)), tmp_path / "fit", {})
