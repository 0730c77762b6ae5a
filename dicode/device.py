"""Which device to compute on, and in which type."""

import os
import platform

import torch

from dicode.config import Precision as Precision

ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # environment variables of oneDNN, to try older processors
NO_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


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
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:  # depends on the device
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
