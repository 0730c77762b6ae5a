"""All results of a model as one HTML file: no script, no other file, for a phone or a desk, by day and by night."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from dicode.features.metrics import Interval
from dicode.files import put_text

# What the figures say, by the beginning of their names; a name that is not here stands for itself.
MEANINGS = {
    "text_control": "Share of prompts whose clip is nearest to a real one of that caption. Higher is better.",
    "validation_percentile": "Percentile rank of the true clip among real ones; chance 50. Higher is better.",
    "motion": "Frame difference of made clips over that of real ones; 1 is as much.",
    "dynamic_share": "Share of generated clips that move at least a quarter as much as the median real clip.",
    "diversity": "Distance of two samples of a caption over that of two real clips of it; 1 is as diverse.",
    "nearer_by_features": "The same by features of EfficientNet-lite0.",
    "nearer_by_pixels": "Share of first images whose own caption's clip is nearer to the real one; chance 0.5.",
    "effect": "What another caption changes of a clip over what another sample does; 0 where captions are not heard.",
    "short_median_s": "Seconds that videos of fewer seconds took, by their length.",
    "marginal_clip_s": "Seconds that one more clip adds to a short video.",
    "start_s": "Seconds that the line through short videos has at no clips: what every video takes once.",
    "time_ratio": "Seconds over clips times what one more adds to a short video; 1: late ones take no longer.",
    "processor_time_ratio": "The same of the processor's time, which other work on the machine does not lengthen.",
    "memory_ratio": "Peak memory of the whole process over that of one clip's.",
    "motion_over_time": "Frame difference at the end of videos over that at their beginning; 1 is as much.",
    "drift": "Squared Fréchet distance of clips at the end of videos to those at their beginning. Lower is better.",
    "join_score": "Frame difference across joins over that inside clips; 1 cannot be told from motion.",
    "psnr": "PSNR in dB, mean over frames, of which an exact one counts 60. Higher is better.",
    "psnr_of_mean_error": "PSNR in dB of the mean squared error of all frames. Higher is better.",
    "psnr_in_motion": "PSNR in dB inside what moves in the real clip: errors weighted by its squared deviation from "
    "the clip's mean frame. Higher is better.",
    "accuracy": "Share of videos of which the scorer finds what their caption line says; shuffled: chance. The real "
    "videos' own is what can be reached.",
    "first_stage_psnr_of_mean_error": "The same of every frame through the first stage alone, by data set.",
    "first_stage_psnr": "PSNR in dB of every frame through the first stage alone, by data set. Higher is better.",
    "SSIM": "Structural similarity, two frames a clip. Higher is better.",
    "perceptual": "Distance of EfficientNet-lite0's feature maps, two frames a clip. Not LPIPS. Lower is better.",
    "FVD": "Squared Fréchet distance to the real clips of the same number. Lower is better.",
    "FID": "Squared Fréchet distance of single frames to those of the real clips. Lower is better.",
    "IS": "Inception Score in one split; grows with the number of clips. Higher is better.",
    "alignment": "Mean cosine of clip and caption. Higher is better; the real clips' own says what is high.",
    "caption rank": "Percentile rank of the right caption among all different ones; chance 50. Higher is better.",
    "CLIPSIM": "Mean product of CLIP's vectors of frames and caption. Higher is better.",
}
STAND_INS = {
    "EffLite0": "Of EfficientNet-lite0, not the network of published figures: compare with none.",
    "TinyVT": "Of TinyVT, a small network trained on clips of five data sets: compare with no published figure.",
}
STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5b6570;--paper:#fff;--line:#d9dee4;--mark:#1f6fb4;--bad:#b42318}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#9aa4af;--paper:#14171a;--line:#343b43;--mark:#6cb2f0;
--bad:#ff8a7a}}
*{box-sizing:border-box}body{margin:0 auto;padding:1rem;max-width:60rem;background:var(--paper);color:var(--ink);
font:1rem/1.5 system-ui,sans-serif}h1{font-size:1.5rem}h2{margin-top:2.5rem;border-bottom:1px solid var(--line)}
h3{margin:1.5rem 0 .2rem;font-size:1.05rem}p{margin:.2rem 0 .6rem}.soft,dt{color:var(--soft)}.bad{color:var(--bad)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem 0 .25rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child{padding-left:0;text-align:left;white-space:normal;
font-weight:normal;position:sticky;left:0;background:var(--paper)}
thead th{color:var(--soft);font-weight:normal}dl{display:grid;grid-template-columns:max-content 1fr;
gap:.1rem .8rem;font-size:.85rem}dd{margin:0;overflow-wrap:anywhere}svg{width:100%;max-width:34rem;height:auto;
display:block;font:12px system-ui,sans-serif;fill:var(--ink)}img{display:block;max-width:none}
"""
WIDTH, LEFT, ROW = 360, 132, 22  # of plots, in their own units: a phone's pixels


class Figure(NamedTuple):
    """A number of a result with its interval and the size of its sample, where the result has these."""

    value: float
    interval: Interval | None
    n: int | None


