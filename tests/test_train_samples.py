"""What is drawn of a cache: no key frame past a video's end, no clip of a still, and no more work for more clips."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dicode.checkpoint import content_hash
from dicode.checkpoint.saving import write_config
from dicode.data.cache import CachedVideo, FrameCache
from dicode.data.columns import Videos
from dicode.evaluate.samples import Samples
from dicode.lm.config import BodyConfig, DeepLMConfig, HeadConfig
from dicode.pipeline import DiCoDe
from dicode.seeds import generator_for
from dicode.tokenizer.config import SamplingConfig
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.augment import augmented_caption
from dicode.train.cached import first_stage_latents, frame_tokens, key_frames_of, latents_name
from dicode.train.distributed import Processes
from dicode.train.first_stage import validation_rows
from dicode.train.lm import LanguageTraining
from dicode.train.loop import Training, draw_batches, train
from dicode.train.run_log import records
from dicode.train.runs import VALIDATION_CLIPS, AugmentConfig, LanguageRun, LoopConfig, OptimConfig, TokenizerRun
from dicode.train.tokenizer import TokenizerTraining

LENGTHS = [1, 8, 16, 32, 72, 30]  # frames at 8 fps: a still, 1 s, a clip of 2 s, 4 s, 9 s, 3.75 s
LM = DeepLMConfig(
    BodyConfig("llama", width=16, depth=1, heads=2),
    head=HeadConfig(components=2),
    positions=80,
    vocab_size=300,
    token_width=6,
    tokens_per_keyframe=4,
    max_keyframes=9,
    text_length=8,
    end_frame_conditioning=True,
)


def plain_cache(folder: Path, lengths: list[int], loops: bool = False, captions: tuple[str, ...] = ("a {}",)) -> Path:
    """Videos of noise that do not loop; every length comes twice, the second time for validation."""
    videos, first = [], 0
    for i, count in enumerate([*lengths, *lengths]):
        told = tuple(caption.format(i) for caption in captions)
        videos.append(CachedVideo("noise", f"{i}.mp4", told, i >= len(lengths), loops, first, count, count / 8))
        first += count
    frames = torch.randint(256, (first, 32, 32, 3), generator=generator_for(0), dtype=torch.uint8)
    times = torch.cat([torch.arange(video.count, dtype=torch.float64) / 8 for video in videos])
    FrameCache(videos, frames, times).save(folder)
    return folder


def language(tiny_model: Path, cache: Path, **changes: object) -> LanguageTraining:
    run = LanguageRun(
        cache=str(cache), tokenizer=str(tiny_model), model=LM, key_frames=3, longer=(9,), longer_share=(0.0,),
        augment=AugmentConfig(null_captions=0.0, word_dropout=0.0, long_captions=0.0),
        loop=LoopConfig(precision="float32"),
    )  # fmt: skip
    return LanguageTraining(dataclasses.replace(run, **changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_cache(tmp_path_factory.mktemp("plain") / "cache", LENGTHS)


def test_key_frames_are_those_that_a_video_has(cache: Path) -> None:
    videos = FrameCache.load(cache).subset(validation=False).videos
    assert [key_frames_of(video, 2.0) for video in videos] == [1, 1, 2, 3, 5, 2]


def test_a_still_and_a_short_clip_teach_a_first_key_frame_and_no_stillness(tiny_model: Path, cache: Path) -> None:
    stage = language(tiny_model, cache, from_start=1.0, longer_share=(1.0,))
    stage.module.eval()
    for number, real in enumerate([1, 1, 2, 3, 5, 2]):
        batch = stage.batch(torch.tensor([number]), generator_for(0))
        assert batch["mask"].tolist() == [[True] * real]  # nothing is computed for what is not there
        assert stage.weight(batch) == real
    mixed = stage.batch(torch.tensor([0, 3]), generator_for(0))
    assert mixed["mask"].tolist() == [[True, False, False], [True] * 3] and stage.weight(mixed) == 4
    changed = {**mixed, "tokens": torch.where(mixed["mask"][..., None, None], mixed["tokens"], 9.0)}
    assert torch.equal(stage.loss(mixed, generator_for(1))[0], stage.loss(changed, generator_for(1))[0])
    video = stage.cache.videos[3]
    rows = video.first + 16 * torch.arange(2)
    assert torch.equal(mixed["tokens"][1, :2], stage.tokens[rows].float())


def test_samples_of_videos_that_do_not_loop_begin_where_all_of_a_longer_sample_fits(
    tiny_model: Path, cache: Path
) -> None:
    stage = language(tiny_model, cache, from_start=0.0)
    starts = {stage.later_start_s(stage.cache.videos[4], 3, i / 10) for i in range(10)}
    assert starts == {2.0, 4.0}  # of 9 s, the first one that is not the start, and the last that has three key frames
    assert {stage.later_start_s(stage.cache.videos[3], 3, i / 10) for i in range(10)} == {0.0}
    for seed in range(4):
        batch = stage.batch(torch.tensor([4]), generator_for(seed))
        assert batch["mask"].all() and batch["mask"].shape == (1, 3)


def test_key_frames_are_numbered_from_a_random_one_that_leaves_room(tiny_model: Path, cache: Path) -> None:
    stage = language(tiny_model, cache, augment=AugmentConfig(shift_key_frames=True))
    batches = [stage.batch(torch.tensor([3, 4]), generator_for(seed)) for seed in range(60)]
    length = batches[0]["tokens"].shape[1]
    firsts = {int(batch["first_keyframe"]) for batch in batches}
    assert firsts == set(range(stage.run.model.most_keyframes() - length + 1))
    assert stage.loss(batches[0], generator_for(1))[0].isfinite()
    assert int(language(tiny_model, cache).batch(torch.tensor([3]), generator_for(0))["first_keyframe"]) == 0


def test_a_goal_is_one_that_all_samples_reach(tiny_model: Path, cache: Path) -> None:
    stage = language(tiny_model, cache, end_frame_prob=1.0, key_frames=5)
    batch = stage.batch(torch.tensor([3, 4]), generator_for(0))
    assert batch["goal"] and batch["mask"].shape == (2, 3) and batch["mask"].all()
    assert stage.weight(batch) == 4  # the goal itself has no loss
    assert not stage.batch(torch.tensor([2, 4]), generator_for(0))["goal"]


def test_only_frames_that_can_be_key_frames_have_tokens_and_those_are_of_cached_latents(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plain_cache(tmp_path / "cache", [1, 32, 72])
    cache, tokenizer = FrameCache.load(folder), VideoTokenizer.from_pretrained(tiny_model)
    read: list[int] = []
    real = VideoTokenizer.source_of
    monkeypatch.setattr(VideoTokenizer, "source_of", lambda self, p: read.append(len(p)) or real(self, p))
    direct = frame_tokens(tokenizer, cache, precision="float32")
    key_rows = torch.tensor([0, 1, 17, 32, 33, 49, 65, 81, 97])  # of the training half; 4.0 s shows the last frame
    every = torch.cat([key_rows, key_rows + 105])
    assert sum(read) == 18 and torch.equal(load_file(next(folder.glob("*.tokens-*")))["rows"], every)
    expected = torch.cat([tokenizer.encode(cache.frames[every][i : i + 2][None])[0] for i in range(0, 18, 2)])
    torch.testing.assert_close(direct[every].float(), expected, rtol=2e-3, atol=2e-3)
    with pytest.raises(IndexError, match="no key frames"):
        direct[2]
    next(folder.glob("*.tokens-*")).unlink()
    latents = first_stage_latents(tokenizer, cache, "float32")
    assert latents.shape[1] == 1 and latents_name(tokenizer, False) in str(list(folder.iterdir()))
    read.clear()
    again = frame_tokens(tokenizer, FrameCache.load(folder), precision="float32")
    assert not read
    torch.testing.assert_close(again[every].float(), expected, rtol=1e-2, atol=1e-2)


def test_a_run_from_a_checkpoint_of_8_bits_and_one_from_its_weights_share_what_is_cached(
    tiny_model: Path, tmp_path: Path
) -> None:
    DiCoDe.from_pretrained(tiny_model).save_pretrained(tmp_path / "small", dtype=torch.int8)
    small = VideoTokenizer.from_pretrained(tmp_path / "small")
    for parameter in small.denoiser.parameters():
        parameter.data += 1
    write_config(tmp_path / "trained", {"tokenizer": small.save_pretrained(tmp_path / "trained")})
    first, second, other = (
        VideoTokenizer.from_pretrained(folder) for folder in (tmp_path / "small", tmp_path / "trained", tiny_model)
    )
    assert first.latent_hash() == second.latent_hash() != other.latent_hash()
    assert first.token_hash() == second.token_hash() != other.token_hash()


def test_the_denoiser_learns_from_clips_that_last_and_from_a_context_that_was_recorded(
    tiny_model: Path, cache: Path
) -> None:
    model = VideoTokenizer.from_pretrained(tiny_model).config
    run = TokenizerRun(
        cache=str(cache), init=str(tiny_model), model=model, mirror=True, loop=LoopConfig(precision="float32")
    )
    stage = TokenizerTraining(run)
    assert [video.count for video in stage.videos] == [16, 32, 72, 30] and stage.num_samples() == 4
    batch = stage.batch(torch.arange(4), generator_for(0))
    assert batch["has_context"].tolist() == [False, True, True, True]
    zeros = torch.zeros(4, 2, 4, 6), torch.zeros(4, 2, 5, 8, 8), torch.zeros(4, 2, 5, 8, 8)
    masks = [stage.training_condition(*zeros, batch, generator_for(i)).context_mask for i in range(20)]
    assert torch.stack(masks).amax(0).tolist() == [0, 1, 1, 1] and torch.stack(masks).amin(0).max() == 0
    plain = TokenizerTraining(dataclasses.replace(run, mirror=False))
    assert plain.latents.shape[1:] == (1, *stage.latents.shape[2:])
    torch.testing.assert_close(plain.latents[:], stage.latents[:][:, :1], rtol=1e-2, atol=1e-2)
    short = plain_cache(cache.parent / "short", [1, 8])
    with pytest.raises(ValueError, match="none of its training videos lasts 2 s, as a clip does"):
        TokenizerTraining(dataclasses.replace(run, cache=str(short)))


def test_one_of_many_captions_is_as_likely_as_another(tiny_model: Path, tmp_path: Path) -> None:
    folder = plain_cache(tmp_path / "cache", [16, 32], captions=("one {}", "two {}", "three {}", "four {}"))
    stage = language(tiny_model, folder)
    captions, config = stage.cache.videos[1].captions, AugmentConfig(null_captions=0.0, word_dropout=0.0)
    drawn = [augmented_caption(captions, config, stage.words, generator_for(i)) for i in range(400)]
    counts = {caption: drawn.count(caption) for caption in captions}
    assert sum(counts.values()) == 400 and all(70 <= count <= 130 for count in counts.values())


class Synthetic:
    """Columns of many videos that share the frames of a few, as a cache of ten million would have them."""

    def __init__(self, folder: Path, count: int):
        cache = FrameCache.load(folder)
        some = cache.columns.columns
        times = -(-count // len(cache.videos))
        columns = {name: np.tile(values, times)[:count] for name, values in some.items() if name != "text"}
        length = len(some["text"])
        columns["text_end"] = np.concatenate([some["text_end"] + length * i for i in range(times)])[:count]
        columns["text"] = np.tile(some["text"], times)
        videos = Videos(columns, cache.columns.sources)
        self.cache = FrameCache(videos, cache.frames, cache.times_s, cache.files)


@pytest.mark.parametrize("count", [600, 60_000])
def test_a_step_and_a_validation_make_as_many_videos_however_many_there_are(
    tiny_model: Path, cache: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Synthetic(cache, count).cache
    monkeypatch.setattr(FrameCache, "load", lambda folder: whole)
    stage = language(tiny_model, cache, key_frames=2)
    stage.module.eval()
    made: list[int] = []
    real = Videos._video
    monkeypatch.setattr(Videos, "_video", lambda self, number: made.append(number) or real(self, number))
    monkeypatch.setattr("dicode.train.lm.WRITTEN_CLIPS", 4)
    monkeypatch.setattr("dicode.train.lm.RANKED_CLIPS", 4)
    stage.batch(torch.arange(7), generator_for(0))
    assert len(made) == 7
    made.clear()
    monkeypatch.setattr("dicode.train.lm.WRITTEN_AMONG", 100)
    with torch.no_grad():
        metrics = stage.loss_of(stage.validation.columns.spread(64)), stage.written(stage.cache.columns)
    assert len(made) <= 2 * 64 + 64 + 2 * 100 and np.isfinite(metrics[0])
    rows = validation_rows(stage.validation.columns)
    assert {source: len(chosen) for source, chosen in rows.items()} == {"noise": 2048}
    assert len(stage.cache.columns.spread(VALIDATION_CLIPS)) <= VALIDATION_CLIPS


def test_best_goes_by_the_metric_asked_for_and_last_is_kept_beside_it(
    tiny_model: Path, cache: Path, tmp_path: Path
) -> None:
    stage = language(tiny_model, cache)
    mute = plain_cache(tmp_path / "mute", LENGTHS, captions=())
    assert (stage.best, language(tiny_model, mute).best) == ("written_rank", "-validation_loss")
    loop = LoopConfig(
        best="-training_loss", evaluate_every=2, checkpoint_every=4, tracker="none", precision="float32",
        optim=OptimConfig(steps=6, batch_size=2, lr=1e-3, warmup_steps=1),
    )  # fmt: skip
    scores = iter([9.0, 3.0, 2.0, 5.0])  # of the look at the names first, then of steps 2, 4 and 6
    looks = torch.zeros(1)
    stage.module.register_buffer("looks", looks)

    def validate() -> tuple[dict[str, float], None]:
        looks.add_(1)  # as statistics that it fits
        return {"training_loss": next(scores), "rank": 1.0}, None

    stage.validate = validate  # type: ignore[method-assign]
    assert train(stage, loop, tmp_path / "run", {}) == {"training_loss": 2.0, "rank": 1.0, "step": 4.0}
    assert looks.item() == 3  # the first look has left nothing behind
    logged = [record for record in records(tmp_path / "run/log.jsonl") if record["kind"] == "validation"]
    assert [(record["step"], record["training_loss"]) for record in logged] == [(0, 9), (2, 3), (4, 2), (6, 5)]
    best, last = (content_hash(tmp_path / "run" / name / "lm.safetensors") for name in ("best", "last"))
    assert best != last
    stage.validate = lambda: ({"training_loss": 1.0, "rank": 1.0}, None)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"--loop.best: expected one of rank, training_loss, got 'ranks'"):
        train(stage, dataclasses.replace(loop, best="ranks"), tmp_path / "other", {})
    assert not (tmp_path / "other/best").exists()


def test_written_key_frames_are_drawn_as_the_model_is_sampled(
    tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = language(tiny_model, cache)
    sampling = stage.tokenizer.config.sampling.changed(guidance=2.5, variance_scale=0.7, flow_steps=3)
    stage.tokenizer.config = dataclasses.replace(stage.tokenizer.config, sampling=sampling)
    stage.module.eval()
    ids, _ = stage.sample_of(stage.cache.videos[:2])
    asked = {"guidance": 2.5, "variance_scale": 0.7, "flow_steps": 3}
    expected = list(stage.module.generate(ids, 2, sampling=SamplingConfig(**asked)))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(stage.written_of(ids, 2), expected, strict=True))
    given: list[dict[str, object]] = []
    real = stage.module.generate
    monkeypatch.setattr(stage.module, "generate", lambda *a, **k: given.append(k) or real(*a, **k))
    stage.written(stage.cache.videos)
    stage.sheet()
    assert [options["sampling"] for options in given] == 2 * [dataclasses.replace(sampling, context_key_frames=0)]


class Drawn:
    """Tokens of 400 clips' first two key frames, whatever rows are asked for."""

    def __init__(self, kept: float, drift: float):
        start, step = (torch.randn(400, 1, 4, 6, generator=generator_for(i)) for i in range(2))
        self.values = torch.cat([start, kept * start + drift * step], dim=1)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        return self.values


