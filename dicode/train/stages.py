"""From a recipe's dataclass to its training stage."""

from pathlib import Path
from typing import Any

from dicode.train.clips import TokenizerRun, TokenizerTraining
from dicode.train.images import FirstStageRun, FirstStageTraining
from dicode.train.language import LanguageRun, LanguageTraining
from dicode.train.loop import Stage, train

Run = FirstStageRun | TokenizerRun | LanguageRun


def stage_of(run: Run) -> Stage:
    """The stage that a run trains; loads its data."""
    if isinstance(run, FirstStageRun):
        return FirstStageTraining(run)
    return TokenizerTraining(run) if isinstance(run, TokenizerRun) else LanguageTraining(run)


def run_recipe(run: Run, folder: Path, recipe: dict[str, Any]) -> dict[str, float]:
    """Train a recipe in `folder`, or continue there; returns the validation metrics of its best weights."""
    return train(stage_of(run), run.loop, folder, recipe)
