"""`dicode evaluate` on a tiny model: every figure it promises is there, finite, and repeatable."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tiny_model
from test_evaluate_networks import clip_folder  # noqa: F401
from toy_runs import write_cache

from dicode.cli.app import main
from dicode.data.cache import FrameCache
from dicode.evaluate import speed
from dicode.evaluate.generation import evaluate_generation
from dicode.evaluate.long import JOINS
from dicode.evaluate.samples import Samples, first_clip, generated_clips
from dicode.evaluate.suite import Limits, Work, work_of
from dicode.features.extract import EfficientNetLite0Features, load_networks
from dicode.features.networks import Clip, clip_similarity
from dicode.pipeline import DiCoDe

CASES = ("real", "reconstruction", "generated")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lose their end"),  # the tiny model reads 12 text tokens
    pytest.mark.filterwarnings("ignore:Fréchet distance of"),  # and two clips are few
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: features of real clips are kept in it."""
    folder = tmp_path_factory.mktemp("drawn") / "cache"
    write_cache(folder, count=12)
    return folder


@pytest.fixture(autouse=True)
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """EffLite0 at a quarter of its size: figures of drawn clips mean nothing, and take a tenth of the time."""
    whole = EfficientNetLite0Features.__init__

    def small(self: EfficientNetLite0Features, device: str | torch.device = "cpu") -> None:
        whole(self, image_size=32, device=device)

    monkeypatch.setattr(EfficientNetLite0Features, "__init__", small)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of video that processes would have been started for; `test_evaluate_long` starts one."""
    asked: list[float] = []

    def process(*given: Any) -> speed.WholeProcess:
        asked.append(given[3])
        return speed.WholeProcess(2.5, 0.25)

    monkeypatch.setattr(speed, "whole_process", process)
    return asked


def repeated(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What was measured several times."""
    return [value for value in figures.values() if isinstance(value, dict) and "interval" in value]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in the published arrangement: a clip's tail key frame is its own last frame."""
    return write_tiny_model(tmp_path_factory.mktemp("published") / "tiny", tail_frame=15)


def test_evaluate_writes_a_result_a_part_in_the_published_arrangement(
    published: Path, cache: Path, tmp_path: Path, processes: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(published), "--cache", str(cache), "-o", str(tmp_path / "results"), "--prompts", "3"]
    flags += ["--repeats", "2", "--device", "cpu"]
    parts = ("generation", "reconstruction", "speed", "long", "instructions")
    long = ["--long-prompts", "2", "--long-seconds", "7.5"]  # four clips
    pages = ["--sheets", str(tmp_path / "sheets"), "--report", str(tmp_path / "report.html")]
    assert main(["evaluate", *flags, *long, *pages, "--parts", *parts]) == 0
    assert processes == [4.0] * 2 + [7.5, 1.875] * 2
    printed = capsys.readouterr().out
    assert re.search(r"^about .* on this machine, by its first clips: generation .*, reconstruction .*, long ", printed)
    assert ("TinyVT is blind here" in printed) == ("blind" in (tmp_path / "report.html").read_text())
    made = {p.name: json.loads(p.read_text()) for p in (tmp_path / "results").iterdir()}
    assert set(made) == {f"tiny-{part}.json" for part in parts}
    generation, reconstruction, speed, minute, instructions = (made[f"tiny-{part}.json"]["values"] for part in parts)
    assert 0 <= generation["text_control"]["share"] <= 1
    assert re.search(rf"^  text control +{generation['text_control']['share']:.3g} ", printed, re.MULTILINE)
    assert len(re.findall(r"^  FVD-EffLite0 +\S+$", printed, re.MULTILINE)) == 2  # of two clips: no interval
    assert generation["validation_percentile"]["n"] == 2  # clips 0 and 6 of twelve are held out
    baselines = {"hold_head", "cross_fade", "hold_head_of_tokens", "cross_fade_of_tokens"}
    candidates = {"reconstruction", "first_stage", *baselines}
    for metric in ("psnr", "psnr_in_motion", "SSIM", "perceptual-EffLite0", "FVD-EffLite0", "FVD-TinyVT"):
        assert reconstruction[metric].keys() == candidates
        assert all(score["n"] == 2 for score in reconstruction[metric].values())
    assert reconstruction["token_rate"]["tokens"] == pytest.approx(4 / 1.875)
    assert instructions["motion"].keys() == {"training: own caption", "validation: own caption"}
    assert generation["FVD-EffLite0"].keys() == {"generated", "real training clips"}
    assert generation["FVD-TinyVT"].keys() == generation["FVD-EffLite0"].keys()  # measures by default, by its own name
    for metric in ("alignment-TinyVT", "caption rank-TinyVT"):
        assert generation[metric].keys() == {"generated", "real"}
        assert reconstruction[metric].keys() == {"real", *candidates}
    assert generation["IS-EffLite0"].keys() == {"generated", "real training clips", "real"}
    assert all("EfficientNet-lite0" in made[f"tiny-{part}.json"]["notes"] for part in parts if part != "speed")
    page = (tmp_path / "report.html").read_text()
    assert all(f"<h2>{part}</h2>" in page for part in parts) and page.count("<img") == 4
    assert all(made[f"tiny-{part}.json"]["values"]["measured_in_s"] > 0 for part in parts)
    assert speed["frames"] == 32 and made["tiny-speed.json"]["n"] == 2
    assert minute["frames_asked"] == minute["cost"]["frames"] == 60
    assert {"chained", "parallel"} <= set(JOINS) == minute["joins"].keys() and made["tiny-long.json"]["n"] == 2
    assert all(figures["frames"] == [60, 60] for figures in minute["joins"].values())
    timed, cost = repeated(speed), repeated(minute["cost"])
    assert (len(timed), len(cost)) == (3, 7)  # memory among them
    for measured in (*timed, *cost):
        assert measured["n"] == 2 and measured["interval"] is None
    sheets = {p.name for p in (tmp_path / "sheets").iterdir()}
    assert sheets == {f"tiny-{part}.png" for part in parts if part != "speed"}
    (tmp_path / "sheets/tiny-reconstruction.png").unlink()
    assert main(["evaluate", *flags, *pages, "--parts", "speed"]) == 0
    assert (tmp_path / "report.html").read_text().count("<img") == 3  # of earlier runs


