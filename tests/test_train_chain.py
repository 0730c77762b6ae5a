"""`dicode train FILE.py --all`: stages in order, fed with each other, continued, assembled; steps from minutes."""

import dataclasses
import json
import math
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import SHARD, write_cache

from dicode.checkpoint import read_config
from dicode.cli.app import main, parse
from dicode.cli.train import Train, TrainAll
from dicode.pipeline import DiCoDe
from dicode.tokenizer.config import TokenizerConfig
from dicode.train.chain import Chain, wired
from dicode.train.distributed import Processes
from dicode.train.lm import LanguageTraining
from dicode.train.loop import Stage
from dicode.train.run_log import records
from dicode.train.runs import LanguageRun, LinearCodeRun, LoopConfig
from dicode.train.stages import Pace, Plan, corrected, measured_pace, plan_of, run_recipe, stage_of

RECIPE = """
from dataclasses import replace
from pathlib import Path
from toy_runs import loop, runs
STAGES = {"first_stage": 1, "linear_code": 1, "denoiser": 2, "lm": 4}
SAMPLING = {"guidance": 1.75, "steps": 2}
def _run(name):
    run = replace(runs(Path("runs"))[name], cache="nowhere")
    return replace(run, loop=replace(loop(3), checkpoint_every=1)) if hasattr(run, "loop") else run
def first_stage(): return _run("first_stage")
def linear_code(): return _run("linear_code")
def denoiser(): return _run("denoiser")
def lm(): return replace(_run("lm"), longer=(), longer_share=())
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache and a recipe of four stages of three steps."""
    folder = tmp_path_factory.mktemp("chain")
    torch.set_num_threads(1)
    write_cache(folder / "cache")
    (folder / "toy.py").write_text(RECIPE)
    return folder


@pytest.mark.parametrize("name", ["first_stage", "lm"])
def test_one_stage_can_be_measured_alone(root: Path, name: str) -> None:
    assert Chain(str(root / "toy.py"), str(root / "cache"), root / "paces").paces(name).keys() == {name}


