"""One training loop for every stage: resumable, logged, and a pure function of its seed.

The batch, the noise and the learning rate of a step depend on (seed, step) alone, so a run that was interrupted and
continued is bit-equal to one that was not. The same command continues a run, with any number of processes.
"""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from itertools import count, starmap
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from dicode.checkpoint import content_hash, is_finite
from dicode.config import config_to_dict
from dicode.device import autocast, compute_dtype, describe_device, pick_device
from dicode.files import flush, whole_folder
from dicode.seeds import generator_for
from dicode.stopwatch import Progress
from dicode.train import distributed
from dicode.train.checkpoint import TrainState, load_checkpoint, newest_checkpoint, save_checkpoint
from dicode.train.distributed import Processes, Stopped, StopSignal, copy_into, full, local
from dicode.train.optim import make_optimizers
from dicode.train.order import bucketed_indices, sample_indices
from dicode.train.run_log import RunLog, claimed, note_start
from dicode.train.runs import LoopConfig
from dicode.train.speed import Speed, name_of


@runtime_checkable
class Stage(Protocol):
    """What is trained: a module, its batches, its loss, its validation."""

    best: str  # validation metric that picks the weights; a leading '-' means lower is better
    run: Any  # its configuration; `run.cache` is the folder of its data

    @property
    def module(self) -> nn.Module: ...  # a plain attribute, into which FSDP puts a whole copy for validation

    def num_samples(self) -> int: ...  # training samples an epoch

    def by_size(self, indices: Tensor) -> Tensor:
        """These samples, small ones first: a step's micro-batches, consecutive parts of them, need little padding."""

    def batch(self, indices: Tensor, generator: torch.Generator) -> Any:
        """The batch of these samples; augmentation draws from the generator alone."""

    def loss(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss to minimise and named scalars to log."""

    def weight(self, batch: Any) -> float:
        """Number of terms that this loss is the mean of: its weight among those of a step's micro-batches."""

    def validate(self) -> tuple[dict[str, float], Image.Image | None]:
        """Metrics on the validation split with the module as it stands, and a contact sheet."""

    def export(self, folder: Path) -> None: ...  # writes this stage's part of a checkpoint folder


@runtime_checkable
class Streaming(Protocol):
    """A `Stage` whose batches may be begun before they are asked for, and have samples of one bucket each."""

    def bucket_sizes(self) -> list[int]: ...  # training samples of each, numbered bucket after bucket

    def batches(self, jobs: Iterator[tuple[Tensor, torch.Generator]]) -> Iterator[Any]:
        """As `batch`, of each of these in turn."""


REPLACED = "replaced"  # among a loss's scalars: damaged samples of a micro-batch; in the log: of all steps
# The configuration to go on with, for steps done, seconds a step since the last evaluation, and seconds of training
Replan = Callable[[int, float, float], LoopConfig]


class NonFiniteLossError(FloatingPointError):
    """Training met NaN or infinity; nothing of that step was kept."""


class Training:
    """What changes as a run trains. Raises `ValueError` where its batch cannot be shared out as asked."""

    def __init__(self, stage: Stage, config: LoopConfig, processes: Processes) -> None:
        self.stage, self.config, self.processes = stage, config, processes
        if config.micro_batches % processes.count or config.optim.batch_size % config.micro_batches:
            raise ValueError(
                f"batch_size {config.optim.batch_size}: expected a multiple of micro_batches, and those of the "
                f"{processes.count} processes; got micro_batches {config.micro_batches}"
            )
        shards = config.strategy == "fsdp" and processes.count > 1
        self.copy = deepcopy(stage.module).cpu() if shards else None  # for validation
        module = stage.module.to(device := pick_device(config.device))
        dtype = compute_dtype(device, config.precision)
        if config.checkpoint_activations:
            distributed.recompute_activations(module)
        self.step = processes.arrange(distributed.StepModule(stage), config.strategy, dtype)  # computes the loss
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.trained.items()}
        constant = {
            f"{name}." * bool(name) + own for name, m in module.named_modules() for own in m._non_persistent_buffers_set
        }
        self.buffers = {name: buffer for name, buffer in module.named_buffers() if name not in constant}
        self.optimizers = make_optimizers(module, config.optim, dtype)

    @property
    def device(self) -> torch.device:
        return next(iter(self.trained.values())).device

    @property
    def own_micro_batches(self) -> range:
        """Numbers of the micro-batches of a step that this process computes."""
        return range(self.processes.rank, self.config.micro_batches, self.processes.count)

    def samples(self, step: int) -> Tensor:
        optim, seed, parts = self.config.optim, self.config.seed, self.config.micro_batches
        if isinstance(self.stage, Streaming) and len(sizes := self.stage.bucket_sizes()) > 1:
            return bucketed_indices(sizes, optim.batch_size, parts, seed, step)
        return sample_indices(self.stage.num_samples(), optim.batch_size, seed, step)

    def jobs(self, step: int) -> Iterator[tuple[Tensor, torch.Generator]]:
        """Samples and random numbers of this process's micro-batches, from this step on."""
        parts = self.config.micro_batches
        for at in count(step):
            drawn = self.samples(at)
            indices = (self.stage.by_size(drawn) if parts > 1 else drawn).tensor_split(parts)
            yield from ((indices[i], self.generator("batch", at, i)) for i in self.own_micro_batches)

    def generator(self, purpose: str, step: int, micro_batch: int) -> torch.Generator:
        """Random numbers of one micro-batch, the same in whichever process."""
        return generator_for(self.config.seed, purpose, step, micro_batch)

    def loss(self, step: int, micro_batch: int, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and scalars of one micro-batch, always the same ones."""
        # dropout inside library modules takes no generator
        torch.manual_seed(self.generator("dropout", step, micro_batch).initial_seed())
        with autocast(self.device, self.config.precision):
            return self.step(batch, self.generator("noise", step, micro_batch))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, by name."""
        held: dict[str, Tensor] = {f"weights/{name}": p.detach() for name, p in self.trained.items()}
        held |= {f"ema/{name}": average for name, average in self.ema.items()}
        held |= {f"buffers/{name}": buffer for name, buffer in self.buffers.items()}
        for optimizer in self.optimizers:
            for name, p in self.trained.items():
                held |= {f"optimizer/{key}/{name}": value for key, value in optimizer.state.get(p, {}).items()}
        return held

    @contextmanager
    def validating(self) -> Iterator[None]:
        """In here the stage's module is whole, in eval mode, and not compiled anew for the shapes of validation."""
        self.stage.module.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), distributed.whole(self.stage, self.copy):
            yield

    def best_metric(self, metrics: dict[str, float]) -> tuple[str, float]:
        """Name and sign of the metric that picks weights. Raises `ValueError` where it is not among these."""
        asked = self.config.best or self.stage.best
        name, sign = asked.removeprefix("-"), -1.0 if asked.startswith("-") else 1.0
        if name not in metrics:
            raise ValueError(f"--loop.best: expected one of {', '.join(sorted(metrics))}, got {asked!r}")
        return name, sign


