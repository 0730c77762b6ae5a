"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen weight W becomes W + alpha/rank · B·A; only A and B train.

They are torch parametrizations of the weights, so whatever reads a weight reads the sum: linear layers, convolutions,
embeddings, attention's fused projections. `peft` wraps layers instead, which does not fit these networks: it counts
the output adapter of `nn.MultiheadAttention` twice, and torch's fused encoder layer leaves its adapters out
(docs/finetune.md).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from dicode.config import nearest
from dicode.seeds import generator_for
from dicode.train.runs import LoRAConfig


class LowRank(nn.Module):
    """Adds alpha/rank · B·A to a weight of at least two dimensions; B starts as zero, so that nothing changes."""

    def __init__(self, weight: Tensor, config: LoRAConfig, generator: torch.Generator):
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.scale, self.dropout = config.alpha / config.rank, config.dropout
        # A starts as a linear layer's weight does, so that its size does not depend on the rank
        initial = (2 * torch.rand(config.rank, columns, generator=generator, device="cpu") - 1) / columns**0.5
        self.a = nn.Parameter(initial.to(weight.device))
        self.b = nn.Parameter(torch.zeros(rows, config.rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        meta = weight.device.type == "meta"  # sizing counts there; torch has no autocast for it
        with nullcontext() if meta else torch.autocast(weight.device.type, enabled=False):  # merged: float32 too
            a = functional.dropout(self.a, self.dropout, self.training)
            return weight + (self.scale * self.b @ a).view(weight.shape).to(weight.dtype)


def add_adapters(module: nn.Module, config: LoRAConfig, seed: int) -> None:
    """Freeze a module and give the weights of its layers adapters: linear, convolution, embedding, attention.

    Raises `ValueError` for a rank below 1, or a target that is the end of no layer's name.
    """
    if config.rank < 1 or not 0 <= config.dropout < 1:
        raise ValueError(f"lora: expected rank ≥ 1 and 0 ≤ dropout < 1, got {config.rank} and {config.dropout}")
    layers = [
        (f".{layer_name}", layer, name)
        for layer_name, layer in module.named_modules()
        for name, weight in layer.named_parameters(recurse=False)
        if name.endswith("weight") and weight.ndim >= 2
    ]
    names = sorted({name.rpartition(".")[2] for name, _, _ in layers})
    for target in config.targets:
        if not any(name.endswith(f".{target}") for name, _, _ in layers):
            raise ValueError(f"lora.targets: no layer {target!r}{nearest(target, names)}; there are {', '.join(names)}")
    generator = generator_for(seed, "lora")
    module.requires_grad_(False)
    ends = tuple(f".{target}" for target in config.targets) or ""
    for layer_name, layer, name in layers:
        if layer_name.endswith(ends):
            parametrize.register_parametrization(layer, name, LowRank(getattr(layer, name), config, generator))


def train_whole(module: nn.Module, parts: Sequence[str]) -> None:
    """Train weights with one of these in their names, too. Raises `ValueError` for a part that no name has."""
    for part in parts:
        found = [p for name, p in module.named_parameters() if part in name and ".parametrizations." not in name]
        if not found:
            raise ValueError(f"lora.whole: no weight has {part!r} in its name")
        for p in found:
            p.requires_grad_(True)


@contextmanager
def merged(module: nn.Module) -> Iterator[None]:
    """In here the module's `state_dict` has the sums under the weights' own names, as if there were no adapters."""
    if module.training:
        raise ValueError("merged() in training mode would drop parts of the adapters out: call .eval() first")

    def merge(layer: Any, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}parametrizations.")]:
            del state[name]
        with torch.no_grad():
            state.update({prefix + name: getattr(layer, name) for name in layer.parametrizations})

    layers = [layer for layer in module.modules() if parametrize.is_parametrized(layer)]
    hooks = [layer.register_state_dict_post_hook(merge) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
