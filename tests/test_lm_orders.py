"""Orders, heads, goals, windows, re-rolling: what generation reads is what training reads, in every combination."""

import dataclasses
from typing import Any, get_args

import pytest
import torch
from test_lm_deep_lm import CAPTIONS, CONFIG, NEAR, PROMPTS, TEXT, build, fit, generated, uncached, written

from dicode.lm.config import HeadName
from dicode.lm.deep_lm import DeepTokenLM
from dicode.seeds import SeedPlan

ORDERS = ["token", "keyframe"]
HEADS = get_args(HeadName)
BODIES = ["llama", "gpt2"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_cached_generation_equals_uncached(head: str, order: str, guidance: float) -> None:
    model = build(head=head, order=order, end_frame_conditioning=True)
    options: dict[str, Any] = {"guidance": guidance, "variance_scale": 0.5, "goal": torch.randn(3, 5, 7)}
    cached = written(model, num_keyframes=4, **options)
    torch.testing.assert_close(cached, written(uncached(model), num_keyframes=4, **options), **NEAR)
    assert cached.shape == (3, 4, 5, 7) and cached.dtype == torch.float32


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("goal", [False, True])
@pytest.mark.parametrize("anchor", [None, 0.0])
def test_what_regression_writes_has_no_loss(order: str, body: str, goal: bool, anchor: float | None) -> None:
    model = build(head="regression", order=order, body=body, end_frame_conditioning=True, residual_anchor=anchor)
    tokens = written(model, num_keyframes=4, goal=torch.randn(3, 5, 7) if goal else None)
    with torch.no_grad():
        output = model(PROMPTS, tokens, goal=goal)
    assert output.keyframe_loss.shape == (3, 3 if goal else 4)
    assert output.loss < 1e-8 < model(PROMPTS, tokens + 0.1, goal=goal).loss


@pytest.mark.parametrize("body", BODIES)
def test_key_frame_order_sees_all_of_a_key_frame_and_nothing_later(body: str) -> None:
    model, tokens = build(order="keyframe", body=body), torch.randn(3, 4, 5, 7)
    changed = tokens.clone()
    changed[:, 1, 2] += 1.0
    with torch.no_grad():
        difference = (model(PROMPTS, tokens).hidden - model(PROMPTS, changed).hidden).abs().amax((0, -1))
    assert difference[:2].max() < 1e-6  # the states that predict key frames 0 and 1
    assert difference[2:].min() > 1e-4  # all places of the later ones


@pytest.mark.parametrize("order", ORDERS)
def test_a_goal_changes_what_comes_between_and_is_reached_exactly(order: str) -> None:
    model, goal = build(order=order, end_frame_conditioning=True), torch.randn(3, 5, 7)
    plain, led = written(model, num_keyframes=5), written(model, num_keyframes=5, goal=goal)
    assert torch.equal(led[:, 4], goal)
    assert torch.equal(led[:, 0], plain[:, 0])  # written before the goal is read
    assert (led[:, 1:4] - plain[:, 1:4]).abs().amax((0, 2, 3)).min() > 1e-3
    nearer = written(model, num_keyframes=4, goal=goal)
    assert (nearer[:, 1] - led[:, 1]).abs().max() > 1e-3  # when it comes is read too


@pytest.mark.parametrize("order", ORDERS)
def test_a_loop_ends_on_the_key_frame_it_began_with(order: str) -> None:
    model = build(order=order, end_frame_conditioning=True)
    loop = written(model, num_keyframes=4, goal="first")
    assert torch.equal(loop[:, 3], loop[:, 0])
    as_goal = written(model, num_keyframes=3, prefix=loop[:, :1], goal=loop[:, 0])
    torch.testing.assert_close(as_goal, loop[:, 1:], **NEAR)
    later = written(model, num_keyframes=2, prefix=loop[:, :2], goal="first")
    torch.testing.assert_close(later, loop[:, 2:], **NEAR)


def test_a_loop_of_one_clip_needs_no_goal_to_be_read() -> None:
    model = build()
    loop = written(model, num_keyframes=2, goal="first")
    assert torch.equal(loop[:, 0], written(model, num_keyframes=1)[:, 0]) and torch.equal(loop[:, 1], loop[:, 0])


def test_a_goal_that_cannot_be_read_raises_before_anything_is_written() -> None:
    goal = torch.zeros(3, 5, 7)
    with pytest.raises(ValueError, match="end_frame_conditioning"):
        build().generate(PROMPTS, 4, goal=goal)
    model = build(end_frame_conditioning=True)
    with pytest.raises(ValueError, match="goal_keyframe"):
        model.generate(PROMPTS, 4, goal=goal, goal_keyframe=2)
    with pytest.raises(ValueError, match="goal: expected shape"):
        model.generate(PROMPTS, 4, goal=goal[:, :4])
    with pytest.raises(ValueError, match="3 key frames or more"):
        model(PROMPTS, torch.zeros(3, 2, 5, 7), goal=True)
    with pytest.raises(ValueError, match="this model holds 7"):
        build(end_frame_conditioning=True, positions=12 + 6 * 8).generate(PROMPTS, 8, goal=goal)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("context_key_frames", [2, 3, 4])
@pytest.mark.parametrize("anchor", [None, 0.0])
def test_a_window_writes_on_as_if_the_video_began_with_it(
    order: str, context_key_frames: int, anchor: float | None
) -> None:
    model = build(order=order, head="regression", residual_anchor=anchor)
    tokens = written(model, num_keyframes=13, context_key_frames=context_key_frames)  # the model holds 8
    jump = context_key_frames // 2
    for keyframe in range(context_key_frames, 13):
        kept = context_key_frames - jump + (keyframe - context_key_frames) % jump  # a jump drops the earlier half
        alone = written(model, num_keyframes=1, prefix=tokens[:, keyframe - kept : keyframe])
        torch.testing.assert_close(alone[:, 0], tokens[:, keyframe], **NEAR)
    plain = written(model, num_keyframes=8)
    torch.testing.assert_close(tokens[:, :context_key_frames], plain[:, :context_key_frames])
    assert (tokens[:, context_key_frames:8] - plain[:, context_key_frames:]).abs().max() > 1e-4


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("anchor", [None, 0.0])
def test_a_prefix_and_a_window_continue_what_one_call_writes(order: str, anchor: float | None) -> None:
    model = build(order=order, end_frame_conditioning=True, residual_anchor=anchor)
    options: dict[str, Any] = {
        "context_key_frames": 4,
        "goal": "first",
        "goal_keyframe": 11,
        "guidance": 2.0,
        "seed": 3,
    }
    whole = written(model, num_keyframes=12, **options)
    for start in (1, 4, 7, 10):
        rest = written(model, num_keyframes=12 - start, prefix=whole[:, :start], **options)
        torch.testing.assert_close(rest, whole[:, start:], **NEAR)


def test_a_window_the_model_cannot_hold_raises() -> None:
    for context_key_frames in (1, 9):
        with pytest.raises(ValueError, match="context_key_frames: expected 2 to 8"):
            generated(build(), PROMPTS, 4, context_key_frames=context_key_frames)


@pytest.mark.parametrize("order", ORDERS)
def test_re_rolling_keeps_the_clips_before(order: str) -> None:
    model = build(order=order)
    first, other = written(model, num_keyframes=6, seed=1), written(model, num_keyframes=6, seed=2)
    rolled = written(model, num_keyframes=6, seed=SeedPlan(1, reroll_from=3, reroll_seed=2))
    assert torch.equal(rolled[:, :4], first[:, :4])  # clips 0, 1, 2 are made of key frames 0 … 3
    assert (rolled[:, 4:] - first[:, 4:]).abs().amax((0, 2, 3)).min() > 1e-2
    again = written(model, num_keyframes=2, seed=2, prefix=first[:, :4])
    torch.testing.assert_close(rolled[:, 4:], again, **NEAR)
    assert torch.equal(written(model, num_keyframes=6, seed=SeedPlan(1, 0, 2)), other)
    one = written(model, num_keyframes=6, seed=SeedPlan(1, 3, 2, reroll_clips=1))
    assert torch.equal(one[:, :5], rolled[:, :5])
    torch.testing.assert_close(one[:, 5:], written(model, num_keyframes=1, seed=1, prefix=rolled[:, :5]), **NEAR)


@pytest.mark.parametrize("order", ORDERS)
def test_a_model_of_residuals_keeps_an_image_where_it_predicts_zero(order: str) -> None:
    model, image = build(order=order, head="regression", residual_anchor=0.0), torch.randn(3, 1, 5, 7)
    for value in model.head.parameters():
        torch.nn.init.zeros_(value)
    tokens = written(model, num_keyframes=4, prefix=image, guidance=2.0)
    assert torch.equal(tokens, image.expand_as(tokens))
    assert model(PROMPTS, torch.cat([image, tokens], dim=1)).keyframe_loss[:, 1:].eq(0).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("goal", [False, True])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_residuals_may_be_anchored_to_the_first_key_frame(order: str, goal: bool, share: float) -> None:
    kind: dict[str, Any] = {"order": order, "head": "regression", "residual_anchor": share}
    model = build(**kind, end_frame_conditioning=True)
    tokens = written(model, num_keyframes=4, goal=torch.randn(3, 5, 7) if goal else None)
    with torch.no_grad():
        assert model(PROMPTS, tokens, goal=goal).loss < 1e-8  # what is written is what is asked for in training
    long = written(model, num_keyframes=9, context_key_frames=4)
    alone = written(model, num_keyframes=1, prefix=long[:, 6:8])  # a window is as a video that begins there
    torch.testing.assert_close(alone[:, 0], long[:, 8], **NEAR)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("share", "added"), [(0.0, [1, 2, 3, 4]), (0.5, [1, 1.5, 1.75, 1.875]), (1.0, [1, 1, 1, 1])])
