"""The optimizers of a run: AdamW, and Muon for the matrices of linear layers.

Muon (Jordan et al. 2024) updates a matrix by its momentum, orthogonalised. As `torch.optim.Muon` with
`adjust_lr_fn="match_rms_adamw"`, but in a dtype that the device multiplies fast, with matrices of one shape in one
batch, and each gathered once from the shards of all processes.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dicode.train.distributed import local
from dicode.train.lora import LowRank
from dicode.train.runs import OptimConfig

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7
AT_ONCE = 2**26  # numbers orthogonalised together, gathered in every process meanwhile


class Muon(torch.optim.Optimizer):
    """Updates of matrices of AdamW's size, so that one learning rate serves both (arXiv 2502.16982)."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["momentum_buffer"] = torch.zeros_like(p).detach()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all matrices that have a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for shape, matrices in alike.items():
                count = max(1, AT_ONCE // shape.numel())
                for first in range(0, len(matrices), count):
                    self._update(matrices[first : first + count], **group)

    def _update(
        self, matrices: list[nn.Parameter], lr: float, weight_decay: float, momentum: float, **_: object
    ) -> None:
        """Update matrices of one shape."""
        weights = [local(p) for p in matrices]
        gradients = [local(p.grad) for p in matrices if p.grad is not None]
        moments = [local(self.state[p]["momentum_buffer"]) for p in matrices]
        torch._foreach_lerp_(moments, gradients, 1 - momentum)
        ahead = torch.stack(torch._foreach_lerp(gradients, moments, momentum)).to(self.dtype)
        shape, mesh = matrices[0].shape, matrices[0].device_mesh if isinstance(matrices[0], DTensor) else None
        if mesh is not None:  # rows of each matrix are here, the others in other processes
            size, stride = torch.Size([len(matrices), *shape]), (shape.numel(), shape[1], 1)
            rows = DTensor.from_local(ahead, mesh, [Shard(1)], run_check=False, shape=size, stride=stride)
            ahead = rows.full_tensor()
        turned = orthogonalised(ahead)
        if mesh is not None:
            turned = distribute_tensor(turned, mesh, [Shard(1)], src_data_rank=None).to_local()
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_add_(weights, list(turned.to(weights[0].dtype).unbind()), alpha=-0.2 * lr * max(shape) ** 0.5)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices `b m n` with all singular values near 1: five Newton-Schulz iterations, in the dtype given."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp(min=EPSILON)[:, None, None]
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def make_optimizers(
    module: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """The optimizers of a module's trained parameters, AdamW first; Muon computes in `dtype`."""
    trained = [p for p in module.parameters() if p.requires_grad]
    linear = {m.weight for m in module.modules() if isinstance(m, nn.Linear)} if config.optimizer == "muon" else set()
    decays = decayed(module)
    matrices = [p for p in trained if p in linear]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p not in linear and (p in decays) == decay], "weight_decay": weight_decay}
        for decay, weight_decay in ((True, config.weight_decay), (False, 0.0))
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if others := [group for group in groups if group["params"]]:
        optimizers.append(torch.optim.AdamW(others, config.lr, (config.beta1, config.beta2), fused=True))
        for p in (p for group in others for p in group["params"]):  # from the start, as every checkpoint has it
            moments = {name: torch.zeros_like(p).detach() for name in ("exp_avg", "exp_avg_sq")}
            optimizers[0].state[p] = {**moments, "step": torch.zeros((), device=p.device)}
    if matrices:
        optimizers.append(Muon(matrices, config.lr, config.weight_decay, config.beta2, dtype))
    return optimizers


def decayed(module: nn.Module) -> set[nn.Parameter]:
    """The weights of linear layers, convolutions and attention, and adapters of any layer."""
    return {
        p
        for layer in module.modules()
        if not isinstance(layer, nn.Embedding)
        for name, p in layer.named_parameters(recurse=False)
        if p.ndim >= 2 and (name.endswith("weight") or isinstance(layer, LowRank))
    }
