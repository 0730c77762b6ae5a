"""The tokenizer: resampler against the public code's vectors, shapes, seeds, context, denoisers, diffusion."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler
from published import reference_resampler_config, values_of, vectors_of, weights_of
from safetensors.torch import load_file

from dicode.checkpoint import read_config
from dicode.checkpoint.saving import write_config
from dicode.config import CheckpointError
from dicode.convert.priors import diffusers_first_stage
from dicode.seeds import SeedPlan, generator_for
from dicode.tokenizer.boundaries import BLEND_FRAMES, blended
from dicode.tokenizer.config import (
    DenoiserConfig,
    DenoiserName,
    EncoderConfig,
    FirstStageConfig,
    Joins,
    Objective,
    ResamplerConfig,
    SamplingConfig,
    TokenizerConfig,
)
from dicode.tokenizer.denoiser import DENOISERS as NETWORKS
from dicode.tokenizer.denoiser import (
    ClipConditioning,
    ResidualDenoiser,
    build_denoiser,
    noised,
    sample,
    scale_motion,
)
from dicode.tokenizer.encoder import FirstStage, Resampler
from dicode.tokenizer.library import ClipEncoder
from dicode.tokenizer.video_tokenizer import VideoTokenizer, steadied

DENOISERS = {
    "hourglass": DenoiserConfig(width=32, fine_width=16, fine_blocks=1, depth=1, heads=2),
    "unet3d": DenoiserConfig(kind="unet3d", channels=(32, 64), depth=1, heads=2, text_width=12, text_tokens=3),
    "wan": DenoiserConfig(kind="wan", width=24, depth=1, heads=2, text_width=8, text_tokens=512, context_frames=1),
}


def tiny_config(**changes: object) -> TokenizerConfig:
    config = TokenizerConfig(
        size=32,
        tokens_per_keyframe=4,
        token_width=6,
        first_stage=FirstStageConfig(
            channels=(8, 8, 8), latent_channels=5, encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1)
        ),
        denoiser=DENOISERS["hourglass"],
        sampling=SamplingConfig(steps=2),
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


# Of pixels, as published, with every part tiny: of the tokens' number and width of `tiny_config`
RESAMPLER = ResamplerConfig(24, 1, 2, 12, encoder=EncoderConfig(width=16, depth=1, heads=2, size=14, patch=7))


def tiny_tokenizer(**changes: object) -> VideoTokenizer:
    torch.manual_seed(0)
    tokenizer = VideoTokenizer(tiny_config(**changes)).eval()
    for parameter in tokenizer.parameters():  # the zero-initialised outputs would hide what does not depend on what
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return tokenizer


def decoded(tokenizer: VideoTokenizer, tokens: torch.Tensor, **options: Any) -> Iterator[torch.Tensor]:
    """`decode`, with fields of `SamplingConfig` among its options."""
    fields = {name: options.pop(name) for name in SamplingConfig.__dataclass_fields__ if name in options}
    return tokenizer.decode(tokens, sampling=tokenizer.config.sampling.changed(**fields), **options)


def conditioning(b: int, n: int = 4, d: int = 6, c: int = 5, side: int = 8) -> ClipConditioning:
    g = torch.Generator().manual_seed(1)
    return ClipConditioning(
        torch.randn(b, 2, n, d, generator=g),
        torch.randn(b, 2, c, side, side, generator=g),
        torch.ones(b),
        torch.randn(b, 2, c, side, side, generator=g),
        torch.ones(b),
        torch.arange(1.0, b + 1),
        torch.randn(b, 0, d),
        torch.randn(b, 16, c, side, side, generator=g),
    )


def test_resampler_agrees_with_the_public_code() -> None:
    values = values_of("resampler")
    resampler = Resampler(reference_resampler_config(), values["num_queries"], values["output_dim"])
    resampler.load_state_dict(weights_of("resampler"))
    vectors = vectors_of("resampler")
    torch.testing.assert_close(resampler(vectors["features"]), vectors["tokens"], rtol=1e-5, atol=1e-5)


def test_encode_gives_one_row_of_tokens_a_key_frame() -> None:
    frames = torch.randint(0, 256, (2, 33, 32, 32, 3), dtype=torch.uint8)
    tokens = tiny_tokenizer().encode(frames)
    assert tokens.shape == (2, 3, 4, 6)


def test_tokens_depend_on_their_own_key_frame_alone() -> None:
    tokenizer = tiny_tokenizer()
    frames = torch.randint(0, 256, (1, 33, 32, 32, 3), dtype=torch.uint8)
    before = tokenizer.encode(frames)
    frames[:, 16] = 255 - frames[:, 16]
    after = tokenizer.encode(frames)
    torch.testing.assert_close(after[:, [0, 2]], before[:, [0, 2]], atol=1e-6, rtol=0)
    assert (after[:, 1] - before[:, 1]).abs().max() > 1e-3


def test_frames_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="expected frames of"):
        tiny_tokenizer().encode(torch.zeros(1, 17, 64, 64, 3, dtype=torch.uint8))


def test_decode_gives_a_clip_a_pair_of_key_frames() -> None:
    clips = list(decoded(tiny_tokenizer(), torch.randn(2, 4, 4, 6)))
    assert [clip.shape for clip in clips] == [(2, 16, 32, 32, 3)] * 3
    assert clips[0].dtype == torch.uint8


def test_decoding_is_lazy() -> None:
    drawn = []

    def pairs():  # type: ignore[no-untyped-def]
        for i in range(3):
            drawn.append(i)
            yield torch.randn(1, 2, 4, 6)

    next(tiny_tokenizer().decode_pairs(pairs()))
    assert drawn == [0]


def test_batch_size_and_order_change_no_clip() -> None:
    tokenizer = tiny_tokenizer()
    tokens = torch.randn(3, 3, 4, 6)
    together = torch.cat(list(decoded(tokenizer, tokens, seed=5, decoder_guidance=2.0)), dim=1).int()
    for i in (2, 0, 1):
        alone = torch.cat(
            list(decoded(tokenizer, tokens[i : i + 1], seed=5, sample_indices=[i], decoder_guidance=2.0)), dim=1
        ).int()
        assert (alone[0] - together[i]).abs().max() <= 1  # float rounding may move a level


def test_residual_blocks_of_the_published_network_drop_out_in_training_alone() -> None:
    network = build_denoiser(tiny_config(denoiser=DENOISERS["unet3d"]))
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    rates = {name: m.p for name, m in network.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {rate for name, rate in rates.items() if ".resnets." in name} == {0.1}
    noisy, timestep = torch.randn(2, 16, 5, 8, 8), torch.tensor([10.0, 900.0])
    with torch.no_grad():
        first, again = (network.eval()(noisy, timestep, conditioning(2)) for _ in range(2))
        training = network.train()(noisy, timestep, conditioning(2))
    assert torch.equal(first, again) and not torch.allclose(first, training, rtol=1e-2)


def test_seed_and_sample_index_change_the_clip() -> None:
    tokenizer = tiny_tokenizer()
    tokens = torch.randn(1, 2, 4, 6)
    plain, other_seed, other_sample = (
        next(decoded(tokenizer, tokens, seed=s, sample_indices=[i])).float() for s, i in ((0, 0), (1, 0), (0, 1))
    )
    assert (plain - other_seed).abs().mean() > 1
    assert (plain - other_sample).abs().mean() > 1


def test_impossible_options_are_refused_before_anything_is_made() -> None:
    tokenizer, tokens = tiny_tokenizer(), torch.randn(1, 2, 4, 6)
    wrong: dict[str, dict[str, Any]] = {
        "steps": {"steps": -1},
        "decoder_temperature": {"decoder_temperature": -0.5},
        "motion_scale": {"motion_scale": -0.5},
        "clips_at_once: expected at least 1": {"joins": "parallel", "clips_at_once": 0},
        "first_clip": {"first_clip": -1},
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            decoded(tokenizer, tokens, **options)


def test_temperature_scales_the_noise_that_a_clip_starts_from() -> None:
    tokenizer, tokens = tiny_tokenizer(), torch.randn(1, 2, 4, 6)

    def made(temperature: float, seed: int) -> torch.Tensor:
        return next(decoded(tokenizer, tokens, seed=seed, decoder_temperature=temperature)).float()

    differences = [(made(t, 1) - made(t, 2)).abs().mean() for t in (1.0, 0.5, 0.0)]
    assert differences[0] > differences[1] > differences[2] == 0


@pytest.mark.parametrize("tail_frame", [15, 16])
def test_motion_scale_moves_frames_from_the_mean_of_their_clip_and_leaves_key_frames(tail_frame: int) -> None:
    tokenizer, tokens = tiny_tokenizer(tail_frame=tail_frame), torch.randn(2, 2, 4, 6)
    (plain,), (same,), (moved,) = (latents_of(tokenizer, tokens, motion_scale=s) for s in (None, 1.0, 1.5))
    assert torch.equal(plain, same)
    keys = [0] if tail_frame == 16 else [0, 15]
    between = [frame for frame in range(16) if frame not in keys]
    mean = plain.mean(1, keepdim=True)
    torch.testing.assert_close(moved[:, between] - mean, 1.5 * (plain[:, between] - mean))
    assert torch.equal(moved[:, keys], plain[:, keys])
    (still,) = latents_of(tokenizer, tokens, motion_scale=0.0)
    assert still[:, between].var(1).max() < 1e-10


def test_a_dead_band_keeps_pixels_until_they_change_by_more() -> None:
    values = torch.tensor([100, 102, 104, 103, 90], dtype=torch.uint8)
    frames = torch.zeros(2, 5, 1, 1, 3, dtype=torch.uint8)
    frames[0, :, 0, 0] = values[:, None]
    frames[1, :, 0, 0, 2] = values  # one channel decides for all
    kept = torch.tensor([100, 100, 104, 104, 90], dtype=torch.uint8)
    assert torch.equal(steadied(frames, 3.0)[0, :, 0, 0, 0], kept)
    assert torch.equal(steadied(frames, 3.0)[1, :, 0, 0, 2], kept)
    after = steadied(frames, 3.0, last=torch.full((2, 1, 1, 3), 101, dtype=torch.uint8))
    assert after[0, :, 0, 0, 0].tolist() == [101, 101, 101, 101, 90]
    assert after[1, :, 0, 0, 0].tolist() == [0] * 5


def test_a_dead_band_goes_on_over_joins_and_from_the_frames_before() -> None:
    tokenizer, tokens = tiny_tokenizer(), torch.randn(2, 3, 4, 6)
    before = torch.randint(0, 256, (2, 16, 32, 32, 3), dtype=torch.uint8)
    for options in ({}, {"before": before}):
        plain = torch.cat([*decoded(tokenizer, tokens, **options)], dim=1)
        kept = torch.cat([*decoded(tokenizer, tokens, dead_band=20.0, **options)], dim=1)
        last = options["before"][:, -1] if options else None
        assert torch.equal(kept, steadied(plain, 20.0, last))
        assert not torch.equal(kept, plain)


def test_a_chained_clip_sees_the_one_before_as_it_was_shown() -> None:
    tokenizer, tokens = tiny_tokenizer(), torch.randn(1, 3, 4, 6)
    tokenizer.config = dataclasses.replace(tokenizer.config, sampling=SamplingConfig(steps=2, motion_scale=1.5))
    by_config = latents_of(tokenizer, tokens)
    assert clips_equal(by_config, latents_of(tokenizer, tokens, motion_scale=1.5)) == [True, True]
    other = latents_of(tokenizer, tokens, motion_scale=1.0)[1]
    other = scale_motion(other, 1.5, [0])  # the second clip alike, after a first one that moved less
    assert not torch.allclose(other, by_config[1])


def test_chained_clips_see_the_clip_before_and_independent_ones_do_not() -> None:
    tokenizer = tiny_tokenizer()
    tokens, others = torch.randn(1, 3, 4, 6), torch.randn(1, 3, 4, 6)
    others[:, 1:] = tokens[:, 1:]  # the second clip's own key frames are the same
    for joins, differs in (("chained", True), ("independent", False)):
        second = [list(decoded(tokenizer, t, joins=joins))[1].float() for t in (tokens, others)]  # type: ignore[arg-type]
        assert bool((second[0] - second[1]).abs().max() > 0) is differs


def latents_of(tokenizer: VideoTokenizer, tokens: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """What `decode` hands to the first stage, clip by clip."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "frames_of", lambda latents: latents)
        return list(decoded(tokenizer, tokens, **options))


