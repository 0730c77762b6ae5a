"""Going on from what the model itself writes: what is read differs, what is asked for stays true."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_lm_deep_lm import PROMPTS, build, written
from test_views import run_of

from dicode.lm.deep_lm import DeepTokenLM
from dicode.seeds import generator_for
from dicode.train.lm import LanguageTraining
from dicode.train.own import FLOW_STEPS, with_own

KINDS: list[dict[str, Any]] = [{"head": "flow"}, {"head": "flow", "predict_residual": True}, {"head": "mixture"}]
ALL = torch.ones(3, 4, dtype=torch.bool)


def truth() -> torch.Tensor:
    return torch.randn(3, 4, 5, 7, generator=generator_for(0))


def model_of(**changes: Any) -> DeepTokenLM:
    return build(**{"head": "flow", "predict_residual": True, "order": "keyframe", **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_key_frames_between_the_first_and_the_last_are_the_models_own(kind: dict[str, Any]) -> None:
    model, tokens = model_of(**kind), truth()
    own = with_own(model, PROMPTS, tokens, ALL, generator_for(1))
    seed = int(torch.randint(2**62, (), generator=generator_for(1)))
    with torch.no_grad():  # which the tests' type checks keep from a generator
        expected = written(model, num_keyframes=2, prefix=tokens[:, :1], seed=seed, flow_steps=FLOW_STEPS)
    assert torch.equal(own[:, 1:3], expected)
    assert torch.equal(own[:, 0], tokens[:, 0]) and torch.equal(own[:, 3], tokens[:, 3])


def test_draws_follow_their_generator_alone_and_leave_the_mode() -> None:
    model, tokens = model_of(dropout=0.5, input_noise=0.6), truth()
    at_rest = with_own(model, PROMPTS, tokens, ALL, generator_for(1))
    torch.manual_seed(5)
    assert torch.equal(with_own(model.train(), PROMPTS, tokens, ALL, generator_for(1)), at_rest)
    assert model.training and not with_own(model.eval(), PROMPTS, tokens, ALL, generator_for(2)).equal(at_rest)
    assert not model.training


def test_no_more_is_drawn_than_real_key_frames_go_on_from() -> None:
    model, tokens = model_of(), truth()
    mask = torch.tensor([[False, True, True, False], [True, True, False, False], [True, False, False, False]])
    whole, part = (with_own(model, PROMPTS, tokens, m, generator_for(1)) for m in (ALL, mask))
    assert torch.equal(part[:, 1], whole[:, 1]) and torch.equal(part[:, 2:], tokens[:, 2:])
    for few in (mask & torch.tensor([True, True, False, False]), torch.zeros_like(mask)):
        assert with_own(model, PROMPTS, tokens, few, generator_for(1)) is tokens


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_changes_are_counted_from_what_was_read(share: float) -> None:
    model = model_of(head="regression", residual_anchor=share)
    tokens, read = truth(), truth() + torch.randn(3, 4, 5, 7, generator=generator_for(1))
    targets: list[torch.Tensor] = []

    def kept(_: torch.Tensor, target: torch.Tensor, __: object) -> torch.Tensor:
        targets.append(target)
        return target[..., 0, 0]

    with patch.object(model.head, "loss", side_effect=kept):
        model(PROMPTS, tokens, read=read)
    (target,) = targets
    assert torch.equal(target[:, 0, 0], tokens[:, 0])
    start = (1 - share) * read[:, :-1] + share * read[:, :1]
    torch.testing.assert_close(start + target[:, 1:, 0], tokens[:, 1:])


@pytest.mark.parametrize("change", [False, True])
@pytest.mark.parametrize("goal", [False, True])
def test_what_is_read_is_read_as_it_is(change: bool, goal: bool) -> None:
    model, tokens = model_of(predict_residual=change, input_noise=0.6, end_frame_conditioning=True), truth()
    wrong = torch.cat([tokens[:, :1], tokens[:, 1:] + 1.0], dim=1)

    def losses(read: torch.Tensor | None) -> torch.Tensor:
        return model(PROMPTS, tokens, None, generator_for(0), goal, read=read).keyframe_loss

    plain, other = losses(None), losses(wrong)
    assert torch.equal(plain, losses(tokens)) and torch.equal(plain[:, 0], other[:, 0])
    assert (plain - other).abs()[:, 2:].min() > 1e-4
    model.train()
    assert torch.equal(losses(wrong), other)  # no noise on top, as in use
    assert not torch.equal(losses(None), plain)


def test_gradients_do_not_flow_through_the_draws_and_reach_all_weights() -> None:
    model, tokens = model_of().train(), truth()

    def gradients(read: torch.Tensor | None) -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):  # whose cache of cast weights must not outlive the draws
            read = with_own(model, PROMPTS, tokens, ALL, generator_for(1)) if read is None else read
            assert not read.requires_grad
            model(PROMPTS, tokens, ALL, generator_for(2), read=read).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with torch.autocast("cpu", torch.bfloat16):
        given = with_own(model, PROMPTS, tokens, ALL, generator_for(1))
    drawn, fixed = gradients(None), gradients(given)
    assert len(drawn) == len(list(model.parameters()))
    assert all(map(torch.equal, drawn, fixed))


def losses(run: Any, count: int = 12) -> Iterator[torch.Tensor]:
    stage = LanguageTraining(run)
    stage.module.train()
    for step in range(count):
        torch.manual_seed(step)
        yield stage.loss(stage.batch(torch.arange(4), generator_for(step)), generator_for(step, "noise"))[0]


def test_a_share_of_steps_goes_on_from_own_key_frames(tiny_model: Path, tmp_path: Path) -> None:
    run = dataclasses.replace(run_of(tiny_model, tmp_path), self_rollout_prob=0.5, view_share=0.4)
    calls: list[DeepTokenLM] = []
    with patch("dicode.train.lm.with_own", side_effect=lambda *a: calls.append(a[0]) or with_own(*a)):
        first, again = list(losses(run)), list(losses(run))
        assert 0 < len(calls) < 24 and len(calls) % 2 == 0
        assert all(map(torch.equal, first, again))
        calls.clear()
        for off in ({"self_rollout_prob": 0.0}, {"self_rollout_prob": 1.0, "end_frame_prob": 1.0}):
            list(losses(dataclasses.replace(run, **off), 4))
        assert not calls  # where a goal is told, what lies between is not drawn


def test_what_cannot_go_on_from_its_own_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    run = dataclasses.replace(run_of(tiny_model, tmp_path), self_rollout_prob=0.5)
    token = dataclasses.replace(run.model, order="token")
    shared = dataclasses.replace(run.loop, strategy="fsdp")
    for changes, named in (
        ({"model": token}, "keyframe"),
        ({"loop": shared}, "ddp"),
        ({"self_rollout_prob": 1.5}, "0 to 1"),
    ):
        with pytest.raises(ValueError, match=rf"self_rollout_prob: .*{named}"):
            LanguageTraining(dataclasses.replace(run, **changes))