def test_what_is_added_fades_by_the_share_of_the_first_key_frame(order: str, share: float, added: list[float]) -> None:
    model = build(order=order, head="regression", residual_anchor=share)
    image = torch.randn(3, 1, 5, 7)
    for name, value in model.head.named_parameters():
        torch.nn.init.constant_(value, 1.0 if name.endswith("bias") else 0.0)
    difference = written(model, num_keyframes=4, prefix=image) - image
    torch.testing.assert_close(difference, torch.tensor(added).view(4, 1, 1).expand_as(difference).float())


@pytest.mark.parametrize("head", HEADS)
def test_a_model_of_residuals_has_the_same_loss_of_the_first_key_frame(head: str) -> None:
    tokens = torch.randn(3, 4, 5, 7)
    plain, residual = (build(head=head, residual_anchor=value) for value in (None, 0.0))
    losses = [model(PROMPTS, tokens).keyframe_loss for model in (plain, residual)]
    assert torch.equal(losses[0][:, 0], losses[1][:, 0])
    assert (losses[0][:, 1:] - losses[1][:, 1:]).abs().min() > 1e-4


@pytest.mark.parametrize("head", ["mixture", "flow"])
def test_the_first_key_frame_may_have_a_variance_of_its_own(head: str) -> None:
    model = build(head=head, order="keyframe")
    options: dict[str, Any] = {"num_keyframes": 3, "variance_scale": 0.5, "guidance": 1.5}
    plain, same, sure = (written(model, **options, first_variance_scale=scale) for scale in (None, 0.5, 0.0))
    assert torch.equal(plain, same)
    others = written(model, **{**options, "variance_scale": 0.9}, first_variance_scale=0.0, seed=7)
    torch.testing.assert_close(sure[:, 0], others[:, 0])  # without chance whatever the seed
    assert (sure[:, 1:] - others[:, 1:]).abs().amax((0, 2, 3)).min() > 1e-3
    rest = written(model, **{**options, "num_keyframes": 2}, prefix=sure[:, :1], first_variance_scale=0.0)
    torch.testing.assert_close(rest, sure[:, 1:], **NEAR)  # of key frame 0 alone


