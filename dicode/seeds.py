"""Randomness that depends on a sample's seed and place, never on batches, order or devices."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SeedPlan:
    """A seed for a video, and another one for some of its clips. Raises `ValueError` unless they differ.

    Clips after those have the first seed again, but go on from what is new: they change too, less than with another.
    """

    seed: int
    reroll_from: int | None = None  # the first clip with the other seed
    reroll_seed: int = 0
    reroll_clips: int | None = None  # how many have it; None: all that follow

    def __post_init__(self) -> None:
        if self.reroll_from is not None and self.reroll_from < 0:
            raise ValueError(f"reroll_from: expected the number of a clip, from 0, got {self.reroll_from}")
        if self.reroll_clips is not None and self.reroll_clips < 1:
            raise ValueError(f"reroll_clips: expected 1 or more, got {self.reroll_clips}")
        if self.reroll_from is not None and self.reroll_seed == self.seed:
            raise ValueError(f"reroll_seed: expected another seed than the video's, got {self.seed} for both")


def seed_of_clip(seed: int | SeedPlan, clip: int) -> int:
    """The seed of a clip."""
    if isinstance(seed, int):
        return seed
    if seed.reroll_from is None or clip < seed.reroll_from:
        return seed.seed
    ended = seed.reroll_clips is not None and clip >= seed.reroll_from + seed.reroll_clips
    return seed.seed if ended else seed.reroll_seed


def generator_for(seed: int, *place: int | str) -> torch.Generator:
    """A CPU generator for one place in the work, e.g. `generator_for(seed, "clip", sample_index, clip_index)`.

    The stream's seed is a hash of all arguments: streams of two places, or of neighbouring seeds, are independent.
    """
    digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal(shape: tuple[int, ...], seed: int, *place: int | str) -> Tensor:
    """Standard-normal float32 noise for one place, the same on every device."""
    return torch.randn(shape, generator=generator_for(seed, *place))