def test_a_quick_look_says_what_it_leaves_out_and_takes_a_scorer(
    published: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torch.py").write_text(
        "def found(frames):\n    return {'moves': bool((frames[0] != frames[-1]).any())}\n"
    )
    frames = FrameCache.load(cache)
    videos = [dataclasses.replace(v, extra={"moves": True}) for v in frames.videos]
    dataclasses.replace(frames, videos=videos).save(tmp_path / "cache")
    flags = ["--cache", str(tmp_path / "cache"), "-o", str(tmp_path / "results"), "--quick", "--features", "EffLite0"]
    flags += ["--scorer", f"{tmp_path}/torch.py:found"]
    assert main(["evaluate", str(published), *flags]) == 0
    printed = capsys.readouterr().out
    assert "quick: generation, reconstruction, scorer" in printed
    assert "left out: instructions, events, speed, long" in printed
    made = {p.name: json.loads(p.read_text()) for p in (tmp_path / "results").iterdir()}
    assert set(made) == {f"tiny-quick-{part}.json" for part in ("generation", "reconstruction", "scorer")}
    values = made["tiny-quick-scorer.json"]["values"]
    assert values["seconds"] == 2.0  # the median video is 1.9 s long
    cases = {f"{s}: {c}{t}" for s in ("training", "validation") for c in CASES for t in ("", ", shuffled")}
    assert values["accuracy of moves"].keys() == cases
    assert values["accuracy of moves"]["validation: real"]["value"] == 1.0
    assert all("Quick: few clips" in one["notes"] for one in made.values())
    assert main(["evaluate", str(published), "--cache", str(cache), "--quick", "--parts", "long"]) == 2
    assert "--quick: expected a part among generation, reconstruction, scorer, got long" in capsys.readouterr().err


