"""`dicode scale`: power laws are found with their errors, caches join, and a finished run is not trained again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import runs as training_runs
from test_training import write_cache

from dicode.cli.app import main
from dicode.cli.info import runs_of
from dicode.data.cache import FrameCache, join_caches
from dicode.evaluate.scaling import fit_power_law
from dicode.lm.presets import SIZES
from dicode.train.lm import LanguageTraining
from dicode.train.runs import LanguageRun
from dicode.train.stages import run_recipe

PARAMETERS = np.array([3e5, 1e6, 3e6, 1e7, 3e7])
RECIPES = """
from dicode.lm.presets import DeepLMConfig
from dicode.train.runs import LanguageRun, LoopConfig, OptimConfig

def small() -> LanguageRun:
    return of_width(16)

def middle() -> LanguageRun:
    return of_width(24)

def large() -> LanguageRun:
    return of_width(32)

def of_width(width):
    model = DeepLMConfig(
        body="llama", width=width, depth=1, heads=2, positions=12 + 3 * 5, vocab_size=300, token_width=6,
        tokens_per_keyframe=4, max_keyframes=3, text_length=12, components=2,
    )
    loop = LoopConfig(
        precision="float32", tracker="none", evaluate_every=100, checkpoint_every=2,
        optim=OptimConfig(steps=4, batch_size=4, warmup_steps=1),
    )
    return LanguageRun(model=model, loop=loop, longer=(), longer_share=())
