"""From a recipe's dataclass to its training: its stage, and how many of its steps a time allows on this machine.

runs/NAME/plan.json     the steps that `--minutes` became, from the speed of the first ones and then of the others
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

from torch.nn.attention import sdpa_kernel

from dicode.config import config_from_dict
from dicode.files import put_text, read_json
from dicode.stopwatch import Progress, duration
from dicode.train.checkpoint import TrainState, checkpoints
from dicode.train.distributed import Processes
from dicode.train.loop import Stage, Training, attention_on, draw_batches, session, train, train_step
from dicode.train.runs import FirstStageRun, LanguageRun, LinearCodeRun, LoopConfig, TokenizerRun

WARM_STEPS, TIMED_STEPS = 3, 10
MOST_EVALUATIONS, EVALUATION_SHARE = 8, 0.15  # of a run of so many minutes: how often, and of its time
CHECKPOINT_EVERY_S = 120.0
PLAN = "plan.json"
PLAN_OFF = 1.2
Run = FirstStageRun | TokenizerRun | LanguageRun


def stage_of(run: Run) -> Stage:
    """The stage that a run trains; loads its data. Raises `ValueError` for a run of another kind."""
    if isinstance(run, FirstStageRun):
        from dicode.train.first_stage import FirstStageTraining

        return FirstStageTraining(run)
    if isinstance(run, TokenizerRun):
        from dicode.train.tokenizer import TokenizerTraining

        return TokenizerTraining(run)
    from dicode.train.lm import LanguageTraining

    return LanguageTraining(run)


def run_recipe(
    run: Run | LinearCodeRun,
    folder: Path,
    recipe: dict[str, Any],
    source: Path | None = None,
    minutes: float | None = None,
) -> dict[str, float]:
    """Train a recipe in `folder`, or continue there; returns the validation metrics of its best weights.

    With `minutes`, the number of steps follows from the speed of this machine; see `planned`. Else as `train`.
    """
    if isinstance(run, LinearCodeRun):
        from dicode.train.linear_code import fit_run

        if minutes is not None:
            raise ValueError("--minutes: a linear code is fitted without steps; leave the flag out")
        return fit_run(run, folder, recipe, source)
    if not isinstance(run, Run):
        expected = "FirstStageRun, LinearCodeRun, TokenizerRun or LanguageRun"
        raise ValueError(f"expected a {expected}, got {type(run).__name__}")
    began_s = time.monotonic()
    with session(folder, run, run.loop) as (processes, stop):
        with stop.cutting(), Progress(f"preparing {folder.name}"):
            stage = stage_of(run)
            loop = planned(stage, run.loop, folder, minutes, began_s, processes)
        replan = partial(replanned, folder, loop, processes) if read_plan(folder) else None
        return train(stage, loop, folder, recipe, source, (processes, stop), replan)


@dataclass(frozen=True)
class Pace:
    """Seconds that a stage takes here."""

    step_s: float
    evaluation_s: float


@dataclass(frozen=True)
class Plan:
    """The steps that a number of minutes became."""

    minutes: float
    prepared_s: float  # until the first step: latents, tokens, measuring
    pace: Pace
    steps: int
    warmup_steps: int
    evaluate_every: int
    checkpoint_every: int
    replaced_steps: int | None = None  # those of the recipe; None: kept by an earlier version

    def applied(self, config: LoopConfig) -> LoopConfig:
        """The loop with these steps in place of its recipe's."""
        optim = replace(config.optim, steps=self.steps, warmup_steps=self.warmup_steps)
        return replace(config, optim=optim, evaluate_every=self.evaluate_every, checkpoint_every=self.checkpoint_every)


def read_plan(folder: Path) -> Plan | None:
    """The plan of a run, if it was begun with `--minutes`."""
    path = folder / PLAN
    return config_from_dict(Plan, read_json(path), str(path)) if path.is_file() else None


