"""Motion tokens: computed from all frames of a clip, written with the key frame that ends it, read by denoisers."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_tiny_model
from test_lm_deep_lm import NEAR, PROMPTS, build, uncached, written
from test_tokenizer import DENOISERS, RESAMPLER, conditioning, decoded, tiny_config, tiny_tokenizer
from test_train_samples import LM, language, plain_cache

from dicode.cli.app import main
from dicode.data.cache import CachedVideo, FrameCache
from dicode.lm.deep_lm import DeepTokenLM
from dicode.pipeline import DiCoDe, check_shared
from dicode.seeds import generator_for
from dicode.sizing.count import size_lm, size_tokenizer
from dicode.storyboard import parse_storyboard
from dicode.tokenizer.config import FirstStageConfig, MotionConfig
from dicode.tokenizer.denoiser import build_denoiser, cross_faded
from dicode.tokenizer.motion import limited
from dicode.tokenizer.presets import TOKENIZERS
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.begin import widened
from dicode.train.cached import frame_tokens
from dicode.train.lm import PLACE
from dicode.train.loop import train
from dicode.train.runs import LanguageRun, LoopConfig, OptimConfig, TokenizerRun, runs_of
from dicode.train.stages import run_recipe
from dicode.train.tokenizer import TokenizerTraining

STEM = "denoiser.stem.weight"
MOTION = MotionConfig(tokens=3, width=16, depth=1, heads=2)
PUBLISHED: dict[str, Any] = {
    "first_stage": FirstStageConfig("kl", (8, 8, 8), 5, (1,), (1,)),
    "resampler": RESAMPLER,
    "denoiser": DENOISERS["unet3d"],
    "tail_frame": 15,
}


@pytest.fixture(scope="module")
def moving_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_model`, with three motion tokens a clip."""
    return write_tiny_model(tmp_path_factory.mktemp("moving") / "tiny", motion=MOTION)


