"""What `dicode evaluate` does; its flags are in `flags.py`."""

import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dicode.checkpoint import resolve
from dicode.cli.evaluate_flags import Evaluate
from dicode.data.cache import FrameCache
from dicode.device import pick_device
from dicode.evaluate.estimate import measured_units, work_of
from dicode.evaluate.generation import evaluate_generation
from dicode.evaluate.instructions import IMAGES, evaluate_instructions
from dicode.evaluate.long import measure_long
from dicode.evaluate.own_scorer import clips_of_videos, evaluate_scorer
from dicode.evaluate.reconstruction import evaluate_reconstruction
from dicode.evaluate.report import write_report
from dicode.evaluate.samples import MOST_VIDEOS, Samples, caption_of, split_rows
from dicode.evaluate.scores import blindness, marked_blind, measured_with
from dicode.evaluate.speed import check_length, evaluate_speed
from dicode.features.extract import Network, load_networks
from dicode.features.scorer import Scorer
from dicode.pipeline import DiCoDe
from dicode.provenance import read_result, write_result
from dicode.stopwatch import Progress, Stopwatch, duration

PARTS = ("generation", "reconstruction", "instructions", "scorer", "speed", "long")
QUICK_PARTS = ("generation", "reconstruction", "scorer")
ONE_NETWORK = (
    "Every figure named EffLite0, text control and the rank of the true clip are made with one network, "
    "EfficientNet-lite0. Where the decoder was trained with the perceptual loss, as the model in the box was, earlier "
    "layers of the same network trained it: these figures favour it over models that were not."
)
RANKED_CLIPS = 48  # whose captions a network must rank better than chance
UNMEASURED = ("speed", "scorer")  # without a network


@dataclass(frozen=True)
class Limits:
    """How much is looked at."""

    prompts: int  # training captions, and videos of each split for a scorer
    validation: int | None  # clips; None: all
    references: int = MOST_VIDEOS  # training clips that text control looks among
    scored: int = 100


QUICK = Limits(prompts=8, validation=8, references=24, scored=8)


def evaluate(command: Evaluate, watch: Stopwatch) -> int:
    """One result file and one contact sheet a part: generation, reconstruction, instructions, speed, long."""
    limits = QUICK if command.quick else Limits(command.prompts, None, scored=command.prompts)
    parts = parts_of(command)
    scorer = None if command.scorer is None else Scorer(command.scorer)
    with watch.stage("load"):
        device = pick_device(command.device)
        model = DiCoDe.from_pretrained(command.model, device=str(device), dtype=getattr(torch, command.dtype))
        cache = FrameCache.load(command.cache)
        networks = load_networks(command.features, device)
    if "long" in parts:
        check_length(model, command.long_seconds)  # before the other parts take their hours
    made = Samples(model, cache, command.seed, Path(command.cache), limits.validation)
    print(foretold(made, networks, parts, command, limits, watch))
    command.output.mkdir(parents=True, exist_ok=True)
    name = f"{Path(command.model).name}{'-quick' * command.quick}"
    sheets: dict[str, Image.Image] = {}
    blind: dict[str, str] = {}
    if set(parts) & {"generation", "reconstruction"}:
        blind = blind_networks(made, networks)
    work = work_by_part(command, made, networks, scorer, limits)
    for part in parts:
        with watch.stage(part), Progress(part):
            figures, sheet = work[part]()
        write_part(command, name, part, figures, watch.seconds[part], device, blind)
        if sheet is not None:
            sheets[part] = sheet
            if command.sheets is not None:
                command.sheets.mkdir(parents=True, exist_ok=True)
                sheet.save(command.sheets / f"{name}-{part}.png")
    if command.report is not None:
        report(command, name, sheets)
    print(watch.text())
    return 0


def parts_of(command: Evaluate) -> tuple[str, ...]:
    """The parts asked for, each once; says which ones `--quick` leaves out. Raises `ValueError` where none is left."""
    asked = tuple(dict.fromkeys([*command.parts, *(["scorer"] if command.scorer else [])]))
    if not command.quick:
        return asked
    kept = tuple(part for part in asked if part in QUICK_PARTS)
    if not kept:
        raise ValueError(f"--quick: expected a part among {', '.join(QUICK_PARTS)}, got {', '.join(asked)}")
    left_out = [part for part in PARTS if part not in kept and part != "scorer"]
    print(
        f"quick: {', '.join(kept)}, of {QUICK.validation} validation clips, {QUICK.prompts} captions and "
        f"{QUICK.references} training clips; left out: {', '.join(left_out)}. Intervals are wide: for figures to "
        "compare, leave --quick out"
    )
    return kept


