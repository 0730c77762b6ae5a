"""Toy clips and runs of every stage, for tests of training."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from synthetic import draw_clip
from test_tokenizer import RESAMPLER, tiny_config

from dicode.checkpoint.saving import write_config
from dicode.data.cache import CachedVideo, FrameCache
from dicode.lm.config import BodyConfig, DeepLMConfig, HeadConfig
from dicode.tokenizer.config import FirstStageConfig, TokenizerConfig
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.loop import train
from dicode.train.runs import (
    FirstStageRun,
    LanguageRun,
    LinearCodeRun,
    LoopConfig,
    OptimConfig,
    StreamConfig,
    TokenizerRun,
)
from dicode.train.stages import run_recipe, stage_of

SIZE = 32
SHARD = "shard-00001-model-00001-of-00001.safetensors"  # of a single process


def write_cache(folder: Path, count: int = 18) -> None:
    """Drawn clips of 12 to 20 frames with captions, every sixth held out."""
    videos, frames, times = [], [], []
    first = 0
    for i in range(count):
        length = 12 + i % 9
        clip, caption = draw_clip(i, length, SIZE)
        videos.append(
            CachedVideo(
                "drawn", f"{i}.mp4", (caption, f"a clip of {caption}"), i % 6 == 0, True, first, length, length / 8
            )
        )
        frames.append(torch.from_numpy(clip.copy()))
        times.append(torch.arange(length, dtype=torch.float64) / 8)
        first += length
    FrameCache(tuple(videos), torch.cat(frames), torch.cat(times)).save(folder)


def write_prior(folder: Path, **changes: Any) -> TokenizerConfig:
    """A tokenizer with random weights and a resampler, as a converter writes one; returns its configuration."""
    torch.manual_seed(3)
    config = tiny_config(resampler=RESAMPLER, **changes)
    tokenizer = VideoTokenizer(config)
    if config.denoiser.kind == "unet3d":
        tokenizer.denoiser.get_buffer("null_text").normal_()
    write_config(folder, {"tokenizer": tokenizer.save_pretrained(folder)})
    return config


def loop(steps: int, **changes: object) -> LoopConfig:
    optim = OptimConfig(steps=steps, batch_size=4, lr=2e-3, warmup_steps=2, ema_decay=0.9)
    return LoopConfig(precision="float32", log_every=1, evaluate_every=4, checkpoint_every=2, optim=optim, **changes)  # type: ignore[arg-type]


def runs(root: Path) -> dict[str, Any]:
    config = tiny_config()
    cache, first_stage, code = (str(root / name) for name in ("cache", "first_stage/best", "linear_code/best"))
    return {
        "first_stage": FirstStageRun(cache=cache, model=config.first_stage, loop=loop(4)),
        "linear_code": LinearCodeRun(cache, first_stage, config, precision="float32"),
        "denoiser": TokenizerRun(cache, code, model=config, loop=loop(4)),
        "lm": LanguageRun(
            cache=cache,
            tokenizer=code,
            model=LM,
            loop=loop(4),
            longer=(5,),
            longer_share=(0.5,),
        ),
    }


def variants(root: Path) -> dict[str, Any]:
    """Runs that differ from `runs` in one part."""
    first_stage, denoiser, lm = (runs(root)[name] for name in ("first_stage", "denoiser", "lm"))
    muon = dataclasses.replace(lm.loop.optim, optimizer="muon")
    kl = FirstStageConfig("kl", (8, 8, 8), latent_channels=5, encoder_blocks=(1,), decoder_blocks=(1,))
    frozen = dataclasses.replace(first_stage, init=str(root / "first_stage/best"), freeze_encoder=True)
    change = dataclasses.replace(denoiser.model.denoiser, predict_residual=True)
    return {
        "kl": dataclasses.replace(first_stage, model=kl),
        "perceptual": dataclasses.replace(frozen, perceptual_weight=0.2, tokenizer=str(root / "linear_code/best")),
        "rendered": dataclasses.replace(
            frozen, tokenizer=str(root / "denoiser/best"), rendered_share=0.5, perceptual_weight=0.2
        ),
        "adversarial": dataclasses.replace(frozen, perceptual_weight=0.2, adversarial_weight=0.1),
        "muon": dataclasses.replace(lm, loop=dataclasses.replace(lm.loop, optim=muon)),
        "flow": dataclasses.replace(lm, model=FLOW),
        "change": dataclasses.replace(denoiser, model=dataclasses.replace(denoiser.model, denoiser=change)),
        "streamed": dataclasses.replace(denoiser, cache=str(root / "index"), stream=StreamConfig(workers=0)),
    }


LM = DeepLMConfig(
    BodyConfig("llama", width=32, depth=1, heads=2),
    head=HeadConfig(components=3),
    positions=48,
    vocab_size=300,
    token_width=6,
    tokens_per_keyframe=4,
    max_keyframes=6,
    text_length=12,
    input_noise=0.1,
)


PLAIN_CAPTIONS: dict[str, float] = {"null_captions": 0.0, "long_captions": 0.0, "word_dropout": 0.0}


FLOW = dataclasses.replace(
    LM, head=dataclasses.replace(LM.head, kind="flow", width=16), order="keyframe", residual_anchor=0.0
)


def train_in_parts(run: FirstStageRun | TokenizerRun | LanguageRun, folder: Path) -> None:
    """End a run in its fourth step, without a checkpoint of the third; then continue it to its end."""
    stopping = stage_of(run)
    original, calls = stopping.batch, []

    def batch(indices: torch.Tensor, generator: torch.Generator) -> object:
        calls.append(indices)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(indices, generator)

    stopping.batch = batch  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(stopping, run.loop, folder, {})
    run_recipe(run, folder, {})


def assert_same_checkpoint(folder: Path, other_folder: Path, step: int) -> None:
    one, other = (load_file(p / f"step-{step:08d}/{SHARD}") for p in (folder, other_folder))
    assert {name.split("/")[0] for name in one} - {"buffers"} == {"weights", "ema", "optimizer"}  # a Llama has none
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