def clips_equal(made: list[torch.Tensor], expected: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(made, expected, strict=True)]


@pytest.mark.parametrize("tail_frame", [15, 16])
def test_parallel_clips_do_not_depend_on_how_many_are_rendered_at_once(tail_frame: int) -> None:
    tokenizer, tokens = tiny_tokenizer(tail_frame=tail_frame), torch.randn(2, 6, 4, 6)
    alone = latents_of(tokenizer, tokens, decoder_guidance=2.0, joins="parallel", clips_at_once=1)
    assert [clip.shape[1] for clip in alone] == [16] + [tail_frame] * 4
    for clips_at_once in (2, 3, 9):
        together = latents_of(tokenizer, tokens, decoder_guidance=2.0, joins="parallel", clips_at_once=clips_at_once)
        for made, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("joins", "clips_at_once", "ahead"), [("independent", 3, 1), ("parallel", 1, 2), ("parallel", 3, 4)]
)
def test_pairs_drawn_ahead_of_what_was_given_are_bounded(joins: Joins, clips_at_once: int, ahead: int) -> None:
    drawn, most = 0, 0

    def pairs() -> Iterator[torch.Tensor]:
        nonlocal drawn, most
        for _ in range(8):
            drawn += 1
            most = max(most, drawn - given)
            yield torch.randn(1, 2, 4, 6)

    given, sampling = 0, SamplingConfig(steps=1, joins=joins)
    for _ in tiny_tokenizer().decode_pairs(pairs(), sampling=sampling, clips_at_once=clips_at_once):
        given += 1
    assert (given, most) == (8, ahead)