def planned(
    stage: Stage, config: LoopConfig, folder: Path, minutes: float | None, began_s: float, processes: Processes
) -> LoopConfig:
    """The loop of a run that may last so many minutes, counted from `began_s` of `time.monotonic`.

    The number of steps follows from the speed of the first ones and is kept in the run's folder, so that a continued
    run is the same; see `replanned`. Raises `ValueError` where it was begun with other minutes, or with other steps.
    """
    plan = read_plan(folder)
    if minutes is None or plan is not None:
        if plan is not None and minutes not in (None, plan.minutes):
            raise ValueError(
                f"{folder / PLAN}: this run has {plan.steps} steps, fixed when it began with --minutes "
                f"{plan.minutes:g}, got {minutes:g}; leave the flag out, or give another --run-folder"
            )
        if plan is not None and plan.replaced_steps not in (None, config.optim.steps):
            raise ValueError(
                f"{folder / PLAN}: this run has {plan.steps} steps, fixed when it began with --minutes "
                f"{plan.minutes:g}, got loop.optim.steps {config.optim.steps}; leave the flag out, or delete {PLAN} "
                "for other steps"
            )
        return config if plan is None else plan.applied(config)
    if checkpoints(folder):
        raise ValueError(f"{folder}: begun without --minutes; leave the flag out, or give another --run-folder")
    if config.strategy == "fsdp" and processes.count > 1:
        raise ValueError("--minutes: needs loop.strategy 'ddp'; give FSDP its steps (loop.optim.steps)")
    pace = processes.from_first(measured_pace(stage, config, processes))
    plan = plan_of(minutes, processes.from_first(time.monotonic() - began_s), pace, config)
    if processes.first:
        put_text(folder / PLAN, json.dumps(asdict(plan), indent=1) + "\n")
        about = duration(plan.steps * pace.step_s + -(-plan.steps // plan.evaluate_every) * pace.evaluation_s)
        print(
            f"{plan.steps:,} steps of {pace.step_s:.3g} s, an evaluation of {pace.evaluation_s:.3g} s every "
            f"{plan.evaluate_every:,}: about {about}",
            flush=True,
        )
    return plan.applied(config)


def replanned(
    folder: Path, config: LoopConfig, processes: Processes, step: int, step_s: float, spent_s: float
) -> LoopConfig:
    """A planned run's loop after an evaluation, its plan corrected by the speed since the one before."""
    plan = read_plan(folder)
    assert plan is not None
    changed = processes.from_first(corrected(plan, step, step_s, spent_s, config.optim.decay_fraction))
    if changed != plan and processes.first:
        put_text(folder / PLAN, json.dumps(asdict(changed), indent=1) + "\n")
        paces = f"{changed.pace.step_s:.3g} s, not {plan.pace.step_s:.3g} s"
        print(f"{changed.steps:,} steps: they take {paces}", flush=True)
    return changed.applied(config)


def corrected(plan: Plan, step: int, step_s: float, spent_s: float, decay_fraction: float) -> Plan:
    """The plan with the steps that the rest of its time allows, where those are other than planned by `PLAN_OFF`.

    Others may have computed while the first steps were timed, or begin to later. The learning rate is constant until it
    decays: until then the number of steps has had no effect; from then on it stays.
    """
    constant = 1 - decay_fraction
    if step >= plan.steps * constant:
        return plan
    evaluations = -(-(plan.steps - step) // plan.evaluate_every)
    left_s = 60 * plan.minutes - plan.prepared_s - spent_s - evaluations * plan.pace.evaluation_s
    steps = max(step + int(left_s / step_s), ceil(step / constant))
    if 1 / PLAN_OFF < steps / plan.steps < PLAN_OFF:
        return plan
    every = -(-(steps - step) // evaluations)
    checkpoint_every = max(1, min(steps, int(CHECKPOINT_EVERY_S / step_s)))
    pace = replace(plan.pace, step_s=step_s)
    return replace(plan, pace=pace, steps=steps, evaluate_every=every, checkpoint_every=checkpoint_every)


def measured_pace(stage: Stage, config: LoopConfig, processes: Processes, timed: int = TIMED_STEPS) -> Pace:
    """Time some training steps and an evaluation, then put weights and buffers back."""
    before = {name: value.detach().clone() for name, value in stage.module.state_dict().items()}
    run, state = Training(stage, config, processes), TrainState()
    with Progress("measuring the speed"), sdpa_kernel(attention_on(run.device)):
        batches = draw_batches(run, 0)
        spent_s = []
        for _ in range(WARM_STEPS + timed):
            began_s = time.perf_counter()
            train_step(run, state, next(batches))
            state.step += 1
            spent_s.append(time.perf_counter() - began_s)
        began_s = time.perf_counter()
        with run.validating():
            stage.validate()
        evaluation_s = time.perf_counter() - began_s
    stage.module.zero_grad(set_to_none=True)
    stage.module.load_state_dict(before)
    return Pace(median(spent_s[WARM_STEPS:]), evaluation_s)  # a moment in which others computed does not count


def plan_of(minutes: float, prepared_s: float, pace: Pace, config: LoopConfig) -> Plan:
    """Steps for what is left of these minutes, evaluated up to eight times in up to 15 % of the time.

    A recipe that is evaluated at its last step alone is so here too; one with a metric as `best`, before the first too.
    """
    left_s = max(0.0, 60 * minutes - prepared_s - bool(config.best) * pace.evaluation_s)
    evaluations = min(MOST_EVALUATIONS, max(1, int(EVALUATION_SHARE * left_s / max(pace.evaluation_s, 1e-6))))
    if config.evaluate_every == config.optim.steps:
        evaluations = 1
    steps = max(1, int((left_s - evaluations * pace.evaluation_s) / pace.step_s))
    warmup_steps, evaluate_every = min(config.optim.warmup_steps, steps // 10), -(-steps // evaluations)
    checkpoint_every = max(1, min(steps, int(CHECKPOINT_EVERY_S / pace.step_s)))
    every = (evaluate_every, checkpoint_every)
    return Plan(minutes, prepared_s, pace, steps, warmup_steps, *every, replaced_steps=config.optim.steps)