def write_report(
    path: Path, name: str, results: Mapping[str, Mapping[str, Any]], sheets: Mapping[str, Image.Image]
) -> None:
    """Write the page of a model's results (`read_result`), by part, with the contact sheets there are of them.

    Whole or not at all. Raises `ValueError` where there are no results.
    """
    if not results:
        raise ValueError(f"{path}: expected the results of one part at least, got none")
    put_text(path, page(name, results, sheets))


def page(name: str, results: Mapping[str, Mapping[str, Any]], sheets: Mapping[str, Image.Image]) -> str:
    """The whole page."""
    parts = "".join(section(part, result, sheets.get(part)) for part, result in results.items())
    notes = {result["notes"]: None for result in results.values() if result.get("notes")}
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(name)}: results</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(name)}: results</h1>"
        '<p class="soft">Intervals are 95 % over clips, prompts, videos, or repeats of seconds and memory: they cover '
        "the choice of these, not training. Those of FVD, FID, IS and drift are by the delete-half jackknife, the "
        "others by bootstrap percentiles.</p>"
        + "".join(f"<p>{escape(note)}</p>" for note in notes)
        + f"{parts}</body></html>\n"
    )


def section(part: str, result: Mapping[str, Any], sheet: Image.Image | None) -> str:
    """One part: how it was made, its figures, its contact sheet."""
    changed = " with uncommitted changes" if result.get("uncommitted_changes") else ""
    facts = {
        "command": result["command"],
        "commit": f"{result.get('commit') or 'unknown'}{changed}",
        "device": result.get("device", "unknown"),
        "seed": result.get("seed", "unknown"),
        "n": result["n"],
        "date": result.get("date", "unknown"),
    }
    listed = "".join(f"<dt>{key}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items())
    values = dict(result["values"])
    blind = "".join(f'<p class="bad">{escape(why)}</p>' for why in values.pop("blind", {}).values())
    body = drifts(values) + figures(values)
    picture = ""
    if sheet is not None:
        picture = f'<h3>Clips</h3><div class="wide"><img alt="contact sheet: {part}" src="{data_uri(sheet)}"></div>'
    return f"<section><h2>{escape(part)}</h2><dl>{listed}</dl>{blind}{body}{picture}</section>"


def figures(values: Mapping[str, Any]) -> str:
    """A plot and a table for every metric with several candidates, one table for figures that stand alone."""
    if "joins" in values:  # candidates by metric, as elsewhere
        own: dict[str, dict[str, Any]] = {}
        for kind, part in values["joins"].items():
            videos = {"n": len(part["frames"])}
            drift = {metric.replace("FVD", "drift"): {**figure, **videos} for metric, figure in part["drift"].items()}
            named = {"join_score": part["join_score"], "motion_over_time": part["motion"], **drift}
            for metric, figure in named.items():
                own.setdefault(metric, {})[kind] = figure
        others = {key: value for key, value in values.items() if key not in ("joins", "cost")}
        values = {**others, **own, **values["cost"]}
    of_mean_error = {
        f"{metric}_of_mean_error": {
            name: {"value": one["of_mean_error_db"], "interval": one["of_mean_error_interval_db"], "n": one["n"]}
            for name, one in values[metric].items()
        }
        for metric in ("psnr", "first_stage_psnr")
        if metric in values
    }
    values = {**values, **of_mean_error}
    alone: dict[str, Figure] = {}
    plain: dict[str, Any] = {}
    groups = []
    for key, value in values.items():
        figure = figure_of(value)
        if figure is not None:
            alone[key] = figure
        elif isinstance(value, Mapping):
            found = {name: one for name, item in value.items() if (one := figure_of(item)) is not None}
            if found:
                groups.append(f"<h3>{escape(key)}</h3>{blindness(value)}{meaning(key)}{dots(found)}{table(found)}")
            else:
                plain |= {
                    f"{key}, {name}": item for name, item in value.items() if not isinstance(item, list | Mapping)
                }
        elif not isinstance(value, list) and key != "n":
            plain[key] = value
    rows = "".join(f"<tr><th>{escape(words(key))}</th><td>{short(item)}</td></tr>" for key, item in plain.items())
    explained = "".join(f"{meaning(key, words(key) + ': ')}" for key in alone)
    return (
        (f"<h3>Figures</h3>{table(alone)}{explained}" if alone else "")
        + "".join(groups)
        + (f'<h3>Other numbers</h3><div class="wide"><table>{rows}</table></div>' if rows else "")
    )


def figure_of(value: Any) -> Figure | None:
    """The figure in an entry of a result: its first number, and what is called an interval; None for other entries."""
    if not isinstance(value, Mapping):
        return None
    interval = next((key for key in value if key in ("interval", "interval_db")), None)
    if interval is None:
        return None
    low_high = None if value[interval] is None else (float(value[interval][0]), float(value[interval][1]))
    return Figure(float(next(iter(value.values()))), low_high, value.get("n"))


def drifts(values: Mapping[str, Any]) -> str:
    """Distance of later windows of long videos to their first, a line for every kind of joins."""
    lines = {kind: part["drift"] for kind, part in values.get("joins", {}).items()}
    return "".join(
        f"<h3>Drift, {escape(metric)}: {escape(kind)} joins</h3><p class='soft'>Distance of each window to the first; "
        f"chance {short(own['chance'])} (shaded: 95 % of chance). Without drift it does not grow.</p>{curve(own)}"
        for kind, drift in lines.items()
        for metric, own in drift.items()
    )


def dots(candidates: Mapping[str, Figure]) -> str:
    """A row a candidate: a dot for its value, a line for its interval."""
    ends = [end for own in candidates.values() for end in (own.value, *(own.interval or ()))]
    low, high = min(0.0, *ends), max(0.0, *ends) or 1.0
    height = ROW * len(candidates) + 24

    def x(number: float) -> float:
        return LEFT + (number - low) / (high - low) * (WIDTH - LEFT - 16)

    drawn = []
    for row, (name, own) in enumerate(candidates.items()):
        y = ROW * row + 14
        drawn.append(f'<text x="0" y="{y + 4}">{escape(words(name))}</text>')
        drawn.append(f'<path d="M{LEFT} {y}H{WIDTH}" stroke="var(--line)"/>')
        if own.interval is not None:
            span = f"M{x(own.interval[0]):.1f} {y}H{x(own.interval[1]):.1f}"
            drawn.append(f'<path d="{span}" stroke="var(--mark)" stroke-width="3" stroke-opacity=".5"/>')
        drawn.append(f'<circle cx="{x(own.value):.1f}" cy="{y}" r="4" fill="var(--mark)"/>')
    for tick, anchor in ((low, "start"), (high, "end")):
        drawn.append(f'<text x="{x(tick):.1f}" y="{height - 4}" text-anchor="{anchor}">{short(tick)}</text>')
    return drawing(height, drawn, "values and intervals")


def curve(drift: Mapping[str, Any]) -> str:
    """The distances by window over the band of chance."""
    distances, (band_low, band_high) = drift["by_window"], drift["chance_interval"]
    high, height = max(*distances, band_high) * 1.05, 140
    step = (WIDTH - 60) / max(1, len(distances) - 1)
    y = [height - 24 - value / high * (height - 36) for value in (band_low, band_high, *distances)]
    points = [(40 + step * i, at) for i, at in enumerate(y[2:])]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    return drawing(
        height,
        [
            f'<rect x="40" y="{y[1]:.1f}" width="{WIDTH - 60}" height="{y[0] - y[1]:.1f}" fill="var(--line)"/>',
            f'<polyline points="{line}" fill="none" stroke="var(--mark)" stroke-width="2"/>',
            *(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="var(--mark)"/>' for a, b in points),
            *(
                f'<text x="{a:.1f}" y="{height - 6}" text-anchor="middle">{i + 2}</text>'
                for i, (a, _) in enumerate(points)
            ),
            f'<text x="0" y="{y[2] + 4:.1f}">{short(distances[0])}</text>',
        ],
        "distance by window",
    )


def drawing(height: int, parts: Sequence[str], label: str) -> str:
    """An SVG as wide as the page allows."""
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def table(candidates: Mapping[str, Figure]) -> str:
    """Value, interval and n of every figure."""
    rows = "".join(
        f"<tr><th>{escape(words(name))}</th><td>{short(own.value)}</td><td>{within(own).strip() or 'none'}</td>"
        f"<td>{'–' if own.n is None else own.n}</td></tr>"
        for name, own in candidates.items()
    )
    head = "<thead><tr><th></th><th>value</th><th>95 %</th><th>n</th></tr></thead>"
    return f'<div class="wide"><table>{head}{rows}</table></div>'


def meaning(key: str, before: str = "") -> str:
    """What a metric says, and that it compares with no published one where it is of the stand-in network."""
    said = MEANINGS.get(key) or MEANINGS.get(key.split("-")[0].split(" of ")[0], "")
    said = f"{said} {STAND_INS.get(key.split('-')[-1], '')}".strip()
    return f'<p class="soft">{escape(before + said)}</p>' if said else ""


def blindness(candidates: Mapping[str, Any]) -> str:
    """That these figures say nothing, where their network cannot tell the real clips at hand apart."""
    blind = any(isinstance(one, Mapping) and one.get("blind") for one in candidates.values())
    return '<p class="bad">The network is blind here: these say nothing.</p>' if blind else ""


def words(key: str) -> str:
    """A key as words."""
    return key.replace("_", " ")


def short(value: Any) -> str:
    """A number with as many digits as help; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return escape("none" if value is None else str(value))
    return f"{value:,.0f}" if abs(value) >= 100 or isinstance(value, int) else f"{value:.3g}"


def within(own: Figure) -> str:
    """The interval, in a form that stands behind a value."""
    return "" if own.interval is None else f" <small>{short(own.interval[0])} to {short(own.interval[1])}</small>"


def data_uri(sheet: Image.Image) -> str:
    """A picture inside the page."""
    held = io.BytesIO()
    sheet.save(held, "WEBP", quality=40, method=6)
    return f"data:image/webp;base64,{base64.b64encode(held.getvalue()).decode()}"
