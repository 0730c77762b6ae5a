"""A step's gradient is the mean over all its terms, into however many micro-batches its batch was cut."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dicode.train.checkpoint import TrainState
from dicode.train.distributed import Processes
from dicode.train.loop import Training, draw_batches, train_step
from dicode.train.runs import LoopConfig, OptimConfig

TERMS = torch.tensor([1, 5, 2, 0, 4, 1, 3, 0])  # key frames of each sample


class Masked:
    """A regression whose samples have unlike numbers of terms, none of two of them."""

    best = "-loss"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = nn.Linear(3, 1)
        self.inputs, self.targets = torch.randn(8, 5, 3), torch.randn(8, 5, 1)
        self.run: Any = SimpleNamespace(cache="none")

    def num_samples(self) -> int:
        return 8

    def by_size(self, indices: Tensor) -> Tensor:
        return indices

    def batch(self, indices: Tensor, generator: torch.Generator) -> Any:
        mask = torch.arange(5) < TERMS[indices][:, None]
        return {"inputs": self.inputs[indices], "targets": self.targets[indices], "mask": mask}

    def loss(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        errors = (self.module(batch["inputs"]) - batch["targets"]).square()[..., 0] * batch["mask"]
        return errors.sum() / batch["mask"].sum().clamp(min=1), {}

    def weight(self, batch: Any) -> float:
        return float(batch["mask"].sum())

    def validate(self) -> Any: ...

    def export(self, folder: Any) -> None: ...


def gradient(micro_batches: int) -> tuple[float, list[Tensor]]:
    stage = Masked()
    optim = OptimConfig(batch_size=8, lr=0.0, clip_norm=1e9)
    run = Training(stage, LoopConfig(precision="float32", micro_batches=micro_batches, optim=optim), Processes())
    found = train_step(run, TrainState(), next(draw_batches(run, 0)))
    assert found is not None
    return found["loss"], [p.grad.clone() for p in stage.module.parameters() if p.grad is not None]


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_the_split_into_pieces_changes_neither_loss_nor_gradient(micro_batches: int) -> None:
    loss, gradients = gradient(1)
    stage = Masked()
    whole, _ = stage.loss(stage.batch(torch.arange(8), torch.Generator()), torch.Generator())
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    other_loss, others = gradient(micro_batches)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