@pytest.mark.parametrize("moves_later", [True, False])
@pytest.mark.parametrize("shares_frame", [True, False])
def test_a_jump_is_spread_evenly_over_the_steps_around_a_join(shares_frame: bool, moves_later: bool) -> None:
    """Two clips of a thing that moves at constant speed, the second of which is off by a jump."""
    speed, jump = torch.randn(2, 5, 3, 4), 4 * torch.randn(2, 5, 3, 4)
    times = torch.arange(12.0)[:, None, None, None]
    earlier = speed[:, None] * times
    later = speed[:, None] * (times + 12 - int(shares_frame)) + jump[:, None]
    closed = blended(earlier, later, shares_frame, moves_later)
    shown = torch.cat([closed[0], closed[1][:, shares_frame:]], dim=1)
    frames = BLEND_FRAMES * (1 + moves_later) + (not shares_frame)
    expected = speed[:, None].repeat(1, shown.shape[1] - 1, 1, 1, 1)
    expected[:, 11 - BLEND_FRAMES :][:, :frames] += jump[:, None] / frames
    torch.testing.assert_close(shown.diff(dim=1), expected, rtol=0, atol=1e-4)
    if shares_frame:
        torch.testing.assert_close(closed[0][:, -1], closed[1][:, 0], rtol=0, atol=1e-4)
    if not moves_later:
        assert torch.equal(closed[1], later)