@contextmanager
def session(folder: Path, run: Any, config: LoopConfig) -> Iterator[tuple[Processes, StopSignal]]:
    """In here the processes of this run, and no others, train in `folder`. Raises `ValueError` as `claimed`."""
    with StopSignal() as stop, Processes() as processes, claimed(folder, data_of(run), config, processes):
        yield processes, stop


def train(
    stage: Stage,
    config: LoopConfig,
    folder: Path,
    recipe: dict[str, Any],
    source: Path | None = None,
    within: tuple[Processes, StopSignal] | None = None,
    replan: Replan | None = None,
) -> dict[str, float]:
    """Train to `config.optim.steps` in `folder`, continuing from its newest whole checkpoint; returns the best metrics.

    `recipe` and the file `source` are copied there; `within` is a `session` that was begun; `replan` is asked after
    every evaluation for the configuration to go on with. A SIGTERM or SIGINT finishes the step, writes a checkpoint and
    raises `SystemExit(75)`. Raises `NonFiniteLossError`, and `CheckpointError` for checkpoints that cannot be read or
    written.
    """
    with nullcontext(within) if within else session(folder, stage.run, config) as (processes, stop):
        run, state = Training(stage, config, processes), TrainState()
        if newest := newest_checkpoint(folder, processes):
            state = load_checkpoint(newest, run.tensors(), processes)
        if processes.first:
            if newest:
                print(f"continuing {folder} from step {state.step}", flush=True)
            asked = {"recipe": recipe, "loop": config_to_dict(config)}
            note_start(folder, state.step, asked, source, environment_of(stage.run, config, processes))
        log = RunLog(folder, state.step, config.tracker, recipe, processes.first)
        with log, sdpa_kernel(attention_on(run.device)):
            if config.best and state.step == 0:
                log.write("validation", 0, _first_metrics(run, stop))
            _loop(run, state, folder, log, stop, replan)
    return state.best or {}


def environment_of(run: Any, config: LoopConfig, processes: Processes) -> dict[str, Any]:
    """What the results of a run depend on beside its recipe, for `note_start`."""
    device = pick_device(config.device)
    return {
        "device": describe_device(device),
        "dtype": name_of(compute_dtype(device, config.precision)),
        "threads": torch.get_num_threads(),
        "processes": processes.count,
        "data": data_of(run),
    }


