"""Every study of `studies/` runs at toy size, and what it computes agrees with closed forms."""

import dataclasses
import json
import shlex
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import tyro
from drawn_blocks import write_blocks
from scipy.stats import norm
from synthetic import draw_clip
from test_features_tinyvt import SMALL, drawn_cache
from test_linear_code import CHANNELS, SIDE, TOKENS, WIDTH, error, fitted, pictures
from test_tokenizer import conditioning, tiny_tokenizer
from toy_runs import FLOW, write_cache

from dicode.checkpoint.saving import write_config
from dicode.config import DEFAULT_MODEL, FINETUNED_MODEL
from dicode.config.user_code import load_file
from dicode.data.blocks.clips import BlocksOptions
from dicode.data.cache import FrameCache
from dicode.evaluate.events import scripted_of
from dicode.features.tinyvt import TinyVT
from dicode.lm.deep_lm import DeepTokenLM
from dicode.lm.text import TextTokenizer
from dicode.pipeline import DiCoDe
from dicode.tokenizer.config import CodeConfig, DenoiserConfig, FirstStageConfig, SamplingConfig
from dicode.tokenizer.encoder import LinearCode
from dicode.tokenizer.presets import TOKENIZERS
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.loop import train
from dicode.train.runs import LanguageRun, LoopConfig, OptimConfig, runs_of

STUDIES = Path(__file__).parents[1] / "studies"
SMALL_BLOCKS = dataclasses.replace(
    TOKENIZERS["blocks"],
    first_stage=FirstStageConfig(channels=(8, 8, 8, 8), encoder_blocks=(0, 1, 1, 1), decoder_blocks=(1, 1, 1, 0)),
    denoiser=DenoiserConfig(width=48, depth=1, heads=2, fine_width=16, fine_blocks=1, predict_residual=True),
    sampling=SamplingConfig(steps=1),
    code=CodeConfig(width=24, depth=1, heads=2),
    token_width=32,
    motion=None,
)
SMALL_RECIPE = """
from dataclasses import replace
from test_studies import SMALL_BLOCKS, STUDIES
from dicode.tokenizer.config import MotionConfig
from dicode.train.runs import load_run

def denoiser():
    model = replace(SMALL_BLOCKS, motion=MotionConfig(width=24, depth=1, heads=2))
    return replace(load_run(f"{STUDIES.parent / 'recipes/blocks.py'}:denoiser"), model=model)
"""
FAMILY = """
from dicode.lm.presets import BodyConfig, DeepLMConfig, HeadConfig
from dicode.train.runs import LanguageRun, LoopConfig, OptimConfig

def small() -> LanguageRun:
    return of_width(16)

def middle() -> LanguageRun:
    return of_width(24)

def large() -> LanguageRun:
    return of_width(32)

def of_width(width):
    model = DeepLMConfig(
        BodyConfig("llama", width=width, depth=1, heads=2), head=HeadConfig(components=2), positions=12 + 3 * 5,
        vocab_size=300, token_width=6, tokens_per_keyframe=4, max_keyframes=3, text_length=12,
    )
    loop = LoopConfig(
        precision="float32", tracker="none", evaluate_every=100, checkpoint_every=2,
        optim=OptimConfig(steps=4, batch_size=4, warmup_steps=1),
    )
    return LanguageRun(model=model, loop=loop, longer=(), longer_share=())
"""


