"""Training goes on after whatever ends it: `tests/survival.py` with fewer kills, and what it does not do."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from survival import differences, prepare, the_run
from torch import Tensor
from toy_runs import SHARD, runs

import dicode.train.loop
from dicode.config import CheckpointError
from dicode.train.checkpoint import checkpoints
from dicode.train.loop import NonFiniteLossError, train
from dicode.train.run_log import RunLog, duration, records
from dicode.train.runs import LoopConfig
from dicode.train.speed import Speed
from dicode.train.stages import Run, run_recipe, stage_of

STEPS = 8
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, a tokenizer, and a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("survival")
    torch.set_num_threads(1)
    prepare(folder)
    run_recipe(short_run(folder), folder / "whole", {})
    return folder


def short_run(root: Path, **changes: Any) -> Run:
    run = the_run(root, STEPS)
    return dataclasses.replace(run, loop=dataclasses.replace(run.loop, checkpoint_every=2, evaluate_every=4, **changes))


def short_config() -> LoopConfig:
    return LoopConfig(precision="float32")


def stop_after(run: Run, folder: Path, steps: int) -> None:
    """Go on with a run for some steps, and end without a checkpoint of its own."""
    stage = stage_of(run)
    draw, drawn = stage.batch, []

    def batch(indices: Tensor, generator: torch.Generator) -> Any:
        drawn.append(indices)
        if len(drawn) > steps:
            raise KeyboardInterrupt
        return draw(indices, generator)

    stage.batch = batch  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(stage, run.loop, folder, {})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="its runs are forks, which Windows does not have")
def test_kills_signals_damage_and_nan_change_nothing(tmp_path: Path) -> None:
    asked = ["--kills", "5", "--signals", "10", "--nan", "10", "--steps", "150"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "survival.py"), str(tmp_path / "out.json"), *asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "out.json").read_text())["values"]
    assert values["kills"]["differences"] == values["signals"]["differences"] == []
    assert values["kills"]["samples_repeated_or_missed"] == 0
    assert values["signals"]["exit_codes"] == [75] and values["signals"]["steps_lost"] == 0
    assert values["signals"]["slowest_s"] < 200  # a validation of five minutes was cut short
    assert values["damage"]["detected"] == {"flips": 200, "truncations": 100}
    assert values["nan"]["files_with_nan"] == 0 and values["nan"]["stopped"] == values["nan"]["naming_a_step"] >= 8


def test_five_resumes_inside_an_epoch_repeat_and_miss_no_sample(root: Path, tmp_path: Path) -> None:
    run = short_run(root)
    optim = dataclasses.replace(run.loop.optim, batch_size=1, steps=18)
    run = dataclasses.replace(run, loop=dataclasses.replace(run.loop, optim=optim, checkpoint_every=1))
    for steps in (2, 3, 2, 3, 2):  # of the 15 of an epoch
        stop_after(run, tmp_path / "run", steps)
    run_recipe(run, tmp_path / "run", {})
    sessions = map(json.loads, (tmp_path / "run/sessions.jsonl").read_text().splitlines())
    assert [session["from_step"] for session in sessions] == [0, 2, 5, 7, 10, 12]
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    order = [sample for line in lines if line["kind"] == "samples" for sample in line["samples"]]
    assert sorted(order[:15]) == list(range(15))
    run_recipe(run, tmp_path / "whole", {})
    assert differences(tmp_path / "run", tmp_path / "whole", 18) == []


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(short_run(root), tmp_path / "run", 5)
    older, newest = checkpoints(tmp_path / "run")
    content = bytearray((newest / SHARD).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / SHARD).write_bytes(content)
    run_recipe(short_run(root), tmp_path / "run", {})
    said = capsys.readouterr().out
    assert f"{newest} is damaged: {SHARD}: not as written" in said
    assert f"from step {int(older.name[5:])}" in said
    assert (tmp_path / "run" / f"damaged-{newest.name}").is_dir()
    assert differences(tmp_path / "run", root / "whole", STEPS) == []


def test_a_run_without_a_whole_checkpoint_does_not_begin_again_in_silence(root: Path, tmp_path: Path) -> None:
    stop_after(short_run(root), tmp_path / "run", 5)
    for path in checkpoints(tmp_path / "run"):
        (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint is left; delete the folder to begin again"):
        run_recipe(short_run(root), tmp_path / "run", {})


def test_what_a_killed_run_left_unfinished_is_removed(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "whole", tmp_path / "run")
    (tmp_path / "run/.best.12345678.part").mkdir()
    (tmp_path / "run/.plan.json.12345678.part").touch()
    (tmp_path / "run/.step-00000009.12345678.part/shard").mkdir(parents=True)
    (tmp_path / "run/.download.part").touch()  # of another program
    (tmp_path / "run/step-by-step").mkdir()
    run_recipe(short_run(root), tmp_path / "run", {})
    assert {path.name for path in (tmp_path / "run").glob(".*")} == {".lock", ".download.part"}
    assert (tmp_path / "run/step-by-step").is_dir()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no process's files")
def test_a_full_disk_stops_the_run_and_leaves_the_checkpoint_before(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = dicode.train.loop.save_checkpoint

    def fills_up(folder: Path, state: Any, *rest: Any) -> Path:
        if state.step == 4:  # from here on files end at 100 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        return save(folder, state, *rest)

    monkeypatch.setattr(dicode.train.loop, "save_checkpoint", fills_up)
    try:
        with pytest.raises(CheckpointError, match=r"step-00000004: cannot be written .*step-00000002 is whole"):
            run_recipe(short_run(root), tmp_path / "run", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "run").glob("*step-*")] == ["step-00000002"]
    assert not list((tmp_path / "run").glob(".*.part"))
    monkeypatch.undo()
    run_recipe(short_run(root), tmp_path / "run", {})
    assert differences(tmp_path / "run", root / "whole", STEPS) == []


@pytest.mark.parametrize("where", ["output", "weight"])
def test_nan_names_step_samples_and_module(root: Path, tmp_path: Path, where: str) -> None:
    stage = stage_of(short_run(root))
    module = dict(stage.module.named_modules())["backbone.body.layers.0.mlp"]
    if where == "output":
        module.register_forward_hook(lambda _, __, output: output * torch.nan)
        expected = r"step 0: loss nan.*first module to give NaN or infinity is backbone\.body\.layers\.0\.mlp"
    else:
        with torch.no_grad():
            module.down_proj.weight[1, 2] = torch.inf  # type: ignore[union-attr, operator]
        expected = r"step 0: .*weight backbone\.body\.layers\.0\.mlp\.down_proj\.weight was so before it"
    with pytest.raises(NonFiniteLossError, match=expected + r".*samples \[\d+, \d+, \d+, \d+\]"):
        train(stage, short_run(root).loop, tmp_path, {})


def test_steps_with_nan_are_left_out_and_counted_where_asked(root: Path, tmp_path: Path) -> None:
    stage = stage_of(short_run(root))
    draw, drawn = stage.batch, []

    def batch(indices: Tensor, generator: torch.Generator) -> Any:
        drawn.append(indices)
        made = draw(indices, generator)
        return {**made, "tokens": made["tokens"] * torch.nan} if len(drawn) in (3, 6) else made

    stage.batch = batch  # type: ignore[method-assign]
    train(stage, short_run(root, skip_non_finite=2).loop, tmp_path, {})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "skipped"] == [3, 6]
    assert json.loads((tmp_path / "step-00000008/state.json").read_text())["skipped"] == 2
    for name, tensor in load_file(tmp_path / "step-00000008" / SHARD).items():
        assert torch.isfinite(tensor).all(), name
    stage.batch = batch  # type: ignore[method-assign]
    drawn.clear()
    with pytest.raises(NonFiniteLossError, match="step 5"):
        train(stage, short_run(root, skip_non_finite=1).loop, tmp_path / "less", {})


def test_a_run_folder_explains_itself(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root / "cache", tmp_path / "cache")
    source = tmp_path / "recipe.py"
    source.write_text("# how it was made\n")
    run = dataclasses.replace(short_run(root), cache=str(tmp_path / "cache"))
    folder = tmp_path / "run"
    run_recipe(run, folder, {"recipe": "recipe.py:lm"}, source)
    assert (folder / "recipe.py").read_text() == source.read_text()
    assert json.loads((folder / "recipe.json").read_text())["recipe"] == {"recipe": "recipe.py:lm"}
    (session,) = map(json.loads, (folder / "sessions.jsonl").read_text().splitlines())
    assert {"started", "command", "commit", "versions", "device", "processes", "data", "from_step"} <= session.keys()
    assert session["versions"]["torch"] == torch.__version__
    index = tmp_path / "cache/index.json"
    index.write_text(index.read_text() + " ")
    with pytest.raises(ValueError, match=rf"{folder} was begun with other data .*--run-folder.*--init {folder}/best"):
        run_recipe(run, folder, {"recipe": "recipe.py:lm"}, source)
    (folder / "sessions.jsonl").write_text(json.dumps({**session, "threads": 7, "dtype": "bfloat16"}) + "\n")
    index.write_text(index.read_text()[:-1])
    capsys.readouterr()
    longer = dataclasses.replace(run.loop, optim=dataclasses.replace(run.loop.optim, lr=1e-4))
    run_recipe(dataclasses.replace(run, loop=longer), folder, {"recipe": "recipe.py:lm"}, source)
    out = capsys.readouterr().out
    assert "the recipe is not the one the run began with (loop.optim.lr)" in out
    assert f"threads: 7 then, {torch.get_num_threads()} now" in out and "dtype: bfloat16 then, float32 now" in out
    assert [record["from_step"] for record in records(folder / "sessions.jsonl")] == [0, STEPS]


def test_the_first_line_of_a_run_says_what_it_computes_on(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(short_run(root), tmp_path / "run", {})
    threads = torch.get_num_threads()
    first = capsys.readouterr().out.splitlines()[0]
    assert re.search(rf"run: cpu: .*{threads} threads; float32, matrix products at [\d,]+ GFLOP/s$", first)
    (session,) = records(tmp_path / "run/sessions.jsonl")
    assert session["dtype"] == "float32" and session["threads"] == threads and session["device"].startswith("cpu")


def test_one_process_trains_in_a_folder(root: Path, tmp_path: Path) -> None:
    held = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", held, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"{tmp_path}: another process trains here.*--run-folder"):
            run_recipe(short_run(root), tmp_path, {})
        other.kill()
    assert not (tmp_path / "log.jsonl").exists()
    run = short_run(root)
    elsewhere = dataclasses.replace(run, loop=dataclasses.replace(run.loop, device="nowhere"))
    with pytest.raises(ValueError, match="device nowhere: cannot be used here"):
        run_recipe(elsewhere, tmp_path, {})
    run_recipe(run, tmp_path, {})
    assert (tmp_path / "best").is_dir()


def test_lines_that_are_torn_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo}\n\x00\x00\xff}\n[3]\n{"step": 3}\n{"step": 4, "l')
    assert records(path) == [{"step": 1, "loss": 2.0}, {"step": 3}]
    assert records(tmp_path / "none") == []
    with RunLog(tmp_path, 2, "none", {}) as log:
        log.write("train", 3, {"loss": 1.0})
    assert [record["step"] for record in records(path)] == [1, 3]


def test_operations_are_counted_once_and_steps_are_timed_without_counting() -> None:
    a = torch.ones(64, 64)
    speed = Speed(short_config(), torch.device("cpu"), 0)
    for _ in range(3):
        with speed.working({0: {"tokens": a, "goal": torch.tensor(True)}}):
            a @ a
    assert speed.computed == 2 * 2 * 64**3  # of the two steps after the one that was counted
    with speed.working({0: {"tokens": a, "goal": torch.tensor(False)}}):  # another kind
        a @ a @ a
    assert sorted(speed.flops.values()) == [2 * 64**3, 4 * 64**3] and speed.computed == 4 * 64**3


def test_more_than_the_peak_is_never_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = Speed(short_config(), torch.device("cpu"), 0)
    speed.computed, speed.computing_s = 10**9, 1.0
    measured = []
    for peaks, expected in (([0.5e9, 4e9], 0.25), ([4e9, 4e9], 0.25), ([0.5e9, 0.5e9], None)):
        left = iter(peaks)
        monkeypatch.setattr(
            "dicode.train.speed.peak_flops", lambda _, dtype, left=left: (measured.append(dtype), next(left))[1]
        )
        assert speed.mfu() == expected  # measured again where it is less than was reached
    assert measured == [torch.float32] * 6


def test_the_log_tells_speed_memory_and_what_is_left(root: Path) -> None:
    lines = [json.loads(line) for line in (root / "whole/log.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert all(line["samples_per_s"] > 0 and 0 < line["data_share"] < 1 and line["memory_gib"] > 0 for line in trained)
    timed = [line for line in trained if "mfu" in line]  # the first of a kind is counted
    assert timed and all(0 < line["mfu"] <= 1 for line in timed)
    assert trained[-1]["eta_s"] == 0 and "eta_s" not in trained[0]
    assert list((root / "whole/tensorboard").glob("events.*"))


def test_durations_are_told_in_two_units() -> None:
    told = {0.4: "0 s", 40.0: "40 s", 3600.0: "1 h", 7500.0: "2 h 5 min", 273_600.0: "3 d 4 h"}
    assert {seconds: duration(seconds) for seconds in told} == told


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_a_hosted_tracker_gets_every_number(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    """The functions that both have note their calls; docs/training.md says what was tried with the real ones."""
    logged: list[tuple[int, dict[str, Any]]] = []
    asked: dict[str, Any] = {}
    done: list[bool] = []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: done.append(True))
    fake = SimpleNamespace(init=lambda **options: (asked.update(options), run)[1], Image=lambda image: image)
    monkeypatch.setitem(sys.modules, library, fake)
    run_recipe(short_run(root, tracker=library), tmp_path / "run", {"recipe": "x"})
    kept = (tmp_path / "run/tracker-id").read_text().strip()
    assert re.fullmatch(r"run-[0-9a-f]{8}", kept)
    assert asked["project"] == "dicode" and asked["name"] == kept and asked["config"] == {"recipe": "x"}
    assert [step for step, values in logged if "train/loss" in values] == list(range(1, STEPS + 1))
    assert any("validation/sheet" in values for _, values in logged) and done == [True]
    assert not (tmp_path / "run/tensorboard").exists()


def test_a_tracker_that_is_not_installed_is_an_error(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match=r"tracker trackio.*pip install trackio"):
        run_recipe(short_run(root, tracker="trackio"), tmp_path, {})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"tracker tensorboard.*dicode\[train\].*--loop.tracker none"):
        run_recipe(short_run(root), tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_toy_runs_have_every_option_of_the_loop_at_its_default_but_these(root: Path) -> None:
    """So that what is compared above is what users run."""
    config, default = runs(root)["lm"].loop, dicode.train.loop.LoopConfig()
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(default, f.name)}
    assert changed == {"precision", "log_every", "evaluate_every", "checkpoint_every", "optim"}