def data_of(run: Any) -> str:
    """A hash of the cache that a run trains on."""
    index = Path(run.cache) / "index.json"
    return content_hash(index) if index.is_file() else ""  # whoever reads the cache raises


def attention_on(device: torch.device) -> list[SDPBackend]:
    """Kinds of attention to train with."""
    # torch's fused one for CPUs runs backward at 8 GFLOP/s on short sequences: plain products are 1.2× faster
    return [SDPBackend.MATH] if device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def _loop(run: Training, state: TrainState, folder: Path, log: RunLog, stop: StopSignal, replan: Replan | None) -> None:
    config = run.config
    speed = Speed(config, run.device, state.step)
    batches = draw_batches(run, state.step)
    kept = (state.step, state.evaluated)
    began_s = time.monotonic() - state.trained_s
    since, since_s = state.step, state.trained_s  # the last evaluation
    while True:
        state.trained_s = time.monotonic() - began_s
        finished = state.step >= config.optim.steps
        due = state.step > state.evaluated and (finished or state.step % config.evaluate_every == 0)
        step_s = (state.trained_s - since_s) / max(1, state.step - since)
        cut = due and not _evaluate(run, state, folder, log, stop)
        if due and not cut:
            since, since_s = state.step, time.monotonic() - began_s
            if replan and not finished:
                run.config = speed.config = config = replan(state.step, step_s, since_s)
        stopping = run.processes.any(stop.asked)
        keeping = finished or stopping or state.step % config.checkpoint_every == 0
        if keeping and (state.step, state.evaluated) != kept:
            save_checkpoint(folder, state, run.tensors(), run.processes)
            kept = (state.step, state.evaluated)
        if finished and not cut:
            return
        if stopping:
            if run.processes.first:
                print(f"stopped at step {state.step}; the same command continues", flush=True)
            raise Stopped
        with speed.watch.stage("data"):
            batch = next(batches)
        logs = (state.step + 1) % config.log_every == 0 or state.step == 0
        with speed.watch.stage("step"), speed.working(batch):
            scalars = train_step(run, state, batch)
        state.step += 1
        if config.log_samples:
            log.append({"kind": "samples", "step": state.step, "samples": run.samples(state.step - 1).tolist()})
        if scalars is None:
            log.write("skipped", state.step, {"skipped": float(state.skipped)})
        elif logs:
            scalars |= {REPLACED: float(state.replaced)} if state.replaced else {}
            log.write("train", state.step, {**scalars, "trained_s": state.trained_s, **speed.since_last(state.step)})
        else:
            log.heartbeat(state.step, config.optim.steps, scalars["loss"])


def draw_batches(run: Training, step: int) -> Iterator[dict[int, Any]]:
    """This process's micro-batches, step after step; with `prefetch` drawn one step ahead, in a thread."""
    stage, jobs = run.stage, run.jobs(step)
    made = stage.batches(jobs) if isinstance(stage, Streaming) else starmap(stage.batch, jobs)

    def draw() -> dict[int, Any]:
        return {i: next(made) for i in run.own_micro_batches}

    if not run.config.prefetch:
        while True:
            yield draw()
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(draw)
        while True:
            batch = ahead.result()
            ahead = thread.submit(draw)
            yield batch


def train_step(run: Training, state: TrainState, batches: dict[int, Any]) -> dict[str, float] | None:
    """One update of the weights, and what to log of it; None for a step that was left out as not finite."""
    step = state.step
    run.stage.module.train()
    run.stage.module.zero_grad(set_to_none=True)
    scalars, terms = [], torch.tensor([run.stage.weight(batch) for batch in batches.values()], dtype=torch.float64)
    shares = terms / run.processes.mean(terms.sum()).clamp(min=1)  # gradients and logs are means over processes
    for share, (i, batch) in zip(shares.tolist(), batches.items(), strict=True):
        # DDP averages gradients with the last one; FSDP with each, since to wait would be to hold them whole
        last = i == run.own_micro_batches[-1]
        with run.step.no_sync() if isinstance(run.step, DistributedDataParallel) and not last else nullcontext():
            loss, values = run.loss(step, i, batch)
            (loss * share).backward()
        scalars.append({"loss": loss.detach(), **values})
    names = list(scalars[0])
    table = torch.stack([torch.stack([s[name].float() for name in names]) for s in scalars]).cpu()
    sums = (table * shares[:, None].float()).sum(0)
    found = dict(zip(names, run.processes.mean(sums).tolist(), strict=True))
    state.replaced += round(found.pop(REPLACED, 0.0) * run.config.micro_batches)
    for p in run.trained.values():  # as where another process's micro-batch has reached it
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    total_norm = nn.utils.get_total_norm([p.grad for p in run.trained.values() if p.grad is not None])
    norm = full(total_norm).item()
    if not (math.isfinite(found["loss"]) and math.isfinite(norm)):
        state.skipped += 1
        if state.skipped <= run.config.skip_non_finite:
            return None
        raise NonFiniteLossError(
            f"step {step}: loss {found['loss']}, gradient norm {norm}; {_not_finite(run, step, batches)}; samples "
            f"{run.samples(step).tolist()}"
        )
    return {**found, "gradient_norm": norm, "lr": _update(run, step, total_norm)}