def test_all_stages_train_in_order_and_an_interrupted_one_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second time finished stages are skipped, and the model is that of a run that was never interrupted."""

    def command(name: str) -> list[str]:
        runs_folder, output = str(tmp_path / name), str(tmp_path / f"{name}-model")
        cache = ["--cache", str(root / "cache"), "--dtype", "float32"]
        return ["train", str(root / "toy.py"), "--all", *cache, "--runs", runs_folder, "-o", output]

    def interrupted(*_: object) -> object:
        if len(list((tmp_path / "parts/toy-lm").glob("step-*"))) == 2:
            raise KeyboardInterrupt
        return original(*_)  # type: ignore[arg-type]

    original = LanguageTraining.batch
    monkeypatch.setattr(LanguageTraining, "batch", interrupted)
    assert main(command("parts")) == 130
    assert not (tmp_path / "parts-model").exists()
    monkeypatch.undo()
    capsys.readouterr()
    assert main(command("parts")) == 0
    said = capsys.readouterr().out
    for name in ("first_stage", "linear_code", "denoiser"):
        assert f"{tmp_path}/parts/toy-{name} is finished" in said
    assert f"continuing {tmp_path}/parts/toy-lm from step 2" in said
    assert main(command("whole")) == 0
    for name in ("first_stage", "lm"):
        one, other = (load_file(tmp_path / part / f"toy-{name}/step-00000003/{SHARD}") for part in ("parts", "whole"))
        assert one.keys() == other.keys() and not [key for key in one if not torch.equal(one[key], other[key])]
    model = DiCoDe.from_pretrained(tmp_path / "parts-model")
    assert (model.tokenizer.config.sampling.guidance, model.tokenizer.config.sampling.steps) == (1.75, 2)
    (tmp_path / "parts/toy-lm/sessions.jsonl").write_text('{"data": "of other clips"}\n')
    chain = Chain(str(root / "toy.py"), str(root / "cache"), tmp_path / "parts")
    assert not finished_of(chain, "lm") and finished_of(chain, "denoiser")


def finished_of(chain: Chain, name: str) -> bool:
    from dicode.train.chain import finished

    return finished(chain.folders[name], chain.stages[name])


def test_a_first_stage_can_be_taken_from_a_model(root: Path, tmp_path: Path, tiny_model: Path) -> None:
    chain = Chain(str(root / "toy.py"), str(root / "cache"), tmp_path, str(tiny_model))
    assert list(chain.stages) == ["linear_code", "denoiser", "lm"]
    code, denoiser, lm = chain.stages.values()
    assert code.first_stage == str(tiny_model)  # type: ignore[union-attr]
    assert denoiser.init == lm.tokenizer == str(tmp_path / "toy-linear_code/best")  # type: ignore[union-attr]
    held = read_config(tiny_model)["tokenizer"]["first_stage"]["latent_channels"]
    for run in (code, denoiser):
        assert run.model.first_stage.latent_channels == held  # type: ignore[union-attr]


def test_a_stage_is_fed_with_those_before_it_alone(tmp_path: Path) -> None:
    """A run of another file that has the name of a stage itself, or of a later one, stays what it is."""
    best = {"linear_code": tmp_path / "mine-linear_code/best"}
    run = LanguageRun(tokenizer="runs/small-linear_code/best", init="runs/other-lm/best")
    wired_run = wired(run, best)
    assert isinstance(wired_run, LanguageRun)
    assert (wired_run.tokenizer, wired_run.init) == (str(tmp_path / "mine-linear_code/best"), "runs/other-lm/best")


def test_a_stage_that_is_finished_on_other_weights_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what feeds it was trained anew; what does not feed it may be."""
    chain = Chain(str(root / "toy.py"), str(root / "cache"), tmp_path)
    trained: list[str] = []
    monkeypatch.setattr("dicode.train.chain.run_recipe", lambda run, folder, *_: trained.append(folder.name))
    monkeypatch.setattr("dicode.train.chain.finished", lambda folder, run: folder.name != "toy-denoiser")
    chain.train(None)
    assert trained == ["toy-denoiser"]
    monkeypatch.setattr("dicode.train.chain.finished", lambda folder, run: folder.name != "toy-first_stage")
    with pytest.raises(ValueError, match="toy-linear_code: trained on earlier weights of first_stage; delete it"):
        chain.train(None)
    monkeypatch.undo()
    (tmp_path / "toy-lm/step-00000003").mkdir(parents=True)
    (tmp_path / "toy-lm/step-00000003/state.json").write_text('{"step": 3, "train')
    assert not finished_of(chain, "lm")  # damaged: training goes on from the checkpoint before


def test_measuring_leaves_weights_and_statistics_as_they_were(root: Path, tmp_path: Path) -> None:
    for name in ("first_stage", "linear_code", "denoiser", "lm"):
        chain = Chain(str(root / "toy.py"), str(root / "cache"), tmp_path)
        if isinstance(run := chain.stages[name], LinearCodeRun):
            run_recipe(run, chain.folders[name], {})
            continue
        stage: Stage = stage_of(run)
        before = {key: value.clone() for key, value in stage.module.state_dict().items()}
        pace = measured_pace(stage, run.loop, Processes(), timed=1)
        assert pace.step_s > 0 and pace.evaluation_s > 0
        assert all(torch.equal(value, before[key]) for key, value in stage.module.state_dict().items())
        stage.export(chain.folders[name] / "best")


