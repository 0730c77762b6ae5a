"""What `dicode evaluate` does; its flags are in `cli.py`."""

import shlex
import sys
from pathlib import Path

from dicode.cli import Evaluate
from dicode.evaluate.long import check_length, measure_long
from dicode.evaluate.report import write_result
from dicode.evaluate.suite import evaluate_generation, evaluate_reconstruction, evaluate_speed
from dicode.generate import DiCoDe
from dicode.hub import resolve
from dicode.stopwatch import Stopwatch
from dicode.video.shards import FrameCache


def evaluate(command: Evaluate, watch: Stopwatch) -> int:
    """One result file and one contact sheet a part: generation, reconstruction, speed, long."""
    with watch.stage("load"):
        model = DiCoDe.from_pretrained(command.model)
        cache = FrameCache.load(command.cache)
    if "long" in command.parts:
        check_length(model, command.long_seconds)  # before the other parts take their hours
    command.output.mkdir(parents=True, exist_ok=True)
    config = model.tokenizer.config
    bank = Path(command.cache) / f"EffLite0-{config.clip_frames}-frames-{config.fps:g}-fps.safetensors"
    folder, line = resolve(command.model), "dicode " + shlex.join(sys.argv[1:])
    name = Path(command.model).name
    parts = {
        "generation": lambda: evaluate_generation(model, cache, bank, command.prompts, command.seed),
        "reconstruction": lambda: evaluate_reconstruction(model, cache, bank, command.seed),
        "speed": lambda: (evaluate_speed(model, folder, "a swirling ice vortex"), None),
        "long": lambda: measure_long(model, cache, folder, command.long_prompts, command.seed, command.long_seconds),
    }
    counts = {"generation": command.prompts, "speed": 3, "long": command.long_prompts}
    for part in command.parts:
        with watch.stage(part):
            figures, sheet = parts[part]()
        n = counts.get(part) or figures["n"]
        write_result(command.output / f"{name}-{part}.json", f"{name}: {part}", figures, n, command.seed, line)
        if sheet is not None and command.sheets is not None:
            command.sheets.mkdir(parents=True, exist_ok=True)
            sheet.save(command.sheets / f"{name}-{part}.png")
        print(f"{command.output / f'{name}-{part}.json'}")
    print(watch.text())
    return 0
