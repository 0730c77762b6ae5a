"""Write the figures of `results/` into README.md, the model cards and pages of docs/; `--check` only compares."""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
START, END = "<!-- figures -->", "<!-- end of figures -->"


def main() -> int:
    """Rewrite the block between the marks in each file; returns 1 where `--check` finds a stale one."""
    tables = {"README.md": blocks(), "dicode/checkpoints/blocks/README.md": blocks(), "docs/paper-scale.md": plans()}
    tables["dicode/checkpoints/sprites/README.md"] = figures("sprites")
    tables |= {"studies/tokens/README.md": tokens(), "studies/widths/README.md": widths()}
    tables["docs/evaluation.md"] = tables["dicode/checkpoints/tinyvt/README.md"] = video_text()
    tables["dicode/checkpoints/world/README.md"] = tables["docs/world.md"] = figures("world")
    tables |= {
        "studies/scale/README.md": scaling(),
        "studies/motion/README.md": motion_scale(),
        "studies/ranking/README.md": ranking(),
    }
    stale = []
    for path, table in ((ROOT / name, table) for name, table in tables.items()):
        text = path.read_text(encoding="utf-8")
        before, _, rest = text.partition(START)
        _, _, after = rest.partition(END)
        fresh = f"{before}{START}\n{table}\n{END}{after}"
        if fresh != text:
            stale.append(path)
            if "--check" not in sys.argv:
                path.write_text(fresh, encoding="utf-8")
    return int(bool(stale) and "--check" in sys.argv)


def blocks() -> str:
    """What videos of `blocks` show of their captions, and the rest of its results, as two Markdown tables."""
    values = values_of("blocks-events")
    what = {
        "seen": "new scenes, one to three clauses",
        "combinations": "of colour, shape and event that training never has",
        "orders": "of two events that training has only the other way round",
        "paraphrases": "wordings that training never has",
        "swaps": "two clauses that can be exchanged",
        "within": "a quick event between two key frames",
        "lengths": "six to eight clauses; training has at most five",
        "story": "a storyboard of 30 clauses, a minute",
    }
    cases = ("reconstruction", "generated", "generated, shuffled")
    rows = [["clauses right, %", "", "reconstructed", "generated", "chance"]]
    for name, meaning in what.items():
        own = (values["clauses_right"].get(f"{name}: {case}") for case in cases)
        cells = [f"{100 * one['value']:.0f} ({interval(one, 100)})" if one else "–" for one in own]
        rows.append([f"`{name}`", meaning, *cells])
    swap = values["swap"]["both right"]
    rebuilt, speed = values_of("blocks-reconstruction"), values_of("blocks-speed")
    others = [["measured", "value (95 % interval; all in results/)"]]
    others += [["two clauses exchanged: both videos right", f"{swap['value']:.0%} ({interval(swap, 100)} %)"]]
    others += [list(row) for row in (*rebuilt_rows(rebuilt), *speed_rows(speed))]
    return as_table(rows) + "\n\n" + as_table(others)


def figures(model: str) -> str:
    """The results of one bundled model as a Markdown table."""
    made, rebuilt, speed = (values_of(f"{model}-{part}") for part in ("generation", "reconstruction", "speed"))
    control, rank, motion = made["text_control"], made["validation_percentile"], made["motion"]
    rows = [
        (
            f"text control: nearest real training clip has the prompt's caption, {control['n']} training captions",
            f"{control['share']:.0%} ({interval(control, 100)} %; chance {control['chance']:.1%})",
        ),
        (
            f"percentile rank of the true clip, {rank['n']} validation captions",
            f"{rank['mean']:.1f} ({interval(rank)}; chance 50)",
        ),
        ("motion of generated clips against real ones", f"{motion['ratio']:.2f} ({interval(motion)})"),
        *rebuilt_rows(rebuilt),
        *speed_rows(speed),
        *(long_rows(values_of(f"{model}-long")) if (ROOT / f"results/{model}-long.json").exists() else ()),
        *(instruction_rows(values_of(f"{model}-instructions")) if model == "world" else ()),
    ]
    return "\n".join(
        [
            "| measured | value (95 % interval; all in results/) |",
            "|---|---|",
            *(f"| {a} | {b} |" for a, b in rows),
        ]
    )


