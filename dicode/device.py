"""Which device to compute on and in which type; what devices are called, how fast they are, memory that was used."""

import math
import os
import platform
import re
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from dicode.config import Precision as Precision

ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # environment variables of oneDNN, to try older processors
NO_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
MEASURED_S = 0.05  # of matrix products a size


def pick_device(name: str) -> torch.device:
    """The device of this name, `auto` the machine's accelerator or cpu. Raises `ValueError` for one that fails."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        trial = torch.ones(2, device=name)
        if trial.sum().item() != 2 or not trial.untyped_storage().nbytes():
            raise RuntimeError("it does not compute")
        return trial.device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ImportError) as error:  # by the device
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"device {name}: cannot be used here ({reason}); cpu always can") from error


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware; emulation is up to 300 times slower.

    oneDNN also claims AVX-512 without such an instruction, where float32 is four times faster.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    limited = any(os.environ.get(name, "").upper() in NO_BFLOAT16 for name in ISA_LIMITS)
    if limited or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return not is_x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compute_dtype(device: torch.device, precision: Precision = "auto") -> torch.dtype:
    """The dtype of matrix products in training and encoding: `auto` is bfloat16 only where the device has it."""
    if precision == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return getattr(torch, precision)


def autocast(device: torch.device, precision: Precision = "auto") -> torch.autocast:
    """Autocast to `compute_dtype`, disabled where that is float32."""
    dtype = compute_dtype(device, precision)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def describe_device(device: str | torch.device = "cpu") -> str:
    """The device in words, e.g. 'cpu: Intel Xeon, 2 cores, 1 threads' or 'cuda: NVIDIA H100 80GB HBM3'."""
    device = torch.device(device)
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu: {_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{device.type}: {platform.platform()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory_mib() -> float | None:
    """Peak memory of this process; None on Windows.

    On Linux `getrusage` includes the peak of the parent process, so the kernel's status file comes first.
    """
    status = Path("/proc/self/status")
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(peak[1]) / 2**10
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def available_bytes(device: torch.device) -> float:
    """Memory that is free on a GPU, or that this machine can still give; infinite where it does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:  # not Linux
        found = None
    return int(found[1]) * 2.0**10 if found else math.inf


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of tensors on an accelerator, or of the process on a CPU (0 on Windows)."""
    if device.type == "cpu":
        return (peak_memory_mib() or 0.0) / 1024
    return torch.accelerator.max_memory_allocated(device) / 2**30


@dataclass(frozen=True)
class Gpu:
    """A model of GPU."""

    pattern: str  # of its driver's name for it
    memory_gib: int
    peak_flops: float  # a second: dense matrix products in bfloat16, accumulated in float32


# From NVIDIA's data sheets (GeForce: the architectures' white papers); where they print rates "with sparsity", half.
GPUS = {
    "a100-40gb": Gpu(r"A100.*40GB", 40, 312e12),
    "a100-80gb": Gpu(r"A100.*80GB", 80, 312e12),
    "h100-pcie": Gpu(r"H100 PCIe", 80, 756e12),
    "h100-80gb": Gpu(r"H100 80GB HBM3", 80, 989e12),  # the SXM module
    "h200": Gpu(r"H200$", 141, 989e12),
    "b200": Gpu(r"\bB200", 180, 2250e12),
    "l4": Gpu(r"L4$", 24, 121e12),
    "l40s": Gpu(r"L40S", 48, 362e12),
    "a6000": Gpu(r"RTX A6000", 48, 154.8e12),
    "rtx-3090": Gpu(r"RTX 3090$", 24, 71e12),
    "rtx-4090": Gpu(r"RTX 4090$", 24, 165.2e12),
}


def peak_flops(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOPs a second of matrix products: by data sheet for bfloat16 on a GPU of `GPUS`, else measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for gpu in GPUS.values():
            if re.search(gpu.pattern, name):
                return gpu.peak_flops
    return measured_flops(device, dtype)


@cache
def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second at the fastest of three sizes of matrix products; takes a quarter of a second, once."""
    best = 0.0
    for size in (512, 2048, 8192):
        if best and 2 * size**3 / best > 2 * MEASURED_S:
            break  # CPUs end at 2048, without bfloat16 units at 512; only 8192 occupies a large GPU
        matrix, flops, spent_s = torch.ones(size, size, dtype=dtype, device=device), 0, 0.0
        (matrix @ matrix)[0, 0].item()  # the first product also loads the library
        began_s = time.perf_counter()
        while spent_s < MEASURED_S:
            (matrix @ matrix)[0, 0].item()
            flops, spent_s = flops + 2 * size**3, time.perf_counter() - began_s
        best = max(best, flops / spent_s)
    return best
