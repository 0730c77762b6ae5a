"""All results of a model as one HTML file: no script, no other file, for a phone or a desk, by day and by night."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from dicode.evaluate.metrics import PAIR_METRICS, SET_METRICS
from dicode.features.metrics import Interval
from dicode.files import check_file, put_text

# By the beginning of a figure's name; a name that is not here stands for itself.
MEANINGS = {
    "text_control": "Share of prompts whose clip is nearest to a real one of that caption. Higher is better.",
    "validation_percentile": "Percentile rank of the true clip among real ones; chance 50. Higher is better.",
    "motion": "Frame difference of generated clips over that of real ones; 1 is as much.",
    "nearer_by_features": "The same by features of EfficientNet-lite0.",
    "nearer_by_pixels": "Share of first images whose own caption's clip is nearer to the real one; chance 0.5.",
    "effect": "What another caption changes of a clip over what another sample does; 0 where captions have no effect.",
    "marginal_clip_s": "Seconds that one more clip adds to a short video.",
    "time_ratio": "Seconds over clips times what one more adds to a short video; 1: late ones take no longer.",
    "memory_ratio": "Peak memory of the whole process over that of one clip's.",
    "motion_over_time": "Frame difference at the end of videos over that at their beginning; 1 is as much.",
    "drift": "Distance of clips at the end of videos to those at their beginning (squared Fréchet distance, or MMD). "
    "Lower is better.",
    "end_contrast": "Mean difference of this between the first and the last 15 % of a video's frames, in steps of "
    "0 to 255; small too where nothing moves. Lower is better.",
    "similarity": "Mean cosine of features of two frames so far apart, centred on all frames' mean.",
    "join_score": "Frame difference across joins over that inside clips; 1 cannot be distinguished from motion.",
    "psnr": "PSNR in dB, mean over frames, of which an exact one counts 60. Higher is better.",
    "psnr_of_mean_error": "PSNR in dB of the mean squared error of all frames. Higher is better.",
    "accuracy": "Share of videos for which the scorer's answer is that of their caption line; shuffled: chance. The "
    "real videos' own is what can be reached.",
    "clauses_right": "Share of clauses of which colours, shapes and event are right, in the clips of the script.",
    "colour_right": "Share of clauses whose objects have the right colours.",
    "shape_right": "Share of clauses whose objects have the right shapes.",
    "event_right": "Share of clauses whose event happened, whatever did it.",
    "sequences_right": "Share of videos with all clauses right, by number of clauses.",
    "order": "Kendall's tau of the clauses' order, -1 to 1; a clause that is nowhere counts 0 in its pairs.",
    "objects_kept": "Share of objects, whole in a clip's last frame, that are unchanged in the next clip's first.",
    "right_by_event": "Share of clauses right, by event, in new scenes of seen combinations.",
    "swap": "Of pairs of captions whose two clauses are exchanged: share of pairs with both videos right; and of pairs "
    "with all clauses somewhere in both videos, share in which each has its own order.",
    "first_stage_psnr_of_mean_error": "The same of every frame through the first stage alone, by data set.",
    "first_stage_psnr": "PSNR in dB of every frame through the first stage alone, by data set. Higher is better.",
    "CLIPSIM": "Mean product of CLIP's vectors of frames and caption. Higher is better.",
    **{name: metric.meaning for name, metric in PAIR_METRICS.items()},
    **{name: metric.meaning for name, metric in SET_METRICS.items()},
}
OWN = ("generated", "reconstruction")  # candidates that are the model's, beside baselines
STAND_INS = {
    "EffLite0": "Of EfficientNet-lite0, not the network of published figures: compare with none.",
    "TinyVT": "Of TinyVT, a small network trained on clips of five data sets: compare with no published figure.",
}


class Figure(NamedTuple):
    """A number of a result with its interval and the size of its sample, where the result has these."""

    value: float
    interval: Interval | None
    n: int | None


def write_report(
    path: Path, name: str, results: Mapping[str, Mapping[str, Any]], sheets: Mapping[str, Image.Image]
) -> None:
    """Write the page of a model's results (`read_result`), by part, with the contact sheets there are of them.

    Whole or not at all. Raises `ValueError` where there are no results, `FileExistsError` in place of another file.
    """
    check_file(path, is_report)
    if not results:
        raise ValueError(f"{path}: expected the results of one part at least, got none")
    put_text(path, page(name, results, sheets))


def is_report(path: Path) -> bool:
    """Whether a file is one of `write_report`."""
    with path.open("rb") as file:
        return b'<meta name="generator" content="dicode">' in file.read(200)


def page(name: str, results: Mapping[str, Mapping[str, Any]], sheets: Mapping[str, Image.Image]) -> str:
    """The whole page: `report.html`, filled in."""
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.undefined, environment.filters["short"] = StrictUndefined, short
    sections = [section(part, result, sheets.get(part)) for part, result in results.items()]
    notes = {result["notes"]: None for result in results.values() if result.get("notes")}
    return environment.get_template("report.html").render(name=name, notes=list(notes), sections=sections)


def section(part: str, result: Mapping[str, Any], sheet: Image.Image | None) -> dict[str, Any]:
    """One part: how it was measured, its figures, its contact sheet."""
    changed = " with uncommitted changes" if result.get("uncommitted_changes") else ""
    values = dict(result["values"])
    blind = values.pop("blind", {}).values()
    return {
        "part": part,
        "facts": {
            "command": result["command"],
            "commit": f"{result.get('commit') or 'unknown'}{changed}",
            **{key: result.get(key, "unknown") for key in ("device", "seed", "n", "date")},
        },
        "blind": list(blind),
        "drifts": [
            {"metric": metric, "joins": kind, **own}
            for kind, joins in values.get("joins", {}).items()
            for metric, own in joins["drift"].items()
        ],
        **tables(by_metric(values)),
        "sheet": None if sheet is None else data_uri(sheet),
    }


def by_metric(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with candidates by metric: kinds of joins too, and PSNR of the mean error as a metric of its own."""
    regrouped = {key: value for key, value in values.items() if key not in ("joins", "cost")}
    for kind, part in values.get("joins", {}).items():
        named = {"join_score": part["join_score"], "motion_over_time": part["motion"]}
        for metric, figure in part["drift"].items():
            named[f"drift-{metric}".replace("drift-FVD", "drift")] = {**figure, "n": len(part["frames"])}
        for metric, figure in named.items():
            regrouped.setdefault(metric, {})[kind] = figure
    regrouped |= values.get("cost", {})
    for metric in ("psnr", "first_stage_psnr"):
        if metric in values:
            regrouped[f"{metric}_of_mean_error"] = {
                name: {"value": one["of_mean_error_db"], "interval": one["of_mean_error_interval_db"], "n": one["n"]}
                for name, one in values[metric].items()
            }
    return regrouped