def rebuilt_rows(rebuilt: dict[str, Any]) -> list[tuple[str, str]]:
    """Clips through tokens and back."""
    frechet = {name: score["value"] for name, score in rebuilt["FVD-EffLite0"].items()}
    return [
        (
            f"reconstruction, FVD-EffLite0, {rebuilt['n']} validation clips (lower is better)",
            f"{frechet['reconstruction']:.0f} ({interval(rebuilt['FVD-EffLite0']['reconstruction'])}); real head frame "
            f"held {frechet['hold_head']:.0f}, real key frames cross-faded {frechet['cross_fade']:.0f}; the same from "
            f"what the tokens hold {frechet['hold_head_of_tokens']:.0f}, {frechet['cross_fade_of_tokens']:.0f}; every "
            f"frame through the first stage {frechet['first_stage']:.0f}",
        ),
        (
            "first stage alone, PSNR on validation clips",
            ", ".join(f"{source} {score['mean_db']:.1f} dB" for source, score in rebuilt["first_stage_psnr"].items()),
        ),
    ]


def speed_rows(speed: dict[str, Any]) -> list[tuple[str, str]]:
    """Time and memory of a video."""
    return [
        (
            f"{speed['seconds_of_video']:g} s of video, {speed['threads']} CPU threads, model loaded",
            f"{seconds(speed['median_s'])} s; the whole process {seconds(speed['process_s'])} s, "
            f"{speed['peak_memory_gib']['value']:.2f} GiB",
        )
    ]


def values_of(name: str) -> dict[str, Any]:
    """The figures of a result file."""
    return json.loads((ROOT / f"results/{name}.json").read_text(encoding="utf-8"))["values"]


def instruction_rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """What captions change where the first image is given."""

    def cell(metric: str, case: str, scale: float = 1, unit: str = "") -> str:
        splits = {split: values[metric][f"{split}: {case}"] for split in ("training", "validation")}
        shown = (
            f"{split} {next(iter(own.values())) * scale:.3g}{unit} ({interval(own, scale)})"
            for split, own in splits.items()
        )
        return ", ".join(shown)

    count = values["nearer_by_pixels"]["training: own caption"]["n"]
    held = values["nearer_by_pixels"]["validation: own caption"]["n"]
    what = f"first image given, {count} training and {held} validation clips"
    return [
        (f"{what}: nearer to what happened than under another caption, by pixels (chance 50 %)",
         cell("nearer_by_pixels", "own caption", 100, " %")),
        ("the same by features", cell("nearer_by_features-EffLite0", "own caption", 100, " %")),
        ("what another caption changes, over what other noise does", cell("effect", "other caption")),
        ("motion against real clips", cell("motion", "own caption")),
        ("FVD-EffLite0, own caption", cell("FVD-EffLite0", "own caption")),
        ("FVD-EffLite0, first image held still", cell("FVD-EffLite0", "first frame held")),
    ]  # fmt: skip