@pytest.mark.parametrize(
    ("kept", "drift", "residual", "whole", "end"), [(1, 0.1, 0.01, 1, "may not fit, try 0.0"), (0, 2, 5, 4, "fits")]
)
def test_a_run_compares_the_variance_of_residuals_with_that_of_key_frames(
    tiny_model: Path, cache: Path, kept: float, drift: float, residual: float, whole: float, end: str
) -> None:
    stage = language(tiny_model, cache)
    stage.tokens = Drawn(kept, drift)  # type: ignore[assignment]
    line = stage.residual_variance()
    found = [float(number) for number in re.findall(r"(?<= )[\d.]+(?=,| \()", line)]
    assert found == pytest.approx([whole, residual], rel=0.1)
    assert line.endswith(f"model.residual_anchor None {end}")


def test_the_real_side_of_an_evaluation_has_no_clip_that_is_held_to_its_end(tiny_model: Path, cache: Path) -> None:
    model, frames = DiCoDe.from_pretrained(tiny_model), FrameCache.load(cache)
    made = Samples(model, frames)
    assert [video.count for video in made.videos] == [16, 32, 72, 30]
    assert [video.count for video in made.training(3)] == [16, 72, 30]


def test_micro_batches_hold_samples_of_about_one_size_and_lose_none(tiny_model: Path, tmp_path: Path) -> None:
    stage = language(tiny_model, plain_cache(tmp_path / "cache", LENGTHS))
    config = LoopConfig(micro_batches=3, optim=OptimConfig(batch_size=6), prefetch=False)
    training = Training(stage, config, Processes())
    batches = next(draw_batches(training, 0))
    held = [batch["mask"].sum(1).tolist() for batch in batches.values()]
    assert held == [[1, 1], [2, 2], [3, 3]] and [batch["tokens"].shape[1] for batch in batches.values()] == [1, 2, 3]
    ordered = stage.by_size(torch.arange(6))
    assert sorted(ordered.tolist()) == [*range(6)] and ordered.tolist() != [*range(6)]