def test_minutes_become_steps_that_stay_as_they_are(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On another day, at another speed, the same command goes on to the same end."""
    command = ["train", f"{root}/toy.py:first_stage", "--cache", str(root / "cache"), "--run-folder", str(tmp_path)]
    monkeypatch.setattr("dicode.train.stages.measured_pace", lambda *_: Pace(step_s=0.5, evaluation_s=0.25))
    monkeypatch.setattr("dicode.train.stages.time", FrozenTime())
    monkeypatch.setattr("dicode.train.stages.PLAN_OFF", math.inf)  # whatever the speed is then
    assert main([*command, "--minutes", "0.1"]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["steps"] == 10 and plan["evaluate_every"] == 4  # 6 s: 10 steps and 3 evaluations
    last = {p.name for p in tmp_path.glob("step-*")}
    assert "step-00000010" in last
    monkeypatch.setattr("dicode.train.stages.measured_pace", lambda *_: Pace(step_s=0.01, evaluation_s=0.25))
    assert main([*command, "--minutes", "0.1"]) == 0 and main(command) == 0
    assert {p.name for p in tmp_path.glob("step-*")} == last
    assert main([*command, "--minutes", "0.2"]) == 2
    assert "this run has 10 steps, fixed when it began with --minutes 0.1, got 0.2" in capsys.readouterr().err
    assert main([*command, "--loop.optim.steps", "99"]) == 2  # not left unheeded
    assert "fixed when it began with --minutes 0.1, got loop.optim.steps 99" in capsys.readouterr().err


def test_a_plan_of_a_moment_in_which_others_computed_is_corrected(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", f"{root}/toy.py:first_stage", "--cache", str(root / "cache"), "--run-folder", str(tmp_path)]
    monkeypatch.setattr("dicode.train.stages.measured_pace", lambda *_: Pace(step_s=0.5, evaluation_s=0.25))
    asked: list[tuple[int, float, float]] = []

    def correct(plan: Plan, step: int, step_s: float, spent_s: float, decay_fraction: float) -> Plan:
        asked.append((step, step_s, spent_s))
        return corrected(plan, step, 0.25, step * 0.25, decay_fraction) if step == 4 else plan

    monkeypatch.setattr("dicode.train.stages.time", FrozenTime())
    monkeypatch.setattr("dicode.train.stages.corrected", correct)
    assert main([*command, "--minutes", "0.1"]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["steps"] == 22 and plan["evaluate_every"] == 9 and plan["pace"]["step_s"] == 0.25
    assert "22 steps: they take 0.25 s, not 0.5 s" in capsys.readouterr().out
    assert (tmp_path / "step-00000022").is_dir()
    done = [own["step"] for own in records(tmp_path / "log.jsonl") if own["kind"] == "validation"]
    assert done == [4, 9, 18, 22] and [step for step, *_ in asked] == [4, 9, 18]
    assert all(0 < step_s < spent_s for _, step_s, spent_s in asked)
    assert main([*command, "--minutes", "0.1"]) == 0 and len(asked) == 3  # finished


def test_a_plan_is_corrected_before_its_learning_rate_decays() -> None:
    plan = Plan(10.0, 20.0, Pace(1.0, 5.0), steps=500, warmup_steps=50, evaluate_every=100, checkpoint_every=120)
    assert corrected(plan, 100, 1.1, 115.0, 0.2) == plan  # near enough
    fast = corrected(plan, 100, 0.1, 15.0, 0.2)
    assert fast.steps == 100 + (600 - 20 - 15 - 4 * 5) / 0.1 and fast.evaluate_every == -(-(fast.steps - 100) // 4)
    assert fast.warmup_steps == 50 and fast.pace == Pace(0.1, 5.0) and fast.checkpoint_every == 1200
    slow = corrected(plan, 200, 2.0, 300.0, 0.2)
    assert slow.steps == 200 + (600 - 20 - 300 - 3 * 5) // 2
    assert corrected(plan, 300, 9.0, 550.0, 0.2).steps == 375  # as many as decay from now on
    assert corrected(plan, 400, 0.01, 100.0, 0.2) == plan


class FrozenTime:
    """A clock that stands still, but measures."""

    perf_counter = staticmethod(time.perf_counter)

    @staticmethod
    def monotonic() -> float:
        return 0.0


def test_a_plan_fills_its_time() -> None:
    """Steps, evaluations and what came before the first step are together no longer than asked, nor a step shorter."""
    config = LoopConfig()
    for minutes, prepared_s, pace in ((10.0, 30.0, Pace(0.4, 3.0)), (1.0, 10.0, Pace(0.05, 20.0))):
        plan = plan_of(minutes, prepared_s, pace, config)
        evaluations = -(-plan.steps // plan.evaluate_every)
        spent_s = prepared_s + plan.steps * pace.step_s + evaluations * pace.evaluation_s
        assert 60 * minutes - pace.step_s - pace.evaluation_s < spent_s <= 60 * minutes
        assert evaluations == 1 or evaluations * pace.evaluation_s <= 0.15 * 60 * minutes
    assert plan_of(1.0, 100.0, Pace(1.0, 1.0), config).steps == 1
    config = dataclasses.replace(config, evaluate_every=config.optim.steps, best="loss")
    once = plan_of(1.0, 0.0, Pace(1.0, 5.0), config)
    assert once.steps == once.evaluate_every == 50  # evaluated before the first step and after the last


def test_time_left_over_by_a_stage_goes_to_those_after_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(str(root / "toy.py"), str(root / "cache"), tmp_path)
    assert [chain.minutes_for(name, 8.0) for name in ("first_stage", "linear_code", "lm")] == pytest.approx(
        [1, 8 / 7, 8]
    )
    monkeypatch.setattr(
        "dicode.train.chain.spent_minutes", lambda folder: {"toy-first_stage": 4.5}.get(folder.name, 0.0)
    )
    assert chain.minutes_for("linear_code", 8.0) == pytest.approx(3.5 / 7)
    monkeypatch.setattr("dicode.train.chain.spent_minutes", lambda folder: 8.0)
    assert chain.minutes_for("lm", 8.0) == pytest.approx(0.5 * 4)  # not nothing


def test_flags_of_one_stage_and_of_all() -> None:
    made = parse(["train", "recipes/small.py", "--all", "--cache", "c", "--minutes", "55", "-o", "m"])
    assert made == TrainAll("recipes/small.py", Path("m"), "c", 55.0)
    one = parse(["train", "recipes/small.py:lm", "--minutes", "5"])
    assert isinstance(one, Train) and one.minutes == 5.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recipes/small.py"], "recipe: expected FILE.py:RUN, or FILE.py and --all"),
        (["recipes/paper.py", "--all", "-o", "{}/m"], "expected STAGES, a dict of its runs in order"),
        (["recipes/small.py", "--all", "-o", "{}/m", "--minutes", "-1"], "--minutes: expected a positive number, got"),
        (["recipes/small.py:lm", "--minutes", "nan"], "--minutes: expected a positive number, got"),
        (["recipes/small.py", "--all", "-o", "{}/none/m"], "no such folder to write 'm' in"),
        (["recipes/small.py", "--all", "-o", "{}/notes"], "notes: holds diary.txt, which this command did not write"),
        (["{}/half.py", "--all", "-o", "{}/m"], "expected STAGES with a TokenizerRun and a LanguageRun"),
        (["{}/odd.py", "--all", "-o", "{}/m"], "SAMPLING: unknown options ['guidence']"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/diary.txt").write_text("mine")
    for name, more in (("half", "del STAGES['lm']"), ("odd", "SAMPLING = {'guidence': 2}")):
        (tmp_path / f"{name}.py").write_text(f"{RECIPE}\n{more}\n")
    assert main(["train", *(text.format(tmp_path) for text in arguments)]) == 2
    assert said in capsys.readouterr().err


def test_the_bundled_recipes_with_stages_agree_over_them() -> None:
    """Whatever the dial: one tokenizer in all stages, and tokens of its shape in the language model."""
    for name in ("small", "sprites", "world"):
        chain = Chain(f"recipes/{name}.py", "cache/mine", Path("runs"))
        models = [run.model for run in chain.stages.values()]
        tokenizer = next(model for model in models if hasattr(model, "resampler"))
        for model in models:
            if isinstance(model, TokenizerConfig):  # a flow map is another network, and is sampled otherwise
                model = dataclasses.replace(model, denoiser=tokenizer.denoiser, sampling=tokenizer.sampling)
            assert model in (tokenizer, tokenizer.first_stage) or (
                model.token_width == tokenizer.token_width
                and model.tokens_per_keyframe == tokenizer.tokens_per_keyframe
                and model.most_keyframes(model.end_frame_conditioning) >= 3
            )
        assert all(run.cache == "cache/mine" for run in chain.stages.values())
