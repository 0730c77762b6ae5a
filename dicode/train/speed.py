"""The speed of a run, for its log."""

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_leaves
from torch.utils.flop_counter import flop_registry

from dicode.device import compute_dtype, measured_flops, peak_flops, peak_memory_gib
from dicode.stopwatch import Stopwatch
from dicode.train.runs import LoopConfig

ESTIMATED_FROM = 20  # steps, before the time to go is estimated
MOST_KINDS = 8  # of batches whose operations are counted, by their shapes
FLOAT32, BFLOAT16 = 4, 2  # bytes a number


def name_of(dtype: torch.dtype) -> str:
    """E.g. 'bfloat16'."""
    return str(dtype).removeprefix("torch.")


class Speed:
    """The speed of a run, between one log line and the next."""

    def __init__(self, config: LoopConfig, device: torch.device, step: int):
        self.config, self.device, self.watch = config, device, Stopwatch()
        self.dtype = compute_dtype(device, config.precision)
        self.first = self.step = step
        self.began_s = time.monotonic()
        self.flops: dict[Any, int] = {}  # of a step of each kind of batch
        self.computed, self.computing_s = 0, 0.0  # FLOPs, and their time, since the last log line

    @contextmanager
    def working(self, batches: Any) -> Iterator[None]:
        """A step: the first of its kind has its operations counted, which is slow, others are timed.

        Compiled code hides its operations.
        """
        tensors = [leaf for leaf in tree_leaves(batches) if isinstance(leaf, Tensor)]
        kind = tuple(t.item() if t.ndim == 0 and t.dtype == torch.bool else t.shape for t in tensors)
        if not self.config.compile and kind not in self.flops and len(self.flops) < MOST_KINDS:
            with Meter() as counter:  # torch's own decomposes operations, which rounds otherwise
                yield
            self.flops[kind] = counter.flops
            return
        began_s = time.perf_counter()
        yield
        if kind in self.flops:
            self.computed += self.flops[kind]
            self.computing_s += time.perf_counter() - began_s

    def mfu(self) -> float | None:
        """Model FLOPs utilisation (Chowdhery et al. 2022, PaLM, B) of this process's device; None without a count.

        A peak that was measured while other programs ran is measured again; None above 1.
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
        data_s, left = self.watch.seconds["data"], self.config.optim.steps - step
        computing_s = data_s + self.watch.seconds["step"]
        values = {
            "samples_per_s": (step - self.step) * self.config.optim.batch_size / computing_s,
            "data_share": data_s / computing_s,
            "memory_gib": peak_memory_gib(self.device),
        }
        if step - self.first >= ESTIMATED_FROM or not left:  # the first steps are slow; evaluations count too
            values["eta_s"] = left * (time.monotonic() - self.began_s) / (step - self.first)
        if (share := self.mfu()) is not None:
            values["mfu"] = share
        self.step, self.computed, self.computing_s = step, 0, 0.0
        self.watch.seconds.clear()
        return values


class Meter(TorchDispatchMode):
    """Counts FLOPs inside it, and bytes of the tensors allocated there until they are freed.

    Every floating-point number counts `float_bytes`. The formulas for FLOPs are those of torch's `FlopCounterMode`;
    following storages is the idea of its `MemTracker`, which is no public interface.
    """

    def __init__(self, float_bytes: int = FLOAT32) -> None:
        super().__init__()
        self.float_bytes = float_bytes
        self.held: dict[int, int] = {}  # bytes of each storage
        self.flops = self.bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            held = getattr(args[0], "constant", args[0])  # the value of a fake tensor, or None
            # transformers asks whether positions are consecutive, the loss whether all key frames are real
            if held is None or held.is_meta:
                return True
            with _disable_current_modes():
                return bool(held)
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._hold(tensor)
        return result

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.held:
            self.held[key] = size * self.float_bytes // FLOAT32 if tensor.is_floating_point() else size
            self.bytes += self.held[key]
            self.peak_bytes = max(self.peak_bytes, self.bytes)
            weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        self.bytes -= self.held.pop(key)
