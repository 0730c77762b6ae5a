"""Where to compute."""

import torch


def pick_device(name: str) -> torch.device:
    """`auto` → the accelerator of this machine or cpu; raises `ValueError` for a device that cannot be used."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # which of them depends on the device
        raise ValueError(f"device {name}: cannot be used here ({str(error).splitlines()[0]})") from error
