"""From a recipe's dataclass to its training stage."""

import time
from pathlib import Path
from typing import Any, get_args

from dicode.stopwatch import Progress
from dicode.train.first_stage import FirstStageTraining
from dicode.train.lm import LanguageTraining
from dicode.train.loop import Stage, data_of, train
from dicode.train.pace import planned
from dicode.train.parallel import Processes
from dicode.train.run_log import claimed
from dicode.train.runs import FirstStageRun, LanguageRun, TokenizerRun
from dicode.train.signals import StopSignal
from dicode.train.tokenizer import TokenizerTraining

Run = FirstStageRun | TokenizerRun | LanguageRun


def stage_of(run: Run) -> Stage:
    """The stage that a run trains; loads its data."""
    if isinstance(run, FirstStageRun):
        return FirstStageTraining(run)
    if isinstance(run, TokenizerRun):
        return TokenizerTraining(run)
    return LanguageTraining(run)


def run_recipe(
    run: Run, folder: Path, recipe: dict[str, Any], source: Path | None = None, minutes: float | None = None
) -> dict[str, float]:
    """Train a recipe in `folder`, or continue there; returns the validation metrics of its best weights.

    With `minutes`, the number of steps follows from the speed of this machine; see `planned`.
    """
    if not isinstance(run, Run):
        kinds = ", ".join(kind.__name__ for kind in get_args(Run))
        raise ValueError(f"expected a run of one of the kinds {kinds}, got {type(run).__name__}")
    began_s = time.monotonic()
    with StopSignal() as stop, Processes() as processes, claimed(folder, data_of(run), run.loop, processes):
        with stop.cutting(), Progress(f"preparing {folder.name}"):
            stage = stage_of(run)
        with stop.cutting():
            loop = planned(stage, run.loop, folder, minutes, began_s, processes)
        return train(stage, loop, folder, recipe, source, stop)
