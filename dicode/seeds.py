"""Randomness that depends on what a sample is, never on how it is batched, ordered or distributed."""

import hashlib

import torch
from torch import Tensor


def generator_for(seed: int, *place: int | str) -> torch.Generator:
    """A CPU generator for one place in the work, e.g. `generator_for(seed, "clip", sample_index, clip_index)`.

    The stream is a hash of all arguments, so two places never share one and neighbouring seeds are independent.
    """
    digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal(shape: tuple[int, ...], seed: int, *place: int | str) -> Tensor:
    """Standard-normal float32 noise for one place, drawn on the CPU so that every device sees the same values."""
    return torch.randn(shape, generator=generator_for(seed, *place))