def test_a_join_as_uneven_as_its_clips_stays_as_it_is() -> None:
    torch.manual_seed(0)
    clips = torch.randn(2, 32, 5, 8, 8).cumsum(1).split(16, dim=1)  # steps of deviation 1, the join's like the others
    for made, given in zip(blended(clips[0], clips[1], shares_frame=False), clips, strict=True):
        assert (made - given).square().mean().sqrt() < 0.05


def test_independent_clips_with_their_numbers_equal_those_of_the_whole() -> None:
    tokenizer, tokens = tiny_tokenizer(), torch.randn(2, 7, 4, 6)
    whole = list(decoded(tokenizer, tokens, joins="independent"))
    assert (
        clips_equal(list(decoded(tokenizer, tokens[:, 3:], joins="independent", first_clip=3)), whole[3:]) == [True] * 3
    )
    assert clips_equal(list(decoded(tokenizer, tokens[:, 3:], joins="independent")), whole[3:]) == [False] * 3


def test_a_rerolled_video_is_the_old_one_up_to_its_clip_and_another_after() -> None:
    tokenizer, tokens = tiny_tokenizer(), torch.randn(1, 5, 4, 6)
    for joins in ("chained", "independent"):
        old, new = (list(decoded(tokenizer, tokens, seed=s, joins=joins)) for s in (1, SeedPlan(1, 2, 9)))
        assert clips_equal(new, old) == [True, True, False, False]
    all_of_it = list(decoded(tokenizer, tokens, seed=SeedPlan(1, 0, 9)))
    assert clips_equal(all_of_it, list(decoded(tokenizer, tokens, seed=9))) == [True] * 4
    one, independent = SeedPlan(1, 1, 9, reroll_clips=1), {"joins": "independent"}
    old, new = (list(decoded(tokenizer, tokens, seed=seed, **independent)) for seed in (1, one))
    assert clips_equal(new, old) == [True, False, True, True]


