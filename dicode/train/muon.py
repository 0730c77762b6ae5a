"""Muon (Jordan et al. 2024): the momentum of a matrix, orthogonalised, is its update.

As `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, but for where it computes: in a dtype that the device has,
matrices of one shape together, and each put together once from the shares that processes hold of it.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7
AT_ONCE = 2**26  # numbers orthogonalised together, which are whole in every process meanwhile


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
        weights = [_own(p) for p in matrices]
        gradients = [_own(p.grad) for p in matrices if p.grad is not None]
        moments = [_own(self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))) for p in matrices]
        torch._foreach_lerp_(moments, gradients, 1 - momentum)
        ahead = torch.stack(torch._foreach_lerp(gradients, moments, momentum)).to(self.dtype)
        shape, mesh = matrices[0].shape, matrices[0].device_mesh if isinstance(matrices[0], DTensor) else None
        if mesh is not None:  # rows of each matrix are here, the others in other processes
            size, stride = torch.Size([len(matrices), *shape]), (shape.numel(), shape[1], 1)
            ahead = DTensor.from_local(
                ahead, mesh, [Shard(1)], run_check=False, shape=size, stride=stride
            ).full_tensor()
        turned = orthogonalised(ahead)
        if mesh is not None:
            turned = distribute_tensor(turned, mesh, [Shard(1)], src_data_rank=None).to_local()
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_add_(weights, list(turned.to(weights[0].dtype).unbind()), alpha=-0.2 * lr * max(shape) ** 0.5)


def _own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
