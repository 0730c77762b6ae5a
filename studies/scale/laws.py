"""Power laws of a loss against size or compute, with their errors."""

from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

LOWEST, HIGHEST = 0.005, 5.0  # exponents


@dataclass(frozen=True)
class PowerLaw:
    """y = scale · (x / reference)^-exponent + floor."""

    scale: float
    exponent: float
    floor: float  # 0 where the law has none
    reference: float  # geometric mean of x
    residual: float  # root mean square of measured means less the law
    errors: dict[str, float] | None  # standard errors of scale, exponent and floor; None with one seed
    determined: bool  # whether scale and exponent exceed their errors, and the exponent is inside its bounds


def fit_power_law(x: np.ndarray, y: np.ndarray, floor: bool = True, resamples: int = 500) -> PowerLaw:
    """Least squares on the means over seeds of `y` (sizes × seeds); without a floor in logarithms.

    Errors are of a bootstrap over seeds, the same for all sizes since they share the samples, widened by √(n/(n-1)).
    """
    reference, means, seeds = float(np.exp(np.log(x).mean())), y.mean(1), y.shape[1]
    scale, exponent, bottom = fitted(x / reference, means, floor)
    residual = float(np.sqrt(np.mean((scale * (x / reference) ** -exponent + bottom - means) ** 2)))
    errors = None
    if seeds > 1:
        drawn = y[:, np.random.default_rng(0).integers(seeds, size=(resamples, seeds))].mean(2).T
        drawn = means + np.sqrt(seeds / (seeds - 1)) * (drawn - means)
        spread = np.std([fitted(x / reference, row, floor) for row in drawn], axis=0)
        errors = dict(zip(("scale", "exponent", "floor"), spread.tolist(), strict=True))
    inside = not floor or LOWEST * 1.01 < exponent < HIGHEST * 0.99
    determined = bool(inside and (errors is None or (errors["exponent"] < exponent and errors["scale"] < scale)))
    return PowerLaw(scale, exponent, bottom, reference, residual, errors, determined)


def fitted(x: np.ndarray, y: np.ndarray, floor: bool) -> tuple[float, float, float]:
    """Scale, exponent and floor."""
    if not floor:
        slope, at_one = np.polyfit(np.log(x), np.log(y), 1)
        return float(np.exp(at_one)), -float(slope), 0.0

    def line(exponent: float) -> tuple[float, np.ndarray]:
        """For a given exponent the other two are those of a straight line."""
        powers = x**-exponent
        (scale, bottom), squares, *_ = np.polyfit(powers, y, 1, full=True)
        return float(squares.sum()), np.array([scale, exponent, bottom])

    grid = np.geomspace(LOWEST, HIGHEST, 60)  # there may be several minima
    best = int(np.argmin([line(exponent)[0] for exponent in grid]))
    around = float(grid[max(0, best - 1)]), float(grid[min(59, best + 1)])
    found = optimize.minimize_scalar(lambda e: line(e)[0], bounds=around, method="bounded", options={"xatol": 1e-7})
    scale, exponent, bottom = line(float(found.x))[1].tolist()
    return scale, exponent, bottom


def t_interval(values: np.ndarray) -> tuple[float, float] | None:
    """95 % of the mean over seeds, by Student's distribution; None for one seed."""
    if len(values) < 2:
        return None
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))  # t.interval gives NaN for equal values
    return float(values.mean()) - half, float(values.mean()) + half
