"""Training checkpoints: weights, EMA and optimizer as safetensors, written atomically, the two newest kept."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dicode.hub import CheckpointError

KEPT = 2
STATE_OF = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq", "step"), torch.optim.Muon: ("momentum_buffer",)}


@dataclass
class TrainState:
    """Where a run stands: steps done, best validation metrics so far, seconds spent training."""

    step: int
    best: dict[str, float] | None
    trained_s: float


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete `step-…` folder of a run, or None."""
    found = sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())
    return found[-1] if found else None


def save_checkpoint(
    folder: Path,
    state: TrainState,
    trained: dict[str, nn.Parameter],
    ema: dict[str, Tensor],
    buffers: dict[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
) -> Path:
    """Write `folder/step-…` under a temporary name, flush it to disk, rename it; older ones beyond two are deleted."""
    final = folder / f"step-{state.step:08d}"
    temporary = folder / f".writing-{state.step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    moments = {
        f"{key}/{name}": value
        for name, p in trained.items()
        for optimizer in optimizers
        for key, value in optimizer.state.get(p, {}).items()
    }
    groups = {
        "weights": {n: p.detach() for n, p in trained.items()},
        "ema": ema,
        "buffers": buffers,
        "optimizer": moments,
    }
    for name, tensors in groups.items():
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary / f"{name}.safetensors")
    (temporary / "state.json").write_text(json.dumps(asdict(state)))
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)
    return final


def load_checkpoint(
    path: Path,
    trained: dict[str, nn.Parameter],
    ema: dict[str, Tensor],
    buffers: dict[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
) -> TrainState:
    """Restore a run from one checkpoint; tensors that do not match the recipe raise `CheckpointError`."""
    weights = load_file(path / "weights.safetensors")
    averages = load_file(path / "ema.safetensors")
    kept = load_file(path / "buffers.safetensors")
    moments = load_file(path / "optimizer.safetensors")
    if differing := sorted((weights.keys() ^ trained.keys()) | (kept.keys() ^ buffers.keys())):
        raise CheckpointError(f"{path}: made by another recipe; differing tensors: {differing[:5]}")
    held = {**weights, **kept}
    if misshapen := [n for n, t in {**trained, **buffers}.items() if t.shape != held[n].shape]:
        raise CheckpointError(f"{path}: made by another recipe; tensors of other shapes: {misshapen[:5]}")
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(kept[name])
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
            ema[name].copy_(averages[name])
    names = {parameter: name for name, parameter in trained.items()}
    for optimizer in optimizers:
        keys = STATE_OF[type(optimizer)]
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            name = names[parameter]
            if missing := [key for key in keys if f"{key}/{name}" not in moments]:
                raise CheckpointError(f"{path}: made with another optimizer; {name} has no {', '.join(missing)}")
            found = {key: moments[f"{key}/{name}"] for key in keys}
            # in the parameter's memory layout: fused AdamW walks both storages side by side
            optimizer.state[parameter] = {
                key: torch.empty_like(parameter).copy_(m) if m.shape == parameter.shape else m.clone()
                for key, m in found.items()
            }
    return TrainState(**json.loads((path / "state.json").read_text()))
