"""The processes of one training run: `torchrun --nproc-per-node 4 -m dicode train …`, or just this one; its signals.

A step's batch is cut into micro-batches, each with random numbers of its own; process r of n takes r, r + n, …,
and gradients are averaged over all. So batch and losses are the same whatever the number of processes.
"""

import atexit
import gc
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.checkpoint import checkpoint

from dicode.train.runs import Strategy

T = TypeVar("T")
TIMEOUT = timedelta(days=1)  # one process may compute latents or validate; one that dies ends all at once
RESUME_EXIT_CODE = 75  # EX_TEMPFAIL: stopped by a signal, with everything kept; the same command continues


class Stopped(SystemExit):
    """Leaves the process with the exit code for "resume me"."""

    def __init__(self) -> None:
        super().__init__(RESUME_EXIT_CODE)


class StopSignal:
    """While active, the first SIGTERM or SIGINT only sets `asked`; a second one acts as it would without us."""

    def __init__(self) -> None:
        self.asked = self._cuts = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def cutting(self) -> Iterator[None]:
        """In here a signal raises `Stopped` at once: for long work that leaves nothing half done behind it."""
        self._cuts = True
        try:
            if self.asked:
                raise Stopped
            yield
        finally:
            self._cuts = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
        self.asked = True
        if self._cuts:
            raise Stopped


class Processes:
    """All processes of this run; a context that joins those that `torchrun` started.

    Afterwards nothing may hold the process group: its threads let tensors go, and one that does so while Python shuts
    down aborts the process (pytorch/pytorch#190489).
    """

    _meshes: ClassVar[list[DeviceMesh]] = []  # torch's caches keep them, and each keeps its process groups

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.joined = False

    def __enter__(self) -> "Processes":
        if self.count > 1 and not dist.is_initialized():
            if torch.accelerator.is_available():
                torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group(timeout=TIMEOUT)  # nccl on GPUs, and gloo for CPU tensors
            atexit.register(gc.collect)  # what still holds it when an exception ends the process: circles of modules
            self.joined = True
        return self

    def __exit__(self, *_: object) -> None:
        if self.joined:
            dist.destroy_process_group()
            while self._meshes:
                getattr(self._meshes.pop(), "_pg_registry", {}).clear()
            gc.collect()

    @property
    def first(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """In here the first process goes first, then the others, which find its files."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def any(self, flag: bool) -> bool:
        return self.mean(torch.tensor([float(flag)]))[0].item() > 0

    def mean(self, values: Tensor) -> Tensor:
        """Mean of a float tensor over all processes, on the CPU."""
        values = values.detach().cpu()
        if self.count > 1:
            dist.all_reduce(values)
            values /= self.count
        return values

    def from_first(self, value: T) -> T:
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def arrange(self, step: nn.Module, strategy: Strategy, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The module whose `forward` is called in training, as these processes share it.

        `ddp`: weights, gradients, EMA and optimizer whole in each; `fsdp`: FSDP2, each holding its shard of them, a
        block's weights and inputs in `dtype` while it computes.
        """
        if self.count == 1:
            return step
        device = next(step.parameters()).device
        if strategy == "ddp":
            places = None if device.type == "cpu" else [device.index]
            return DistributedDataParallel(step, device_ids=places, gradient_as_bucket_view=True)
        for parameter in step.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP takes no channels-last
        mesh = init_device_mesh(device.type, (self.count,))
        self._meshes.append(mesh)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in blocks_of(step):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(step, mesh=mesh)
        return step


class StepModule(nn.Module):
    """A stage's loss as the `forward` of a module, whose hooks DDP and FSDP use."""

    def __init__(self, stage: Any) -> None:
        super().__init__()
        self.module = stage.module
        self.stage = [stage]  # in a list: a stage is no part of the module

    def forward(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        loss, values = self.stage[0].loss(batch, generator)
        if dist.is_available() and dist.is_initialized():
            # all processes expect a gradient of every weight that is whole here, also where this batch gives none
            reached = leaves_of(loss)
            unused = [p for p in self.module.parameters() if p.requires_grad and not isinstance(p, DTensor)]
            loss = loss + sum(0.0 * p.sum() for p in unused if p not in reached)
        return loss, values


def leaves_of(loss: Tensor) -> set[Tensor]:
    """The leaf tensors that a backward pass reaches."""
    found: set[Tensor] = set()
    visited, ahead = set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in visited:
            visited.add(node)
            ahead += [before for before, _ in node.next_functions]
            if isinstance(leaf := getattr(node, "variable", None), Tensor):
                found.add(leaf)
    return found


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost members of lists of modules: a transformer's blocks, a U-Net's levels."""
    for child in module.children():
        if isinstance(child, ParametrizationList):
            continue  # adapters of a weight, not layers
        if not isinstance(module, nn.ModuleList) or isinstance(child, nn.ModuleList):
            yield from blocks_of(child)
        elif any(p.requires_grad for p in child.parameters()):
            yield child


def recompute_activations(module: nn.Module) -> None:
    """Keep only the inputs of each block, and recompute the rest in the backward pass; idempotent."""
    for block in blocks_of(module):
        if getattr(block.forward, "func", None) is not checkpoint:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


@contextmanager
def whole(stage: Any, copy: nn.Module | None) -> Iterator[None]:
    """In here the stage's module has all its weights in every process, to validate and to export.

    Under FSDP it is a `copy`, taken before the weights were sharded.
    """
    if copy is None:
        yield
        return
    shared = stage.module
    weights, buffers = dict(shared.named_parameters()), dict(shared.named_buffers())
    copy.to(next(iter(weights.values())).device).train(shared.training)
    with torch.no_grad():
        for name, p in copy.named_parameters():
            p.copy_(full(weights[name]))
    copy_into(dict(copy.named_buffers()), buffers)
    stage.module = copy
    try:
        yield
    finally:
        stage.module = shared
        copy_into(buffers, dict(copy.named_buffers()))
        copy.cpu()


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """A tensor gathered from all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Overwrite tensors with others of the same names."""
    for name, tensor in target.items():
        local(tensor).copy_(local(source[name]))
