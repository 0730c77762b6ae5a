"""Several processes train as one does: DDP and FSDP, with 2 and 4 processes on this machine."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import parallel_recipes
import pytest
import torch
from drawn_archives import write_archives
from parallel_recipes import COMPARED, SHARED, recipe
from parallel_recipes import NAMES as RECIPES
from parallel_worker import STEPS, parallel_run
from safetensors.torch import load_file
from test_golden import write_models
from torch import nn
from toy_runs import loop, runs, write_cache

from dicode.seeds import generator_for
from dicode.train.distributed import Processes, StepModule, blocks_of, recompute_activations
from dicode.train.loop import Training
from dicode.train.stages import run_recipe, stage_of

HERE = Path(__file__).parent
NAMES = ["first_stage", "denoiser", "lm", "muon"]
OF_TWO = ["fsdp:denoiser", "ddp:denoiser", "ddp:flow", "fsdp:first_stage", "fsdp:lm", "fsdp:streamed"]
OF_FOUR = ["ddp:lm", "fsdp:denoiser", "fsdp:muon", "ddp:streamed"]
TOGETHER = [f"{count}/{own.replace(':', '-')}" for count, those in ((2, OF_TWO), (4, OF_FOUR)) for own in those]

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def launch(processes: int, *arguments: object, forks: bool = False) -> None:
    """The worker, by `torchrun` or as forks of one process, which begin sooner; its output is shown where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    worker, count = str(HERE / "parallel_worker.py"), str(processes)
    start = [worker, "--forks", count] if forks and hasattr(os, "fork") else [*TORCHRUN, count, worker]
    done = subprocess.run(
        [sys.executable, *start, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]


@pytest.fixture(scope="module")
def recipes(root: Path) -> dict[str, Any]:
    """The first steps of every bundled recipe: of one process under its name, of two under the strategy too."""
    alone = {name: parallel_recipes.first_steps(recipe(name, root), Processes()) for name in COMPARED}
    return {**alone, **json.loads((root / "recipes.json").read_text())}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_its_first_steps_in_two_processes(recipes: dict[str, Any], name: str) -> None:
    """Also where only one of them draws a goal: some weights have no part elsewhere."""
    shared = recipes[f"ddp:{name}"]
    assert np.isfinite([*shared["loss"], *shared["norm"]]).all() and shared["moved"] > 0
    alone = recipes.get(name, shared)
    for kind in ("loss", "norm", "moved"):
        assert shared[kind] == pytest.approx(alone[kind], rel=1e-3), kind


@pytest.mark.parametrize("name", SHARED)
def test_fsdp_computes_in_bfloat16(recipes: dict[str, Any], name: str) -> None:
    alone, shared = recipes[name], recipes[f"fsdp:{name}"]
    for kind, tolerance in (("loss", 0.03), ("norm", 0.1), ("moved", 0.1)):
        assert shared[kind] == pytest.approx(alone[kind], rel=tolerance), kind


@pytest.mark.parametrize("name", ["sprites:denoiser", "sprites:lm"])
def test_muon_gathers_each_matrix_once(recipes: dict[str, Any], name: str) -> None:
    gathers, messages, matrices, shapes = recipes[f"fsdp:{name}"]["gathers"]
    assert gathers == messages == shapes < matrices


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process made of five recipes, and what 4 and 2 made of the same; also `recipes.json`, of two."""
    pytest.importorskip("efficientnet_lite_pytorch")
    folder = tmp_path_factory.mktemp("parallel")
    torch.set_num_threads(1)
    write_cache(folder / "cache")
    write_models(folder)
    write_archives(folder)
    for name in ("first_stage", "linear_code"):
        run_recipe(runs(folder)[name], folder / name, {})
    for name in (*NAMES, "flow", "streamed"):
        run_recipe(parallel_run(folder, name, "ddp"), folder / "1" / f"ddp-{name}", {})
    launch(4, folder, folder / "4", "fsdp:denoiser:7", *OF_FOUR, forks=True)
    shutil.copytree(folder / "stopped", folder / "2")
    asked = [*(f"ddp:{name}" for name in RECIPES), *(f"fsdp:{name}" for name in SHARED)]
    launch(2, folder, folder / "2", *OF_TWO, "recipes", *asked)
    return folder


def curve(folder: Path) -> dict[tuple[str, int], float]:
    """What a run logged: losses, and its metric of validation."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    metrics = ("loss", "validation_loss", "denoising_loss", "psnr_db")
    return {(f"{line['kind']} {m}", line["step"]): line[m] for line in lines for m in metrics if m in line}


@pytest.mark.parametrize("together", TOGETHER)
def test_losses_do_not_depend_on_the_number_of_processes(root: Path, together: str) -> None:
    alone = curve(root / "1" / f"ddp-{together.rpartition('-')[2]}")
    assert len([key for key in alone if key[0] == "train loss"]) == STEPS
    assert curve(root / together) == pytest.approx(alone, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("together", TOGETHER)
def test_exported_weights_are_whole_and_the_same(root: Path, together: str) -> None:
    files = list((root / "1" / f"ddp-{together.rpartition('-')[2]}" / "best").glob("*.safetensors"))
    assert files
    for path in files:
        alone, shared = load_file(path), load_file(root / together / "best" / path.name)
        assert shared.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(shared[name], value, rtol=1e-2, atol=2e-3, msg=f"{path} {name}")


def test_what_four_processes_kept_when_stopped_goes_on_in_one_and_in_two(root: Path, tmp_path: Path) -> None:
    """A SIGTERM reached one of the four; all kept the same step, and the rest ran elsewhere as if nothing had been."""
    stopped = root / "stopped/fsdp-denoiser"
    assert sorted(path.name for path in stopped.glob("step-*")) == ["step-00000005", "step-00000007"]
    assert len(list((stopped / "step-00000007").glob("shard-*"))) == 4
    shutil.copytree(stopped, tmp_path / "run")
    run_recipe(parallel_run(root, "denoiser", "ddp"), tmp_path / "run", {})
    for folder in (tmp_path / "run", root / "2/fsdp-denoiser"):
        assert curve(folder) == pytest.approx(curve(root / "1/ddp-denoiser"), rel=1e-4, abs=1e-4)


def test_blocks_are_the_members_of_the_outermost_lists() -> None:
    inner = nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))])
    frozen = nn.Linear(2, 2).requires_grad_(False)
    module = nn.ModuleDict({"a": nn.ModuleList([inner, frozen]), "b": nn.Linear(2, 2)})
    assert list(blocks_of(module)) == list(inner)


