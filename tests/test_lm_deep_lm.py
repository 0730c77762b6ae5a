"""The language model: training loss, generation, checkpoints."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dicode.checkpoint.saving import write_config
from dicode.config import CheckpointError
from dicode.lm.config import BodyConfig, DeepLMConfig, HeadConfig
from dicode.lm.deep_lm import DeepTokenLM, _noised
from dicode.lm.presets import SIZES
from dicode.lm.text import TextTokenizer
from dicode.tokenizer.config import SamplingConfig

# Of tokens that are written one after the other: sums are taken in another order, and what differs is read again
NEAR = {"rtol": 1e-4, "atol": 1e-4}
CAPTIONS = ["a swirling ice vortex", "a fireball", "arcane curse", "water burst"]
TEXT = TextTokenizer.train(CAPTIONS, 300)
CONFIG = DeepLMConfig(
    BodyConfig("llama", width=24, depth=2, heads=3),
    head=HeadConfig(components=4),
    positions=12 + 6 * 9,
    vocab_size=300,
    token_width=7,
    max_keyframes=8,
    text_length=12,
    tokens_per_keyframe=5,
)
PROMPTS = TEXT.encode(CAPTIONS[:3], 12)
KINDS = [
    {"body": "llama"},
    {"body": "gpt2"},
    {"body": "llama", "head": "regression"},
    {"head": HeadConfig(components=1)},
    {"attend_padding": False},
    {"attend_padding": False, "body": "llama", "order": "keyframe", "head": "flow"},
]


def build(**changes: Any) -> DeepTokenLM:
    """A small model with weights large enough for every input to matter; parts may be named by their kind alone."""
    for part in ("body", "head"):
        if isinstance(changes.get(part), str):
            changes[part] = dataclasses.replace(getattr(CONFIG, part), kind=changes[part])
    torch.manual_seed(0)
    model = DeepTokenLM(dataclasses.replace(CONFIG, **changes), TEXT).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return model


def written(model: DeepTokenLM, prompts: Tensor = PROMPTS, num_keyframes: int = 3, **options: Any) -> Tensor:
    return torch.stack(list(generated(model, prompts, num_keyframes, **options)), dim=1)


def uncached(model: DeepTokenLM) -> DeepTokenLM:
    """The model computes the whole sequence again for every token."""
    model.backbone.new_cache = lambda: None  # type: ignore[method-assign]
    return model


def saved(model: DeepTokenLM, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a checkpoint of nothing but a language model."""
    write_config(folder, {"lm": model.save_pretrained(folder, dtype)})


def generated(model: DeepTokenLM, prompts: Tensor, num_keyframes: int, **options: Any) -> Iterator[Tensor]:
    """`generate`, with fields of `SamplingConfig` among its options."""
    fields = {name: options.pop(name) for name in SamplingConfig.__dataclass_fields__ if name in options}
    return model.generate(prompts, num_keyframes, sampling=SamplingConfig(**fields), **options)


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_cached_generation_equals_uncached(changes: dict, guidance: float) -> None:
    model = build(**changes)
    cached = written(model, guidance=guidance, variance_scale=0.5)
    torch.testing.assert_close(cached, written(uncached(model), guidance=guidance, variance_scale=0.5), **NEAR)
    assert cached.shape == (3, 3, 5, 7) and cached.dtype == torch.float32


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_batch_size_and_order_change_nothing(guidance: float) -> None:
    model = build()
    together = written(model, seed=5, guidance=guidance)
    turned = written(model, PROMPTS.flip(0), seed=5, guidance=guidance, sample_indices=[2, 1, 0])
    torch.testing.assert_close(turned.flip(0), together, **NEAR)
    for i in range(3):
        alone = written(model, PROMPTS[i : i + 1], seed=5, guidance=guidance, sample_indices=[i])
        torch.testing.assert_close(alone[0], together[i], **NEAR)


def test_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    model = build()
    assert torch.equal(written(model, seed=3), written(model, seed=3))
    assert not torch.allclose(written(model, seed=3), written(model, seed=4), atol=1e-2)


def test_samples_of_one_prompt_differ() -> None:
    tokens = written(build(), PROMPTS[:1].expand(2, -1))
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-2)