def frames(count: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(256, (batch, count, 32, 32, 3), generator=generator_for(1), dtype=torch.uint8)


# tokens


@pytest.mark.parametrize("changes", [{}, {"tail_frame": 15}, PUBLISHED])
def test_motion_tokens_tell_of_the_frames_between_two_key_frames(changes: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer(motion=MOTION, **changes)
    tail, video = tokenizer.config.tail_frame, frames(40)
    tokens = tokenizer.encode(video)
    assert tokens.shape == (1, 4, 7, 6) and not tokens[:, 0, 4:].any()
    torch.testing.assert_close(tokens[:, 1:, 4:].var(-1, unbiased=False), torch.ones(1, 3, 3), atol=1e-2, rtol=0)
    changed = video.clone()
    changed[:, tail + 3] = 255 - changed[:, tail + 3]
    differs = (tokenizer.encode(changed) - tokens).abs().amax((0, 3)) > 0
    assert differs.nonzero().tolist() == [[2, place] for place in (4, 5, 6)]  # of the clip from key frame 1 to 2 alone


def test_key_frames_tokens_are_those_of_a_model_without_motion() -> None:
    moving, plain, video = tiny_tokenizer(motion=MOTION), tiny_tokenizer(), frames(33)
    state = {name: t for name, t in moving.state_dict().items() if "motion" not in name}
    plain.load_state_dict(widened(state, plain.state_dict()) | {STEM: state[STEM][:, :-5]})
    assert torch.equal(moving.encode(video)[:, :, :4], plain.encode(video))
    stills = moving.encode_frames(video[0].numpy())
    assert stills.shape == (1, 33, 7, 6) and not stills[:, :, 4:].any()
    torch.testing.assert_close(stills[:, ::16, :4], plain.encode(video))
    assert moving.token_hash() != plain.token_hash()
    latents = moving.key_latents(moving.encode(video)[0])
    torch.testing.assert_close(latents, plain.key_latents(plain.encode(video)[0]))


def test_a_clip_that_ends_early_holds_its_last_frame() -> None:
    tokenizer, video = tiny_tokenizer(motion=MOTION), frames(24)
    held = torch.cat([video, video[:, -1:].expand(-1, 9, -1, -1, -1)], dim=1)
    torch.testing.assert_close(tokenizer.encode(video), tokenizer.encode(held))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="motion: needs an even number"):
        VideoTokenizer(tiny_config(motion=MOTION, clip_frames=15, tail_frame=15))
    with pytest.raises(ValueError, match="motion: 3 heads do not divide a width of 16"):
        VideoTokenizer(tiny_config(motion=dataclasses.replace(MOTION, heads=3)))


def test_paper_recipes_have_motion_tokens_that_fit() -> None:
    found = runs_of(str(Path(__file__).parents[1] / "recipes/paper.py"))
    tokenizer, lm = found["paper_motion"], found["gpt2_motion"]
    assert isinstance(tokenizer, TokenizerRun) and isinstance(lm, LanguageRun)
    check_shared(tokenizer.model, lm.model)
    assert tokenizer.model == TOKENIZERS["paper_motion"] and lm.model.keyframe_limit == 32


# rendering


@pytest.mark.parametrize("kind", DENOISERS)
def test_every_denoiser_reads_motion_tokens_and_knows_which_is_which(kind: str) -> None:
    torch.manual_seed(0)
    own = {"tail_frame": 15} if kind == "wan" else {}  # whose context is the clip's own first frame
    denoiser = build_denoiser(tiny_config(denoiser=DENOISERS[kind], motion=MOTION, **own)).eval()
    for parameter in denoiser.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    noisy, time = torch.randn(2, 16, 5, 8, 8), torch.tensor([300.0, 700.0])
    given = dataclasses.replace(conditioning(2), motion=torch.randn(2, 3, 6))

    def difference(motion: torch.Tensor) -> torch.Tensor:
        changed = denoiser(noisy, time, dataclasses.replace(given, motion=motion))
        return (changed - denoiser(noisy, time, given)).abs().amax((0, 2, 3, 4))

    assert (difference(torch.zeros(2, 3, 6)) > 1e-5).all()  # every frame reads them
    assert (difference(given.motion.flip(1)) > 1e-6).all()


@pytest.mark.parametrize("motion", [None, MOTION])
def test_no_steps_show_what_is_expected(motion: MotionConfig | None) -> None:
    tokenizer = tiny_tokenizer(motion=motion)
    tokens = torch.randn(2, 3, tokenizer.config.block_tokens, 6)
    clips = [*decoded(tokenizer, tokens, steps=0, decoder_guidance=2.0)]
    expected = [tokenizer.conditioning(tokens[:, i : i + 2]).expected for i in range(2)]
    assert all(torch.equal(clip, tokenizer.frames_of(own)) for clip, own in zip(clips, expected, strict=True))
    published = tiny_tokenizer(**PUBLISHED)
    with pytest.raises(ValueError, match="steps: 0 is for models whose deep tokens decode to key frames"):
        next(decoded(published, torch.randn(1, 2, 4, 6), steps=0))


def test_guidance_steers_away_from_no_motion_too() -> None:
    tokenizer = tiny_tokenizer(motion=MOTION)
    both = tokenizer.conditioning(torch.randn(2, 2, 7, 6)).with_null(tokenizer.null_tokens())
    assert both.motion[:2].any() and not both.motion[2:].any() and both.motion.shape == (4, 3, 6)


def test_clips_are_rendered_from_any_first_motion_tokens() -> None:
    tokenizer, tokens = tiny_tokenizer(motion=MOTION), torch.randn(1, 2, 7, 6)

    def rendered(tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        return next(decoded(tokenizer, tokens, **options))

    cut = tokens.clone()
    cut[:, 1, 5:] = 0
    assert torch.equal(rendered(tokens, motion_tokens=1), rendered(cut))
    assert not torch.equal(rendered(tokens), rendered(cut))
    assert torch.equal(rendered(tokens, motion_tokens=3), rendered(tokens))
    assert torch.equal(rendered(tokens, motion_tokens=50), rendered(tokens))
    head = tokens.clone()
    head[:, 0, 4:] = 9.0  # of the clip before
    assert torch.equal(rendered(head), rendered(tokens))


def test_limits_may_differ_by_clip() -> None:
    motion = torch.ones(3, 4, 2)
    assert limited(motion, torch.tensor([0, 2, 4])).sum((1, 2)).tolist() == [0, 4, 8]
    assert limited(motion, None) is motion


# language model

MOVING: dict[str, Any] = {"tokens_per_keyframe": 4, "motion_tokens": 2, "positions": 12 + 7 * 9}
MOVING |= {"end_frame_conditioning": True, "head": "flow"}
ORDERS = ["token", "keyframe"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("goal", [False, True])
def test_cached_generation_equals_uncached(order: str, goal: bool) -> None:
    model = build(order=order, residual_anchor=0.0, **MOVING)
    options: dict[str, Any] = {"guidance": 2.0, "goal": torch.randn(3, 6, 7) if goal else None}
    tokens = written(model, num_keyframes=4, **options)
    torch.testing.assert_close(tokens, written(uncached(model), num_keyframes=4, **options), **NEAR)
    assert tokens.shape == (3, 4, 6, 7) and not tokens[:, 0, 4:].any() and tokens[:, 1:].all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("goal", [False, True])
@pytest.mark.parametrize("anchor", [None, 0.0])
@pytest.mark.parametrize("motion_tokens", [0, 1, None])
def test_what_regression_writes_has_no_loss(
    order: str, goal: bool, anchor: float | None, motion_tokens: int | None
) -> None:
    model = build(**MOVING | {"head": "regression", "order": order, "residual_anchor": anchor})
    last = torch.randn(3, 6, 7) if goal else None
    tokens = written(model, num_keyframes=4, goal=last, motion_tokens=motion_tokens)
    if order == "token" and motion_tokens is not None:
        assert not tokens[:, :, 4 + motion_tokens :].any()
        tokens = tokens[:, :, : 4 + motion_tokens]
    with torch.no_grad():
        # in key frame order all of a block is predicted, the first one's motion and the goal's own tokens too
        fixed = {"keyframe": slice(1, 3 if goal else 4), "token": slice(0, 4)}[order]
        output = model(PROMPTS, tokens, goal=goal)
        assert output.keyframe_loss[:, fixed].max() < 1e-8 < model(PROMPTS, tokens + 0.1, goal=goal).loss
    without = goal and order == "token" and motion_tokens == 0  # a goal has a loss of its motion alone
    assert output.keyframe_loss.shape == (3, 3 if without else 4)


def test_a_first_key_frames_motion_has_no_loss_and_is_not_read() -> None:
    model, tokens = build(**MOVING), torch.randn(3, 3, 6, 7)
    other = tokens.clone()
    other[:, 0, 4:] = 5.0
    with torch.no_grad():
        assert torch.equal(model(PROMPTS, tokens).keyframe_loss, model(PROMPTS, other).keyframe_loss)
        last = tokens.clone()
        last[:, 2, 5] = 5.0
        assert not torch.equal(model(PROMPTS, tokens).keyframe_loss, model(PROMPTS, last).keyframe_loss)
    continued = [written(model, num_keyframes=2, prefix=prefix[:, :1]) for prefix in (tokens, other, tokens[:, :, :4])]
    assert torch.equal(continued[0], continued[1]) and torch.equal(continued[0], continued[2])


@pytest.mark.parametrize("order", ORDERS)
def test_a_goal_is_reached_and_the_motion_to_it_is_written(order: str) -> None:
    model, goal = build(order=order, **MOVING), torch.randn(3, 6, 7)
    led = written(model, num_keyframes=4, goal=goal)
    assert torch.equal(led[:, 3, :4], goal[:, :4]) and led[:, 3, 4:].all()
    other = goal.clone()
    other[:, 4:] = 5.0
    assert torch.equal(written(model, num_keyframes=4, goal=other), led)
    joined = written(model, num_keyframes=1, prefix=led[:, :1], goal=goal)  # two images, and what lies between them
    assert torch.equal(joined[:, 0, :4], goal[:, :4]) and joined[:, 0, 4:].all()
    apart = written(model, num_keyframes=1, prefix=led[:, :1], goal=goal.flip(1))
    assert (apart[:, 0, 4:] - joined[:, 0, 4:]).abs().amax((1, 2)).min() > 1e-3
    loop = written(model, num_keyframes=3, goal="first")
    assert torch.equal(loop[:, 2, :4], loop[:, 0, :4]) and loop[:, 2, 4:].all()


def test_a_goal_next_to_the_first_key_frame_is_trained_where_it_is_read() -> None:
    tokens, model = torch.randn(3, 2, 6, 7), build(order="keyframe", **MOVING)
    with torch.no_grad():
        losses = model(PROMPTS, tokens, goal=True).keyframe_loss
    assert losses.shape == (3, 2) and losses.all()
    with pytest.raises(ValueError, match="expected 3 key frames or more"):
        build(**MOVING)(PROMPTS, tokens, goal=True)  # given the goal, its motion follows as any other does


def test_a_head_whose_variance_has_no_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="motion_tokens: in keyframe order expected a head 'flow'"):
        build(**MOVING | {"head": "mixture", "order": "keyframe"})
    build(**MOVING | {"head": "mixture"})


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("anchor", [None, 0.0])
def test_a_window_writes_on_as_if_the_video_began_with_it(order: str, anchor: float | None) -> None:
    model = build(order=order, residual_anchor=anchor, **MOVING)
    tokens = written(model, num_keyframes=6, context_key_frames=3, seed=4)
    again = written(model, num_keyframes=3, prefix=tokens[:, :3], context_key_frames=3, seed=4)
    torch.testing.assert_close(again, tokens[:, 3:], **NEAR)


def test_fewer_motion_tokens_are_what_a_shorter_sequence_holds() -> None:
    model = build(**MOVING | {"head": "regression"})
    one = written(model, num_keyframes=3, motion_tokens=1)
    assert one[:, 1:, 4].all() and not one[:, :, 5:].any()
    with torch.no_grad():
        assert model(PROMPTS, one[:, :, :5]).loss < 1e-8 < model(PROMPTS, one).loss


def test_tokens_of_another_number_are_refused() -> None:
    model = build(order="keyframe", **MOVING)
    for order, count in (("keyframe", 5), ("token", 3), ("token", 7)):
        model = build(order=order, **MOVING)
        with pytest.raises(ValueError, match=r"deep tokens: expected \(b, n, d\) = \(3, 6, 7\)"):
            model(PROMPTS, torch.zeros(3, 2, count, 7))


# training


def run_of(model: Path, cache: Path, **changes: Any) -> TokenizerRun:
    config = VideoTokenizer.from_pretrained(model).config
    loop = LoopConfig(precision="float32", evaluate_every=2, optim=OptimConfig(steps=2, batch_size=4, warmup_steps=1))
    return TokenizerRun(str(cache), str(model), model=dataclasses.replace(config, **changes), loop=loop)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_cache(tmp_path_factory.mktemp("plain") / "cache", [1, 32, 72, 30])


@pytest.mark.parametrize("changes", [{}, PUBLISHED])
def test_the_encoder_learns_with_the_denoiser(tmp_path: Path, cache: Path, changes: dict[str, Any]) -> None:
    model = write_tiny_model(tmp_path / "model", motion=MOTION, **changes)
    stage = TokenizerTraining(run_of(model, cache))
    batch = stage.batch(torch.arange(3), generator_for(0))
    loss, _ = stage.loss(batch, generator_for(1))
    loss.backward()
    read = [name for name, p in stage.module.motion_encoder.named_parameters() if p.grad is not None and p.grad.any()]
    assert len(read) == len([*stage.module.motion_encoder.parameters()])
    metrics, sheet = stage.validate()
    assert np.isfinite(metrics["denoising_loss"]) and sheet.width > 0


def test_parts_are_trained_alone(moving_model: Path, cache: Path, tmp_path: Path) -> None:
    """First what has to do with motion, then the denoiser, then all."""
    run, held = run_of(moving_model, cache), VideoTokenizer.from_pretrained(moving_model).state_dict()
    shutil.copytree(moving_model, tmp_path / "new/best")
    (tmp_path / "new/recipe.json").write_text('{"recipe": {"run": {"first_stage": "as of a linear code"}}}')
    with pytest.raises(ValueError, match="trains 'denoiser': motion encoder and decoder are not trained in"):
        TokenizerTraining(dataclasses.replace(run, init=str(tmp_path / "new/best"), trains="denoiser"))
    parts = {"motion_encoder", "motion_decoder", "denoiser"}
    for name, trained in (("motion", {"motion_encoder", "motion_decoder"}), ("denoiser", {"denoiser"}), ("all", parts)):
        run_recipe(dataclasses.replace(run, trains=name), tmp_path / name, {})
        run = dataclasses.replace(run, init=str(tmp_path / name / "best"))
        state = VideoTokenizer.from_pretrained(tmp_path / name / "best").state_dict()
        changed = {key.split(".")[0] for key, t in state.items() if not torch.equal(t, held[key]) and t.ndim > 1}
        assert changed == trained
        held = state


def test_motion_is_trained_alone_where_there_is_motion(moving_model: Path, tiny_model: Path, cache: Path) -> None:
    for run in (run_of(tiny_model, cache), run_of(tiny_model, cache, motion=MOTION, resampler=RESAMPLER)):
        with pytest.raises(ValueError, match=r"trains: 'motion' needs .*, no resampler, and no adapters"):
            TokenizerTraining(dataclasses.replace(run, trains="motion"))


def test_what_is_expected_of_a_clip_begins_as_a_cross_fade() -> None:
    tokenizer, tokens = VideoTokenizer(tiny_config(motion=MOTION)), torch.randn(2, 2, 7, 6)
    given = tokenizer.conditioning(tokens)
    torch.testing.assert_close(given.expected, cross_faded(given.key_latents, 16))
    torch.nn.init.normal_(tokenizer.motion_decoder.write.weight)
    given, fewer = tokenizer.conditioning(tokens), tokenizer.conditioning(tokens, motion_tokens=2)
    assert torch.equal(given.expected, tokenizer.expected(given.key_latents, tokens[:, 1, 4:]))
    assert not torch.equal(given.expected, fewer.expected)
    assert not given.with_null(tokenizer.null_tokens()).expected[2:].any()


def test_motion_tokens_learn_what_key_frames_do_not_tell(tmp_path: Path, moving_model: Path, cache: Path) -> None:
    """Latents of zeros at both key frames; between them one row of the eight is 2."""
    run = dataclasses.replace(run_of(moving_model, cache), trains="motion", token_noise=0.0)
    videos = [CachedVideo("drawn", f"{i}", (), i >= 32, False, 17 * i, 17, 17 / 8) for i in range(40)]
    FrameCache(videos, frames(17 * 40)[0], (torch.arange(17).double() / 8).repeat(40)).save(tmp_path / "cache")
    stage = TokenizerTraining(dataclasses.replace(run, cache=str(tmp_path / "cache")))
    latents = torch.zeros(40, 17, 5, 8, 8)
    latents[torch.arange(40), 1:16, :, torch.arange(40) % 8] = 2.0
    stage.latents = latents.flatten(0, 1)[:, None]  # type: ignore[assignment]
    optim = OptimConfig(steps=250, batch_size=16, lr=1e-2, warmup_steps=10, optimizer="muon", ema_decay=0.9)
    train(stage, dataclasses.replace(run.loop, optim=optim, evaluate_every=250), tmp_path / "run", {})
    clips, tokenizer = latents, stage.module
    keys = tokenizer.tokens_of(clips[:, [0, 16]].flatten(0, 1)).unflatten(0, (40, 2))
    pair = tokenizer.with_motion(keys, tokenizer.motion_of(clips)[:, None])
    expected = [tokenizer.conditioning(pair, motion_tokens=most).expected for most in (0, 1, 3)]
    errors = [(own - clips[:, :16]).square().mean().item() for own in expected]
    assert max(errors[1:]) < 0.93 * errors[0]


def test_clips_of_training_may_lie_where_key_frames_are(moving_model: Path, cache: Path) -> None:
    run = run_of(moving_model, cache)
    video = next(video for video in FrameCache.load(cache).videos if video.count == 72)
    anywhere, whole = (TokenizerTraining(dataclasses.replace(run, whole_clips=w)) for w in (False, True))
    starts = torch.linspace(0, 0.999, 200).tolist()
    assert {int(whole.clip_rows(video, s)[whole.head] - video.first) for s in starts} == {0, 16, 32, 48}
    assert len({int(anywhere.clip_rows(video, s)[whole.head]) for s in starts}) > 50


def test_a_tokenizer_is_not_trained_on_key_frames_alone(tmp_path: Path, moving_model: Path) -> None:
    videos = [CachedVideo("drawn", f"{i}", (), i > 0, False, 2 * i, 2, 17 / 8) for i in range(2)]
    FrameCache(videos, frames(4)[0], torch.tensor([0.0, 2.0, 0.0, 2.0]).double()).save(tmp_path)
    with pytest.raises(ValueError, match=r"its training videos hold 1.9 frames a clip; cache all frames"):
        TokenizerTraining(run_of(moving_model, tmp_path))


def test_training_shows_any_first_motion_tokens(moving_model: Path, cache: Path) -> None:
    stage = TokenizerTraining(run_of(moving_model, cache))
    clips = stage.batch(torch.zeros(200, dtype=torch.long), generator_for(0))["clips"]
    shown = stage.noisy_motion(clips, generator_for(0)).detach().ne(0).any(-1)
    assert (shown[:, :-1] >= shown[:, 1:]).all()
    counts = torch.bincount(shown.sum(1), minlength=4) / 200
    torch.testing.assert_close(counts, torch.tensor([0.125, 0.125, 0.125, 0.625]), atol=0.1, rtol=0)


def test_a_model_without_motion_tokens_is_a_beginning(tmp_path: Path, tiny_model: Path, cache: Path) -> None:
    run = run_of(tiny_model, cache, motion=MOTION)
    run_recipe(run, tmp_path / "run", {})
    tokenizer = VideoTokenizer.from_pretrained(tmp_path / "run/best")
    assert tokenizer.config.motion == MOTION
    for change in ({"lora": dataclasses.replace(run.lora, rank=2)}, {"trains": "denoiser"}):
        with pytest.raises(ValueError, match=r"lora and trains 'denoiser': .* has no motion tokens"):
            TokenizerTraining(dataclasses.replace(run, **change))
    other = dataclasses.replace(run_of(tmp_path / "run/best", cache), init_denoiser=str(tiny_model))
    TokenizerTraining(other)


def test_a_language_model_without_motion_tokens_is_a_beginning(
    moving_model: Path, tiny_model: Path, cache: Path
) -> None:
    plain, moving = (DeepTokenLM.from_pretrained(folder) for folder in (tiny_model, moving_model))
    held, kept = plain.state_dict(), moving.state_dict()
    state = language(moving_model, cache, model=moving.config, init=str(tiny_model)).module.state_dict()
    own = len(held[PLACE])
    assert all(torch.equal(state[name], value) for name, value in held.items() if name != PLACE)
    assert torch.equal(state[PLACE][:own], held[PLACE]) and state[PLACE][own:].std() > 0.01
    state = language(moving_model, cache, model=moving.config, init=str(moving_model)).module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in kept.items())


@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize("published", [False, True])
def test_cached_tokens_are_those_of_encode(tmp_path: Path, moving_model: Path, loops: bool, published: bool) -> None:
    model = write_tiny_model(tmp_path / "model", motion=MOTION, **PUBLISHED) if published else moving_model
    tokenizer, folder = VideoTokenizer.from_pretrained(model), plain_cache(tmp_path / "cache", [1, 16, 40], loops)
    spacing, cache = tokenizer.config.tail_frame, FrameCache.load(folder)
    tokens = frame_tokens(tokenizer, cache, precision="float32")
    still, short, long = cache.videos[:3]
    assert not tokens[still.first][4:].any()
    near = {"rtol": 2e-3, "atol": 4e-3}
    rows = long.first + torch.arange(0, 40, spacing)
    own = cache.frames[long.first : long.first + 40]
    if not loops:
        encoded = tokenizer.encode(own[None])[0, : len(rows)]
        torch.testing.assert_close(tokens[rows].float(), encoded, **near)
        return
    twice = tokenizer.encode(torch.cat([own, own])[None])[0]
    assert (rows[-1] + spacing - long.first) % 40 != 0
    torch.testing.assert_close(tokens[rows[1:]].float(), twice[1 : len(rows)], **near)
    turned = tokenizer.encode(own.roll(spacing, 0)[None])[0, 1]  # the first frame ends the clip before it
    torch.testing.assert_close(tokens[long.first].float(), turned, **near)
    if spacing == short.count:  # a clip that is the whole loop
        around = torch.cat([cache.frames[short.first : short.first + 16], cache.frames[short.first][None]])
        torch.testing.assert_close(tokens[short.first].float(), tokenizer.encode(around[None])[0, 1], **near)


def test_motion_of_a_frame_that_is_shown_for_long_is_of_its_own_clip(tmp_path: Path, moving_model: Path) -> None:
    """Frames at 0 to 3 s, then one until 8 s, then others: the key frames at 4 and at 6 s are one frame."""
    times_s = torch.cat([torch.arange(25) / 8, 8 + torch.arange(25) / 8]).double()
    video = CachedVideo("drawn", "0.mp4", (), False, False, 0, 50, 11.125)
    own, tokenizer = frames(50)[0], VideoTokenizer.from_pretrained(moving_model)
    FrameCache([video], own, times_s).save(tmp_path)
    cache = FrameCache.load(tmp_path)
    tokens = frame_tokens(tokenizer, cache, precision="float32")
    shown = own[cache.clip_rows(video, 0.0, 90, 8.0)]
    encoded = tokenizer.encode(shown[:81][None])[0]  # at 0, 2, 4, 6, 8 and 10 s
    rows, numbers = [0, 16, 24, 25, 41], [0, 1, 2, 4, 5]
    torch.testing.assert_close(tokens[torch.tensor(rows)].float(), encoded[numbers], rtol=2e-3, atol=4e-3)


def test_videos_that_share_frames_have_the_tokens_of_either(tmp_path: Path, moving_model: Path) -> None:
    """Three clips of one video, its last two clips as another video, then a third video (as in caches of `blocks`)."""
    spans = [(0, 49), (16, 33), (49, 17)]
    videos = [CachedVideo("drawn", f"{i}.mp4", (), False, False, *span, span[1] / 8) for i, span in enumerate(spans)]
    own, tokenizer = frames(66)[0], VideoTokenizer.from_pretrained(moving_model)
    FrameCache(videos, own, torch.cat([torch.arange(49) / 8, torch.arange(17) / 8]).double()).save(tmp_path)
    tokens = frame_tokens(tokenizer, FrameCache.load(tmp_path), precision="float32")
    for first, count in (spans[0], spans[2]):
        encoded = tokenizer.encode(own[first : first + count][None])[0]
        found = tokens[first + 16 * torch.arange(len(encoded))].float()
        torch.testing.assert_close(found, encoded, rtol=2e-3, atol=4e-3)


def test_sequences_of_training_have_any_first_motion_tokens(moving_model: Path, cache: Path) -> None:
    model = dataclasses.replace(LM, motion_tokens=3, positions=110)
    stage = language(moving_model, cache, model=model, end_frame_prob=0.5)
    batches = [stage.batch(torch.tensor([1, 2]), generator_for(seed)) for seed in range(100)]
    lengths = [batch["tokens"].shape[2] for batch in batches]
    assert set(lengths) == {4, 5, 6, 7} and 45 <= lengths.count(7) <= 80
    for batch in batches[:20]:
        assert stage.loss(batch, generator_for(0))[0].isfinite()
    stage.module.eval()
    metrics, sheet = stage.validate()
    assert np.isfinite(metrics["validation_loss"]) and sheet is not None
    goals = {(batch["tokens"].shape[2] > 4, stage.weight(batch)) for batch in batches if batch["goal"]}
    assert goals == {(True, 6.0), (False, 4.0)}  # of a goal motion alone has a loss


def test_a_language_model_of_other_tokens_is_refused_before_it_trains(
    moving_model: Path, tiny_model: Path, cache: Path, tmp_path: Path
) -> None:
    model = dataclasses.replace(LM, motion_tokens=3, positions=110)
    for folder, own in ((tiny_model, model), (moving_model, LM)):
        with pytest.raises(ValueError, match="do not share tokens"):
            language(folder, cache, model=own)
    shutil.copytree(moving_model, tmp_path / "fit/best")
    (tmp_path / "fit/recipe.json").write_text('{"recipe": {"run": {"cache": "a"}}}')
    with pytest.raises(ValueError, match=r"tokenizer: .*fit/best computes no motion tokens yet"):
        language(tmp_path / "fit/best", cache, model=model)
    with pytest.raises(ValueError, match="key_frames and longer: expected up to 12, got 13"):
        language(moving_model, cache, model=dataclasses.replace(model, max_keyframes=20), key_frames=13)


# everything else


@pytest.mark.parametrize("joins", ["chained", "parallel"])
def test_videos_of_every_kind_are_generated(moving_model: Path, joins: str) -> None:
    model, image, last = DiCoDe.from_pretrained(moving_model), frames(1)[0].numpy(), frames(2)[0, 1:].numpy()
    board = parse_storyboard("[2s: a red square] [4s: a blue circle]")
    assert board is not None
    old = np.concatenate([*model.generate("a red square", seconds=5.0)])
    for given, prompt, seconds in (
        ({}, "a red square", 4.0),
        ({"image": image}, "a red square", 4.0),
        ({"image": image, "last_image": last}, "a red square", 2.0),
        ({"image": image, "last_image": last}, "a red square", 6.0),
        ({"loop": True}, "a red square", 4.0),
        ({"continued": old}, "a red square", 4.0),
        ({}, board, None),
    ):
        options: dict[str, Any] = {"seconds": seconds, "given": model.given(**given), "joins": joins}
        videos = [
            np.concatenate([*model.generate(prompt, motion_tokens=count, **options)]) for count in (None, 3, 1, 0)
        ]
        assert len(videos[0]) == 8 * (seconds or 6.0)
        assert np.array_equal(videos[0], videos[1])
        assert not np.array_equal(videos[0], videos[2]) and not np.array_equal(videos[2], videos[3])


def test_a_continued_video_is_read_with_its_motion(moving_model: Path) -> None:
    model, old = DiCoDe.from_pretrained(moving_model), frames(40)[0].numpy()
    given = model.given(continued=old)
    assert given.key_frames is not None and given.key_frames.shape[1:] == (3, 7, 6)  # 7, 23, 39
    whole = model.tokenizer.encode(torch.from_numpy(old[7:])[None])
    torch.testing.assert_close(given.key_frames, whole)


def test_models_that_share_no_motion_tokens_are_refused(moving_model: Path, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"do not share tokens.*: 4 \+ 3 × 6 and 4 \+ 0 × 6"):
        DiCoDe(VideoTokenizer.from_pretrained(moving_model), DiCoDe.from_pretrained(tiny_model).lm)


def test_commands_know_motion_tokens(
    moving_model: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(moving_model)]
    assert main(["generate", "a red square", "--seconds", "4", "--motion-tokens", "1", "-o", "one.mp4", *model]) == 0
    assert main(["tokenize", "one.mp4", *model]) == 0
    assert "3 key frames × 7 tokens × 6 numbers" in capsys.readouterr().out
    assert main(["reconstruct", "tokens.safetensors", "-o", "few.mp4", "--motion-tokens", "0", *model]) == 0
    assert main(["reconstruct", "one.mp4", "-o", "all.mp4", *model]) == 0
    assert Path("few.mp4").read_bytes() != Path("all.mp4").read_bytes()
    plain = ["generate", "a red square", "--motion-tokens", "1", "--model", str(tiny_model)]
    assert main(plain) == 2
    assert "motion_tokens: this model has none" in capsys.readouterr().err
    assert main(["info", str(moving_model)]) == 0
    out = capsys.readouterr().out
    assert "4 + 3 tokens × 6 numbers" in out and "motion_encoder" in out.replace(" ", "_")


def test_sizes_count_motion_tokens() -> None:
    plain, moving = size_tokenizer(tiny_config()), size_tokenizer(tiny_config(motion=MOTION))
    assert moving["parameters"]["motion_encoder"] > 0 and "motion_encoder" not in plain["parameters"]
    assert moving["flops"]["motion of a clip encoded"] > 0
    assert moving["flops"]["denoiser once on a clip"] > plain["flops"]["denoiser once on a clip"]
    assert "sequence of 68 read" in size_lm(build(**MOVING).config)["flops"]


def test_a_checkpoint_without_the_section_has_no_motion(tiny_model: Path) -> None:
    config = VideoTokenizer.from_pretrained(tiny_model).config
    assert config.motion is None and config.block_tokens == config.tokens_per_keyframe
