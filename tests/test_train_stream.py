"""A tokenizer trains on clips that are decoded meanwhile: same order and bytes however it is interrupted and shared."""

import dataclasses
import hashlib
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from drawn_archives import SIZES, write_archives
from test_tokenizer import RESAMPLER, tiny_config
from test_train_paper import PUBLISHED
from test_wan import CONFIG as WAN
from toy_runs import LM, assert_same_checkpoint, loop, write_cache, write_prior

from dicode.checkpoint.saving import write_config
from dicode.data.build import CacheOptions, build_cache
from dicode.data.cache import CacheError
from dicode.data.index import read_index
from dicode.seeds import generator_for
from dicode.tokenizer.config import MotionConfig
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.distributed import Processes
from dicode.train.loop import Training, draw_batches, train
from dicode.train.order import bucketed_indices, shuffled
from dicode.train.run_log import records
from dicode.train.runs import LanguageRun, StreamConfig, TokenizerRun, load_run
from dicode.train.stages import run_recipe, stage_of
from dicode.train.streamed import check_buckets
from dicode.train.tokenizer import TokenizerTraining

BUCKETS = ((32, 32), (24, 40), (40, 24))
RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives of 27 videos of three shapes, 22 of them to train on, and a folder `prior` as a converter writes it."""
    folder = tmp_path_factory.mktemp("streamed")
    torch.set_num_threads(1)
    write_archives(folder, 27, SIZES)
    write_prior(folder / "prior")
    write_prior(folder / "published", **PUBLISHED)
    return folder


def run(root: Path, **changes: Any) -> TokenizerRun:
    """Four clips a step in four micro-batches, of a tiny model."""
    own = loop(5, micro_batches=4, tracker="none")
    made = TokenizerRun(
        cache=str(root / "index"),
        init=str(root / "prior"),
        model=tiny_config(resampler=RESAMPLER),
        loop=dataclasses.replace(own, log_samples=True, evaluate_every=5, checkpoint_every=1),
        stream=StreamConfig(workers=0),
        mirror=True,
    )
    return dataclasses.replace(made, **changes)


def of_unet(root: Path, **changes: Any) -> TokenizerRun:
    """With the published arrangement, two clips a micro-batch."""
    made = run(root, init=str(root / "published"), model=tiny_config(resampler=RESAMPLER, **PUBLISHED), token_noise=0.0)
    optim = dataclasses.replace(made.loop.optim, batch_size=4)
    return dataclasses.replace(made, loop=dataclasses.replace(made.loop, micro_batches=2, optim=optim), **changes)


def digests(asked: TokenizerRun, step: int, steps: int, rank: int = 0, count: int = 1) -> dict[tuple[int, int], str]:
    """Of each micro-batch of some steps, by step and number, as one of several processes draws them."""
    training = Training(stage_of(asked), asked.loop, Processes())
    training.processes = SimpleNamespace(rank=rank, count=count)  # type: ignore[assignment]
    found = {}
    for at, batches in enumerate(islice(draw_batches(training, step), steps), step):
        for number, batch in batches.items():
            content = hashlib.sha256()
            for name in ("frames", "frame_stride", "has_context"):
                content.update(batch[name].numpy().tobytes() + str(batch[name].shape).encode())
            found[at, number] = content.hexdigest()
    return found


@pytest.mark.parametrize("buckets", [(), BUCKETS])
def test_order_and_bytes_are_the_same_for_1_2_and_4_processes_and_after_five_resumes(
    root: Path, buckets: tuple[tuple[int, int], ...]
) -> None:
    unet = of_unet(root, frame_strides=(1, 6), stream=StreamConfig(0, buckets))
    asked = dataclasses.replace(unet, loop=dataclasses.replace(unet.loop, micro_batches=4))
    assert asked.loop.optim.batch_size * 5 <= len(TokenizerTraining(asked).videos)  # all in one epoch
    alone = digests(asked, 0, 5)
    assert len(alone) == 20 and len(set(alone.values())) == 20
    for count in (2, 4):
        shared = [digests(asked, 0, 5, rank, count) for rank in range(count)]
        assert all(len(own) == 20 // count for own in shared)
        assert {place: digest for own in shared for place, digest in own.items()} == alone
    resumed = [digests(asked, step, 1) for step in range(5)]
    assert {place: digest for own in resumed for place, digest in own.items()} == alone
    other = dataclasses.replace(asked, loop=dataclasses.replace(asked.loop, seed=1))
    assert not set(digests(other, 0, 5).values()) & set(alone.values())


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_run_that_is_interrupted_five_times_in_an_epoch_ends_as_one_that_is_not(root: Path, tmp_path: Path) -> None:
    """With one worker and without, which may change between."""
    asked = run(root)
    run_recipe(asked, tmp_path / "whole", {})
    for number, cut in enumerate((6, 2, 6, 6, 6)):  # in its second step, or its first: before that is kept
        stopping = stage_of(dataclasses.replace(asked, stream=StreamConfig(workers=number % 2)))
        original, calls = stopping.loss, []

        def loss(*given: Any, original: Any = original, calls: list[Any] = calls, cut: int = cut) -> Any:
            calls.append(given)
            if len(calls) == cut:
                raise KeyboardInterrupt
            return original(*given)

        stopping.loss = loss  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            train(stopping, asked.loop, tmp_path / "parts", {})
    run_recipe(asked, tmp_path / "parts", {})
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "parts", 5)
    logs = [records(tmp_path / f"{name}/log.jsonl") for name in ("whole", "parts")]
    kept = ("kind", "step", "samples", "loss", "denoising_loss")
    whole, parts = ([{k: line[k] for k in kept if k in line} for line in log] for log in logs)
    assert whole == parts
    samples = [sample for line in whole for sample in line.get("samples", ())]
    assert len(samples) == len(set(samples)) == 20


def test_the_clips_are_those_of_a_cache(root: Path, tmp_path: Path) -> None:
    """The same videos, moments, strides and sides: encoded here, or read from what `first_stage_latents` left."""
    build_cache(read_index(root / "tars"), tmp_path / "cache", CacheOptions(size=32, max_fps=1000.0))
    streamed = TokenizerTraining(of_unet(root, frame_strides=(1, 6)))
    cached = TokenizerTraining(of_unet(root, frame_strides=(1, 6), cache=str(tmp_path / "cache")))
    for name in ("count", "period_s"):
        np.testing.assert_allclose(streamed.videos.column(name), cached.videos.column(name), atol=1e-3)
    for n in range(6):
        ones, others = (stage.batch(torch.arange(4) + n, generator_for(n)) for stage in (streamed, cached))
        assert torch.equal(ones["frame_stride"], others["frame_stride"])
        assert torch.equal(ones["has_context"], others["has_context"])
        clips, keys = streamed.inputs(ones)
        near = (clips - others["clips"]).flatten(2).abs().amax(2) < 1e-2  # float16; frames on a border may be others
        assert clips.shape == others["clips"].shape and near.float().mean() > 0.95
        same = (keys - others["keys"]).flatten(1).abs().amax(1) == 0
        assert keys.shape == others["keys"].shape and same.float().mean() > 0.8


def test_the_stride_drawn_is_that_of_the_frames_and_the_denoiser_is_given_it(root: Path) -> None:
    """24 frames a second allow strides from 2, which is 24 of them, to 6, which is 8; all last long enough."""
    stage = TokenizerTraining(of_unet(root, frame_strides=(1, 6)))
    assert stage.streamed is not None
    drawn = [stage.streamed.asked(torch.arange(4), generator_for(n)) for n in range(20)]
    asked = [clip for batch in drawn for candidates in batch for clip in candidates]
    assert {clip.stride for clip in asked} == {2, 3, 4, 5, 6}
    assert all(clip.fps == pytest.approx(48 / clip.stride) for clip in asked)
    assert all(clip.first_s + 15 / clip.fps <= clip.end_s - clip.start_s + 1e-3 for clip in asked)
    assert {clip.mirrored for clip in asked} == {True, False}
    given: list[torch.Tensor] = []
    stage.module.denoiser.register_forward_pre_hook(lambda _, args: given.append(args[2].frame_stride))
    batch = stage.batch(torch.arange(4), generator_for(3))
    stage.loss(batch, generator_for(1))
    assert torch.equal(given[0], batch["frame_stride"]) and len(set(given[0].tolist())) > 1
    plain = TokenizerTraining(of_unet(root)).batch(torch.arange(4), generator_for(0))
    assert set(plain["frame_stride"].tolist()) == {6.0}


def test_a_micro_batch_has_one_shape_which_is_the_nearest_to_its_videos(root: Path) -> None:
    asked = of_unet(root, stream=StreamConfig(0, BUCKETS))
    stage = TokenizerTraining(asked)
    shapes = [(int(h), int(w)) for h, w in zip(*map(stage.videos.column, ("height", "width")), strict=True)]
    nearest = {(48, 48): BUCKETS[0], (40, 64): BUCKETS[1], (64, 40): BUCKETS[2]}
    assert [nearest[s] for s in shapes] == [
        b for b, n in zip(BUCKETS, stage.bucket_sizes(), strict=True) for _ in range(n)
    ]
    training, seen = Training(stage, asked.loop, Processes()), Counter[tuple[int, ...]]()
    for step, batches in enumerate(islice(draw_batches(training, 0), 8)):
        for number, batch in batches.items():
            samples = training.samples(step).tensor_split(2)[number].tolist()
            (shape,) = {nearest[shapes[sample]] for sample in samples}
            assert batch["frames"].shape == (2, 16, *shape, 3)
            seen[shape] += 1
            loss, _ = stage.loss(batch, generator_for(step))
            assert torch.isfinite(loss)
    assert set(seen) == set(BUCKETS)


def test_wan_trains_on_buckets_of_archives(root: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_config(tmp_path / "wan", {"tokenizer": VideoTokenizer(WAN).save_pretrained(tmp_path / "wan")})
    own = dataclasses.replace(
        of_unet(root).loop, optim=dataclasses.replace(loop(3).optim, batch_size=4), evaluate_every=3
    )
    asked = run(root, init=str(tmp_path / "wan"), model=WAN, loop=own, stream=StreamConfig(0, BUCKETS))
    metrics = run_recipe(asked, tmp_path / "run", {})
    assert np.isfinite(metrics["denoising_loss"])
    assert len(list((tmp_path / "run/sheets").iterdir())) == 1
    batch = TokenizerTraining(asked).batch(torch.arange(2), generator_for(0))
    assert batch["frames"].shape == (2, 17, 32, 32, 3) and batch["has_context"].all()
    wide = dataclasses.replace(asked, model=dataclasses.replace(WAN, frame_width=64), stream=StreamConfig(0))
    stage = TokenizerTraining(wide)
    batch = stage.batch(torch.arange(2), generator_for(0))
    assert batch["frames"].shape == (2, 17, 32, 64, 3)
    assert torch.isfinite(stage.loss(batch, generator_for(0))[0])


@pytest.mark.parametrize(
    ("change", "buckets", "said"),
    [
        ({}, BUCKETS, r"expected a denoiser 'unet3d' or 'wan'.*learn places of a square of 32; got 'hourglass'"),
        ({"denoiser": PUBLISHED["denoiser"], "resampler": None}, BUCKETS, "got 'unet3d', no resampler"),
        ({**PUBLISHED, "motion": MotionConfig(2, 8, 1, 2)}, BUCKETS, "got 'unet3d', a resampler, motion tokens"),
        (PUBLISHED, ((32, 36),), r"in multiples of 8, of about the area of 32×32 \(to a quarter\), got 32×36"),
        (PUBLISHED, ((48, 48),), r"of about the area of 32×32 \(to a quarter\), got 48×48"),
    ],
)
def test_shapes_that_a_model_does_not_take_are_refused(
    root: Path, change: dict[str, Any], buckets: tuple[tuple[int, int], ...], said: str
) -> None:
    model = tiny_config(**{"resampler": RESAMPLER, **change})
    with pytest.raises(ValueError, match=said):
        TokenizerTraining(run(root, model=model, stream=StreamConfig(0, buckets)))


def test_buckets_without_videos_and_caches_of_one_size_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training video is nearest to 16×64 in shape; leave it out"):
        TokenizerTraining(of_unet(root, stream=StreamConfig(0, ((32, 32), (16, 64)))))
    write_cache(tmp_path / "cache")
    with pytest.raises(
        ValueError, match=r"stream\.buckets: for an index of archives; .*cache holds frames of one size"
    ):
        TokenizerTraining(of_unet(root, cache=str(tmp_path / "cache"), stream=StreamConfig(0, BUCKETS)))


def test_folders_of_another_kind_are_refused(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="or an index of its archives with `dicode data stream`"):
        TokenizerTraining(run(root, cache=str(root / "tars")))
    none: dict[str, Any] = {"longer": (), "longer_share": ()}
    lm = LanguageRun(cache=str(root / "index"), tokenizer=str(root / "prior"), model=LM, loop=loop(4), **none)
    with pytest.raises(CacheError, match="is an index of archives, whose videos only a TokenizerRun decodes"):
        stage_of(lm)
    long = dataclasses.replace(run(root).model, fps=0.5)
    with pytest.raises(ValueError, match="none of its training videos lasts 32 s, as a clip does"):
        TokenizerTraining(run(root, model=long))


def test_damaged_videos_are_replaced_counted_and_counted_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoilt = (1, 2, 3, 12)
    write_archives(tmp_path, 16, spoilt=spoilt)
    write_prior(tmp_path / "prior")
    asked = run(tmp_path)
    stage = TokenizerTraining(asked)
    bad = {i for i, video in enumerate(stage.videos) if int(Path(video.file).stem) in spoilt}
    assert len(bad) == 3 and len(stage.videos) == 13
    run_recipe(asked, tmp_path / "whole", {})
    log = records(tmp_path / "whole/log.jsonl")
    drawn, expected = 0, []
    found = {line["step"]: line.get("replaced", 0.0) for line in log if line["kind"] == "train"}
    for line in log:
        if line["kind"] == "samples":
            drawn += sum(sample in bad for sample in line["samples"])
            expected.append(drawn)
    # a clip at the beginning of such a video may lie before the damage
    assert 0 < found[5] <= expected[-1] and all(found[n + 1] <= most for n, most in enumerate(expected))
    assert [line["replaced"] for line in log if line["kind"] == "validation"] == [1.0]
    assert "damaged, another clip stands in: " in capsys.readouterr().out
    first = dataclasses.replace(asked, loop=dataclasses.replace(asked.loop, optim=dataclasses.replace(loop(3).optim)))
    run_recipe(first, tmp_path / "parts", {})
    run_recipe(asked, tmp_path / "parts", {})
    parts = records(tmp_path / "parts/log.jsonl")
    assert {line["step"]: line.get("replaced", 0.0) for line in parts if line["kind"] == "train"} == found
    state = json.loads((tmp_path / "whole/step-00000005/state.json").read_text())
    assert state["replaced"] == found[5]


def test_every_bucket_is_passed_once_before_any_of_it_comes_again() -> None:
    sizes, batch, parts = [7, 40, 2], 6, 2
    numbers = torch.stack([bucketed_indices(sizes, batch, parts, 3, step) for step in range(80)]).view(-1, 3)
    starts = np.cumsum([0, *sizes])
    of = [set(np.searchsorted(starts, group.numpy(), side="right").tolist()) for group in numbers]
    assert all(len(own) == 1 for own in of)
    for bucket, size in enumerate(sizes, 1):
        own = numbers[[bucket in those for those in of]].flatten() - starts[bucket - 1]
        counts = torch.bincount(own, minlength=size)
        assert len(own) == pytest.approx(480 * size / 49, abs=6)
        assert counts.max() - counts.min() <= 3  # micro-batches of an epoch come in another order
        assert sorted(shuffled(np.arange(size), size, 3, "bucket", bucket - 1).tolist()) == list(range(size))
    assert not torch.equal(numbers[:16], bucketed_indices(sizes, batch, parts, 4, 0).view(-1, 3)[:16])
    whole = [bucketed_indices([6, 9], 3, 1, 0, step).tolist() for step in range(5)]  # nothing reaches over its end
    assert sorted(n for own in whole for n in own) == list(range(15))


def test_the_recipes_take_an_index_of_archives() -> None:
    for name in ("wan.py:adapters", "wan.py:whole", "paper.py:paper_tokenizer_256"):
        own = load_run(f"{RECIPES}/{name}")
        unit = 64 if "paper" in name else 16
        check_buckets(dataclasses.replace(own, stream=StreamConfig(buckets=((256, 256), (192, 320), (320, 192)))))
        with pytest.raises(ValueError, match=f"in multiples of {unit}, "):
            check_buckets(dataclasses.replace(own, stream=StreamConfig(buckets=((200, 328),))))
