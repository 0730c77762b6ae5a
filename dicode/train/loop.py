"""One training loop for every stage: resumable, logged, and a pure function of its seed.

The batch, the noise and the learning rate of a step depend on (seed, step) alone, so a run that was interrupted and
continued is bit-equal to one that was not. The same command continues a run.
"""

import json
import math
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.tensorboard import SummaryWriter

from dicode.device import pick_device
from dicode.hub import config_to_dict
from dicode.seeds import generator_for
from dicode.train.checkpoint import TrainState, latest_checkpoint, load_checkpoint, save_checkpoint

RESUME_EXIT_CODE = 75  # EX_TEMPFAIL: stopped by a signal after a checkpoint; the same command continues


@dataclass(frozen=True)
class OptimConfig:
    """Warm-up, a constant stretch, and a linear decay over the last `decay_fraction` of the steps.

    `muon` orthogonalises the updates of linear layers' weights, scaled to AdamW's size so that one `lr` serves both
    (arXiv 2502.16982); all other parameters stay with AdamW.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    steps: int = 10_000
    batch_size: int = 32
    lr: float = 1e-3
    warmup_steps: int = 200
    decay_fraction: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999

    def lr_at(self, step: int) -> float:
        """Learning rate of `step`, counted from 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        left = (self.steps - step) / max(1, round(self.steps * self.decay_fraction))
        return self.lr * min(warm, 1.0, left)


@dataclass(frozen=True)
class LoopConfig:
    """What the loop itself needs; `bf16` is autocast with float32 weights, for machines that have bf16 units."""

    seed: int = 0
    device: str = "auto"
    bf16: bool = True
    compile: bool = False  # torch.compile: a minute once, then 1.4× the speed on CPUs; language model (docs/log.md)
    log_every: int = 20
    evaluate_every: int = 1000
    checkpoint_every: int = 500
    optim: OptimConfig = field(default_factory=OptimConfig)


@runtime_checkable
class Stage(Protocol):
    """What is trained: a module, its batches, its loss, its validation. `best` names the metric that picks weights."""

    best: str  # validation metric; a leading '-' means lower is better

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        ...

    def num_samples(self) -> int:
        """Training samples an epoch."""
        ...

    def batch(self, indices: Tensor, generator: torch.Generator) -> Any:
        """The batch of these sample indices; augmentation draws from the generator alone."""
        ...

    def loss(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss to minimise and named scalars to log."""
        ...

    def validate(self) -> tuple[dict[str, float], Image.Image | None]:
        """Metrics on the validation split with the module as it stands, and a contact sheet."""
        ...

    def export(self, folder: Path) -> None:
        """Write the part of a checkpoint folder that this stage makes."""
        ...


class NonFiniteLossError(RuntimeError):
    """Training met NaN or infinity; nothing of that step was kept."""


def sample_indices(num_samples: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Sample numbers of one step: consecutive pieces of one permutation an epoch, each sample once an epoch."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    orders: dict[int, Tensor] = {}
    picked = []
    for position in positions:
        epoch, place = divmod(position, num_samples)
        if epoch not in orders:
            orders[epoch] = torch.randperm(num_samples, generator=generator_for(seed, "epoch", epoch))
        picked.append(orders[epoch][place])
    return torch.stack(picked)


def make_optimizers(module: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of a module's trained parameters, each with its own share of them."""
    trained = [p for p in module.parameters() if p.requires_grad]
    linear = {m.weight for m in module.modules() if isinstance(m, nn.Linear)} if config.optimizer == "muon" else set()
    matrices = [p for p in trained if p in linear]
    others = [p for p in trained if p not in linear]
    made: list[torch.optim.Optimizer] = []
    if others:
        betas = (config.beta1, config.beta2)
        made.append(torch.optim.AdamW(others, config.lr, betas, weight_decay=config.weight_decay, fused=True))
    if matrices:
        momentum, decay = config.beta2, config.weight_decay
        made.append(torch.optim.Muon(matrices, config.lr, decay, momentum, adjust_lr_fn="match_rms_adamw"))
    return made


def train(stage: Stage, config: LoopConfig, folder: Path, recipe: dict[str, Any]) -> dict[str, float]:
    """Train to `config.optim.steps` in `folder`, continuing from its newest checkpoint; returns the best metrics.

    A SIGTERM or SIGINT finishes the step, writes a checkpoint and raises `SystemExit(75)`.
    """
    device = pick_device(config.device)
    module = stage.module.to(device)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(module, config.optim)
    ema = {name: p.detach().clone() for name, p in trained.items()}
    buffers = dict(module.named_buffers())
    state = TrainState(step=0, best=None, trained_s=0.0)
    folder.mkdir(parents=True, exist_ok=True)
    asked = json.dumps({"recipe": recipe, "loop": config_to_dict(config)}, indent=2, default=str) + "\n"
    if newest := latest_checkpoint(folder):
        state = load_checkpoint(newest, trained, ema, buffers, optimizers)
        print(f"continuing {folder} from step {state.step}", flush=True)
        if asked != (folder / "recipe.json").read_text():
            changed = folder / f"recipe-from-step-{state.step:08d}.json"
            changed.write_text(asked)
            print(f"the recipe is not the one the run began with: see {changed}", flush=True)
    else:
        (folder / "recipe.json").write_text(asked)
    log = RunLog(folder)
    # torch's fused attention for CPUs runs backward at 8 GFLOP/s on short sequences; plain products train 1.2× faster
    attention = [SDPBackend.MATH] if device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with log, StopSignal() as stop, sdpa_kernel(attention):
        started_s = time.monotonic() - state.trained_s
        while state.step < config.optim.steps:
            scalars = _step(stage, config, optimizers, trained, ema, state.step)
            state.step += 1
            state.trained_s = time.monotonic() - started_s
            if state.step % config.log_every == 0 or state.step == 1:
                log.write("train", state.step, {**scalars, "trained_s": state.trained_s})
            last = state.step == config.optim.steps
            if state.step % config.evaluate_every == 0 or last:
                _evaluate(stage, trained, ema, state, log, folder)
            if state.step % config.checkpoint_every == 0 or last or stop.asked:
                save_checkpoint(folder, state, trained, ema, buffers, optimizers)
            if stop.asked and not last:
                print(f"stopped at step {state.step}; the same command continues", flush=True)
                raise SystemExit(RESUME_EXIT_CODE)
    return {} if state.best is None else state.best


def _step(
    stage: Stage,
    config: LoopConfig,
    optimizers: list[torch.optim.Optimizer],
    trained: dict[str, nn.Parameter],
    ema: dict[str, Tensor],
    step: int,
) -> dict[str, float]:
    optim = config.optim
    device = next(iter(trained.values())).device
    indices = sample_indices(stage.num_samples(), optim.batch_size, config.seed, step)
    batch = stage.batch(indices, generator_for(config.seed, "batch", step))
    torch.manual_seed(config.seed * 1_000_003 + step)  # dropout inside library modules has no generator argument
    stage.module.train()
    with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
        loss, scalars = stage.loss(batch, generator_for(config.seed, "noise", step))
    stage.module.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(trained.values(), optim.clip_norm)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        bad = [n for n, p in trained.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
        raise NonFiniteLossError(
            f"step {step}: loss {loss.item()}, gradient norm {norm.item()}; first modules with non-finite gradients: "
            f"{bad[:3]}; samples {indices.tolist()[:8]}"
        )
    lr = optim.lr_at(step)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    decay = min(optim.ema_decay, (1 + step) / (10 + step))  # short memory at first, as in Karras et al. 2022
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in trained.values()], 1 - decay)
    return {
        "loss": loss.item(),
        **{name: value.item() for name, value in scalars.items()},
        "gradient_norm": norm.item(),
        "lr": lr,
    }


