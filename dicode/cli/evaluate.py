"""`dicode evaluate` and `dicode tune`."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from dicode.cli import common
from dicode.config import DEFAULT_MODEL, Count, Factor, Guidance, Range, Seed
from dicode.stopwatch import Progress, Stopwatch

PARTS = ("generation", "reconstruction", "instructions", "scorer", "events", "speed", "long")
WITHOUT_FEATURES = {"scorer", "events", "speed"}
QUICK_PARTS = ("generation", "reconstruction", "scorer")
CacheOption = Annotated[
    Path | None, arg(help="real clips, a folder written by `dicode data cache`; default: cache/ and the model's name")
]
ScorerFile = Annotated[
    str | None,
    arg(
        metavar="FILE.py:FUNCTION",
        help="your function of uint8 frames f h w c that returns a dict, compared with the keys of caption lines",
    ),
]


@dataclass(frozen=True)
class Evaluate:
    """Measure a model against its training and validation clips: one JSON a part, written from this command alone.

    The first line estimates the time on this machine; `long`, a minute's videos, takes longest.
    """

    model: common.Model = DEFAULT_MODEL  # bundled model, checkpoint folder, or owner/name on the Hub
    cache: CacheOption = None
    output: common.OutputPath = Path("results")  # folder of the JSON files
    sheets: Path | None = None  # folder for contact sheets; the report includes earlier ones there
    report: Path | None = None  # HTML file of all results of this model in the folder
    # parts of the evaluation; events: of a cache of `dicode data blocks`
    parts: tuple[Literal["generation", "reconstruction", "instructions", "events", "speed", "long"], ...] = (
        "generation",
        "reconstruction",
        "speed",
    )
    quick: bool = False  # a first look of about a minute: few clips, without speed, instructions, long
    scorer: ScorerFile = None
    # networks beside EffLite0: TinyVT, I3D=PATH, C3D=PATH, Inception=PATH, CLIP=ID_OR_FOLDER
    features: tuple[str, ...] = ("EffLite0", "TinyVT")
    # most training captions to generate from, videos of each split for a scorer, scripts of each set
    prompts: Count = 100
    long_prompts: Count = 8  # training captions for long videos
    long_seconds: common.Seconds = 60.0  # length of long videos in seconds
    repeats: Count = 5  # measurements of seconds and memory; fewer have no interval
    seed: Seed = 0  # random seed
    device: common.Device = "auto"
    dtype: common.WeightsDtype = "float32"


@dataclass(frozen=True)
class Tune:
    """Choose a model's sampling on training captions: a table of settings, the best written into its config.json.

    Settings are compared on the same captions and noise; where none is better beyond noise, the stored ones stay.
    """

    model: common.Model  # checkpoint folder; with -o also a bundled model or owner/name on the Hub
    cache: CacheOption = None
    output: Annotated[Path | None, arg(aliases=("-o",))] = None  # new folder for the tuned model; default: in place
    scorer: ScorerFile = None  # default: percentile rank of captions by TinyVT
    prompts: Annotated[int, Range(8, 10_000)] = 32  # training captions
    guidance: tuple[Guidance, ...] = (1.0, 2.0, 3.0)  # guidance scales of the language model
    variance_scale: tuple[Factor, ...] = (0.1, 0.3, 1.0)  # variance scales, each with each guidance
    decoder_guidance: tuple[Guidance, ...] = (1.0, 2.0)  # guidance scales of the decoder, with the best of these pairs
    seed: Seed = 0  # random seed
    device: common.Device = "auto"
    dtype: common.WeightsDtype = "float32"
    json: common.ResultFile = None


def evaluate(command: Evaluate, watch: Stopwatch) -> None:
    """One result file and one contact sheet a part."""
    began_s = time.monotonic()
    from dicode.data.cache import FrameCache
    from dicode.evaluate import suite
    from dicode.evaluate.events import check_scripts
    from dicode.evaluate.report import summary
    from dicode.evaluate.samples import Samples
    from dicode.evaluate.scores import with_blindness
    from dicode.evaluate.speed import check_length
    from dicode.features.extract import check_efficientnet, load_networks
    from dicode.features.scorer import Scorer
    from dicode.provenance import command_line, read_result, write_result
    from dicode.video.sheet import write_sheet

    parts = _parts(command)
    if {*parts} - WITHOUT_FEATURES:
        check_efficientnet()  # before minutes of videos
    flags = {name: getattr(command, name) for name in ("prompts", "repeats", "long_prompts", "long_seconds")}
    limits = suite.QUICK if command.quick else suite.Limits(**flags)
    scorer = None if command.scorer is None else Scorer(command.scorer)
    model, folder = common.load_model(command)
    device = model.tokenizer.device
    cache_folder = _cache_folder(command)
    cache, networks = FrameCache.load(cache_folder), load_networks(command.features, device).values()
    if "events" in parts:
        check_scripts(model.tokenizer.config, cache)
    if "long" in parts:
        check_length(model, command.long_seconds)  # before the other parts take their hours
    samples = Samples(model, cache, command.seed, cache_folder, limits.validation, networks)
    start_s = time.monotonic() - began_s
    with watch.stage("first clips"):
        print(suite.estimated_time(samples, parts, limits, start_s))
    name = f"{Path(command.model).name}{'-quick' * command.quick}"
    files = {part: command.output / f"{name}-{part}.json" for part in PARTS}
    command.output.mkdir(parents=True, exist_ok=True)
    for part in parts:
        _check_outputs(command, files[part])
    blind = suite.blind_networks(samples) if {"generation", "reconstruction"} & {*parts} else {}
    print("".join(f"{reason}\n" for reason in blind.values()), end="")
    sheets: dict[str, Any] = {}
    for part in parts:
        with watch.stage(part), Progress(part):
            figures, sheet = suite.evaluate_part(part, samples, scorer, limits, folder)
        values = {**with_blindness(figures, blind), "measured_in_s": watch.seconds[part]}
        n = {"speed": command.repeats, "long": command.long_prompts}.get(part) or figures["n"]
        notes = [suite.ONE_NETWORK] * (part not in ("speed", "scorer", "events"))
        notes += ["Quick: few clips, for a first look."] * command.quick
        write_result(files[part], f"{name}: {part}", values, n, command.seed, command_line(), device, " ".join(notes))
        blind_here = ", ".join(values.get("blind", {}))
        print(f"{files[part]}" + (f" (ignore the figures of {blind_here}, blind here)" if blind_here else ""))
        print("".join(f"{line}\n" for line in summary(read_result(files[part])["values"])), end="")
        if sheet is not None:
            sheets[part] = sheet
            if command.sheets is not None:
                command.sheets.mkdir(parents=True, exist_ok=True)
                write_sheet(command.sheets / f"{name}-{part}.png", sheet)
    if command.report is not None:
        _report(command, name, files, sheets)
    print(watch.text())


def _cache_folder(command: Evaluate | Tune) -> Path:
    return command.cache or Path("cache") / Path(command.model).name


def _check_outputs(command: Evaluate, file: Path) -> None:
    """Raise before hours of work where a part's result, its sheet or the report would replace another file."""
    from dicode.evaluate.report import is_report
    from dicode.files import check_file
    from dicode.provenance import check_result
    from dicode.video.sheet import is_sheet

    check_result(file)
    if command.sheets is not None:
        check_file(command.sheets / f"{file.stem}.png", is_sheet)
    check_file(command.report, is_report)