def test_evaluate_says_at_once_that_its_extra_is_missing(
    tiny_model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setattr(DiCoDe, "from_pretrained", None)  # nothing is loaded before
    assert main(["evaluate", str(tiny_model), "--cache", str(cache), "-o", str(tmp_path / "results")]) == 2
    assert "'efficientnet_lite_pytorch', not installed: pip install 'dicode[evaluate]'" in capsys.readouterr().err


def test_evaluate_says_at_once_that_a_model_holds_no_minute(
    tiny_model: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--cache", str(cache), "-o", str(tmp_path / "results"), "--parts", "generation", "long"]
    assert main(["evaluate", str(tiny_model), *flags]) == 2
    assert "31 key frames asked for, this model holds 9" in capsys.readouterr().err
    assert main(["evaluate", str(tiny_model), "--cache", str(cache), "-o", str(tmp_path), "--repeats", "0"]) == 2
    assert "repeats: expected 1 or more, got 0" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_generation_figures_repeat_with_the_seed(tiny_model: Path, cache: Path) -> None:
    model, frames = DiCoDe.from_pretrained(tiny_model), FrameCache.load(cache)
    first = evaluate_generation(Samples(model, frames, 1), count=3)[0]  # features are not kept
    assert evaluate_generation(Samples(model, frames, 1, cache), count=3)[0] == first


def test_parts_share_clips_that_are_samples_of_the_seed(tiny_model: Path, cache: Path) -> None:
    model = DiCoDe.from_pretrained(tiny_model)
    made = Samples(model, FrameCache.load(cache), seed=3)
    assert [clip.shape for clip in made.real] == [(17, 32, 32, 3)] * 2
    clips, tokens = made.reconstructed
    assert made.reconstructed[0] is clips and made.generated is made.generated  # made once
    for i, clip in enumerate(made.real):
        alone = model.tokenizer.encode(torch.from_numpy(clip[None]))
        torch.testing.assert_close(tokens[i], alone[0])
        shown = next(model.tokenizer.decode(alone, seed=3, sample_indices=[i]))[0].int()
        assert (torch.from_numpy(clips[i]).int() - shown).abs().max() <= 1  # float rounding may move a level
    assert list(made.generated) == [0, 1]
    expected = generated_clips(model, [made.captions[0], made.captions[1]], seed=4)
    assert all((clip == again).all() for clip, again in zip(made.generated.values(), expected, strict=True))


def test_networks_asked_for_measure_beside_efflite(
    tiny_model: Path,
    cache: Path,
    clip_folder: Path,  # noqa: F811
) -> None:
    model, frames = DiCoDe.from_pretrained(tiny_model), FrameCache.load(cache)
    networks = load_networks(["EffLite0", f"CLIP={clip_folder}"])
    made = evaluate_generation(Samples(model, frames, folder=cache, networks=networks.values()), count=2)[0]
    alone = evaluate_generation(Samples(model, frames, folder=cache), count=2)[0]
    clipsim = f"CLIPSIM-{clip_folder.name}"
    more = made.keys() - alone.keys()
    assert {"FVD-CLIP", clipsim, "caption rank-CLIP"} <= more
    assert all(key == clipsim or key.endswith("-CLIP") for key in more)
    assert {key: made[key] for key in alone} == alone
    real = [first_clip(model.tokenizer.config, frames, video)[:-1] for video in frames.videos if video.validation]
    captions = [video.captions[0] for video in frames.videos if video.validation]
    expected = [clip_similarity(Clip(clip_folder), *pair) for pair in zip(real, captions, strict=True)]
    assert made[clipsim]["real"].value == pytest.approx(sum(expected) / 2)


def test_evaluated_clips_are_single_samples_of_the_seed(tiny_model: Path) -> None:
    model = DiCoDe.from_pretrained(tiny_model)
    prompts = [f"a red square {i}" for i in range(12)]  # more than a batch
    clips = generated_clips(model, prompts, seed=2)
    alone = next(model.generate(prompts[11], seconds=2.0, seed=2, sample_index=11))
    assert abs(clips[11].astype(int) - alone.astype(int)).max() <= 1


def test_first_clip_starts_with_the_video_and_ends_on_its_tail_key_frame(tiny_model: Path, cache: Path) -> None:
    frames = FrameCache.load(cache)
    video = frames.videos[1]  # 13 frames at 8 fps, looping
    clip = first_clip(DiCoDe.from_pretrained(tiny_model).tokenizer.config, frames, video)
    own = frames.frames[video.first : video.first + video.count].numpy()
    assert (clip == own[[i % 13 for i in range(17)]]).all()


def test_a_whole_process_is_timed_with_its_memory(tiny_model: Path) -> None:
    one = speed.whole_process(DiCoDe.from_pretrained(tiny_model), tiny_model, "a red square", 2.0)
    assert 0.1 < one.peak_memory_gib < 4 and one.took_s > 0


def test_work_of_a_part_is_counted_in_clips(tiny_model: Path, cache: Path) -> None:
    samples, limits = Samples(DiCoDe.from_pretrained(tiny_model), FrameCache.load(cache)), Limits(prompts=4, repeats=3)
    training = len(samples.training())  # none of whose features are known
    assert work_of("generation", samples, limits) == Work(generated=4 + 2, measured=training + 4 + 2)
    assert work_of("reconstruction", samples, limits) == Work(reconstructed=2, measured=12)
    assert work_of("scorer", samples, limits) == Work(generated=4 + 2, reconstructed=4 + 2)
    assert work_of("speed", samples, limits) == Work(generated=14, processes=3)
    assert Work(3, 2, 10, 1).seconds(Work(0.5, 0.25, 0.125, 4.0)) == pytest.approx(1.5 + 0.5 + 1.25 + 4.0)