def test_a_plan_that_rerolls_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="reroll_from: expected the number of a clip"):
        SeedPlan(1, -1, 2)
    with pytest.raises(ValueError, match="reroll_seed: expected another seed"):
        SeedPlan(3, 2, 3)
    with pytest.raises(ValueError, match="reroll_clips: expected 1"):
        SeedPlan(3, 2, 4, 0)


def test_a_given_video_is_continued_as_an_own_clip_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a first stage that loses nothing, the frames of a clip are as good a context as its latents."""
    tokenizer, tokens = tiny_tokenizer(), torch.randn(2, 4, 4, 6)
    whole = latents_of(tokenizer, tokens)
    before = torch.randint(0, 256, (2, 5, 32, 32, 3), dtype=torch.uint8)
    seen = []

    def lossless(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels)
        return whole[0][:, -2:].flatten(0, 1)

    monkeypatch.setattr(tokenizer.first_stage, "encode", lossless)
    continued = latents_of(tokenizer, tokens[:, 1:], before=before, first_clip=1)
    assert clips_equal(continued, whole[1:]) == [True] * 2
    expected = before[:, -2:].flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(seen[0], expected)


def test_frames_before_change_the_first_clip_where_clips_are_chained_alone() -> None:
    tokenizer, tokens = tiny_tokenizer(), torch.randn(1, 2, 4, 6)
    before = torch.randint(0, 256, (1, 2, 32, 32, 3), dtype=torch.uint8)
    for joins, same in (("chained", False), ("parallel", True), ("independent", True)):
        made = [list(decoded(tokenizer, tokens, joins=joins, before=b)) for b in (None, before)]  # type: ignore[arg-type]
        assert clips_equal(made[0], made[1]) == [same]


def test_frames_before_that_do_not_fit_are_refused() -> None:
    tokenizer, tokens = tiny_tokenizer(), torch.randn(2, 2, 4, 6)
    wrong = {"at least 2 frames": (2, 1, 32), "expected frames of": (2, 2, 64), "a batch of 2": (1, 2, 32)}
    for message, (b, f, side) in wrong.items():
        with pytest.raises(ValueError, match=message):
            next(decoded(tokenizer, tokens, before=torch.zeros(b, f, side, side, 3, dtype=torch.uint8)))


def test_every_name_of_a_denoiser_has_its_network_and_a_small_configuration() -> None:
    assert set(NETWORKS) == set(DENOISERS) == set(get_args(DenoiserName))
    assert all(config.kind == name for name, config in DENOISERS.items())


@pytest.mark.parametrize("kind", DENOISERS)
def test_every_denoiser_listens_to_noise_time_tokens_and_context(kind: str) -> None:
    torch.manual_seed(0)
    own = {"tail_frame": 15} if kind == "wan" else {}  # whose context is the clip's own first frame
    denoiser = build_denoiser(tiny_config(denoiser=DENOISERS[kind], **own)).eval()
    for parameter in denoiser.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    noisy, time, given = torch.randn(2, 16, 5, 8, 8), torch.tensor([300.0, 700.0]), conditioning(2)
    plain = denoiser(noisy, time, given)
    assert plain.shape == noisy.shape
    assert plain.dtype == torch.float32
    changed = {
        "noise": (noisy + 0.5, time, given),
        "time": (noisy, time + 100, given),
        "tokens": (noisy, time, dataclasses.replace(given, tokens=given.tokens.flip(1))),
        "key latents": (noisy, time, dataclasses.replace(given, key_latents=given.key_latents.flip(1))),
        "context": (noisy, time, dataclasses.replace(given, context=given.context + 1)),
        "context mask": (noisy, time, dataclasses.replace(given, context_mask=torch.zeros(2))),
    }
    if kind == "wan":
        del changed["key latents"]  # tokens alone tell it of key frames
    for name, arguments in changed.items():
        assert (denoiser(*arguments) - plain).abs().max() > 1e-4, name


def test_a_residual_denoiser_that_predicts_zero_gives_the_best_guess_for_gaussian_residuals() -> None:
    """What is left of the target is then `deviation`/√variance of the network's own target, at every time."""
    torch.manual_seed(0)
    b = 400
    denoiser = ResidualDenoiser(Silent(), 4)
    denoiser.deviation.copy_(torch.tensor([0.1, 0.5, 1.0, 2.0]))
    given = ClipConditioning(
        torch.zeros(b, 2, 1, 1),
        torch.zeros(b, 2, 3, 4, 4),
        torch.ones(b),
        torch.zeros(b, 1),
        torch.zeros(b),
        torch.ones(b),
        torch.zeros(b, 0, 1),
        torch.randn(b, 4, 3, 4, 4),
    )
    clips = given.expected + denoiser.deviation[:, None, None, None] * torch.randn(b, 4, 3, 4, 4)
    for t in (0.05, 0.5, 0.95):
        noise = torch.randn_like(clips)
        predicted = denoiser((1 - t) * clips + t * noise, torch.full((b,), 1000 * t), given)
        left = (noise - clips - predicted).square().mean((0, 2, 3, 4)).sqrt()
        expected = denoiser.deviation / (((1 - t) * denoiser.deviation) ** 2 + t**2).sqrt()
        torch.testing.assert_close(left, expected, rtol=0.05, atol=0)


