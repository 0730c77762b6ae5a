"""How fast a run goes: what the log tells beside losses."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from dicode.device import peak_memory_gib
from dicode.sizing import peak_flops
from dicode.stopwatch import Stopwatch
from dicode.train.runs import LoopConfig

ESTIMATED_FROM = 20  # steps, before the time to go is known


class Speed:
    """How fast a run goes, between one look and the next."""

    def __init__(self, config: LoopConfig, device: torch.device, step: int, watch: Stopwatch):
        self.config, self.device, self.watch = config, device, watch
        self.first = self.step = step
        self.began_s = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.flops_per_s: float | None = None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the floating-point operations of the step in here; not those of compiled code, which hides them."""
        if self.config.compile:
            yield
            return
        began_s = time.perf_counter()
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops_per_s = counter.get_total_flops() / (time.perf_counter() - began_s)

    def since_last(self, step: int) -> dict[str, float]:
        """Samples a second, share of time spent waiting for data, seconds to the end, most memory so far, and MFU.

        MFU: the share of this process's device's peak that the last step used (Chowdhery et al. 2022, PaLM, B).
        """
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
        if self.flops_per_s is not None:
            values["mfu"] = self.flops_per_s / peak_flops(self.device)
        self.step, self.seconds = step, dict(self.watch.seconds)
        return values