def test_prompt_and_guidance_matter() -> None:
    model = build()
    first, second = (written(model, PROMPTS[i : i + 1], variance_scale=0.0) for i in (0, 1))
    assert (first - second).abs().max() > 1e-2
    guided = written(model, PROMPTS[:1], variance_scale=0.0, guidance=4.0)
    assert (first - guided).abs().max() > 1e-2
    null = torch.full_like(PROMPTS[:1], CONFIG.pad_id)
    torch.testing.assert_close(
        written(model, PROMPTS[:1], variance_scale=0.0, guidance=0.0),
        written(model, null, variance_scale=0.0),
        rtol=1e-4,
        atol=1e-5,
    )


def test_continuing_a_prefix_writes_what_one_call_writes() -> None:
    model = build()
    whole = written(model, num_keyframes=4, seed=9, guidance=2.0)
    rest = written(model, num_keyframes=2, seed=9, guidance=2.0, prefix=whole[:, :2])
    torch.testing.assert_close(rest, whole[:, 2:], **NEAR)


def test_key_frames_are_written_only_when_asked_for() -> None:
    model = build()
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    keyframes = model.generate(PROMPTS, 4)
    assert not calls
    next(keyframes)
    assert len(calls) == CONFIG.tokens_per_keyframe


def test_too_many_key_frames_raise_before_anything_is_written() -> None:
    model = build()
    assert model.config.keyframe_limit == 8
    with pytest.raises(ValueError, match="9 key frames asked for, this model holds 8"):
        model.generate(PROMPTS, 9)
    with pytest.raises(ValueError, match="9 key frames asked for, this model holds 8"):
        model.generate(PROMPTS, 3, prefix=torch.zeros(3, 6, 5, 7))
    with pytest.raises(ValueError, match="this model holds 2"):
        build(positions=12 + 17).generate(PROMPTS, 3)
    with pytest.raises(ValueError, match="9 key frames"):
        model(PROMPTS, torch.zeros(3, 9, 5, 7))
    assert len(list(model.generate(PROMPTS[:1], 8))) == 8