"""


@pytest.mark.parametrize("floor", [0.0, 0.8])
def test_a_power_law_is_found_again(floor):
    losses = 0.3 * (PARAMETERS / 3e6) ** -0.25 + floor
    law = fit_power_law(PARAMETERS, np.stack([losses] * 3, axis=1), floor=floor > 0)
    assert law.scale * (3e6 / law.reference) ** -law.exponent == pytest.approx(0.3, rel=1e-3)
    assert (law.exponent, law.floor) == (pytest.approx(0.25, rel=1e-3), pytest.approx(floor, abs=1e-3))
    assert law.residual < 1e-6
    assert max(law.errors.values()) < 1e-6
    assert law.determined


def test_its_standard_error_is_that_of_a_straight_line():
    """In logarithms a law without floor is a line, whose slope has the variance σ²/n ÷ Σ(x - x̄)²."""
    x = np.log(PARAMETERS) - np.log(PARAMETERS).mean()
    found, expected = [], 0.01 / np.sqrt((x**2).sum() * 8)
    for seed in range(20):
        noise = 0.01 * np.random.default_rng(seed).standard_normal((5, 8))
        law = fit_power_law(PARAMETERS, PARAMETERS[:, None] ** -0.2 * np.exp(noise), floor=False)
        found.append(law.errors["exponent"])
    assert np.mean(found) == pytest.approx(expected, rel=0.15)


def test_a_law_that_points_do_not_tell_is_said_to_be_so():
    noise = np.random.default_rng(0).standard_normal((5, 3))
    assert not fit_power_law(PARAMETERS, 1 + noise).determined
    with pytest.raises(ValueError, match="positive"):
        fit_power_law(PARAMETERS, noise, floor=False)
    with pytest.raises(ValueError, match="3 sizes or more"):
        fit_power_law(PARAMETERS[:2], noise[:2])


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """Two caches, a tokenizer of random weights, a family of three toy sizes; and the study of them, done."""
    root = tmp_path_factory.mktemp("scale")
    torch.set_num_threads(1)
    write_cache(root / "cache", 12)
    write_cache(root / "other", 7)
    for name in ("first_stage", "key_frames"):
        run_recipe(training_runs(root)[name], root / name, {"name": name})
    (root / "toys.py").write_text(RECIPES)
    assert main(study(root)) == 0
    return root


def study(root: Path, *more: str) -> list[str]:
    return [
        *("scale", str(root / "cache"), str(root / "other"), "--family", str(root / "toys.py")),
        *("--tokenizer", str(root / "key_frames/best"), "--seeds", "2"),
        *("--work-folder", str(root / "runs"), "-o", str(root / "results"), *more),
    ]


def test_joined_caches_give_the_clips_of_each(studied):
    join_caches([studied / "cache", studied / "other"], studied / "joined")
    joined = FrameCache.load(studied / "joined")
    apart = [FrameCache.load(studied / name) for name in ("cache", "other")]
    videos = iter(joined.videos)
    for cache in apart:
        for video in cache.videos:
            ours = next(videos)
            assert (ours.file, ours.captions, ours.loops) == (video.file, video.captions, video.loops)
            rows = cache.clip_rows(video, 0.3, 5, 4.0), joined.clip_rows(ours, 0.3, 5, 4.0)
            assert torch.equal(cache.frames[rows[0]], joined.frames[rows[1]])
    assert next(videos, None) is None
    means = [c.computed("mean", lambda f: f.float().mean((1, 2))) for c in (*apart, joined)]
    assert torch.equal(means[2][:], torch.cat([means[0][:], means[1][:]]))
    assert sorted(path.name for path in studied.glob("joined/*")) == ["index.json", "videos.safetensors"]


def test_a_study_says_sizes_losses_and_laws(studied):
    values = json.loads((studied / "results/toys.json").read_text())["values"]
    assert list(values["sizes"]) == list(values["runs"]) == ["small", "middle", "large"]
    parameters = [size["parameters"] for size in values["sizes"].values()]
    flops = [size["flops"] for size in values["sizes"].values()]
    assert sorted(parameters) == parameters
    assert sorted(flops) == flops
    for runs in values["runs"].values():
        assert [run["seed"] for run in runs] == [0, 1]
        assert all(0 <= run["alignment"] <= 100 for run in runs)
    nll = [run["nll"] for run in values["runs"]["large"]]
    assert values["means"]["large"]["nll"]["mean"] == pytest.approx(np.mean(nll))
    assert values["laws"]["parameters, with floor"]["reference"] == pytest.approx(np.prod(parameters) ** (1 / 3))
    assert not list(studied.glob("runs/*/step-*"))


def test_a_finished_run_is_not_trained_again(studied, monkeypatch, capsys):
    (studied / "results/toys.json").unlink()
    shutil.rmtree(studied / "runs/large-1")
    trained = []
    monkeypatch.setattr("dicode.scale_command.LanguageTraining", recording(trained))
    assert main(study(studied)) == 0
    assert [(run.model.width, run.loop.seed) for run in trained] == [(32, 1)]
    assert (studied / "results/toys.json").exists()
    capsys.readouterr()
    assert main(study(studied, "--samples", "40")) == 2
    assert "small-0 was run with other values of loop" in capsys.readouterr().err
    kept = studied / "runs/small-0/figures.json"
    older = json.loads(kept.read_text())
    del older["run"]["views"], older["run"]["model"]["predict_residual"]  # of a version that did not have them
    kept.write_text(json.dumps(older))
    assert main(study(studied)) == 0 and len(trained) == 1


def recording(trained):
    def made(run, measure):
        trained.append(run)
        return LanguageTraining(run, measure)

    return made


def test_ablations_measure_every_arm_in_the_same_latents(studied):
    more = "--seeds", "1", "--work-folder", str(studied / "ablations"), "--studies", "tokens", "head"
    assert main(study(studied, *more)) == 0
    means = json.loads((studied / "results/ablations.json").read_text())["values"]["means"]
    assert list(means) == ["base", "tokens 1", "head gaussian", "head regression", "head flow"]
    lost = {name: arm["lost"]["mean"] for name, arm in means.items()}
    assert lost["tokens 1"] > lost["base"] == lost["head flow"]
    for arm in means.values():
        assert min(arm[f"energy/{which}"]["mean"] for which in ("first", "third", "third, told")) > 0


def test_a_dry_run_tells_the_published_sizes(tmp_path, monkeypatch, capsys):
    whole = runs_of("recipes/paper.py")
    assert {name: run.model for name, run in whole.items() if isinstance(run, LanguageRun)} == {
        name.replace("-", "_"): model for name, model in SIZES.items() if name != "sprites"
    }
    two = {name: whole[name] for name in ("gpt2_mini", "distilgpt2")}
    monkeypatch.setattr("dicode.scale_command.runs_of", lambda file: two)
    assert main(["scale", "none", "--family", "recipes/paper.py", "--dry-run", "--work-folder", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:4] for row in rows[1:-1]] == [
        ["gpt2_mini", "69,402,640", "43,637,264", "6,400,000"],
        ["distilgpt2", "109,179,408", "70,531,344", "6,400,000"],
    ]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "paper.json").write_text('{"mine": 1}')
    argv = ["scale", "none", "--family", "recipes/paper.py", "-o", str(tmp_path), "--work-folder", str(tmp_path / "w")]
    assert main(argv) == 2
    assert "expected a result with name" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["paper.json"]


def test_the_larger_sizes_go_on_where_the_study_ends():
    study, larger = runs_of("recipes/scale.py"), runs_of("recipes/scale_large.py")
    first, *rest = larger.values()
    assert first.model == study["llama_19m"].model and first.loop.optim == study["llama_19m"].loop.optim
    for run in rest:  # the same samples and text, wider and deeper alone
        assert run.loop.optim.steps == first.loop.optim.steps and run.loop.seed == first.loop.seed
        assert replace(run.model, width=448, depth=7, heads=7) == first.model
        assert run.loop.optim.lr * run.model.width**0.5 == pytest.approx(first.loop.optim.lr * first.model.width**0.5)
    assert [run.model.width for run in larger.values()] == sorted(run.model.width for run in larger.values())