def tokens() -> str:
    """What deep tokens keep of validation frames, as a Markdown table."""
    values = values_of("tokens")
    named = {"fourth": "fourth release", "linear": "linear code as fitted", "fifth": "fifth release, trained beside it"}
    columns = list(values["fourth"])
    lines = ["| deep tokens of | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for key, name in named.items():
        cells = [f"{values[key][column]:.3g}" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def widths() -> str:
    """What tokens of other widths would keep of single frames, as a Markdown table."""
    values, perceptual = values_of("world-widths"), "perceptual-EffLite0"
    rows = [["", *(f"{split}: {name}" for split in values for name in ("PSNR", "perceptual distance", "lost"))]]
    for name in values["training"]:
        found = [values[split][name] for split in values]
        cells = [(f"{one['psnr_db']:.1f} dB", f"{one[perceptual]:.3f}", f"{100 * one['lost']:.1f} %") for one in found]
        rows.append([{"model": "its own tokens"}.get(name, name), *(cell for those in cells for cell in those)])
    return as_table(rows)


def motion_scale() -> str:
    """What `motion_scale` changes on training clips, as a Markdown table."""
    cases = {name: case for name, case in values_of("sprites-motion-scale").items() if name != "deviation over time"}
    columns = list(next(iter(cases.values())))
    rows = [[name, *(f"{case[column]:.3g}" for column in columns)] for name, case in cases.items()]
    return as_table([["training clips", *columns], *rows])


def ranking() -> str:
    """Whether each metric ranks the cases that it claims to rank, as a Markdown table."""
    rows = [["model", "metric", "real", "reconstruction", "generation", "shuffled", "noise", "ranked", "overlap"]]
    for model in ("sprites", "world"):
        for metric, row in values_of(f"{model}-ranking")["metrics"].items():
            if row["ranked"] is not None:
                cells = [f"{score['value']:.3g}" if isinstance(score, dict) else "–" for score in row["cases"].values()]
                ranked = "yes" if row["ranked"] else "no"
                rows.append([f"`{model}`", metric, *cells, ranked, "; ".join(row["undecided"]) or "–"])
    return as_table(rows)


def video_text() -> str:
    """How well TinyVT recognises captions and order of validation clips, as a Markdown table."""
    folders = json.loads((ROOT / "results/video-text.json").read_text(encoding="utf-8"))["values"]["folders"]

    def ranked(row: dict[str, Any], way: str) -> list[str]:
        if way not in row:
            return ["–"] * 2
        recall, chance = (
            " / ".join(f"{100 * share:.0f}" for share in row[way][kind].values()) for kind in ("recall", "chance")
        )
        return [f"{row[way]['percentile']:.1f}", f"{recall} ({chance})"]

    head = [
        "validation clips of",
        "clips",
        "captions (in training too)",
        "caption of a clip: rank",
        "recall@1 / 5 / 10, %",
        "clip of a caption: rank",
        "recall@1 / 5 / 10, %",
        "reversed recognised, %",
        "shuffled recognised, %",
    ]
    lines = [head, ["---"] * len(head)]
    for name, row in folders.items():
        captions = f"{row['captions']} ({row['captions also in training']})"
        order = [f"{100 * row['order'][kind]:.0f}" for kind in ("reversed", "shuffled")]
        retrieval = [*ranked(row, "caption of a clip"), *ranked(row, "clip of a caption")]
        lines.append([f"`{name}`", str(row["clips"]), captions, *retrieval, *order])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def scaling() -> str:
    """Loss and text alignment of several sizes, the laws they follow, and what one change does, as Markdown tables."""
    values = json.loads((ROOT / "results/scale.json").read_text(encoding="utf-8"))["values"]
    folders = [key for key in next(iter(values["means"].values())) if key.startswith("nll/") and "key frame" not in key]
    columns = ["nll", *folders, "alignment", "alignment/training", "written_rank"]
    rows = [["language model", "parameters", "TFLOP", "minutes", *columns]]
    for name, size in values["sizes"].items():
        means = values["means"][name]
        counts = f"{size['parameters'] / 1e6:.3g} M", f"{size['flops'] / 1e12:.3g}"
        minutes = f"{median([run['trained_s'] for run in values['runs'][name]]) / 60:.3g}"  # some shared their core
        rows.append([name, *counts, minutes, *(with_interval(means[column]) for column in columns)])
    laws = [["law of the loss", "exponent", "scale at", "scale", "floor", "residual", "determined by the points"]]
    for name, law in values["laws"].items():
        error = law["errors"] or dict.fromkeys(("exponent", "scale", "floor"), float("nan"))
        terms = [f"{law[part]:.3g} ± {error[part]:.2g}" for part in ("exponent", "scale", "floor")]
        rest = [f"{law['reference']:.3g}", *terms[1:], f"{law['residual']:.2g}", "yes" if law["determined"] else "no"]
        laws.append([name, terms[0], *rest])
    steps = [["to the next size", "nll, the same seeds in pairs"]]
    steps += [[name, with_interval(step)] for name, step in values["differences"].items()]
    tables = [rows, steps, laws, larger(values_of("scale-h100")), *ablations(values_of("ablations"))]
    return "\n\n".join(as_table(table) for table in tables)


def larger(values: dict[str, Any]) -> list[list[str]]:
    """The same run on a GPU, and what was seen of larger ones: training loss of the same samples at the same steps."""
    losses = values["training loss of 16 samples"]
    looks = [step for step in next(iter(losses.values())) if all(step in own for own in losses.values())]
    rows = [["one H100", "parameters", "samples a second", "of its peak", "GiB", "nll"]]
    rows[0] += [f"loss at step {step}" for step in looks]
    for name, own in sorted(losses.items(), key=lambda item: values["sizes"][item[0]]["parameters"]):
        runs = values["runs"].get(name)
        rows.append(
            [
                name,
                f"{values['sizes'][name]['parameters'] / 1e6:,.0f} M",
                f"{median(values['samples a second'][name]):.0f}",
                f"{values['share of the peak'][name]:.1%}",
                f"{values['GiB'][name]:.3g}",
                f"{runs[0]['nll']:.4g}" if runs else "stopped",
                *(f"{own[step]:.3f}" for step in looks),
            ]
        )
    return rows


def ablations(values: dict[str, Any]) -> list[list[list[str]]]:
    """A row a change, and a row a kind of joins."""
    columns = ["lost", "energy/first", "energy/third", "energy/third, told", "rank", "alignment/training", "nll"]
    rows = [["changed", "parameters", *columns]]
    for name, means in values["means"].items():
        size = f"{values['sizes'][name]['parameters'] / 1e6:.3g} M"
        lost = f"{means['lost']['mean']:.3g}"  # the same for every seed: of the code, not of the training
        rows.append([name, size, lost, *(with_interval(means[column]) for column in columns[1:])])
    if "joins" not in values:
        return [rows]
    scores = values["joins"]["scores"].items()
    return [
        rows,
        [["joins", "step at joins ÷ step inside"], *([n, f"{s['score']:.2f} ({interval(s)})"] for n, s in scores)],
    ]


def with_interval(figure: dict[str, Any]) -> str:
    """`mean (low–high)`, or the mean alone where there is one seed."""
    between = figure["interval"]
    return f"{figure['mean']:.4g}" + (f" ({between[0]:.4g}–{between[1]:.4g})" if between else "")


def as_table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the heading."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def plans() -> str:
    """What training each run of recipes/paper.py takes, as a Markdown table."""
    values = values_of("plans")
    assumed = values.pop("assumed")
    shared = ("FSDP's whole weights", "FSDP's whole gradients")
    columns = {
        "trained + frozen": lambda plan: (
            f"{plan['trained'] / 1e6:,.0f} M" + f" + {plan['frozen'] / 1e6:,.0f} M" * (plan["frozen"] > 0)
        ),
        "batch, in micro-batches of": lambda plan: (
            f"{plan['batch_size']}, {plan['batch_size'] // plan['micro_batches']}"
        ),
        "strategy": lambda plan: plan["strategy"].upper(),
        "weights": lambda plan: gib(plan["bytes_held"]["weights"]),
        "gradients": lambda plan: gib(plan["bytes_held"]["gradients"]),
        "average": lambda plan: gib(plan["bytes_held"]["moving average"]),
        "optimizer": lambda plan: gib(plan["bytes_held"]["optimizer"]),
        "for sharing": lambda plan: gib(sum(plan["bytes_held"].get(name, 0) for name in shared)),
        "activations (recomputed)": lambda plan: (
            f"{gib(plan['activations']['kept'])} ({gib(plan['activations']['recomputed'])})"
        ),
        "GiB on each GPU": lambda plan: f"**{gib(sum(plan['bytes_held'].values()))}**",
        "TFLOP a step": lambda plan: f"{plan['step_flops'] / 1e12:.3g}",
        "steps a day": lambda plan: f"{float(format(86_400 / plan['step_s'], '.3g')):,.0f}",
        "steps": lambda plan: f"{plan['steps']:,}",
        "days": lambda plan: f"{plan['days']:.2g}",
    }
    rows = [[f"`{name}`", *(tell(plan["4 GPUs"]) for tell in columns.values())] for name, plan in values.items()]
    head = ["run", *columns]
    what = f"4 × {assumed['gpu']}: {assumed['mfu']:.0%} of {assumed['peak_flops'] / 1e12:g} TFLOP/s"
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    measured = [["one H100, measured", "seconds a micro-batch of 16", "of its peak", "GiB", "GiB counted"]]
    for name, run in values_of("paper-h100").items():
        figures = f"{run['median_s']:.3f}", f"{run['mfu']:.1%}", f"{run['memory_gib']:.1f}", f"{run['counted_gib']:.1f}"
        measured.append([f"`{name}`", *figures])
    can = f"{assumed['usable_memory']:.0%} of {assumed['memory_gib']} GiB can be used."
    return "\n".join([f"{what}; {can}", "", *lines, "", as_table(measured)])


def gib(count: int) -> str:
    """Bytes as GiB, with one decimal."""
    return f"{count / 2**30:.1f}"


def long_rows(long: dict[str, Any]) -> list[tuple[str, str]]:
    """What a minute costs, and how it holds together, for every kind of joins."""
    kinds, cost = long["joins"], long["cost"]
    drifts = {kind: part["drift"]["FVD-EffLite0"] for kind, part in kinds.items()}
    what = f"{long['seconds']:g} s of video, {len(long['prompts'])} training captions"
    return [
        (
            f"{what}: step at joins over step inside clips",
            ", ".join(
                f"{kind} {part['join_score']['score']:.2f} ({interval(part['join_score'])})"
                for kind, part in kinds.items()
            ),
        ),
        (
            f"{what}: motion of the last ten seconds over that of the first",
            ", ".join(
                f"{kind} {part['motion']['ratio']:.2f} ({interval(part['motion'])})" for kind, part in kinds.items()
            ),
        ),
        (
            f"{what}: FVD-EffLite0 of the last ten seconds against the first",
            ", ".join(f"{kind} {own['distance']:.0f} ({interval(own)})" for kind, own in drifts.items())
            + f" (same seconds dealt at random: {kinds['chained']['drift']['FVD-EffLite0']['chance']:.0f})",
        ),
        (
            f"{long['seconds']:g} s against 2 s",
            f"time of a clip ×{cost['time_ratio']['value']:.2f} ({interval(cost['time_ratio'])}), memory "
            f"×{cost['memory_ratio']['value']:.2f} ({interval(cost['memory_ratio'])}); language model "
            f"{cost['language_model_share']['value']:.1%} of the time; {cost['threads']} CPU thread",
        ),
    ]


def seconds(score: dict[str, Any]) -> str:
    """`value (low–high)`, in tenths."""
    low, high = score["interval"]
    return f"{score['value']:.1f} ({low:.1f}–{high:.1f})"


def interval(score: dict[str, Any], scale: float = 1) -> str:
    """`low–high`, with as many digits as help."""
    low, high = (value * scale for value in score["interval"])
    return f"{low:.0f}–{high:.0f}" if high > 10 else f"{low:.2f}–{high:.2f}"


if __name__ == "__main__":
    sys.exit(main())