def _report(command: Evaluate, name: str, files: dict[str, Path], sheets: dict[str, Any]) -> None:
    """Write a page of all results of this model, with contact sheets of this run and of earlier ones."""
    from PIL import Image

    from dicode.evaluate.report import write_report
    from dicode.provenance import read_result

    assert command.report is not None
    results = {part: read_result(path) for part, path in files.items() if path.is_file()}
    if command.sheets is not None:
        earlier = {part: command.sheets / f"{name}-{part}.png" for part in results.keys() - sheets.keys()}
        sheets |= {part: Image.open(path) for part, path in earlier.items() if path.is_file()}
    write_report(command.report, name, results, sheets)
    print(f"{command.report}")


def _parts(command: Evaluate) -> tuple[str, ...]:
    """The parts to evaluate, each once. Raises `ValueError` where `--quick` leaves none."""
    parts = tuple(dict.fromkeys([*command.parts, *(["scorer"] if command.scorer else [])]))
    if not command.quick:
        return parts
    kept = tuple(part for part in parts if part in QUICK_PARTS)
    if not kept:
        raise ValueError(f"--quick: expected a part among {', '.join(QUICK_PARTS)}, got {', '.join(parts)}")
    left_out = ", ".join(part for part in PARTS if part not in kept and part != "scorer")
    print(f"quick: {', '.join(kept)}; left out: {left_out}. Few clips and wide intervals: not for figures to compare")
    return kept


def tune(command: Tune, watch: Stopwatch) -> None:
    """Try guidance × variance scale, then the decoder's guidance, each with the same prompts and noise."""
    from dicode.checkpoint import resolve
    from dicode.data.cache import FrameCache
    from dicode.evaluate import tune as tuning
    from dicode.evaluate.samples import Samples
    from dicode.features.scorer import Scorer
    from dicode.provenance import check_result, command_line, write_result

    check_result(command.json)
    folder = resolve(command.model)
    target = tuning.target_of(folder, command.output)
    scorer = None if command.scorer is None else Scorer(command.scorer)
    model, _ = common.load_model(command)
    cache_folder = _cache_folder(command)
    samples = Samples(model, FrameCache.load(cache_folder), command.seed, cache_folder)
    with watch.stage("settings"):
        chosen, values = tuning.tune(
            samples, scorer, command.prompts, command.guidance, command.variance_scale, command.decoder_guidance
        )
    print(f"{tuning.table(model, values)}\n{values['decision']}")
    if chosen or target != folder:
        tuning.write_choice(folder, target, chosen)
        print(f"{target}/config.json: {tuning.named(chosen) or 'as before'}")
    if command.json is not None:
        name, n = f"{Path(command.model).name}: tuned", values["real"]["n"]
        write_result(command.json, name, values, n, command.seed, command_line(), model.tokenizer.device)
        print(f"{command.json}")
