"""How fast a run goes: what the log tells beside losses."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dicode.device import compute_dtype, describe_device, peak_memory_gib
from dicode.sizing import Meter, measured_flops, peak_flops
from dicode.stopwatch import Stopwatch
from dicode.train.runs import LoopConfig

ESTIMATED_FROM = 20  # steps, before the time to go is known
MOST_KINDS = 8  # of steps whose operations are counted: their batches have other shapes, hence other costs


def described(device: torch.device, dtype: torch.dtype) -> str:
    """What a run computes on, and how fast that multiplies matrices now."""
    rate = f"{measured_flops(device, dtype) / 1e9:,.0f} GFLOP/s"
    return f"{describe_device(device)}; {name_of(dtype)}, matrix products at {rate}"


def name_of(dtype: torch.dtype) -> str:
    """E.g. 'bfloat16'."""
    return str(dtype).removeprefix("torch.")


class Speed:
    """How fast a run goes, between one look and the next."""

    def __init__(self, config: LoopConfig, device: torch.device, step: int, watch: Stopwatch):
        self.config, self.device, self.watch = config, device, watch
        self.dtype = compute_dtype(device, config.precision)
        self.first = self.step = step
        self.began_s = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.flops: dict[Any, int] = {}  # of a step of each kind of batch
        self.computed, self.computing_s = 0, 0.0  # FLOPs, and their time, since the last look

    @contextmanager
    def working(self, batches: Any) -> Iterator[None]:
        """A step: its operations are counted where it is the first of its kind, else it is timed.

        To count takes longer than to compute. Those of compiled code are hidden.
        """
        tensors = [leaf for leaf in tree_leaves(batches) if isinstance(leaf, Tensor)]
        kind = tuple(t.item() if t.ndim == 0 and t.dtype == torch.bool else t.shape for t in tensors)
        if not self.config.compile and kind not in self.flops and len(self.flops) < MOST_KINDS:
            with Meter() as counter:  # torch's own takes operations apart, which rounds otherwise
                yield
            self.flops[kind] = counter.flops
            return
        began_s = time.perf_counter()
        yield
        if kind in self.flops:
            self.computed += self.flops[kind]
            self.computing_s += time.perf_counter() - began_s

    def mfu(self) -> float | None:
        """Share of this process's device's peak that its steps used (Chowdhery et al. 2022, PaLM, B), where known.

        A peak that was measured while other programs ran is measured again; more than all of it is never said.
        """
        if not self.computed:
            return None
        rate = self.computed / self.computing_s
        if rate > peak_flops(self.device, self.dtype):
            measured_flops.cache_clear()
        share = rate / peak_flops(self.device, self.dtype)
        return share if share <= 1 else None

    def since_last(self, step: int) -> dict[str, float]:
        """Samples a second, share of time spent waiting for data, seconds to go, most memory so far, and MFU."""
        steps, now = step - self.step, time.monotonic()
        spent = {name: s - self.seconds.get(name, 0.0) for name, s in self.watch.seconds.items()}
        computing_s = spent["data"] + spent["step"]
        left = self.config.optim.steps - step
        values = {
            "samples_per_s": steps * self.config.optim.batch_size / computing_s,
            "data_share": spent["data"] / computing_s,
            "memory_gib": peak_memory_gib(self.device),
        }
        if step - self.first >= ESTIMATED_FROM or not left:  # the first steps are slow
            values["eta_s"] = left * (now - self.began_s) / (step - self.first)  # with evaluations and checkpoints
        if (share := self.mfu()) is not None:
            values["mfu"] = share
        self.computed, self.computing_s = 0, 0.0
        self.step, self.seconds = step, dict(self.watch.seconds)
        return values