def test_the_residual_is_the_whole_clip_where_keys_are_dropped() -> None:
    denoiser = ResidualDenoiser(Silent(), 4)
    denoiser.deviation.fill_(0.1)
    given = conditioning(2)
    dropped = dataclasses.replace(given, expected=given.expected[:, :4] * 0, keys_mask=torch.zeros(2))
    noisy, time = torch.randn(2, 4, 5, 8, 8), torch.full((2,), 1000.0)
    torch.testing.assert_close(denoiser(noisy, time, dropped), noisy)  # at t = 1, noise is the best guess
    torch.testing.assert_close(denoiser(noisy, time * 0, dropped), -noisy)  # at t = 0, minus the clip


def test_deviations_of_the_residual_are_measured_a_frame() -> None:
    denoiser = ResidualDenoiser(Silent(), 4)
    expected = torch.randn(50, 4, 5, 8, 8)
    clips = expected.clone()
    clips[:, 2] += 3 * torch.randn_like(clips[:, 2])
    denoiser.fit_deviation(clips, expected, smallest=0.2)
    torch.testing.assert_close(denoiser.deviation, torch.tensor([0.2, 0.2, 3.0, 0.2]), rtol=0.02, atol=0)


def test_residuals_need_an_objective_that_is_linear_in_the_clip() -> None:
    denoiser = dataclasses.replace(DENOISERS["hourglass"], predict_residual=True)
    with pytest.raises(ValueError, match="predict_residual"):
        VideoTokenizer(tiny_config(denoiser=denoiser, objective="v_prediction"))


class Silent(torch.nn.Module):
    """A network that predicts nothing."""

    def forward(self, noisy: torch.Tensor, timestep: torch.Tensor, conditioning: ClipConditioning) -> torch.Tensor:
        return torch.zeros_like(noisy)