def test_wrong_arguments_raise_before_anything_is_written() -> None:
    model = build()
    wrong: dict[str, dict[str, Any]] = {
        "at least 1": {"num_keyframes": 0},
        "one a prompt": {"num_keyframes": 1, "sample_indices": [0]},
        "deep tokens: expected": {"num_keyframes": 1, "prefix": torch.zeros(3, 1, 4, 7)},
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            generated(model, PROMPTS, **options)
    with pytest.raises(ValueError, match="text ids: expected 12"):
        model.generate(PROMPTS[:, :5], 1)
    with pytest.raises(ValueError, match="eval"):
        build().train().generate(PROMPTS, 1)


def test_masked_key_frames_change_neither_loss_nor_gradient() -> None:
    model = build()
    tokens, mask = torch.randn(3, 4, 5, 7), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    output = model(PROMPTS, tokens, mask)
    alone = [model(PROMPTS[i : i + 1], tokens[i : i + 1, :k]).keyframe_loss.flatten() for i, k in enumerate((4, 2, 1))]
    torch.testing.assert_close(output.loss, torch.cat(alone).mean(), **NEAR)
    torch.testing.assert_close(output.keyframe_loss[mask], torch.cat(alone), **NEAR)
    tokens.requires_grad_()
    model(PROMPTS, tokens, mask).loss.backward()
    assert tokens.grad is not None and tokens.grad[~mask].abs().max() == 0 and tokens.grad[mask].abs().max() > 0


@pytest.mark.parametrize("body", ["llama", "gpt2"])
def test_a_token_is_predicted_from_earlier_ones_only(body: str) -> None:
    model = build(body=body)
    tokens = torch.randn(3, 3, 5, 7)
    changed = tokens.clone()
    changed[:, 1, 2] += 1.0
    with torch.no_grad():
        difference = (model(PROMPTS, tokens).hidden - model(PROMPTS, changed).hidden).abs().amax((0, -1)).flatten()
    assert difference[: 5 + 3].max() < 1e-6  # up to and including the state that predicts the changed token
    assert difference[5 + 3 :].min() > 1e-4


def test_input_noise_acts_in_training_only_and_follows_its_generator() -> None:
    model, tokens = build(input_noise=0.5), torch.randn(3, 2, 5, 7)
    clean = model(PROMPTS, tokens).loss
    assert torch.equal(clean, build()(PROMPTS, tokens).loss)
    model.train()
    first, again, other = (model(PROMPTS, tokens, None, torch.Generator().manual_seed(s)).loss for s in (1, 1, 2))
    assert torch.equal(first, again) and first != clean and first != other


def test_a_share_of_noise_is_at_most_all() -> None:
    with pytest.raises(ValueError, match="input_noise"):
        build(input_noise=1.5)


def test_with_a_share_of_one_what_is_read_may_be_all_noise() -> None:
    tokens = torch.full((4000, 1, 1, 2), 5.0)
    read = _noised(tokens, 1.0, torch.Generator().manual_seed(0))
    # the share's density rises linearly, so its mean is 2/3 and a third of the tokens is left on average
    assert read.mean().item() == pytest.approx(5 / 3, abs=0.1)
    assert read.min() < 0 and read.max() > 4.9


def test_bfloat16_autocast_keeps_the_loss_in_float32() -> None:
    model, tokens = build().train(), torch.randn(3, 2, 5, 7)
    exact = model(PROMPTS, tokens).loss
    with torch.autocast("cpu", torch.bfloat16):
        output = model(PROMPTS, tokens)
    output.loss.backward()
    assert output.loss.dtype == torch.float32 and output.loss != exact
    assert output.loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("changes", [*KINDS, {"head": "flow"}, {"head": "flow", "order": "keyframe"}])
def test_bfloat16_weights_generate(changes: dict) -> None:
    tokens = written(build(**changes).bfloat16(), guidance=2.0)
    assert tokens.dtype == torch.float32 and torch.isfinite(tokens).all()


def fit(model: DeepTokenLM, ids: Tensor, tokens: Tensor, steps: int, goal_every: int | None = None) -> float:
    """Train until the samples are known by heart; returns the last loss and leaves the model in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    loss = torch.zeros(())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, step / 20) * (1 - step / steps)
        goal = goal_every is not None and step % goal_every == 0
        loss = model(ids, tokens, None, generator, goal=goal).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return loss.item()


def test_four_captions_are_memorised_and_written_back() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(
        CONFIG,
        body=dataclasses.replace(CONFIG.body, width=64, heads=4),
        head=dataclasses.replace(CONFIG.head, token_variance=0.03),
        input_noise=0.3,
    )
    model = DeepTokenLM(config, TEXT)
    ids, tokens = TEXT.encode(CAPTIONS, 12), torch.randn(4, 2, 5, 7)
    loss = fit(model, ids, tokens, steps=300)
    assert loss < -0.7  # log-density at best: a Gaussian of variance token_variance gives -0.83
    again = written(model, ids, 2, variance_scale=0.01)
    error = (again.unsqueeze(1) - tokens).square().mean(-1)  # written caption, true caption, key frame, token
    assert error.mean((2, 3)).argmin(1).tolist() == [0, 1, 2, 3]
    own = error.diagonal().flatten()  # of unit-variance tokens: another caption's are 2 away
    assert (own < 0.02).float().mean() > 0.9


def test_saved_model_loads_as_the_same(tmp_path: Path) -> None:
    model = build(body=dataclasses.replace(CONFIG.body, feed_forward=40, key_value_heads=1), input_noise=0.25)
    saved(model, tmp_path)
    again = DeepTokenLM.from_pretrained(tmp_path)
    assert again.config == model.config and not again.training and again.text is not None
    assert torch.equal(written(again, again.text.encode(CAPTIONS[:3], 12)), written(model))


def test_halved_checkpoint_is_half_as_large_and_loads_in_float32(tmp_path: Path) -> None:
    model = build()
    saved(model, tmp_path / "full")
    saved(model, tmp_path / "half", torch.bfloat16)
    full, half = ((tmp_path / name / "lm.safetensors").stat().st_size for name in ("full", "half"))
    assert half < 0.6 * full
    assert all(p.dtype == torch.float32 for p in DeepTokenLM.from_pretrained(tmp_path / "half").parameters())


def test_damaged_checkpoints_name_what_is_wrong(tmp_path: Path) -> None:
    saved(build(), tmp_path)
    weights, config = tmp_path / "lm.safetensors", json.loads((tmp_path / "config.json").read_text())
    state = load_file(weights)

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            DeepTokenLM.from_pretrained(tmp_path)

    save_file({k: v for k, v in state.items() if k != "embedding.place"}, weights)
    refused("missing embedding.place")
    save_file({**state, "embedding.plaice": state["embedding.place"].clone()}, weights)
    refused(r"unexpected embedding.plaice \(did you mean 'embedding.place'")
    save_file({**state, "embedding.place": state["embedding.place"][:4].contiguous()}, weights)
    refused(r"embedding.place: expected shape \(5, 24\), got \(4, 24\)")
    save_file({**state, "embedding.place": state["embedding.place"] * float("nan")}, weights)
    refused("embedding.place: holds NaN")
    weights.write_bytes(weights.read_bytes()[:500])
    refused("not a readable safetensors file")
    weights.unlink()
    refused("no such file")
    save_file(state, weights)
    for section, message in (
        ({**config["lm"], "widht": 3}, "unknown key 'widht'"),
        ({**config["lm"], "begin_id": 7}, "text tokenizer"),
        (None, "no section 'lm'"),
    ):
        write_config(tmp_path, {"lm": section} if section else {})
        refused(message)


def test_named_sizes_have_their_namesakes_parameters() -> None:
    millions = {"gpt2": 124.4, "gpt2-medium": 354.8, "gpt2-large": 774.0, "llama-1b": 1235.8, "llama-3b": 3212.7}
    for name, expected in millions.items():
        with torch.device("meta"):
            model = DeepTokenLM(SIZES[name])
        body = sum(p.numel() for p in model.backbone.parameters()) / 1e6
        assert body == pytest.approx(expected, rel=0.01), name
        assert model.config.keyframe_limit >= 31, f"{name} cannot write a minute"


def test_sprites_size_fits_its_budget_and_writes_a_minute() -> None:
    model = DeepTokenLM(SIZES["sprites"])
    assert sum(p.numel() for p in model.parameters()) <= 6.5e6
    assert model.config.keyframe_limit == 33


@pytest.mark.parametrize("order", ["token", "keyframe"])
@pytest.mark.parametrize("body", ["gpt2", "llama"])
def test_padding_that_is_masked_changes_nothing_and_may_be_left_out(body: str, order: str) -> None:
    longest = int((TEXT.pad_id != PROMPTS).sum(1).max())
    assert longest < PROMPTS.shape[1]
    shorter, tokens = PROMPTS[:, :longest], torch.randn(3, 3, 5, 7)
    for masked in (True, False):
        model = build(attend_padding=not masked, body=body, order=order)
        before, first = model(PROMPTS, tokens).hidden, written(model, guidance=2.0, variance_scale=0.0)
        if masked:
            torch.testing.assert_close(model(shorter, tokens).hidden, before, **NEAR)
            torch.testing.assert_close(written(model, shorter, guidance=2.0, variance_scale=0.0), first, **NEAR)
        else:
            with pytest.raises(ValueError, match="expected 12 a text"):
                model(shorter, tokens)
        with torch.no_grad():
            model.backbone.body.get_input_embeddings().weight[TEXT.pad_id] += torch.linspace(-1, 1, 24)
        assert torch.allclose(model(PROMPTS, tokens).hidden, before, **NEAR) == masked


def test_key_frames_may_begin_at_any_number_and_place() -> None:
    model, other, tokens = build(body="gpt2"), build(body="gpt2"), torch.randn(3, 3, 5, 7)
    shift = 4 * model.config.block_length
    with torch.no_grad():
        other.embedding.keyframe[:3] = model.embedding.keyframe[4:7]
        places = other.backbone.body.wpe.weight
        places[12:-shift] = places[12 + shift :].clone()
    shifted = model(PROMPTS, tokens, first_keyframe=4).hidden
    torch.testing.assert_close(shifted, other(PROMPTS, tokens).hidden, **NEAR)
    llama = build(body="llama")
    plain = llama(PROMPTS, tokens).hidden
    with torch.no_grad():
        llama.embedding.keyframe[4:7] = llama.embedding.keyframe[:3]
    assert not torch.allclose(llama(PROMPTS, tokens, first_keyframe=4).hidden, plain, **NEAR)  # further from the text
    with pytest.raises(ValueError, match="9 key frames asked for, this model holds 8"):
        model(PROMPTS, tokens, first_keyframe=6)
