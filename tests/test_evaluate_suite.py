"""`dicode evaluate` on a tiny model: every figure it promises is there, finite, and repeatable."""

import json
from pathlib import Path

import pytest
from test_training import write_cache

from dicode.cli import main
from dicode.evaluate.long import JOINS
from dicode.evaluate.suite import evaluate_generation, first_clip, generated_clips
from dicode.generate import DiCoDe
from dicode.video.shards import FrameCache

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lose their end"),  # the tiny model reads 12 text tokens
    pytest.mark.filterwarnings("ignore:Fréchet distance of"),  # and two clips are few
]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write_cache(tmp_path / "cache", count=12)
    return tmp_path / "cache"


def test_evaluate_writes_a_result_a_part(tiny_model: Path, cache: Path, tmp_path: Path) -> None:
    flags = [str(tiny_model), "--cache", str(cache), "-o", str(tmp_path / "results"), "--prompts", "3"]
    long = ["--long-prompts", "2", "--long-seconds", "16"]  # the most that the tiny model holds
    assert main(["evaluate", *flags, *long, "--sheets", str(tmp_path / "sheets")]) == 0
    made = {p.name: json.loads(p.read_text()) for p in (tmp_path / "results").iterdir()}
    parts = ("generation", "reconstruction", "speed", "long")
    assert set(made) == {f"tiny-{part}.json" for part in parts}
    generation, reconstruction, speed, minute = (made[f"tiny-{part}.json"]["values"] for part in parts)
    assert 0 <= generation["text_control"]["share"] <= 1
    assert generation["validation_percentile"]["n"] == 2  # clips 0 and 6 of twelve are held out
    baselines = {"hold_head", "cross_fade", "hold_head_of_tokens", "cross_fade_of_tokens"}
    assert set(reconstruction["frechet"]) == {"reconstruction", "first_stage", *baselines}
    assert speed["frames"] == 32
    assert minute["frames_asked"] == minute["cost"]["frames"] == 128
    assert {"chained", "parallel"} <= set(JOINS) == minute["joins"].keys() and made["tiny-long.json"]["n"] == 2
    assert all(figures["frames"] == [128, 128] for figures in minute["joins"].values())
    assert minute["cost"]["memory_ratio"] > 0
    sheets = {p.name for p in (tmp_path / "sheets").iterdir()}
    assert sheets == {"tiny-generation.png", "tiny-reconstruction.png", "tiny-long.png"}


def test_evaluate_says_at_once_that_a_model_holds_no_minute(
    tiny_model: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tiny_model), "--cache", str(cache), "-o", str(tmp_path / "results")]) == 2
    assert "31 key frames asked for, this model holds 9" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_generation_figures_repeat_with_the_seed(tiny_model: Path, cache: Path, tmp_path: Path) -> None:
    model, frames = DiCoDe.from_pretrained(tiny_model), FrameCache.load(cache)
    first, again = (evaluate_generation(model, frames, tmp_path / "bank", count=3, seed=1)[0] for _ in range(2))
    assert first == again


def test_evaluated_clips_are_single_samples_of_the_seed(tiny_model: Path) -> None:
    model = DiCoDe.from_pretrained(tiny_model)
    prompts = [f"a red square {i}" for i in range(12)]  # more than a batch
    clips = generated_clips(model, prompts, seed=2)
    alone = next(model.generate(prompts[11], seconds=2.0, seed=2, sample_index=11))
    assert abs(clips[11].astype(int) - alone.astype(int)).max() <= 1


def test_first_clip_starts_with_the_video_and_ends_on_its_tail_key_frame(tiny_model: Path, cache: Path) -> None:
    frames = FrameCache.load(cache)
    video = frames.videos[1]  # 13 frames at 8 fps, looping
    clip = first_clip(DiCoDe.from_pretrained(tiny_model), frames, video)
    own = frames.frames[video.first : video.first + video.count].numpy()
    assert (clip == own[[i % 13 for i in range(17)]]).all()