def test_unet_shows_head_tokens_to_the_first_half_of_a_clip_only() -> None:
    """Without temporal layers a frame's output depends on its own half's tokens alone."""
    torch.manual_seed(0)
    config = dataclasses.replace(DENOISERS["unet3d"], context_frames=0)
    denoiser = build_denoiser(tiny_config(denoiser=config, resampler=RESAMPLER)).eval()
    for name, parameter in denoiser.named_parameters():
        if "temp_" in name or "transformer_in.proj_out" in name:
            torch.nn.init.zeros_(parameter)
    noisy, time, given = torch.randn(1, 16, 5, 8, 8), torch.tensor([500.0]), conditioning(1)
    tokens = given.tokens.clone()
    tokens[:, 1] += 1
    difference = denoiser(noisy, time, dataclasses.replace(given, tokens=tokens)) - denoiser(noisy, time, given)
    assert difference[:, :8].abs().max() < 1e-6
    assert difference[:, 8:].abs().max() > 1e-4


def test_clip_encoder_gives_all_tokens_of_the_tower_for_any_image_size() -> None:
    encoder = ClipEncoder(EncoderConfig(width=32, depth=2, heads=2, size=28, patch=14))
    assert encoder(torch.rand(3, 3, 40, 36) * 2 - 1).shape == (3, 5, 32)


def test_clip_preprocessing_maps_white_to_clips_white() -> None:
    encoder = ClipEncoder(EncoderConfig(width=32, depth=1, heads=2, size=28, patch=14))
    seen = []
    encoder.tower.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    encoder(torch.ones(1, 3, 50, 50))
    expected = (1 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    torch.testing.assert_close(seen[0][0, :, 3, 5], expected)


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_first_stage_latents_are_normalised(kind: str) -> None:
    torch.manual_seed(0)
    config = FirstStageConfig(
        kind=kind, channels=(8, 8, 8), latent_channels=5, encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1)
    )  # type: ignore[arg-type]
    stage = FirstStage(config)
    pixels = torch.rand(6, 3, 32, 32) * 2 - 1
    stage.fit_statistics(stage.raw_latents(pixels))
    latents = stage.encode(pixels)
    assert latents.shape == (6, 5, 8, 8)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(5), atol=1e-2, rtol=0)
    assert stage.decode(latents).shape == pixels.shape


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_a_diffusers_autoencoder_gives_its_own_scaled_latents(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "tiny":
        library = AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 1), latent_channels=3, scaling_factor=0.5,
        )  # fmt: skip
    else:
        library = AutoencoderKL(
            block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=3,
        )  # fmt: skip
    library.save_pretrained(tmp_path)
    stage = diffusers_first_stage(tmp_path)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    encoded = library.encode(pixels)
    raw = encoded.latents if kind == "tiny" else encoded.latent_dist.mode()
    torch.testing.assert_close(stage.encode(pixels), raw * library.config.scaling_factor, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        stage.decode(raw * library.config.scaling_factor), library.decode(raw).sample, rtol=1e-4, atol=1e-4
    )


