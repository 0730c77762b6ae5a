"""Wan behind the tokenizer's interfaces, at toy size: its own classes are the reference."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from einops import rearrange
from test_tokenizer import RESAMPLER, conditioning
from torch import nn
from toy_runs import LM, assert_same_checkpoint, loop, train_in_parts, write_cache

from dicode.checkpoint.saving import write_config
from dicode.cli.app import main
from dicode.convert.wan import configured
from dicode.lm.presets import SIZES
from dicode.pipeline import DiCoDe, check_shared
from dicode.tokenizer.config import DenoiserConfig, FirstStageConfig, SamplingConfig, TokenizerConfig
from dicode.tokenizer.denoiser import shifted
from dicode.tokenizer.presets import TOKENIZERS
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.tokenizer.wan import IMAGE_PATH, TEXT_ROWS, Wan, begin_image_path
from dicode.train.first_stage import FirstStageTraining
from dicode.train.flow_map import drawn_times, flow_map_loss
from dicode.train.runs import FirstStageRun, LanguageRun, LoRAConfig, TokenizerRun
from dicode.train.stages import run_recipe
from dicode.train.tokenizer import TokenizerTraining

CLASSES_OF_PARTS: tuple[Any, Any] = WanTransformer3DModel, AutoencoderKLWan
FIRST_STAGE = FirstStageConfig(
    kind="wan", channels=(4, 8, 8), latent_channels=5, encoder_blocks=(1,), decoder_blocks=(1,)
)
CONFIG = TokenizerConfig(
    size=32,
    clip_frames=17,
    tokens_per_keyframe=4,
    token_width=6,
    first_stage=FIRST_STAGE,
    resampler=RESAMPLER,
    denoiser=DenoiserConfig(
        kind="wan", width=24, depth=2, heads=2, text_width=8, text_tokens=TEXT_ROWS, context_frames=1, time_shift=3.0
    ),
    sampling=SamplingConfig(steps=2),
)


def tokenizer(**changes: Any) -> VideoTokenizer:
    torch.manual_seed(0)
    return VideoTokenizer(dataclasses.replace(CONFIG, **changes)).eval()


def clips(frames: int = 17, b: int = 2) -> torch.Tensor:
    return torch.rand(b, frames, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def given(**changes: Any) -> Any:
    context = torch.randn(2, 1, 5, 8, 8, generator=torch.Generator().manual_seed(2))
    own = dataclasses.replace(conditioning(2), context=context, context_mask=torch.tensor([1.0, 0.0]))
    return dataclasses.replace(own, **changes)


def test_the_first_stage_codes_clips_as_the_library_does() -> None:
    stage = tokenizer().first_stage
    stage.latent_mean.copy_(torch.arange(5) / 10)
    pixels = clips()
    expected = stage.autoencoder.encode(rearrange(pixels, "b f c y x -> b c f y x")).latent_dist.mode()
    expected = rearrange(expected, "b c f h w -> b f c h w") - stage.latent_mean[:, None, None]
    latents = stage.encode_clips(pixels)
    assert latents.shape == (2, 5, 5, 8, 8)
    torch.testing.assert_close(latents, expected)
    assert stage.decode_clips(latents).shape == pixels.shape
    torch.testing.assert_close(stage.encode(pixels[:, 0]), latents[:, 0], rtol=1e-4, atol=1e-5)  # of frame 0 alone
    assert stage.decode(latents[:, 0]).shape == (2, 3, 32, 32)
    for frames in (16, 18):  # the library drops three frames without a word
        with pytest.raises(ValueError, match="4 n"):
            stage.encode_clips(clips(frames))


def test_without_effect_deep_tokens_leave_the_text_model_as_it_was() -> None:
    model = tokenizer().denoiser
    assert isinstance(model, Wan)
    own = model.transformer
    plain = WanTransformer3DModel.from_config({**own.config, "image_dim": None, "added_kv_proj_dim": None})
    state = {name: t for name, t in own.state_dict().items() if not any(part in name for part in IMAGE_PATH)}
    plain.load_state_dict(state)
    begin_image_path(own)
    noisy, t, condition = torch.randn(2, 5, 5, 8, 8), torch.tensor([500.0, 20.0]), given()
    condition = dataclasses.replace(condition, context_mask=torch.zeros(2))
    expected = plain(noisy.transpose(1, 2), t, model.null_text.expand(2, -1, -1), return_dict=False)[0]
    torch.testing.assert_close(model(noisy, t, condition), expected.transpose(1, 2), rtol=0, atol=1e-5)


def test_head_and_tail_are_told_apart_and_every_token_matters() -> None:
    model = tokenizer().denoiser
    noisy, t, condition = torch.randn(2, 5, 5, 8, 8), torch.tensor([500.0, 20.0]), given()
    made = model(noisy, t, condition)
    swapped = model(noisy, t, dataclasses.replace(condition, tokens=condition.tokens.flip(1)))
    assert (made - swapped).abs().max() > 1e-6
    for place in range(8):
        tokens = condition.tokens.clone()
        tokens[:, place // 4, place % 4] += torch.randn(6)
        assert (model(noisy, t, dataclasses.replace(condition, tokens=tokens)) - made).abs().max() > 1e-6


def test_a_given_first_latent_is_clean_and_its_noise_is_not_read() -> None:
    model = tokenizer().denoiser
    noisy, t, condition = torch.randn(2, 5, 5, 8, 8), torch.tensor([500.0, 500.0]), given()
    made, other = model(noisy, t, condition), noisy.clone()
    other[:, 0] += 1
    changed = model(other, t, condition) - made
    assert changed[0].abs().max() == 0 and changed[1].abs().max() > 1e-6


def test_clips_meet_in_the_frame_that_they_share() -> None:
    model, tokens = tokenizer(), torch.randn(1, 4, 4, 6)
    clips = list(model.decode(tokens, seed=1))
    assert [clip.shape[1] for clip in clips] == [17, 16, 16]
    again = torch.cat(list(model.decode(tokens, seed=1)), dim=1)
    assert torch.equal(torch.cat(clips, dim=1), again)
    with pytest.raises(ValueError, match="parallel"):
        next(model.decode(tokens, sampling=model.config.sampling.changed(joins="parallel")))


def test_a_model_renders_other_frames_once_its_configuration_says_so(tmp_path: Path) -> None:
    prior, tokens = tokenizer(), torch.randn(1, 2, 4, 6)
    section = prior.save_pretrained(tmp_path)
    write_config(tmp_path, {"tokenizer": {**section, "size": 40, "frame_width": 64}})
    (clip,) = VideoTokenizer.from_pretrained(tmp_path).decode(tokens)
    assert clip.shape == (1, 17, 40, 64, 3)


def test_frames_need_not_be_square() -> None:
    model = tokenizer(frame_width=48, null_tokens="grey_image", sampling=SamplingConfig(steps=2, decoder_guidance=2.0))
    tokens = torch.randn(1, 3, 4, 6)
    frames = torch.cat(list(model.decode(tokens, seed=1)), dim=1)
    assert frames.shape == (1, 33, 32, 48, 3)
    assert model.encode(frames).shape == tokens.shape
    more = torch.cat(list(model.decode(tokens, seed=2, before=frames)), dim=1)
    assert more.shape == frames.shape and not torch.equal(more, frames)
    with pytest.raises(ValueError, match=r"\(32, 48, 3\), got \(32, 32, 3\)"):
        model.encode(frames[:, :, :, :32])


def test_a_cache_of_other_frames_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache")
    prior = tokenizer(frame_width=48)
    write_config(tmp_path / "prior", {"tokenizer": prior.save_pretrained(tmp_path / "prior")})
    run = TokenizerRun(str(tmp_path / "cache"), str(tmp_path / "prior"), model=prior.config, loop=loop(1))
    with pytest.raises(ValueError, match=r"32x48.*holds 32x32"):
        TokenizerTraining(run)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"frame_width": 36}, "even number of latents"),
        ({"frame_width": 48, "resampler": None}, "frame_width"),
        ({"clip_frames": 16}, "clip_frames"),
        ({"clip_frames": 17, "tail_frame": 17}, "clip_frames"),
        ({"denoiser": dataclasses.replace(CONFIG.denoiser, text_tokens=77)}, "text_tokens"),
        ({"denoiser": dataclasses.replace(CONFIG.denoiser, context_frames=2)}, "context_frames"),
    ],
)
def test_what_it_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tokenizer(**changes)


def test_its_autoencoder_is_not_trained_here() -> None:
    with pytest.raises(ValueError, match="dicode convert wan"):
        FirstStageTraining(FirstStageRun(model=FIRST_STAGE))


@torch.no_grad()
@pytest.mark.parametrize("context_frames", [0, 1])
def test_a_flow_map_begins_as_its_denoiser_and_reads_where_a_jump_ends(tmp_path: Path, context_frames: int) -> None:
    plain = dataclasses.replace(CONFIG.denoiser, context_frames=context_frames)
    before = tokenizer(denoiser=plain)
    write_config(tmp_path / "prior", {"tokenizer": before.save_pretrained(tmp_path / "prior")})
    own = dataclasses.replace(CONFIG, denoiser=dataclasses.replace(plain, flow_map=True))
    write_cache(tmp_path / "cache")
    run = TokenizerRun(str(tmp_path / "cache"), str(tmp_path / "prior"), model=own, loop=loop(1), trains="denoiser")
    now = TokenizerTraining(run).module.eval()
    noisy, t, condition = torch.randn(2, 5, 5, 8, 8), torch.tensor([500.0, 20.0]), given()
    expected = before.velocity(condition, noisy, t, t)
    same = now.velocity(condition, noisy, t, t)
    torch.testing.assert_close(same, expected, rtol=0, atol=1e-6)
    jumping = now.velocity(condition, noisy, t, t / 2)
    assert (jumping - same).abs().amax((1, 2, 3, 4)).min() > 1e-5


def test_a_given_first_latent_of_a_flow_map_has_no_loss(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache")
    prior = tokenizer()
    write_config(tmp_path / "prior", {"tokenizer": prior.save_pretrained(tmp_path / "prior")})
    own = dataclasses.replace(CONFIG, denoiser=dataclasses.replace(CONFIG.denoiser, flow_map=True, fused_guidance=2.0))
    run = TokenizerRun(str(tmp_path / "cache"), str(tmp_path / "prior"), model=own, loop=loop(1))
    stage = TokenizerTraining(run)
    clips, noise = torch.randn(2, 2, 5, 5, 8, 8, generator=torch.Generator().manual_seed(3))
    everything = given(context_mask=torch.ones(2))
    losses = []
    for moved in (0.0, 5.0):  # of the first latents' noise alone, which nothing reads where they are given
        moving = noise.clone()
        moving[:, 0] += moved
        losses.append(stage.jumping_loss(clips, moving, everything, torch.Generator().manual_seed(0)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    free = given(context_mask=torch.zeros(2))
    moved_loss = stage.jumping_loss(clips, moving, free, torch.Generator().manual_seed(0)).item()
    assert moved_loss > 1.5 * stage.jumping_loss(clips, noise, free, torch.Generator().manual_seed(0)).item()


def test_a_flow_map_learns_to_jump_between_gaussians() -> None:
    """In one step, where a step along the velocity alone would end on the mean: an error of the deviation squared."""
    torch.manual_seed(0)
    mean, deviation, channels = 1.5, 0.4, 2
    stage = dataclasses.replace(FIRST_STAGE, latent_channels=channels)
    denoiser = dataclasses.replace(CONFIG.denoiser, context_frames=0, flow_map=True, width=32, time_shift=1.0)
    model = Wan(dataclasses.replace(CONFIG, size=8, first_stage=stage, denoiser=denoiser))
    tokens = dataclasses.replace(given(), tokens=torch.zeros(1, 2, 4, 6))
    generator, steps = torch.Generator().manual_seed(0), 400
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def u(x: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        same = dataclasses.replace(tokens, tokens=tokens.tokens.expand(len(x), -1, -1, -1))
        return model(x, 1000 * t, same, 1000 * r)

    for _ in range(steps):
        clips, noise = torch.randn(2, 32, 1, channels, 2, 2, generator=generator)
        t, r = drawn_times(32, generator)
        loss, _ = flow_map_loss(u, lambda x, t, r: torch.zeros_like(x), mean + deviation * clips, noise, t, r)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    noise = torch.randn(256, 1, channels, 2, 2, generator=generator)
    with torch.no_grad():
        found = noise - u(noise, torch.ones(256), torch.zeros(256))
    error = (found - mean - deviation * noise).square().mean().item()
    assert error < 0.5 * deviation**2, error


def test_times_move_towards_noise_and_keep_their_ends() -> None:
    sigma = torch.linspace(0, 1, 5)
    assert torch.equal(shifted(sigma, 1.0), sigma)
    moved = shifted(sigma, 3.0)
    assert moved[0] == 0 and moved[-1] == 1 and (moved[1:-1] > sigma[1:-1]).all()
    torch.testing.assert_close(moved[2], torch.tensor(0.75))


def test_the_library_still_counts_what_it_did() -> None:
    """The published sizes with deep tokens of 1,024: 159 tensors more than the text model has."""
    with torch.device("meta"):
        sizes = dataclasses.replace(CONFIG.denoiser, width=1536, depth=30, heads=12, feed_forward=8960, text_width=4096)
        stage = FirstStageConfig("wan", (96, 192, 384, 384), 16, (2,), (2,))
        config = dataclasses.replace(
            CONFIG, size=256, token_width=1024, tokens_per_keyframe=16, denoiser=sizes, first_stage=stage
        )
        model = Wan(config).transformer
        AutoencoderKLWan()
    added = {name: t.numel() for name, t in model.named_parameters() if any(part in name for part in IMAGE_PATH)}
    assert len(added) == 159 and sum(added.values()) == pytest.approx(144.4e6, rel=1e-3)


PUBLISHED = {  # of the transformer and the autoencoder, by their config.json on the Hub
    "Wan2.1-T2V-1.3B": (
        {"num_attention_heads": 12, "in_channels": 16, "out_channels": 16, "ffn_dim": 8960, "num_layers": 30},
        {"base_dim": 96, "z_dim": 16},
    ),
    "Wan2.2-TI2V-5B": (
        {"num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336, "num_layers": 30},
        {"base_dim": 160, "z_dim": 48, "decoder_base_dim": 256, "is_residual": True, "patch_size": 2,
         "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48,
         "latents_std": [1.0] * 48},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_folders_of_full_size_fit(name: str) -> None:
    """Every tensor of either part has its place, and 159 are new."""
    with torch.device("meta"):
        transformer, vae = (kind(**own) for kind, own in zip(CLASSES_OF_PARTS, PUBLISHED[name], strict=True))
        config = configured(transformer.config, vae.config, Path(name), None, (256, None), 33)
        made = VideoTokenizer(config)
    own = {key: t.shape for key, t in made.denoiser.transformer.state_dict().items()}
    theirs = {key: t.shape for key, t in transformer.state_dict().items()}
    assert theirs.items() <= own.items() and len(own) - len(theirs) == 159
    stages = [{key: t.shape for key, t in part.state_dict().items()} for part in (made.first_stage.autoencoder, vae)]
    assert stages[0] == stages[1]
    assert made.config.fps == 16.0 and made.config.latent_frames == 9


@pytest.mark.parametrize("size", [name for name, model in SIZES.items() if model.token_width == 1024])
def test_language_models_of_the_family_share_its_tokens(size: str) -> None:
    for name in ("wan", "wan_siglip", "wan_480p"):
        if not SIZES[size].motion_tokens:
            check_shared(TOKENIZERS[name], SIZES[size])


def test_a_prior_that_cannot_tell_head_from_tail_is_not_trained(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache")
    prior = tokenizer()
    nn.init.zeros_(prior.denoiser.transformer.condition_embedder.image_embedder.pos_embed)  # as diffusers has it
    noisy, t, condition = torch.randn(2, 5, 5, 8, 8), torch.tensor([500.0, 20.0]), given()
    swapped = dataclasses.replace(condition, tokens=condition.tokens.flip(1))
    torch.testing.assert_close(*(prior.denoiser(noisy, t, own) for own in (condition, swapped)))
    write_config(tmp_path / "prior", {"tokenizer": prior.save_pretrained(tmp_path / "prior")})
    run = TokenizerRun(str(tmp_path / "cache"), str(tmp_path / "prior"), model=prior.config, loop=loop(1))
    with pytest.raises(ValueError, match="head and tail are one"):
        TokenizerTraining(run)


def test_presets_of_wan_have_the_published_towers_and_frames() -> None:
    with torch.device("meta"):
        siglip, wide = (VideoTokenizer(TOKENIZERS[name]) for name in ("wan_siglip", "wan_480p"))
        pixels = torch.empty(1, 3, 256, 256)
        assert siglip.encoder(pixels).shape == (1, 729, 1152)
        assert siglip.tokens_of(siglip.source_of(pixels)).shape == (1, 16, 1024)
    assert wide.config.latent_shape == (60, 104)
    tower = sum(p.numel() for p in siglip.encoder.parameters())
    assert tower == pytest.approx(412.4e6, rel=0.01)  # so400m without the head that pools


def test_it_is_trained_resumed_and_writes_videos_that_go_on(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache")
    prior = tokenizer()
    write_config(tmp_path / "prior", {"tokenizer": prior.save_pretrained(tmp_path / "prior")})
    run = TokenizerRun(str(tmp_path / "cache"), str(tmp_path / "prior"), model=CONFIG, loop=loop(4))
    metrics = run_recipe(run, tmp_path / "whole", {})
    assert np.isfinite(metrics["denoising_loss"])
    train_in_parts(run, tmp_path / "parts")
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "parts", 4)
    best = str(tmp_path / "whole/best")
    lm = LanguageRun(run.cache, best, model=LM, loop=loop(4), longer=(5,), longer_share=(0.5,))
    run_recipe(lm, tmp_path / "lm", {})
    assert main(["assemble", best, str(tmp_path / "lm/best"), "-o", str(tmp_path / "model")]) == 0
    model = DiCoDe.from_pretrained(tmp_path / "model")
    made = np.concatenate(list(model.generate("a red square", seconds=4.0, seed=1)))
    assert made.shape == (32, 32, 32, 3)
    more = list(model.generate("a red square", seconds=2.0, seed=2, given=model.given(continued=made)))
    assert sum(map(len, more)) == 16
    assert sum(map(len, model.reconstruct(made))) == 32


def test_adapters_train_with_what_is_new_and_leave_the_rest(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache")
    prior = tokenizer()
    write_config(tmp_path / "prior", {"tokenizer": prior.save_pretrained(tmp_path / "prior")})
    lora = LoRAConfig(rank=2, targets=("to_q", "to_k", "to_v"), whole=("image_embedder", "add_k_proj", "resampler"))
    run = TokenizerRun(str(tmp_path / "cache"), str(tmp_path / "prior"), model=CONFIG, lora=lora, loop=loop(4))
    run_recipe(run, tmp_path / "run", {})
    before, after = prior.state_dict(), VideoTokenizer.from_pretrained(tmp_path / "run/best").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(any(part in name for part in (*lora.targets, *lora.whole)) for name in changed)
    for part in (*lora.targets, *lora.whole):
        assert any(part in name for name in changed), part
    with pytest.raises(ValueError, match=r"lora\.whole"):
        TokenizerTraining(dataclasses.replace(run, lora=dataclasses.replace(lora, whole=("none",))))
