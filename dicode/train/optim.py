"""What turns gradients into weights: schedule and optimizers."""

import torch
from torch import nn

from dicode.train.runs import OptimConfig

STATE_OF = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq", "step"), torch.optim.Muon: ("momentum_buffer",)}


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
