"""Wan at toy size from a prior to videos: stage 1, a language model and a flow map on `blocks`."""

import dataclasses
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch
from drawn_blocks import write_blocks
from test_tokenizer import RESAMPLER
from test_wan import CONFIG as TOY
from toy_runs import LM, assert_same_checkpoint

from dicode.checkpoint.saving import write_config
from dicode.cli.app import main
from dicode.data.blocks.clips import BlocksOptions
from dicode.data.cache import FrameCache
from dicode.pipeline import DiCoDe
from dicode.tokenizer.config import EncoderConfig, SamplingConfig
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.tokenizer.wan import begin_image_path
from dicode.train.loop import train
from dicode.train.run_log import records
from dicode.train.runs import LanguageRun, LoopConfig, OptimConfig, TokenizerRun
from dicode.train.stages import run_recipe, stage_of

STEPS, STOPPED = 60, 33


def loop(**changes: Any) -> LoopConfig:
    optim = OptimConfig(steps=STEPS, batch_size=4, lr=3e-3, warmup_steps=5, ema_decay=0.9)
    return LoopConfig(
        precision="float32",
        tracker="none",
        log_every=1,
        evaluate_every=STEPS,
        checkpoint_every=20,
        optim=optim,
        **changes,
    )


CONFIG = dataclasses.replace(
    TOY,
    size=64,
    null_tokens="grey_image",
    resampler=dataclasses.replace(RESAMPLER, encoder=EncoderConfig(16, 1, 2, size=28, patch=7, kind="siglip")),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes, and a prior as a converter leaves it, its latents normalised for random weights."""
    folder = tmp_path_factory.mktemp("wan")
    write_blocks(folder / "cache", BlocksOptions(12, validation=1))
    torch.manual_seed(0)
    prior = VideoTokenizer(CONFIG).eval()
    begin_image_path(prior.denoiser.transformer)
    stage = prior.first_stage
    latents = stage.encode_clips(frames_of(folder).permute(0, 1, 4, 2, 3) / 127.5 - 1)
    stage.latent_mean.copy_(latents.mean((0, 1, 3, 4)))
    stage.latent_deviation.copy_(latents.std((0, 1, 3, 4)))
    write_config(folder / "prior", {"tokenizer": prior.save_pretrained(folder / "prior")})
    return folder


def frames_of(root: Path) -> torch.Tensor:
    """The first clip, `1 f h w c`."""
    return FrameCache.load(str(root / "cache")).frames[torch.arange(17)][None]


def stage_1(root: Path, **changes: Any) -> TokenizerRun:
    run = TokenizerRun(str(root / "cache"), str(root / "prior"), model=CONFIG, loop=loop())
    return dataclasses.replace(run, **changes)


def flow_map(root: Path) -> TokenizerRun:
    run = stage_1(root, init=str(root / "whole/best"), trains="denoiser")
    denoiser = dataclasses.replace(run.model.denoiser, flow_map=True, fused_guidance=1.5)
    few = SamplingConfig(steps=4)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, denoiser=denoiser, sampling=few))


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    run_recipe(stage_1(root), root / "whole", {})
    short: dict[str, Any] = {"longer": (), "longer_share": (), "key_frames": 2}
    lm = LanguageRun(str(root / "cache"), str(root / "whole/best"), model=LM, loop=loop(), **short)
    run_recipe(lm, root / "lm", {})
    run_recipe(flow_map(root), root / "map", {})
    return root


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in records(folder / "log.jsonl") if "loss" in line]


def test_losses_fall(trained: Path) -> None:
    for name, share in (("whole", 0.9), ("lm", 0.9)):
        found = losses(trained / name)
        assert len(found) == STEPS
        assert mean(found[-15:]) < share * mean(found[:5]), name


def test_stage_1_resumes_bit_for_bit(trained: Path) -> None:
    run, stopping = stage_1(trained), stage_of(stage_1(trained))
    original, calls = stopping.batch, []

    def batch(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == STOPPED:
            raise KeyboardInterrupt
        return original(*given)

    stopping.batch = batch  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(stopping, run.loop, trained / "parts", {})
    run_recipe(run, trained / "parts", {})
    assert_same_checkpoint(trained / "whole", trained / "parts", STEPS)


@pytest.mark.parametrize("name", ["whole", "map"])
def test_videos_are_generated_and_go_on(trained: Path, name: str) -> None:
    """With the flow map on the language model of the tokenizer that it is made from: deep tokens are the same."""
    model = trained / f"model-{name}"
    assert main(["assemble", str(trained / name / "best"), str(trained / "lm/best"), "-o", str(model)]) == 0
    dicode = DiCoDe.from_pretrained(model)
    made = np.concatenate([*dicode.generate("a ball", seconds=4.0, seed=1)])
    assert made.shape == (32, 64, 64, 3) and made.std() > 0
    more = [*dicode.generate("it jumps", seconds=2.0, seed=2, given=dicode.given(continued=made))]
    assert sum(map(len, more)) == 16


@torch.no_grad()
def test_a_flow_map_renders_in_as_many_forwards_as_it_has_steps(trained: Path) -> None:
    model = VideoTokenizer.from_pretrained(trained / "map/best")
    pair = model.encode(frames_of(trained))
    calls: list[list[float]] = []
    model.denoiser.register_forward_pre_hook(lambda module, given: calls.append([given[1].item(), given[3].item()]))
    shift, clips = model.config.denoiser.time_shift, []
    for steps in (1, 2, 3, 4):
        calls.clear()
        (clip,) = model.decode(pair, sampling=model.config.sampling.changed(steps=steps))
        ends = [1000 * shift * s / (1 + (shift - 1) * s) for s in (1 - i / steps for i in range(steps + 1))]
        assert calls == [pytest.approx(jump, abs=1e-3) for jump in pairwise(ends)]
        assert clip.shape == (1, 17, 64, 64, 3)
        clips.append(clip)
    assert not torch.equal(clips[0], clips[3])
