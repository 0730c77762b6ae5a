"""Power laws of a loss against size or work, with their errors."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

EXPONENTS = np.geomspace(0.005, 5, 600)  # tried where a floor makes the law non-linear
REFINEMENTS = 3  # times that the range around the best of them is tried as finely


@dataclass(frozen=True)
class PowerLaw:
    """y = scale · (x / reference)^-exponent + floor, and how far off it is."""

    scale: float  # what size is still worth at `reference`, the geometric mean of x
    exponent: float
    floor: float  # 0 where the law has none
    reference: float
    residual: float  # root mean square of measured means less the law
    errors: dict[str, float] | None  # standard errors of scale, exponent and floor, by seeds; None with one seed
    determined: bool  # whether scale and exponent are beyond their errors, the exponent none of the ends of those tried


def fit_power_law(
    x: Float[ndarray, "sizes"], y: Float[ndarray, "sizes seeds"], floor: bool = True, resamples: int = 500
) -> PowerLaw:
    """The law nearest, by least squares, to each size's mean over seeds; without a `floor` nearest in logarithms.

    Column i of `y` is of one seed, with which all sizes saw the same samples. Errors are those of a bootstrap over
    these columns, spread by √(n/(n-1)) as few seeds' own resampling falls short of it. They cover training, not the
    choice of clips. Raises `ValueError` for fewer sizes than the law has numbers, and where a law without floor meets a
    y of 0 or less.
    """
    if len(x) < 2 + floor or y.shape[:1] != x.shape:
        raise ValueError(f"expected {2 + floor} sizes or more, and as many rows of y, got {x.shape} and {y.shape}")
    if not floor and (y <= 0).any():
        raise ValueError("a power law without a floor is of positive values only")
    reference, means, seeds = float(np.exp(np.log(x).mean())), y.mean(1), y.shape[1]
    best = _fitted(x / reference, means, floor)
    scale, exponent, bottom = best
    residual = float(np.sqrt(np.mean((scale * (x / reference) ** -exponent + bottom - means) ** 2)))
    errors = None
    if seeds > 1:
        random = np.random.default_rng(0)
        drawn = y[:, random.integers(seeds, size=(resamples, seeds))].mean(2).T
        drawn = means + np.sqrt(seeds / (seeds - 1)) * (drawn - means)
        spread = np.std([_fitted(x / reference, row, floor) for row in drawn], axis=0)
        errors = dict(zip(("scale", "exponent", "floor"), spread.tolist(), strict=True))
    inside = not floor or EXPONENTS[0] * 1.01 < exponent < EXPONENTS[-1] * 0.99
    determined = bool(inside and (errors is None or (errors["exponent"] < exponent and errors["scale"] < scale)))
    return PowerLaw(scale, exponent, bottom, reference, residual, errors, determined)


def _fitted(x: ndarray, y: ndarray, floor: bool) -> tuple[float, float, float]:
    """Scale, exponent and floor. For a given exponent the other two are a straight line's."""
    if not floor:
        slope, at_one = np.polyfit(np.log(x), np.log(np.maximum(y, 1e-12)), 1)
        return float(np.exp(at_one)), -float(slope), 0.0
    tried = EXPONENTS
    for _ in range(REFINEMENTS):
        powers = x ** -tried[:, None]
        centred = powers - powers.mean(1, keepdims=True)
        slopes = centred @ (y - y.mean()) / (centred**2).sum(1)
        bottoms = y.mean() - slopes * powers.mean(1)
        at = int(np.argmin(((slopes[:, None] * powers + bottoms[:, None] - y) ** 2).sum(1)))
        best = float(slopes[at]), float(tried[at]), float(bottoms[at])
        tried = np.geomspace(tried[max(0, at - 1)], tried[min(len(tried) - 1, at + 1)], len(EXPONENTS))
    return best
