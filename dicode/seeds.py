"""Randomness that depends on what a sample is, never on how it is batched, ordered or distributed."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SeedPlan:
    """A seed, and another one from some clip on: what comes before that clip stays as it was."""

    seed: int
    reroll_from: int | None = None  # the first clip with the other seed
    reroll_seed: int = 0

    def __post_init__(self) -> None:
        """Raises `ValueError` for a plan that can be no re-roll."""
        if self.reroll_from is None:
            return
        if self.reroll_from < 0:
            raise ValueError(f"reroll_from: expected the number of a clip, from 0, got {self.reroll_from}")
        if self.reroll_seed == self.seed:
            raise ValueError(f"reroll_seed: expected another seed than the video's, got {self.seed} for both")

    def of_clip(self, clip: int) -> int:
        """The seed of this clip."""
        return self.seed if self.reroll_from is None or clip < self.reroll_from else self.reroll_seed


def seed_of_clip(seed: int | SeedPlan, clip: int) -> int:
    """The seed of a clip where one seed or a plan was given."""
    return seed.of_clip(clip) if isinstance(seed, SeedPlan) else seed


def generator_for(seed: int, *place: int | str) -> torch.Generator:
    """A CPU generator for one place in the work, e.g. `generator_for(seed, "clip", sample_index, clip_index)`.

    The stream is a hash of all arguments, so two places never share one and neighbouring seeds are independent.
    """
    digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal(shape: tuple[int, ...], seed: int, *place: int | str) -> Tensor:
    """Standard-normal float32 noise for one place, drawn on the CPU so that every device sees the same values."""
    return torch.randn(shape, generator=generator_for(seed, *place))
