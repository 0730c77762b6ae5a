"""What `dicode convert …` does; its flags are in `flags.py`."""

from pathlib import Path

import torch

from dicode.checkpoint import check_model_folder, downloaded
from dicode.cli.flags import Clip, Dynamicrafter, Official, Vae
from dicode.convert.official import Report, convert_official
from dicode.convert.priors import convert_clip, convert_dynamicrafter, convert_vae
from dicode.lm.text import TextTokenizer
from dicode.stopwatch import Stopwatch


def official(command: Official, watch: Stopwatch) -> int:
    """Tells what became of every tensor."""
    check_model_folder(command.output)
    with watch.stage("convert"):
        report = convert_official(
            command.output,
            command.tokenizer,
            command.lm,
            clip=command.clip,
            vocabulary=gpt2_vocabulary(command.vocabulary) if command.lm else None,
            dtype=getattr(torch, command.dtype),
        )
    return _told(report, command.output, watch)


def dynamicrafter(command: Dynamicrafter, watch: Stopwatch) -> int:
    """Tells what became of every tensor."""
    check_model_folder(command.output)
    with watch.stage("convert"):
        dtype = getattr(torch, command.dtype)
        report = convert_dynamicrafter(
            command.checkpoint, command.output, clip=command.clip, objective=command.objective, dtype=dtype
        )
    return _told(report, command.output, watch)


def clip(command: Clip, watch: Stopwatch) -> int:
    """The direction is told by the names in the file."""
    check_model_folder(command.output, own=())
    with watch.stage("convert"):
        report = convert_clip(command.weights, command.output, getattr(torch, command.dtype))
    return _told(report, command.output, watch)


def vae(command: Vae, watch: Stopwatch) -> int:
    """`FirstStage.from_diffusers` reads what it writes."""
    check_model_folder(command.output, own=())
    with watch.stage("convert"):
        report = convert_vae(command.weights, command.output, getattr(torch, command.dtype))
    return _told(report, command.output, watch)


def gpt2_vocabulary(name: str) -> TextTokenizer:
    """GPT-2's vocabulary with the published entries for images, from a folder or the Hub."""
    files = ("vocab.json", "merges.txt")
    return TextTokenizer.gpt2(Path(name) if Path(name).is_dir() else downloaded(name, files))


def _told(report: Report, output: Path, watch: Stopwatch) -> int:
    print(f"{output}: {sum(report.used.values()):,} numbers\n{report.text()}\n{watch.text()}")
    return 0
