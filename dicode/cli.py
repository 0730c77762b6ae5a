"""The command line: its commands, their flags, and what becomes of errors.

A command is a dataclass of `flags`. The work is done by a function of the same name elsewhere (`COMMANDS`), imported
when the command runs, so that `dicode --help` needs no torch.
"""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import tyro
from tyro.conf import AvoidSubcommands, FlagCreatePairsOff, arg
from tyro.extras import SubcommandApp

from dicode import __version__
from dicode.flags import (
    Assemble,
    Cache,
    Clip,
    Dynamicrafter,
    Encode,
    Evaluate,
    Export,
    Finetune,
    Generate,
    Index,
    Info,
    Msrvtt,
    Official,
    Reconstruct,
    Scale,
    Sheet,
    Tokenize,
    Train,
    Ucf101,
    Vae,
    Vbench,
    Verify,
    Widen,
)
from dicode.recipe_files import load_run
from dicode.stopwatch import Stopwatch

INTERRUPTED = 130  # 128 + SIGINT, as shells count
USAGE_ERROR = 2  # as tyro and argparse

COMMANDS = {
    "dicode.generate_command": (Generate,),
    "dicode.commands": (Tokenize, Reconstruct, Train, Assemble, Widen),
    "dicode.finetune_command": (Finetune,),
    "dicode.info_command": (Info,),
    "dicode.scale_command": (Scale,),
    "dicode.data_commands": (Index, Cache, Verify, Encode, Export, Sheet),
    "dicode.evaluate.command": (Evaluate,),
    "dicode.evaluate.protocols": (Ucf101, Msrvtt, Vbench),
    "dicode.convert.command": (Official, Dynamicrafter, Clip, Vae),
}


def console() -> None:
    """The `dicode` command."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. What users can cause ends in one line, unless DICODE_DEBUG is set."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv == ["--version"]:
        print(f"dicode {__version__}")
        return 0
    signals: list[int] = []
    try:
        with _ended_by(signals), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"dicode: warning: {message}", file=sys.stderr)
            command, watch = parse(argv or ["--help"]), Stopwatch()
            module = next(module for module, kinds in COMMANDS.items() if isinstance(command, kinds))
            with watch.stage("load"):
                work = getattr(import_module(module), type(command).__name__.lower())
            return work(command, watch)
    except KeyboardInterrupt as interrupt:
        print(f"dicode: interrupted; {str(interrupt) or 'no unfinished file is left'}", file=sys.stderr)
        return 128 + signals[0] if signals else INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough, as in `dicode info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at exit
        return 0
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("DICODE_DEBUG"):
            raise
        print(f"dicode: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR


@contextmanager
def _ended_by(signals: list[int]) -> Iterator[None]:
    """In here SIGTERM and SIGHUP act as Ctrl-C does, so that unfinished files are removed; their number is noted."""

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one would stop the clearing up
        signals.append(number)
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():  # others may not set handlers
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup has SIGHUP ignored
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parse(argv: list[str]) -> Any:
    """The command of these arguments, one of the dataclasses of `flags`."""
    if len(argv) > 1 and argv[0] == "train" and not argv[1].startswith("-"):
        return _parse_train(argv[1], argv[2:])
    app, benchmark, data, convert = (SubcommandApp() for _ in range(4))
    for command in (Generate, Tokenize, Reconstruct, Train, Finetune, Assemble, Widen, Evaluate, Scale, Info):
        app.command(name=command.__name__.lower())(command)
    for protocol in (Ucf101, Msrvtt, Vbench):
        benchmark.command(name=protocol.__name__.lower())(protocol)
    for part in (Index, Cache, Verify, Encode, Export, Sheet):
        data.command(name=part.__name__.lower())(part)
    for source in (Official, Dynamicrafter, Clip, Vae):
        convert.command(name=source.__name__.lower())(source)
    app.command(benchmark, name="benchmark", help="Measure a model as the literature does: UCF-101, MSR-VTT, VBench.")
    app.command(data, name="data", help="Check, cache, encode, export or look at folders of clips.")
    app.command(convert, name="convert", help="Turn weights that others published into ours.")
    description = "Text to video with a language model. `dicode --version` tells the version."
    return app.cli(prog="dicode", description=description, args=argv, config=(FlagCreatePairsOff,))


def _parse_train(recipe: str, flags: list[str]) -> Train:
    """The run of a recipe with the fields that flags change, e.g. `--loop.optim.lr 1e-4`."""
    default = load_run(recipe)
    kind = type(default)

    def train(
        run_folder: Path | None = None,
        run: Annotated[AvoidSubcommands[kind], arg(name="")] = default,  # type: ignore[valid-type]
    ) -> Train:
        return Train(recipe, run_folder, run)

    return tyro.cli(train, prog=f"dicode train {recipe}", description=kind.__doc__, args=flags)