def study(name: str, file: str = "__main__") -> ModuleType:
    return load_file(STUDIES / name / f"{file}.py", "study", "train")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache and a model of random weights, with a linear code and a flow head."""
    root = tmp_path_factory.mktemp("studies")
    torch.set_num_threads(1)
    write_cache(root / "cache", 12)
    tokenizer, captions = tiny_tokenizer(), [v.captions[0] for v in FrameCache.load(root / "cache").videos]
    DiCoDe(tokenizer, DeepTokenLM(FLOW, TextTokenizer.train(captions, 300))).save_pretrained(root / "model")
    return root


@pytest.fixture
def results(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with an empty folder `results`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


@pytest.mark.parametrize("floor", [0.0, 0.8])
def test_a_power_law_is_found_again(floor: float) -> None:
    sizes = np.array([3e5, 1e6, 3e6, 1e7, 3e7])
    losses = 0.3 * (sizes / 3e6) ** -0.25 + floor
    law = study("scale", "laws").fit_power_law(sizes, np.stack([losses] * 3, axis=1), floor=floor > 0)
    assert law.scale * (3e6 / law.reference) ** -law.exponent == pytest.approx(0.3, rel=1e-3)
    assert (law.exponent, law.floor) == (pytest.approx(0.25, rel=1e-3), pytest.approx(floor, abs=1e-3))
    assert max(law.errors.values()) < 1e-6 and law.determined


@pytest.mark.parametrize("n", [2, 3, 6, 30])
def test_an_interval_over_seeds_is_students(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    low, high = study("scale", "laws").t_interval(values)
    width = {2: 12.706, 3: 4.3027, 6: 2.5706, 30: 2.0452}[n] * values.std(ddof=1) / n**0.5  # of every t table
    assert (low, high) == (
        pytest.approx(values.mean() - width, rel=1e-4),
        pytest.approx(values.mean() + width, rel=1e-4),
    )


@pytest.mark.parametrize("more", ["--seeds 2", "--seeds 1 --studies tokens head joins"])
def test_scale(toy: Path, results: Path, monkeypatch: pytest.MonkeyPatch, more: str) -> None:
    monkeypatch.syspath_prepend(str(STUDIES / "scale"))
    (results / "toys.py").write_text(FAMILY)
    scale = study("scale")
    asked = f"{toy}/cache --family {results}/toys.py --tokenizer {toy}/model --work-folder runs {more}"
    scale.main(tyro.cli(scale.Scale, args=shlex.split(asked)))
    values = json.loads((results / ("ablations.json" if "studies" in more else "toys.json")).read_text())["values"]
    if "studies" in more:
        assert list(values["sizes"]) == ["base", "tokens 1", "head gaussian", "head regression", "head flow"]
        assert values["joins"]["scores"].keys() == {"chained", "parallel", "independent"}
        return
    parameters = [size["parameters"] for size in values["sizes"].values()]
    assert sorted(parameters) == parameters
    assert values["laws"]["parameters, with floor"]["reference"] == pytest.approx(np.prod(parameters) ** (1 / 3))
    nll = [run["nll"] for run in values["runs"]["large"]]
    assert values["means"]["large"]["nll"]["mean"] == pytest.approx(np.mean(nll))
    trained = {file: file.stat().st_mtime_ns for file in Path("runs").glob("*/figures.json")}
    scale.main(tyro.cli(scale.Scale, args=shlex.split(asked)))  # what is finished is not trained again
    assert trained == {file: file.stat().st_mtime_ns for file in Path("runs").glob("*/figures.json")}


def test_the_larger_sizes_of_scale_differ_in_width_depth_and_learning_rate_alone() -> None:
    small, large = (runs_of(str(STUDIES / f"scale/{name}.py")) for name in ("scale", "scale_large"))
    assert small["llama_19m"].model == large["llama_19m"].model
    rates = {run.loop.optim.lr * run.model.body.width**0.5 for run in large.values()}
    assert max(rates) == pytest.approx(min(rates))


def test_the_energy_score_in_one_dimension_is_the_crps_of_a_gaussian(monkeypatch: pytest.MonkeyPatch) -> None:
    # Gneiting & Raftery 2007, equation 21: σ (z (2Φ(z) - 1) + 2φ(z) - 1/√π)
    drawn = np.random.default_rng(0).normal(1.0, 2.0, size=(1, 4000, 1))
    for y in (1.0, 4.0):
        z = (y - 1) / 2
        expected = 2 * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
        assert study("heads").energy_score(drawn, np.array([[y]]))["mean"] == pytest.approx(expected, abs=0.05)
        assert study("scale", "ablations").energy_score(drawn, np.array([[y]])) == pytest.approx(expected, abs=0.05)


@torch.no_grad()
def test_a_widened_code_keeps_the_first_numbers_and_encodes_the_rest() -> None:
    latents, others = pictures(500, 30), pictures(20, 30, seed=1)
    code = fitted(latents)
    wider = LinearCode(TOKENS, WIDTH + 3, CHANNELS, SIDE)
    study("widths", "widen").extend(wider, code, latents)
    kept, tokens = code.tokens(others), wider.tokens(others)
    torch.testing.assert_close(tokens[..., :WIDTH], kept, rtol=1e-4, atol=1e-4)
    assert error(code, kept, others) > 1e-3 * others.var() > 1e3 * error(wider, tokens, others)


@torch.no_grad()
def test_a_widened_model_predicts_the_same(toy: Path, tmp_path: Path) -> None:
    study("widths", "widen").widen(toy / "model", 9, FrameCache.load(toy / "cache"), tmp_path / "wide")
    narrow, wide = (DiCoDe.from_pretrained(folder) for folder in (toy / "model", tmp_path / "wide"))
    ids = narrow.text.encode(["a red square"], 12)
    tokens = [next(model.lm.generate(ids, 1, seed=3)) for model in (narrow, wide)]
    assert tokens[1].shape[-1] == 9
    noisy, time, clips = torch.randn(2, 16, 5, 8, 8), torch.tensor([100, 900]), conditioning(2)
    further = torch.randn(2, 2, 4, 3)  # numbers that the denoiser has not learnt to read
    wider = dataclasses.replace(clips, tokens=torch.cat([clips.tokens, further], dim=-1))
    expected = narrow.tokenizer.denoiser(noisy, time, clips)
    torch.testing.assert_close(wide.tokenizer.denoiser(noisy, time, wider), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["widths", "motion", "ranking"])
@pytest.mark.filterwarnings("ignore:Fréchet distance of")
def test_measurements_of_a_model(toy: Path, results: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = study(name)
    if name == "widths":
        module.WIDTHS = (4, 6)
        module.main(f"{toy}/model", f"{toy}/cache", "results/widths.json")
    elif name == "motion":
        module.CLIPS, module.SCALES = 2, (1.0, 1.5)
        module.main(f"{toy}/model", f"{toy}/cache")
    else:
        module.NETWORKS = ("EffLite0",)
        module.main(f"{toy}/model", f"{toy}/cache")
    (file,) = results.iterdir()
    assert json.loads(file.read_text())["n"] > 0


@pytest.mark.filterwarnings("ignore:Fréchet distance of")
def test_rollouts(toy: Path, results: Path) -> None:
    rollouts = study("world", "rollouts")
    rollouts.VIDEOS, rollouts.LEAST_S, rollouts.TOTAL_S = 1, 1.0, 2
    rollouts.main(f"{toy}/cache", "results/rollouts.json", f"{toy}/model")
    assert json.loads((results / "rollouts.json").read_text())["values"]


def test_a_short_training_of_tinyvt_learns_captions_that_only_motion_tells_apart(tmp_path: Path) -> None:
    tinyvt, captions = study("tinyvt"), drawn_cache(tmp_path / "cache", 17)
    optim = OptimConfig(steps=60, batch_size=12, lr=4e-3, warmup_steps=5, ema_decay=0.9)
    loop = LoopConfig(precision="float32", evaluate_every=60, checkpoint_every=60, optim=optim)
    tinyvt.HELD_OUT_EVERY, tinyvt.DROPPED_WORDS = 10**6, 0.0
    run = tinyvt.VideoTextRun((str(tmp_path / "cache"),), SMALL, loop)
    train(tinyvt.VideoTextTraining(run), loop, tmp_path / "run", {})
    trained = TinyVT.from_pretrained(tmp_path / "run" / "best")
    rows = [i for i in range(17) if i % 4]
    figures = tinyvt.accuracy(trained, [draw_clip(7 * i, 16, 64)[0] for i in rows], [captions[i] for i in rows])
    assert figures["caption of a clip"]["percentile"] > 80 and figures["order"]["shuffled"] > 0.6


def test_the_nearest_of_several_right_entries_counts() -> None:
    scores = np.array([[0.9, 0.5, 0.4, 0.1], [0.2, 0.3, 0.3, 0.1]])
    right = np.array([[False, True, False, True], [False, True, False, False]])
    made = study("tinyvt").found(scores, right)
    assert made["percentile"] == pytest.approx((50 + 100 * 2.5 / 3) / 2)  # one of two nearer; one of three as near
    assert made["recall"] == {"1": 0.5, "5": 1.0, "10": 1.0}
    assert made["chance"] == {"1": (0.5 + 0.25) / 2, "5": 1.0, "10": 1.0}


def test_diversity_is_one_for_draws_like_the_real_variants_and_zero_for_copies() -> None:
    diversity, rng = study("heads").diversity, np.random.default_rng(3)
    real = [rng.normal(size=(5, 40)) for _ in range(60)]
    assert diversity([rng.normal(size=(16, 40)) for _ in real], real)["ratio"] == pytest.approx(1, abs=0.02)
    assert diversity([np.ones((4, 40))] * 60, real)["ratio"] == 0
    assert diversity([0.5 * variants for variants in real], real)["ratio"] == pytest.approx(0.5)


def test_captions_with_variants_are_those_that_enough_clips_carry() -> None:
    captions = ["Wave", "wave ", "fist", "", "Fist", "WAVE", "", "", "Ear"]
    assert study("heads").captions_with_variants(captions, least=3) == {"Wave": [0, 1, 5]}
    assert list(study("heads").captions_with_variants(captions, least=2)) == ["fist", "Wave"]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blocks(tmp_path_factory.mktemp("blocks") / "cache", BlocksOptions(count=1, validation=1))


def test_codes_of_blocks(results: Path, blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path, {"tokenizer": VideoTokenizer(SMALL_BLOCKS).save_pretrained(tmp_path)})
    own = study("blocks", "codes")
    monkeypatch.setattr(own, "NUMBERS", (1, 2))
    own.main([str(tmp_path), str(blocks), str(results / "codes.json")])
    values = json.loads((results / "codes.json").read_text())["values"]
    assert [*values] == [
        "the model's, 512 numbers",
        "the model's, with noise of 0.3",
        "linear, 1 numbers",
        "linear, 2 numbers",
    ]
    assert values["linear, 1 numbers"]["error"] > values["linear, 2 numbers"]["error"] > 0


def test_scorer_of_blocks(results: Path, blocks: Path) -> None:
    study("blocks", "scorer").main([str(blocks), str(results / "scorer.json")])
    values = json.loads((results / "scorer.json").read_text())["values"]
    assert values["clauses_right"]["event"]["value"] > 0.95 and values["clauses_right"]["colour"]["of"] > 40


def test_key_frames_of_blocks(results: Path, blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of real key frames all is right; a model of another world makes next to nothing of it."""
    own = study("blocks", "key_frames")
    flags = [DEFAULT_MODEL, str(blocks), str(results / "key_frames.json"), "--count", "1"]
    own.main([*flags, "--sheet", str(results / "sheet.png")])
    values = json.loads((results / "key_frames.json").read_text())["values"]
    assert values["seen"]["all"] < 0.5 and values["seen"]["key_frames"] >= 2 and (results / "sheet.png").is_file()
    cache = FrameCache.load(blocks)
    videos = [one.video for one in scripted_of(cache, 1) if one.name in own.SETS]
    real = iter([cache.frames[video.first : video.first + video.count : 16].numpy()[None] for video in videos])
    monkeypatch.setattr(own, "decoded", lambda model, tokens: next(real))
    own.main(flags)
    values = json.loads((results / "key_frames.json").read_text())["values"]
    assert values["seen"]["all"] == values["seen"]["colour_and_shape"] == values["seen"]["place"] == 1