def tables(values: Mapping[str, Any]) -> dict[str, Any]:
    """A plot and a table for every metric with several candidates (`groups`), one table for figures that stand alone.

    Numbers without interval are `others`.
    """
    alone: dict[str, Figure] = {}
    others: dict[str, Any] = {}
    groups = []
    for key, value in values.items():
        if (figure := figure_of(value)) is not None:
            alone[key] = figure
        elif isinstance(value, Mapping):
            found = {name: one for name, item in value.items() if (one := figure_of(item)) is not None}
            if found:
                ends = [end for own in found.values() for end in (own.value, *(own.interval or ()))]
                blind = any(isinstance(one, Mapping) and one.get("blind") for one in value.values())
                low, high = min(0.0, *ends), max(0.0, *ends) or 1.0
                groups.append({"key": key, "figures": found, "low": low, "high": high, "blind": blind})
            else:
                others |= {f"{key}, {name}": own for name, own in value.items() if not isinstance(own, list | Mapping)}
        elif not isinstance(value, list) and key != "n":
            others[key] = value
    keys = [*alone, *(group["key"] for group in groups)]
    return {"alone": alone, "groups": groups, "others": others, "meanings": {key: meaning(key) for key in keys}}


def summary(values: Mapping[str, Any]) -> list[str]:
    """A line a figure of the model itself, of the values of a result file; without those of blind networks."""
    found = tables(by_metric({key: value for key, value in values.items() if key != "blind"}))
    rows = dict(found["alone"])
    for group in found["groups"]:
        own = next((group["figures"][name] for name in OWN if name in group["figures"]), None)
        if own is not None and not group["blind"]:
            rows[group["key"]] = own
    return [
        f"  {key.replace('_', ' '):34}{short(own.value):>8}"
        + ("" if own.interval is None else f"  ({short(own.interval[0])} to {short(own.interval[1])})")
        for key, own in rows.items()
    ]


def figure_of(value: Any) -> Figure | None:
    """The figure in an entry of a result: its first number, and what is called an interval; None for other entries."""
    if not isinstance(value, Mapping):
        return None
    interval = next((key for key in value if key in ("interval", "interval_db")), None)
    if interval is None:
        return None
    low_high = None if value[interval] is None else (float(value[interval][0]), float(value[interval][1]))
    return Figure(float(next(iter(value.values()))), low_high, value.get("n"))


def meaning(key: str) -> str:
    """What a metric means, and that it compares with no published one where it is of a stand-in network."""
    text = MEANINGS.get(key) or MEANINGS.get(key.split("-")[0].split(" of ")[0], "")
    return f"{text} {STAND_INS.get(key.split('-')[-1], '')}".strip()


def short(value: Any) -> str:
    """A number with as many digits as help; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "none" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 or isinstance(value, int) else f"{value:.3g}"


def data_uri(sheet: Image.Image) -> str:
    """A picture inside the page."""
    file = io.BytesIO()
    sheet.save(file, "WEBP", quality=40, method=6)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