def test_a_folder_of_another_class_is_no_first_stage(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderDC"}))
    with pytest.raises(CheckpointError, match="expected AutoencoderKL or AutoencoderTiny, got 'AutoencoderDC'"):
        diffusers_first_stage(tmp_path)


@pytest.mark.parametrize("objective", ["flow", "v_prediction", "epsilon"])
def test_a_perfect_denoiser_recovers_the_latents(objective: Objective) -> None:
    """A denoiser that knows the answer must be led to it by the sampler, whatever the objective."""
    clean, noise = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 3, 4, 4)
    alphas = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        rescale_betas_zero_snr=objective == "v_prediction",
    ).alphas_cumprod  # fmt: skip

    def perfect(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if objective == "flow":
            return (latents - clean) / (timestep / 1000)[:, None, None, None, None]
        alpha = alphas[timestep.long()][:, None, None, None, None]
        implied_noise = (latents - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        return implied_noise if objective == "epsilon" else alpha.sqrt() * implied_noise - (1 - alpha).sqrt() * clean

    times = []

    def watched(latents: torch.Tensor, timestep: torch.Tensor, until: torch.Tensor) -> torch.Tensor:
        times.append(timestep[0].item())
        return perfect(latents, timestep)

    made = sample(objective, SamplingConfig(steps=20), watched, noise)
    assert len(times) == 20
    if objective == "flow":
        assert times == pytest.approx([1000 - 50 * i for i in range(20)], abs=0.01)  # no step is wasted
    # the published schedule stops at t = 1, where noise of deviation 0.03 is left
    torch.testing.assert_close(made, clean, atol=1e-4 if objective == "flow" else 0.15, rtol=0)


def test_guidance_of_one_is_the_conditional_prediction_and_two_moves_away_from_null() -> None:
    noise = torch.zeros(1, 1, 1, 1, 1)

    def predict(x: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.ones_like(x[:1]), torch.zeros_like(x[1:])])

    def made(guidance: float) -> float:
        sampling = SamplingConfig(steps=4, decoder_guidance=guidance)
        return sample("flow", sampling, predict, noise).item()

    values = {guidance: made(guidance) for guidance in (0.0, 1.0, 2.0)}
    assert values[0.0] == pytest.approx(0)
    assert values[2.0] == pytest.approx(2 * values[1.0])


def test_flow_target_is_noise_minus_latents_on_the_line_between_them() -> None:
    latents, noise = torch.randn(3, 2, 4, 5, 5), torch.randn(3, 2, 4, 5, 5)
    noisy, timestep, target = noised("flow", latents, noise, generator_for(0))
    torch.testing.assert_close(noisy, latents + (timestep / 1000)[:, None, None, None, None] * target)


def test_epsilon_is_learnt_on_the_plain_schedule_and_v_on_that_of_zero_terminal_snr() -> None:
    latents, noise = torch.randn(400, 2, 4, 1, 1), torch.randn(400, 2, 4, 1, 1)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = (1 - betas).cumprod(0).sqrt()  # of the public code; rescaled: Lin et al. 2024, algorithm 1
    rescaled = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    for objective, scale in (("epsilon", signal), ("v_prediction", rescaled)):
        noisy, timestep, target = noised(objective, latents, noise, generator_for(0))  # type: ignore[arg-type]
        a = scale[timestep.long()][:, None, None, None, None]
        b = (1 - a.square()).sqrt()
        torch.testing.assert_close(noisy.double(), a * latents + b * noise, atol=1e-4, rtol=0)
        expected = noise.double() if objective == "epsilon" else a * noise - b * latents
        torch.testing.assert_close(target.double(), expected, atol=1e-4, rtol=0)


def test_checkpoint_round_trip_is_exact(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    write_config(tmp_path, {"tokenizer": tokenizer.save_pretrained(tmp_path)})
    again = VideoTokenizer.from_pretrained(tmp_path)
    assert again.config == tokenizer.config
    frames = torch.randint(0, 256, (1, 17, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(again.encode(frames), tokenizer.encode(frames))


@pytest.mark.parametrize("damage", ["truncated", "missing", "extra", "shape", "config"])
def test_damaged_checkpoints_are_refused_with_a_reason(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save_file

    tokenizer = tiny_tokenizer()
    write_config(tmp_path, {"tokenizer": tokenizer.save_pretrained(tmp_path)})
    path = tmp_path / "tokenizer.safetensors"
    state = load_file(path)
    name = "linear_code.encode.bias"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "config":
        values = read_config(tmp_path)
        values["tokenizer"]["siez"] = 3
        write_config(tmp_path, values)
    else:
        if damage == "missing":
            del state[name]
        elif damage == "extra":
            state["linear_code.encode.bia"] = state[name].clone()
        else:
            state[name] = state[name][..., :3].contiguous()
        save_file(state, path)
    reasons = {
        "truncated": "not a readable safetensors",
        "missing": "missing linear_code.encode.bias",
        "extra": "unexpected linear_code.encode.bia.*did you mean",
        "shape": r"linear_code.encode.bias: expected shape",
        "config": "unknown key 'siez'.*did you mean 'size'",
    }
    with pytest.raises(CheckpointError, match=reasons[damage]):
        VideoTokenizer.from_pretrained(tmp_path)