def test_language_models_of_blocks(
    results: Path, blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, tokenizer = study("blocks", "language_models"), VideoTokenizer(SMALL_BLOCKS)
    monkeypatch.setattr(own, "SETS", ("seen",))
    DiCoDe(tokenizer, DiCoDe.from_pretrained(FINETUNED_MODEL).lm).save_pretrained(tmp_path / "model")
    names, work = ["0.1 M", "flow, whole key frames"], ["--work-folder", str(tmp_path)]
    files = [str(tmp_path / "model"), str(blocks), str(blocks), str(results / "lms.json")]
    own.main([*files, "--seeds", "1", "--steps", "4", "--count", "1", *work, "--only", *names])
    values = json.loads((results / "lms.json").read_text())["values"]
    assert [*values] == names and all(own["0"]["seen"]["all"] < 0.5 for own in values.values())
    small, other = (own["0"] for own in values.values())
    assert small["parameters"] < other["parameters"] and other["flops"] == pytest.approx(4 * 91.0e9, rel=0.15)
    monkeypatch.delattr(own, "trained")
    own.main([*files, "--seeds", "1", "--steps", "4", "--count", "1", *work, "--only", *names])
    assert json.loads((results / "lms.json").read_text())["values"] == values  # what is finished is not trained again


@pytest.mark.filterwarnings("ignore:Fréchet distance")
def test_motion_tokens(results: Path, blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, model, recipe = study("motion_tokens"), tmp_path / "model", tmp_path / "recipe.py"
    write_config(model, {"tokenizer": VideoTokenizer(SMALL_BLOCKS).save_pretrained(model)})
    recipe.write_text(SMALL_RECIPE)
    files = [str(recipe), str(blocks), str(model), str(results / "motion.json")]
    flags = ["--seeds", "0", "--steps", "2", "--clips", "4", "--scripts", "1", "--work-folder", str(tmp_path / "work")]
    text, trained = TextTokenizer.train(["a red ball"], 300), []

    def untrained(run: LanguageRun, steps: int, folder: Path) -> tuple[DeepTokenLM, dict[str, float]]:
        trained.append((run.model.motion_tokens, run.key_frames, steps))
        return DeepTokenLM(run.model, text), {"validation_loss": 1.0}

    # test_language_models_of_blocks does both
    monkeypatch.setattr(own.language_models, "trained", untrained)
    monkeypatch.setattr(own.language_models, "followed", lambda model, scripts, seed: {"scripts": len(scripts)})
    own.main([*files, *flags, "--only", "none", "4", own.HALVED])
    values = json.loads((results / "motion.json").read_text())["values"]
    rates = {name: values[name]["0"]["tokens_per_s"] for name in ("none", "4", own.HALVED)}
    assert rates == {"none": 8, "4": 10, own.HALVED: 16}
    flops = [values[name]["0"]["flops"] / values[name]["0"]["steps"] for name in rates]
    assert flops[1] > flops[0] > 1.8 * flops[2] and values[own.HALVED]["0"]["steps"] == 4
    assert "half of them" in values["4"]["0"] and {*values["none"]["0"]["clauses_right"]} == {*own.SETS}
    assert all(values[name]["0"]["language model"]["scripts"] == len(own.SETS) for name in rates)
    assert [one[:2] for one in trained] == [(0, 6), (4, 6), (0, 11)]
    assert trained[0][2] == own.STEPS > trained[1][2] > trained[2][2]
    less = values["less than none"]
    assert all(own["value"] == 0 for own in less["none"].values()) and len(less[own.HALVED]) == 2
    monkeypatch.delattr(own, "trained")
    own.main([*files, *flags, "--only", "none", "4", own.HALVED])
    assert json.loads((results / "motion.json").read_text())["values"] == values


def test_real_videos_follow_their_scripts(blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, cache = study("blocks", "language_models"), FrameCache.load(blocks)
    scripts = [one for one in scripted_of(cache, 1) if one.name in own.SETS]
    rows = iter(
        [cache.frames[one.video.first : one.video.first + one.video.count - 1].numpy()[None] for one in scripts]
    )
    monkeypatch.setattr(own, "generated", lambda *_: next(rows))
    for figures in own.followed(None, scripts, 0).values():
        assert figures["all"] == figures["video"] == 1 and figures["order"] in (0, 1)
