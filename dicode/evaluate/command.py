"""What `dicode evaluate` does; its flags are in `flags.py`."""

import shlex
import sys
from pathlib import Path

import torch
from PIL import Image

from dicode.evaluate.clips import MadeClips
from dicode.evaluate.features import load_networks
from dicode.evaluate.html import write_report
from dicode.evaluate.instructions import evaluate_instructions
from dicode.evaluate.long import check_length, measure_long
from dicode.evaluate.ranking import evaluate_ranking
from dicode.evaluate.report import read_result, write_result
from dicode.evaluate.speed import evaluate_speed
from dicode.evaluate.suite import evaluate_generation, evaluate_reconstruction
from dicode.flags import Evaluate
from dicode.generate import DiCoDe
from dicode.hub import resolve
from dicode.stopwatch import Stopwatch
from dicode.video.shards import FrameCache

PARTS = ("generation", "reconstruction", "ranking", "instructions", "speed", "long")
ONE_NETWORK = (
    "Every figure named EffLite0, text control and the rank of the true clip are made with one network, "
    "EfficientNet-lite0. Where the decoder was trained with the perceptual loss, as the model in the box was, earlier "
    "layers of the same network trained it: these figures favour it over models that were not."
)


def evaluate(command: Evaluate, watch: Stopwatch) -> int:
    """One result file and one contact sheet a part: generation, reconstruction, ranking, instructions, speed, long."""
    if command.repeats < 1:
        raise ValueError(f"repeats: expected 1 or more, got {command.repeats}")
    with watch.stage("load"):
        model = DiCoDe.from_pretrained(command.model, dtype=getattr(torch, command.dtype))
        cache = FrameCache.load(command.cache)
        device = model.tokenizer.device
        networks = load_networks(command.features, device)
    if "long" in command.parts:
        check_length(model, command.long_seconds)  # before the other parts take their hours
    command.output.mkdir(parents=True, exist_ok=True)
    config = model.tokenizer.config
    bank = Path(command.cache) / f"EffLite0-{config.clip_frames}-frames-{config.fps:g}-fps.safetensors"
    folder, line = resolve(command.model), "dicode " + shlex.join(sys.argv[1:])
    name, made = Path(command.model).name, MadeClips(model, cache, command.seed)
    parts = {
        "generation": lambda: evaluate_generation(made, bank, command.prompts, networks),
        "reconstruction": lambda: evaluate_reconstruction(made, bank, networks),
        "ranking": lambda: evaluate_ranking(made, networks),
        "instructions": lambda: evaluate_instructions(model, cache, command.seed),
        "speed": lambda: (evaluate_speed(model, folder, "a swirling ice vortex", repeats=command.repeats), None),
        "long": lambda: measure_long(
            model, cache, folder, command.long_prompts, command.seed, command.long_seconds, command.repeats
        ),
    }
    counts = {"generation": command.prompts, "speed": command.repeats, "long": command.long_prompts}
    sheets: dict[str, Image.Image] = {}
    for part in command.parts:
        with watch.stage(part):
            figures, sheet = parts[part]()
        n = counts.get(part) or figures["n"]
        path, notes = command.output / f"{name}-{part}.json", "" if part == "speed" else ONE_NETWORK
        timed = {**figures, "measured_in_s": watch.seconds[part]}  # shared clips count in the first part
        write_result(path, f"{name}: {part}", timed, n, command.seed, line, device, notes)
        if sheet is not None:
            sheets[part] = sheet
        if sheet is not None and command.sheets is not None:
            command.sheets.mkdir(parents=True, exist_ok=True)
            sheet.save(command.sheets / f"{name}-{part}.png")
        print(f"{path}")
    if command.report is not None:
        files = {part: command.output / f"{name}-{part}.json" for part in PARTS}
        results = {part: read_result(path) for part, path in files.items() if path.is_file()}
        if command.sheets is not None:
            earlier = {part: command.sheets / f"{name}-{part}.png" for part in results.keys() - sheets.keys()}
            sheets |= {part: Image.open(path) for part, path in earlier.items() if path.is_file()}
        write_report(command.report, name, results, sheets)
        print(f"{command.report}")
    print(watch.text())
    return 0
