"""What `dicode train` and `assemble` do; their flags are in `flags.py`."""

import sys
from pathlib import Path

import torch

from dicode import __version__
from dicode.checkpoint import check_model_folder
from dicode.cli.flags import Assemble, Info, Train, TrainAll
from dicode.cli.tokenize import asked_sampling
from dicode.config import config_to_dict, missing_extra
from dicode.files import check_parent
from dicode.stopwatch import Stopwatch


def train(command: Train, watch: Stopwatch) -> int:
    """Leaves with exit code 75 (`SystemExit`) where a signal stopped the run after a checkpoint."""
    try:
        from dicode.train.loop import NonFiniteLossError
        from dicode.train.parallel import Processes
        from dicode.train.stages import run_recipe
    except ModuleNotFoundError as error:
        raise missing_extra(error, "train") from error
    file, _, name = command.recipe.rpartition(":")
    folder = command.run_folder or Path("runs") / f"{Path(file).stem}-{name}"
    recipe = {"recipe": command.recipe, "run": config_to_dict(command.run), "dicode": __version__}
    try:
        best = run_recipe(command.run, folder, recipe, Path(file), command.minutes)
    except NonFiniteLossError as error:
        print(f"dicode: {error}", file=sys.stderr)
        return 1
    if Processes().first:
        print(f"{folder}/best: " + "  ".join(f"{name} {value:.4g}" for name, value in best.items()))
    return 0


def trainall(command: TrainAll, watch: Stopwatch) -> int:
    """As `train` and `assemble`; says what came out, as `dicode info` does."""
    try:
        from dicode.cli.info import info
        from dicode.train.chain import Chain
        from dicode.train.loop import NonFiniteLossError
        from dicode.train.parallel import Processes
    except ModuleNotFoundError as error:
        raise missing_extra(error, "train") from error
    check_parent(command.output)
    check_model_folder(command.output)  # before hours of training
    chain = Chain.of(command.recipe, command.cache, command.runs, command.first_stage)
    try:
        chain.train(command.minutes)
    except NonFiniteLossError as error:
        print(f"dicode: {error}", file=sys.stderr)
        return 1
    if not Processes().first:
        return 0
    chain.assemble(command.output, command.dtype)
    return info(Info(str(command.output)), watch)


def assemble(command: Assemble, watch: Stopwatch) -> int:
    """Says what came out, as `dicode info` does."""
    from dicode.cli.info import info
    from dicode.train.assemble import assemble as join
    from dicode.train.assemble import last_of

    dtype, options = getattr(torch, command.dtype), asked_sampling(command)
    folders = [last_of(path) if command.last else path for path in (command.tokenizer, command.lm)]
    later = last_of(command.first_stage) if command.last and command.first_stage else command.first_stage
    join(folders[0], folders[1], command.output, later, dtype, **options)
    return info(Info(str(command.output)), watch)