def foretold(
    made: Samples,
    networks: Mapping[str, Network],
    parts: tuple[str, ...],
    command: Evaluate,
    limits: Limits,
    watch: Stopwatch,
) -> str:
    """How long the parts will take, from what the first clips take."""
    with watch.stage("first clips"):
        units = measured_units(made, networks, watch.seconds["load"])
    config, cache = made.model.tokenizer.config, made.cache
    training = made.training(limits.references)
    splits = [len(split_rows(cache, held, captioned=True)) for held in (False, True)]
    scored = clips_of_videos(made) * sum(min(limits.scored, own) for own in splits)
    work = work_of(
        parts,
        validation=len(made.rows),
        missing=made.real_clips.missing(made.extractor, training),
        prompts=min(limits.prompts, splits[0]),
        images=sum(min(IMAGES, own) for own in splits),
        scored=scored,
        repeats=command.repeats,
        long=command.long_prompts * config.num_clips(made.model.num_frames(command.long_seconds)),
    )
    each = {part: own.seconds(units) for part, own in work.items()}
    told = ", ".join(f"{part} {duration(max(1.0, seconds))}" for part, seconds in each.items())
    return f"about {duration(max(1, sum(each.values())))} on this machine, by its first clips: {told}"


def blind_networks(made: Samples, networks: Mapping[str, Network]) -> dict[str, str]:
    """Networks that rank the captions of this cache's real clips no better than chance, and what is to be said of it.

    Of validation clips, and of training clips where these are few. Also printed.
    """
    rows, found = made.rows + made.training(max(0, RANKED_CLIPS - len(made.rows))), {}
    captions = [caption_of(made.cache.videos[row]) for row in rows]
    for network in networks.values():
        if reason := blindness(network, made.real_clips.features(network, rows), captions, made.seed):
            found[network.name] = reason
            print(reason)
    return found


def work_by_part(
    command: Evaluate, made: Samples, networks: Mapping[str, Network], scorer: Scorer | None, limits: Limits
) -> dict[str, Callable[[], tuple[dict[str, Any], Image.Image | None]]]:
    """What each part does."""
    model, cache, seed, folder = made.model, made.cache, command.seed, resolve(command.model)
    seconds, repeats = command.long_seconds, command.repeats
    work: dict[str, Callable[[], tuple[dict[str, Any], Image.Image | None]]] = {
        "generation": lambda: evaluate_generation(made, limits.prompts, networks, limits.references),
        "reconstruction": lambda: evaluate_reconstruction(made, networks),
        "instructions": lambda: evaluate_instructions(model, cache, seed),
        "speed": lambda: (evaluate_speed(model, folder, "a swirling ice vortex", repeats=repeats), None),
        "long": lambda: measure_long(model, cache, folder, command.long_prompts, seed, seconds, repeats),
    }
    return work if scorer is None else {**work, "scorer": lambda: evaluate_scorer(made, scorer, limits.scored)}


def write_part(
    command: Evaluate,
    name: str,
    part: str,
    figures: dict[str, Any],
    took_s: float,
    device: torch.device,
    blind: Mapping[str, str],
) -> None:
    """The result file of a part, with what is said of networks that are blind to these clips beside their figures."""
    counts = {"speed": command.repeats, "long": command.long_prompts}
    metrics = [*figures, *figures.get("metrics", {})]
    own = {network: why for network, why in blind.items() if any(measured_with(metric, network) for metric in metrics)}
    values = {**marked_blind(figures, own), "measured_in_s": took_s}  # shared clips count in the first part
    if own:
        values["blind"] = own
    notes = [] if part in UNMEASURED else [ONE_NETWORK]
    notes += ["Quick: few clips, for a first look."] if command.quick else []
    path, n = command.output / f"{name}-{part}.json", counts.get(part) or figures["n"]
    line = "dicode " + shlex.join(sys.argv[1:])
    write_result(path, f"{name}: {part}", values, n, command.seed, line, device, " ".join(notes))
    told = f" (figures of {', '.join(own)}, blind here, say nothing)" if own else ""
    print(f"{path}{told}")


def report(command: Evaluate, name: str, sheets: dict[str, Image.Image]) -> None:
    """The page of all results there are of this model, with contact sheets of this run and of earlier ones."""
    assert command.report is not None
    files = {part: command.output / f"{name}-{part}.json" for part in PARTS}
    results = {part: read_result(path) for part, path in files.items() if path.is_file()}
    if command.sheets is not None:
        earlier = {part: command.sheets / f"{name}-{part}.png" for part in results.keys() - sheets.keys()}
        sheets |= {part: Image.open(path) for part, path in earlier.items() if path.is_file()}
    write_report(command.report, name, results, sheets)
    print(f"{command.report}")
