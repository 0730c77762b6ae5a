"""How far apart samples of one caption are, against its real clips."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dicode.features.metrics import Interval, bootstrap_interval, mean_pair_distance


@dataclass(frozen=True)
class Diversity:
    """Mean distance of two samples of a caption over that of two real clips of it: 1 as diverse as they are."""

    ratio: float  # of the means over captions
    interval: Interval  # 95 %, over captions
    generated: float
    real: float
    n: int  # captions


def diversity(
    features: Sequence[Float[ndarray, "_s width"]], real: Sequence[Float[ndarray, "_r width"]], seed: int = 0
) -> Diversity:
    """Compare how far apart a caption's samples are with its real variants, an emoji's skin tones for example.

    Two or more a caption on either side, `features` and `real` in the same order of captions (see
    `captions_with_variants`). Raises `ValueError` where a caption's real variants are all the same. `seed` is the
    bootstrap's.
    """
    rows = np.array([[mean_pair_distance(a), mean_pair_distance(b)] for a, b in zip(features, real, strict=True)])
    if (same := np.flatnonzero(rows[:, 1] == 0)).size:
        raise ValueError(f"the real variants of {len(same)} captions are all the same, first: caption {same[0]}")
    return Diversity(
        ratio=float(rows[:, 0].sum() / rows[:, 1].sum()),
        interval=bootstrap_interval(lambda drawn: drawn[:, 0].sum() / drawn[:, 1].sum(), rows, seed=seed),
        generated=float(rows[:, 0].mean()),
        real=float(rows[:, 1].mean()),
        n=len(rows),
    )


def captions_with_variants(captions: Sequence[str], least: int = 4) -> dict[str, list[int]]:
    """Captions that at least `least` clips carry, as the first of these spells it, with the clips' positions.

    Captions are compared without case and surplus spaces, and come in alphabetical order.
    """
    carriers: dict[str, list[int]] = {}
    for clip, caption in enumerate(captions):
        if plain := plain_caption(caption):
            carriers.setdefault(plain, []).append(clip)
    return {captions[clips[0]]: clips for _, clips in sorted(carriers.items()) if len(clips) >= least}


def plain_caption(caption: str) -> str:
    """A caption without case and surplus spaces, as captions are compared."""
    return " ".join(caption.casefold().split())
