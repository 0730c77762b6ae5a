"""How long a stage takes on this machine, and how many steps a time allows.

runs/NAME/plan.json     the steps that `--minutes` became when the run began, which stay as they are from then on
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch.nn.attention import sdpa_kernel

from dicode.files import put_text
from dicode.stopwatch import Progress, duration
from dicode.train.checkpoint import TrainState
from dicode.train.loop import Stage, Training, attention_on, draw_batches, train_step
from dicode.train.parallel import Processes
from dicode.train.runs import LoopConfig

WARM_STEPS, TIMED_STEPS = 3, 10
MOST_EVALUATIONS, EVALUATION_SHARE = 8, 0.15  # of a run of so many minutes: how often, and of its time
CHECKPOINT_EVERY_S = 120.0
PLAN = "plan.json"


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

    def applied(self, config: LoopConfig) -> LoopConfig:
        """The loop with these steps in place of its recipe's."""
        optim = replace(config.optim, steps=self.steps, warmup_steps=self.warmup_steps)
        return replace(config, optim=optim, evaluate_every=self.evaluate_every, checkpoint_every=self.checkpoint_every)


def measured_pace(stage: Stage, config: LoopConfig, processes: Processes, timed: int = TIMED_STEPS) -> Pace:
    """Time some training steps and an evaluation, then put weights and buffers back."""
    before = {name: value.detach().clone() for name, value in stage.module.state_dict().items()}
    run, state = Training.of(stage, config, processes), TrainState()
    with Progress("measuring the speed"), sdpa_kernel(attention_on(run.device)):
        batches = draw_batches(run, 0)
        spent_s = []
        for _ in range(WARM_STEPS + timed):
            began_s = time.perf_counter()
            train_step(run, state, next(batches))
            state.step += 1
            spent_s.append(time.perf_counter() - began_s)
        step_s = median(spent_s[WARM_STEPS:])  # a moment in which others computed does not count
        began_s = time.perf_counter()
        stage.module.eval()
        with torch.no_grad():
            stage.validate()
        evaluation_s = time.perf_counter() - began_s
    stage.module.zero_grad(set_to_none=True)
    stage.module.load_state_dict(before)
    return Pace(step_s, evaluation_s)


def planned(
    stage: Stage, config: LoopConfig, folder: Path, minutes: float | None, began_s: float, processes: Processes
) -> LoopConfig:
    """The loop of a run that may last so many minutes, counted from `began_s` of `time.monotonic`.

    The number of steps follows from the speed of the first ones and is then kept in the run's folder, so that a
    continued run is the same. Raises `ValueError` where it was begun with other minutes.
    """
    plan = read_plan(folder)
    if plan is not None:
        if minutes is not None and minutes != plan.minutes:
            raise ValueError(
                f"{folder / PLAN}: this run has {plan.steps} steps, fixed when it began with --minutes "
                f"{plan.minutes:g}, got {minutes:g}; leave the flag out, or give another --run-folder"
            )
        return plan.applied(config)
    if minutes is None:
        return config
    if list(folder.glob("step-*")):
        raise ValueError(f"{folder}: begun without --minutes; leave the flag out, or give another --run-folder")
    if config.strategy == "fsdp" and processes.count > 1:
        raise ValueError("--minutes: needs loop.strategy 'ddp'; give FSDP its steps (loop.optim.steps)")
    pace = processes.from_first(measured_pace(stage, config, processes))
    plan = plan_of(minutes, processes.from_first(time.monotonic() - began_s), pace, config)
    if processes.first:
        folder.mkdir(parents=True, exist_ok=True)
        put_text(folder / PLAN, json.dumps(asdict(plan), indent=1) + "\n")
        about = duration(plan.steps * pace.step_s + -(-plan.steps // plan.evaluate_every) * pace.evaluation_s)
        print(
            f"{plan.steps:,} steps of {pace.step_s:.3g} s, an evaluation of {pace.evaluation_s:.3g} s every "
            f"{plan.evaluate_every:,}: about {about}",
            flush=True,
        )
    return plan.applied(config)


def plan_of(minutes: float, prepared_s: float, pace: Pace, config: LoopConfig) -> Plan:
    """Steps for what is left of these minutes, evaluated up to eight times in up to 15 % of the time."""
    left_s = max(0.0, 60 * minutes - prepared_s)
    evaluations = min(MOST_EVALUATIONS, max(1, int(EVALUATION_SHARE * left_s / max(pace.evaluation_s, 1e-6))))
    steps = max(1, int((left_s - evaluations * pace.evaluation_s) / pace.step_s))
    warmup_steps, evaluate_every = min(config.optim.warmup_steps, steps // 10), -(-steps // evaluations)
    checkpoint_every = max(1, min(steps, int(CHECKPOINT_EVERY_S / pace.step_s)))
    return Plan(minutes, prepared_s, pace, steps, warmup_steps, evaluate_every, checkpoint_every)


def read_plan(folder: Path) -> Plan | None:
    """The plan of a run, if it was begun with `--minutes`."""
    if not (folder / PLAN).is_file():
        return None
    values = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    return Plan(**{**values, "pace": Pace(**values["pace"])})
