"""Draw scale.svg from results/scale.json; the tables of README.md are written by tools/figures.py."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PANELS = {  # title: axis, figure
    "validation loss against parameters": ("parameters", "nll"),
    "… against training FLOPs": ("flops", "nll"),
    "rank of training captions": ("parameters", "alignment/training"),
    "rank of clips by written key frames": ("parameters", "written_rank"),
}
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 330, 260, 50, 36, 30  # pixels of a panel, and what is left free in it


def main() -> None:
    """A panel each, a dot a seed, a bar the interval of their mean, a line the law without a floor."""
    values = json.loads((ROOT / "results/scale.json").read_text())["values"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(PANELS)}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="12"><rect width="{WIDTH * len(PANELS)}" height="{HEIGHT}" fill="white"/>'
    ]
    for number, (title, (axis, figure)) in enumerate(PANELS.items()):
        parts += panel(values, WIDTH * number, title, axis, figure)
    (Path(__file__).with_name("scale.svg")).write_text("\n".join([*parts, "</svg>", ""]))


def panel(values: dict[str, Any], left: int, title: str, axis: str, figure: str) -> list[str]:
    """One of them, from `left` on."""
    at = [size[axis] for size in values["sizes"].values()]
    seeds = [[run[figure] for run in runs] for runs in values["runs"].values()]
    intervals = [mean[figure]["interval"] or [mean[figure]["mean"]] * 2 for mean in values["means"].values()]
    law = values["laws"].get(f"{axis}, without floor") if figure == "nll" else None
    low, high = min(min(row) for row in [*seeds, *intervals]), max(max(row) for row in [*seeds, *intervals])
    low, high = low - 0.06 * (high - low), high + 0.06 * (high - low)
    x = scaled(math.log(at[0] / 1.5), math.log(at[-1] * 1.5), left + LEFT, left + WIDTH - 12)
    y = scaled(low, high, HEIGHT - BOTTOM, TOP)
    parts = [f'<text x="{left + LEFT}" y="18" font-weight="bold">{title}</text>']
    for tick in (low + share * (high - low) for share in (0.1, 0.5, 0.9)):
        parts.append(f'<path d="M{left + LEFT} {y(tick):.1f}H{left + WIDTH - 12}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{left + 6}" y="{y(tick) + 4:.1f}" fill="#666">{tick:.4g}</text>')
    for value in at:
        label = f"{value / 1e6:.2g} M" if axis == "parameters" else f"{value / 1e12:.2g} T"
        parts.append(
            f'<text x="{x(math.log(value)):.1f}" y="{HEIGHT - 12}" text-anchor="middle" fill="#666">{label}</text>'
        )
    if law:
        points = [at[0] * (at[-1] / at[0]) ** (i / 40) for i in range(41)]
        fitted = [law["scale"] * (p / law["reference"]) ** -law["exponent"] + law["floor"] for p in points]
        line = " ".join(f"{x(math.log(p)):.1f},{y(value):.1f}" for p, value in zip(points, fitted, strict=True))
        parts.append(f'<polyline points="{line}" fill="none" stroke="#c4572e"/>')
    for value, (bottom, top), row in zip(at, intervals, seeds, strict=True):
        middle = x(math.log(value))
        parts.append(f'<path d="M{middle:.1f} {y(bottom):.1f}V{y(top):.1f}" stroke="#1f6fb4"/>')
        parts += [f'<circle cx="{middle:.1f}" cy="{y(v):.1f}" r="4" fill="#1f6fb4" fill-opacity="0.6"/>' for v in row]
    return parts


def scaled(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    """From low … high to first … last."""
    return lambda value: first + (value - low) / (high - low) * (last - first)


if __name__ == "__main__":
    main()