def test_recomputed_activations_give_the_same_gradients(root: Path) -> None:
    kept, again = (stage_of(runs(root)["lm"]) for _ in range(2))
    recompute_activations(again.module)
    forwards = [block.forward for block in blocks_of(again.module)]
    recompute_activations(again.module)  # as after a measurement of the speed
    assert forwards == [block.forward for block in blocks_of(again.module)]
    for stage in (kept, again):
        stage.module.train()
        batch = stage.batch(torch.arange(4), generator_for(0))
        StepModule(stage)(batch, generator_for(1))[0].backward()
    for (name, p), other in zip(kept.module.named_parameters(), again.module.parameters(), strict=True):
        assert p.grad is not None and torch.equal(p.grad, other.grad), name


@pytest.mark.parametrize(("micro_batches", "batch_size"), [(3, 8), (3, 9)])
def test_a_batch_that_cannot_be_shared_out_is_an_error(root: Path, micro_batches: int, batch_size: int) -> None:
    stage = stage_of(runs(root)["first_stage"])
    config = dataclasses.replace(
        loop(2), micro_batches=micro_batches, optim=dataclasses.replace(loop(2).optim, batch_size=batch_size)
    )
    processes = Processes()
    processes.count = 2
    with pytest.raises(ValueError, match=f"batch_size {batch_size}.*2 processes.*micro_batches 3"):
        Training(stage, config, processes)
