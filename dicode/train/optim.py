"""What turns gradients into weights: schedule and optimizers."""

import torch
from torch import nn

from dicode.train.lora import LowRank
from dicode.train.muon import Muon
from dicode.train.runs import OptimConfig

STATE_OF: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq", "step"),
    Muon: ("momentum_buffer",),
}


def make_optimizers(
    module: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """The optimizers of a module's trained parameters, each with its own share of them; Muon computes in `dtype`."""
    trained = [p for p in module.parameters() if p.requires_grad]
    linear = {m.weight for m in module.modules() if isinstance(m, nn.Linear)} if config.optimizer == "muon" else set()
    decays = decayed(module)
    matrices = [p for p in trained if p in linear]
    groups = [
        {"params": [p for p in trained if p not in linear and (p in decays) == decay], "weight_decay": weight_decay}
        for decay, weight_decay in ((True, config.weight_decay), (False, 0.0))
    ]
    made: list[torch.optim.Optimizer] = []
    if others := [group for group in groups if group["params"]]:
        made.append(torch.optim.AdamW(others, config.lr, (config.beta1, config.beta2), fused=True))
    if matrices:
        made.append(Muon(matrices, config.lr, config.weight_decay, config.beta2, dtype))
    for optimizer in made:  # what they would make at their first step, so that a checkpoint always has all of it
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            for key in STATE_OF[type(optimizer)]:
                count = key == "step"
                optimizer.state[p][key] = torch.zeros((), device=p.device) if count else torch.zeros_like(p).detach()
    return made


def decayed(module: nn.Module) -> set[nn.Parameter]:
    """The weights of linear layers, convolutions and attention, and adapters of any layer."""
    return {
        p
        for layer in module.modules()
        if not isinstance(layer, nn.Embedding)
        for name, p in layer.named_parameters(recurse=False)
        if p.ndim >= 2 and (name.endswith("weight") or isinstance(layer, LowRank))
    }
