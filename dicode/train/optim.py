"""What turns gradients into weights: schedule and optimizers."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

STATE_OF = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq", "step"), torch.optim.Muon: ("momentum_buffer",)}


@dataclass(frozen=True)
class OptimConfig:
    """Warm-up, a constant stretch, and a linear decay over the last `decay_fraction` of the steps.

    `muon` orthogonalises the updates of linear layers' weights, scaled to AdamW's size so that one `lr` serves both
    (arXiv 2502.16982); all other parameters stay with AdamW.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    steps: int = 10_000
    batch_size: int = 32  # samples a step, of all processes together
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
    for optimizer in made:  # what they would make at their first step, so that a checkpoint always has all of it
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            for key in STATE_OF[type(optimizer)]:
                count = key == "step"
                optimizer.state[p][key] = torch.zeros((), device=p.device) if count else torch.zeros_like(p).detach()
    return made
