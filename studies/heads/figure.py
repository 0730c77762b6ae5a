"""Write README.md's table and heads.svg from results/heads.json."""

import json
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
START, END = "<!-- table: figure.py -->", "<!-- end of table -->"
COLUMNS = {
    "text control, %": lambda run: 100 * run["text_control"],
    "FVD-EffLite0": lambda run: run["frechet"]["generated"]["FVD-EffLite0"],
    "diversity ÷ real": lambda run: run["diversity"]["ratio"],
    "energy, training": lambda run: run["energy_training"]["mean"],
    "energy, validation": lambda run: run["energy_validation"]["mean"],
}
ROW, LEFT, PANEL, TOP = 24, 150, 170, 40  # pixels


def main() -> None:
    """Both, from the runs of all seeds."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, run in json.loads((ROOT / "results/heads.json").read_text())["values"]["runs"].items():
        runs.setdefault(name.rpartition("-")[0], []).append(run)
    lines = ["| head, order | parameters | steps | " + " | ".join(COLUMNS) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    for name, seeds in runs.items():
        columns = [[column(run) for run in seeds] for column in COLUMNS.values()]
        cells = [f"{np.mean(values):.3g} ({min(values):.3g}–{max(values):.3g})" for values in columns]
        lines.append(f"| {name} | {seeds[0]['parameters'] / 1e3:.0f} k | {seeds[0]['steps']} | {' | '.join(cells)} |")
    path = HERE / "README.md"
    before, _, rest = path.read_text().partition(START)
    path.write_text(f"{before}{START}\n" + "\n".join(lines) + f"\n{END}" + rest.partition(END)[2])
    (HERE / "heads.svg").write_text(plot(runs))


def plot(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A panel a column, a row an arrangement, a dot a seed."""
    width, height = LEFT + PANEL * len(COLUMNS), TOP + ROW * len(runs) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>'
    ]
    for row, name in enumerate(runs):
        y = TOP + ROW * row + ROW / 2
        parts.append(f'<text x="8" y="{y + 4}">{name}</text><path d="M{LEFT} {y}H{width - 12}" stroke="#e4e4e4"/>')
    for column, (title, value) in enumerate(COLUMNS.items()):
        left, every = LEFT + PANEL * column, [value(run) for seeds in runs.values() for run in seeds]
        low, high = min(0.0, *every), max(every) * 1.05

        def x(number: float, left: float = left, low: float = low, high: float = high) -> float:
            return left + 12 + (number - low) / (high - low) * (PANEL - 36)

        bottom = TOP + ROW * len(runs)
        parts.append(f'<text x="{left + 12}" y="20" font-weight="bold">{title}</text>')
        parts += [
            f'<text x="{x(tick)}" y="{bottom + 18}" text-anchor="middle" fill="#666">{tick:.3g}</text>'
            for tick in (low, (low + high) / 2, high)
        ]
        for row, seeds in enumerate(runs.values()):
            y = TOP + ROW * row + ROW / 2
            at = [x(value(run)) for run in seeds]
            parts += [f'<circle cx="{dot:.1f}" cy="{y}" r="4" fill="#1f6fb4" fill-opacity="0.6"/>' for dot in at]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