def test_a_key_frame_is_one_pass_in_key_frame_order() -> None:
    model, calls = build(order="keyframe"), []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    for count, _ in enumerate(model.generate(PROMPTS, 4), start=1):
        assert len(calls) == count


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("order", ORDERS)
def test_masked_key_frames_change_no_loss_and_autocast_keeps_it_in_float32(head: str, order: str) -> None:
    model, tokens = build(head=head, order=order), torch.randn(3, 4, 5, 7)
    mask = torch.tensor([[True, True, False, False]]).expand(3, 4)
    changed = torch.where(mask[..., None, None], tokens, 9.0)
    assert torch.equal(model(PROMPTS, tokens, mask).loss, model(PROMPTS, changed, mask).loss)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(PROMPTS, tokens, None, torch.Generator().manual_seed(0)).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.head.parameters())


@pytest.mark.parametrize(
    ("head", "order", "anchor"),
    [("flow", "keyframe", None), ("flow", "keyframe", 0.0), ("flow", "token", None), ("mixture", "keyframe", None)],
)
def test_four_captions_are_memorised_and_written_back(head: str, order: str, anchor: float | None) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(
        CONFIG,
        body=dataclasses.replace(CONFIG.body, width=64, heads=4),
        head=dataclasses.replace(CONFIG.head, kind=head, token_variance=0.03, width=96),
        order=order,
        end_frame_conditioning=True,
        residual_anchor=anchor,
    )
    model = DeepTokenLM(config, TEXT)
    ids, tokens = TEXT.encode(CAPTIONS, 12), torch.randn(4, 3, 5, 7)
    fit(model, ids, tokens, steps=250, goal_every=4)
    again = written(model, ids, 3, variance_scale=0.01, flow_steps=12)
    error = (again.unsqueeze(1) - tokens).square().mean((2, 3, 4))  # written caption, true caption
    assert error.argmin(1).tolist() == [0, 1, 2, 3]
    assert error.diagonal().max() < 0.1  # of unit-variance tokens: another caption's are 2 away
