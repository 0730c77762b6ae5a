"""`dicode tune`: settings are compared on equal prompts and noise, and written only where better beyond noise."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tiny_model
from scipy import stats
from toy_runs import write_cache

from dicode.checkpoint import resolve
from dicode.cli.app import main
from dicode.evaluate.tune import Trial, decided, grid_of, write_choice
from dicode.pipeline import DiCoDe

SCORER = "def found(frames):\n    return {'caption': 'x' if frames.std() > 1 else 'y'}\n"


def trials(gain: float, noise: float, n: int = 30) -> list[Trial]:
    """Of settings without effect but one, over what prompts differ by."""
    random = np.random.default_rng(0)
    prompts = random.normal(50, 20, n)
    settings = [{}, *({"guidance": float(g)} for g in range(1, 9))]
    scores = [prompts + random.normal(0, noise, n) + gain * (s == {"guidance": 3.0}) for s in settings]
    return [Trial(own, score, 1.0) for own, score in zip(settings, scores, strict=True)]


def test_a_setting_is_chosen_where_paired_scores_are_better_beyond_noise() -> None:
    given = trials(gain=6.0, noise=3.0)
    chosen, values = decided(given, np.full(30, 80.0), "score")
    assert chosen == {"guidance": 3.0} and values["beyond_noise"]
    gains = given[3].scores - given[0].scores
    level = 1 - 0.05 / 8  # eight settings were compared with the stored one
    expected = stats.t.interval(level, 29, gains.mean(), stats.sem(gains))
    assert values["trials"][3]["gain"]["interval"] == pytest.approx(expected)
    assert "chosen: guidance 3; +" in values["decision"]


def test_the_best_of_settings_without_effect_is_not_chosen() -> None:
    chosen, values = decided(trials(gain=0.0, noise=10.0), np.full(30, 80.0), "score")
    assert chosen == {} and not values["beyond_noise"]
    assert values["decision"].startswith("no difference beyond noise")


def test_the_choice_changes_sampling_alone(tiny_model: Path, tmp_path: Path) -> None:
    write_choice(tiny_model, tmp_path / "new", {"guidance": 2.0, "variance_scale": 0.3})
    was, now = (json.loads((folder / "config.json").read_text()) for folder in (tiny_model, tmp_path / "new"))
    assert {p.name for p in tiny_model.iterdir()} == {p.name for p in (tmp_path / "new").iterdir()}
    assert now["tokenizer"].pop("sampling") == was["tokenizer"].pop("sampling") | {
        "guidance": 2.0,
        "variance_scale": 0.3,
    }
    assert now == was
    sampling = DiCoDe.from_pretrained(tmp_path / "new").sampling
    assert (sampling.guidance, sampling.variance_scale, sampling.steps) == (2.0, 0.3, 2)


def test_the_grid_leaves_out_what_is_stored_and_sets_both_variance_scales(tiny_model: Path) -> None:
    model = DiCoDe.from_pretrained(tiny_model)  # guidance 1, variance scale 0.5
    assert grid_of(model, [1.0, 2.0], [0.5]) == [{"guidance": 2.0, "variance_scale": 0.5}]
    sprites = DiCoDe.from_pretrained("sprites")
    if sprites.sampling.first_variance_scale is not None:
        assert all(s["first_variance_scale"] == s["variance_scale"] for s in grid_of(sprites, [2.0], [0.25, 0.75]))


@pytest.mark.filterwarnings("ignore:.*lose their end")  # the tiny model reads 12 text tokens
def test_tune_prints_a_table_and_writes_a_result_in_the_published_arrangement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model = write_tiny_model(tmp_path / "tiny", tail_frame=15)
    write_cache(tmp_path / "cache", count=12)
    (tmp_path / "mine.py").write_text(SCORER)
    flags = ["--cache", str(tmp_path / "cache"), "--scorer", f"{tmp_path}/mine.py:found", "--prompts", "8"]
    grid = ["--guidance", "1", "2", "--variance-scale", "0.5", "--decoder-guidance", "2", "--json"]
    output = ["-o", str(tmp_path / "new")]
    assert main(["tune", str(tiny_model), *flags, *grid, str(tmp_path / "tuned.json"), *output]) == 0
    out = capsys.readouterr().out
    assert "8 training captions" in out and "no difference beyond noise" in out  # no caption is x
    made = json.loads((tmp_path / "tuned.json").read_text())
    assert [trial["settings"] for trial in made["values"]["trials"]] == [
        {},
        {"guidance": 2.0, "variance_scale": 0.5},
        {"decoder_guidance": 2.0},
    ]
    assert made["n"] == 8 and all(trial["motion"] > 0 for trial in made["values"]["trials"])
    assert DiCoDe.from_pretrained(tmp_path / "new").sampling == DiCoDe.from_pretrained(tiny_model).sampling
    assert main(["tune", str(tiny_model), *flags, *output]) == 2
    assert "expected a new folder for the tuned model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["sprites"], "a bundled or downloaded model is not changed in place; name a folder with -o"),
        (["sprites", "--prompts", "3"], "--prompts: expected 8 to 10,000"),
        (["sprites", "--guidance", "nan"], "--guidance"),
        (["sprites", "--scorer", "mine.py", "-o", "new"], "scorer: expected FILE.py:FUNCTION"),
    ],
)
def test_what_tune_cannot_do_is_said_before_any_work(
    capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    before = (resolve("sprites") / "config.json").read_bytes()
    assert main(["tune", *flags]) == 2
    assert said in capsys.readouterr().err
    assert (resolve("sprites") / "config.json").read_bytes() == before
