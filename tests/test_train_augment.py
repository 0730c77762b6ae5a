"""Views of training videos, from which a language model learns how a picture goes on."""

import dataclasses
from pathlib import Path

import pytest
import torch
from toy_runs import loop, write_cache

from dicode.lm.config import BodyConfig, DeepLMConfig, HeadConfig
from dicode.seeds import generator_for
from dicode.train.augment import SMALLEST_CROP, View
from dicode.train.lm import LanguageTraining
from dicode.train.runs import AugmentConfig, LanguageRun

AUGMENT = AugmentConfig(null_captions=0.0, word_dropout=0.0, long_captions=0.0, views=2)
PLAIN = View(mirrored=False, crop=1.0, across=0.0, down=0.0, gains=(1.0, 1.0, 1.0), gamma=1.0)


def frames() -> torch.Tensor:
    return torch.randint(256, (3, 8, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def run_of(tiny_model: Path, root: Path) -> LanguageRun:
    write_cache(root / "cache")
    model = DeepLMConfig(
        BodyConfig("llama", width=24, depth=1, heads=2),
        head=HeadConfig("flow", width=16),
        positions=62,
        vocab_size=300,
        token_width=6,
        max_keyframes=9,
        text_length=12,
        tokens_per_keyframe=4,
        order="keyframe",
        end_frame_conditioning=True,
        residual_anchor=0.0,
    )
    return LanguageRun(
        cache=str(root / "cache"), tokenizer=str(tiny_model), model=model, loop=loop(4), key_frames=3, longer=(),
        longer_share=(), augment=AUGMENT,
    )  # fmt: skip


def augmented(run: LanguageRun, end_frame_prob: float = 0.0, **changes: float) -> LanguageRun:
    augment = dataclasses.replace(AUGMENT, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(run, augment=augment, end_frame_prob=end_frame_prob)


def test_a_view_that_changes_nothing_returns_the_same_frames() -> None:
    assert torch.equal(PLAIN.of_frames(frames()), frames())


def test_a_mirrored_view_is_flipped_and_a_crop_is_the_part_asked_for() -> None:
    assert torch.equal(dataclasses.replace(PLAIN, mirrored=True).of_frames(frames()), frames().flip(2))
    halves = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    halves[:, :, 4:] = 200
    right = dataclasses.replace(PLAIN, crop=0.5, across=1.0).of_frames(halves)
    assert right.shape == halves.shape and right.eq(200).all()
    assert dataclasses.replace(PLAIN, crop=0.5).of_frames(halves).eq(0).all()


def test_colours_follow_their_gains_and_gamma() -> None:
    grey = torch.full((1, 2, 2, 3), 51, dtype=torch.uint8)  # a fifth
    seen = dataclasses.replace(PLAIN, gains=(1.0, 2.0, 0.5), gamma=2.0).of_frames(grey)
    assert seen[0, 0, 0].tolist() == [round(255 * 0.04), round(255 * 0.08), round(255 * 0.02)]


def test_views_have_fixed_numbers_and_differ() -> None:
    views = [View.numbered(number) for number in range(1, 9)]
    assert views == [View.numbered(number) for number in range(1, 9)]
    assert len({view.name for view in views}) == 8
    assert [view.mirrored for view in views] == [True, False] * 4
    assert all(SMALLEST_CROP <= view.crop <= 1 for view in views) and {view.crop == 1 for view in views} == {
        True,
        False,
    }


@pytest.mark.parametrize(
    ("caption", "mirrored"),
    [
        ("Move the mug to the left", "Move the mug to the right"),
        ("Left door, then the right one", "Right door, then the left one"),
        ("turn it clockwise", "turn it counterclockwise"),
        ("Turn it counter-clockwise", "Turn it clockwise"),
        ("turn it anticlockwise", "turn it clockwise"),
        ("the leftmost bottle is bright", "the rightmost bottle is bright"),
        ("put it upright, take the leftover copyright", "put it upright, take the leftover copyright"),
        ("Wipe the table.", "Wipe the table."),
    ],
)
def test_captions_of_a_mirrored_view_exchange_the_sides(caption: str, mirrored: str) -> None:
    assert dataclasses.replace(PLAIN, mirrored=True).of_caption(caption) == mirrored
    assert PLAIN.of_caption(caption) == caption


def test_a_share_of_samples_are_views_whose_first_key_frame_is_only_read(tiny_model: Path, tmp_path: Path) -> None:
    stage = LanguageTraining(run_of(tiny_model, tmp_path))
    batches = [stage.batch(torch.arange(8), generator_for(i)) for i in range(40)]
    masks = torch.cat([batch["mask"] for batch in batches])
    assert masks[:, 1:].all()
    assert 0.4 < (~masks[:, 0]).float().mean() < 0.6
    rows = {tuple(row.flatten().tolist()) for tokens in stage.view_tokens for row in tokens[:]}
    for batch in batches[:2]:
        seen = [tuple(tokens.half().flatten().tolist()) in rows for tokens in batch["tokens"][:, 0]]
        assert seen == (~batch["mask"][:, 0]).tolist()


def test_tokens_of_a_view_are_those_of_its_frames(tiny_model: Path, tmp_path: Path) -> None:
    stage = LanguageTraining(run_of(tiny_model, tmp_path))
    for view, tokens in zip(stage.views, stage.view_tokens, strict=True):
        shown = view.of_frames(stage.cache.frames[torch.arange(5)])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = stage.tokenizer.encode_frames(shown.numpy())[0]
        torch.testing.assert_close(tokens[torch.arange(5)].float(), expected.float(), atol=0.05, rtol=0.05)


def test_views_train_with_goals_and_their_first_key_frame_has_no_gradient(tiny_model: Path, tmp_path: Path) -> None:
    stage = LanguageTraining(augmented(run_of(tiny_model, tmp_path), view_share=1.0, end_frame_prob=1.0))
    batch = stage.batch(torch.arange(4), generator_for(0))
    assert batch["goal"] and not batch["mask"][:, 0].any()
    stage.module.eval()
    loss, _ = stage.loss(batch, generator_for(1))
    first = torch.randn_like(batch["tokens"][:, :1])
    output = stage.module(batch["text_ids"], batch["tokens"], batch["mask"], generator_for(1), goal=True)
    assert output.keyframe_loss[:, 0].eq(0).all() and torch.equal(output.loss, loss)
    changed = {**batch, "tokens": torch.cat([first, batch["tokens"][:, 1:]], dim=1)}
    assert not torch.equal(stage.loss(changed, generator_for(1))[0], loss)  # it is read, nevertheless


def test_without_views_nothing_more_is_drawn(tiny_model: Path, tmp_path: Path) -> None:
    run = run_of(tiny_model, tmp_path)
    none, never = (LanguageTraining(augmented(run, **kind)) for kind in ({"views": 0}, {"view_share": 0.0}))
    assert none.views == [] and none.batch(torch.arange(4), generator_for(0))["mask"].all()
    assert never.batch(torch.arange(4), generator_for(0))["mask"].all()