def _evaluate(
    stage: Stage,
    trained: dict[str, nn.Parameter],
    ema: dict[str, Tensor],
    state: TrainState,
    log: "RunLog",
    folder: Path,
) -> None:
    """Validate the EMA weights, and export them where they are the best so far."""
    raw = {name: p.detach().clone() for name, p in trained.items()}
    _copy_into(trained, ema)
    stage.module.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # its shapes would each be compiled anew
        metrics, sheet = stage.validate()
    log.write("validation", state.step, metrics)
    if sheet is not None:
        log.sheet(state.step, sheet)
    name = stage.best.lstrip("-")
    sign = -1.0 if stage.best.startswith("-") else 1.0
    if not math.isfinite(metrics[name]):
        raise NonFiniteLossError(f"step {state.step}: validation {name} is {metrics[name]}")
    if state.best is None or sign * metrics[name] > sign * state.best[name]:
        state.best = {**metrics, "step": float(state.step)}
        stage.export(folder / "best")
    _copy_into(trained, raw)


@torch.no_grad()
def _copy_into(target: dict[str, nn.Parameter], source: dict[str, Tensor]) -> None:
    for name, parameter in target.items():
        parameter.copy_(source[name])


class RunLog:
    """`log.jsonl`, TensorBoard and `sheets/` of one run folder, and a line on the terminal."""

    def __init__(self, folder: Path):
        self.file = (folder / "log.jsonl").open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"))
        self.sheets = folder / "sheets"

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.board.close()

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Append one record to every log."""
        self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)
        print(f"{kind} {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()), flush=True)

    def sheet(self, step: int, image: Image.Image) -> None:
        """Keep the contact sheet of one evaluation."""
        self.sheets.mkdir(exist_ok=True)
        image.save(self.sheets / f"{step:07d}.png")


class StopSignal:
    """While active, SIGTERM and SIGINT only set `asked`; a second one acts as usual."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
        self.asked = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