def _update(run: Training, step: int, total_norm: Tensor) -> float:
    """Move weights and their average by the gradients; returns the learning rate."""
    optim = run.config.optim
    nn.utils.clip_grads_with_norm_(run.trained.values(), optim.clip_norm, total_norm)
    lr = optim.lr_at(step)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    decay = min(optim.ema_decay, (1 + step) / (10 + step))  # short memory at first, as in Karras et al. 2022
    with torch.no_grad():
        weights = [local(p.detach()) for p in run.trained.values()]
        torch._foreach_lerp_([local(average) for average in run.ema.values()], weights, 1 - decay)
    return lr


def _not_finite(run: Training, step: int, batches: dict[int, Any]) -> str:
    """The first of a failed step's weights, module outputs or gradients that is not finite."""
    for name, p in run.trained.items():
        if not is_finite(local(p)):
            return f"weight {name} was so before it"
    gradients = [n for n, p in run.trained.items() if p.grad is not None and not is_finite(local(p.grad))]
    outputs: list[str] = []

    def note(name: str, output: Any) -> None:
        if not all(is_finite(value) for value in tree_leaves(output) if isinstance(value, Tensor)):
            outputs.append(name)

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, module in run.stage.module.named_modules()
    ]
    with torch.no_grad():
        for i, batch in batches.items():
            run.loss(step, i, batch)
    for hook in hooks:
        hook.remove()
    if outputs:
        return f"the first module to give NaN or infinity is {outputs[0] or 'the whole'}"
    return f"all modules' outputs are finite; gradients are not, of {gradients[:3]}"


def _evaluate(run: Training, state: TrainState, folder: Path, log: RunLog, stop: StopSignal) -> bool:
    """Validate the EMA weights, and export them where they are the best so far; False where a signal cut it short."""
    raw, result = {name: p.detach().clone() for name, p in run.trained.items()}, None
    copy_into(run.trained, run.ema)
    with run.validating():
        with suppress(Stopped), stop.cutting(), Progress("validating"):
            result = run.stage.validate()
        cut = run.processes.any(result is None)
        if result is not None and not cut:
            metrics, sheet = run.processes.from_first(result)
            _keep_evaluation(run, state, folder, log, metrics, sheet)
    copy_into(run.trained, raw)
    return not cut


def _keep_evaluation(
    run: Training, state: TrainState, folder: Path, log: RunLog, metrics: dict[str, float], sheet: Any
) -> None:
    log.write("validation", state.step, metrics)
    if sheet is not None:
        log.sheet(state.step, sheet)
    state.evaluated = state.step
    name, sign = run.best_metric(metrics)
    unfit = [n for n, average in run.ema.items() if not is_finite(local(average))]
    if not math.isfinite(metrics[name]) or run.processes.any(bool(unfit)):
        raise NonFiniteLossError(f"step {state.step}: validation {name} is {metrics[name]}; not finite: {unfit[:3]}")
    better = state.best is None or name not in state.best or sign * metrics[name] >= sign * state.best[name]
    if better:
        state.best = {**metrics, "step": float(state.step)}
    for target in ("last", "best")[: 1 + better] if run.processes.first else ():
        with whole_folder(folder / target) as new:  # a run killed here repeats it
            run.stage.export(new)
            for path in new.rglob("*"):
                flush(path)
    run.processes.wait()


def _first_metrics(run: Training, stop: StopSignal) -> dict[str, float]:
    """Validate before the first step where `best` is asked for, to see that this metric exists.

    Statistics that validation fits are put back, so that a run is the same with `best` and without.
    """
    before = {name: local(buffer).clone() for name, buffer in run.buffers.items()}
    with run.validating(), stop.cutting(), Progress("validating"):
        metrics = run.stage.validate()[0]
        run.best_metric(metrics)
    copy_into(run.buffers, before)
    return metrics
