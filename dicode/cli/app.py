"""The command line: its commands, and what becomes of errors.

A command is a frozen dataclass whose fields are the flags and their comments the help. The function of the same name in
lower case, in the same file, runs it. Files of commands import no torch, so that `dicode --help` comes at once.
"""

import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import tyro
from tyro.conf import AvoidSubcommands, DisallowNone, FlagCreatePairsOff, arg
from tyro.extras import SubcommandApp

from dicode import __version__
from dicode.cli.benchmark import Msrvtt, Ucf101, Vbench
from dicode.cli.convert import Clip, Dynamicrafter, Official, Vae, Wan
from dicode.cli.data import Blocks, Cache, Check, Encode, Export, Index, Sheet, Stream, Verify
from dicode.cli.evaluate import Evaluate, Tune
from dicode.cli.generate import Generate
from dicode.cli.info import Info
from dicode.cli.serve import Serve
from dicode.cli.tokenize import Reconstruct, Tokenize
from dicode.cli.train import Assemble, Finetune, Train, TrainAll
from dicode.config import check_ranges
from dicode.config.user_code import raised_in
from dicode.stopwatch import Stopwatch
from dicode.train.runs import load_run

INTERRUPTED = 130  # 128 + SIGINT, as shells count
USAGE_ERROR = 2  # as tyro and argparse
NOT_FINITE = 1  # a training that met NaN or infinity
BUG = 70  # EX_SOFTWARE
THREADS = "--threads"  # of any command
SPINS = "2000"  # that a thread of OpenMP waits awake; its own 300,000 take a busy machine 3 times as long (docs/log.md)
GROUPS = re.compile(r"^(run|write|render)\.")  # of flags, whose names leave them out
CONFIG = (FlagCreatePairsOff, DisallowNone)  # of commands: a flag left out is None; help names the type alone
RECIPE = re.compile(r"\.py(:|$)")

COMMANDS = (Generate, Serve, Tokenize, Reconstruct, Train, Finetune, Assemble, Evaluate, Tune, Info)
GROUPED = {
    "benchmark": ("Measure a model on public benchmarks: UCF-101, MSR-VTT, VBench.", (Ucf101, Msrvtt, Vbench)),
    "data": (
        "Check, cache, encode, export or draw folders of clips.",
        (Index, Cache, Stream, Blocks, Check, Verify, Encode, Export, Sheet),
    ),
    "convert": ("Convert published weights into checkpoint folders.", (Official, Dynamicrafter, Clip, Vae, Wan)),
}


def console() -> None:
    """The `dicode` command."""
    for stream in (sys.stdout, sys.stderr):  # a name that is not UTF-8, or a terminal that is none, stops nothing
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is imported
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
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
            warnings.showwarning = _warn_once()
            argv = _with_threads(argv)
            command, watch = parse(argv or ["--help"]), Stopwatch()
            kind = type(command)
            with watch.stage("load"):  # imports, and what else is in no other stage
                return getattr(sys.modules[kind.__module__], kind.__name__.lower())(command, watch) or 0
    except KeyboardInterrupt as interrupt:
        print(f"dicode: interrupted; {str(interrupt) or 'no unfinished file is left'}", file=sys.stderr)
        return 128 + signals[0] if signals else INTERRUPTED
    except BrokenPipeError:  # the reader of our output has closed it, as in `dicode info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at exit
        return 0
    except Exception as error:
        if os.environ.get("DICODE_DEBUG"):
            raise
        code, text = _explained(error)
        print(f"dicode: {' '.join(text.split())}", file=sys.stderr)
        return code


def _with_threads(argv: list[str]) -> list[str]:
    """Arguments without `--threads N`, which is in force from now on. Raises `ValueError` for what is no number."""
    if THREADS not in argv:
        return argv
    at = argv.index(THREADS)
    if not (at + 1 < len(argv) and argv[at + 1].isdecimal() and int(argv[at + 1]) > 0):
        raise ValueError(f"{THREADS}: expected a number from 1 on, got {' '.join(argv[at + 1 : at + 2]) or 'nothing'}")
    os.environ["OMP_NUM_THREADS"] = argv[at + 1]  # read when torch is imported
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(argv[at + 1]))
    return argv[:at] + argv[at + 2 :]


def _explained(error: Exception) -> tuple[int, str]:
    """The exit code of an error, and its text: what users can cause names file and flag by itself."""
    if isinstance(error, FloatingPointError):
        return NOT_FINITE, str(error)
    if isinstance(error, ValueError | OSError | ImportError):
        return USAGE_ERROR, str(error) or type(error).__name__
    if isinstance(error, MemoryError) or re.search(r"out of memory|allocate memory", str(error)):
        return USAGE_ERROR, f"not enough memory; ask for less at a time, or take a smaller model ({error})"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno}" if trace else "?"
    return BUG, f"{type(error).__name__}: {error} ({where}); this is a bug: DICODE_DEBUG=1 shows where it comes from"


@contextmanager
def _ended_by(signals: list[int]) -> Iterator[None]:
    """In here SIGTERM and SIGHUP act as Ctrl-C does, so that unfinished files are removed; appends their numbers."""

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one would stop the clearing up
        signals.append(number)
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():  # others may not set handlers
        for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:  # Windows has no SIGHUP
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup has SIGHUP ignored
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _warn_once() -> Callable[..., None]:
    """A `warnings.showwarning` that prints a warning in one line, and each text once."""
    printed: set[str] = set()

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in printed:
            printed.add(str(message))
            print(f"dicode: warning: {message}", file=sys.stderr)

    return warn


def parse(argv: list[str]) -> Any:
    """The command of these arguments, one of the dataclasses above, every number in its range."""
    command = _parsed(argv)
    check_ranges(command, lambda path: "--" + GROUPS.sub("", path).replace("_", "-"))
    return command


def _parsed(argv: list[str]) -> Any:
    recipes = [word for word in argv[1:] if RECIPE.search(word)] if argv[0] == "train" else []
    if recipes:
        flags = argv[1:]
        flags.remove(recipes[0])
        return _parse_train(recipes[0], flags)
    app = SubcommandApp()
    for command in COMMANDS:
        app.command(name=command.__name__.lower())(command)
    for name, (text, commands) in GROUPED.items():
        group = SubcommandApp()
        for part in commands:
            group.command(name=part.__name__.lower())(part)
        app.command(group, name=name, help=text)
    description = (
        "Text to video with a language model. `dicode --version` prints the version; `--threads N`, after any command, "
        "limits the processor's threads."
    )
    parsed = app.cli(prog="dicode", description=description, args=argv, config=CONFIG)
    if isinstance(parsed, Train):
        from dicode.train.runs import load_run

        load_run(parsed.recipe)  # which raises, or it would have been found
    return parsed


def _parse_train(recipe: str, flags: list[str]) -> Train | TrainAll:
    """A recipe's run with the fields that flags change, e.g. `--loop.optim.lr 1e-4`; with `--all`, a file's runs."""
    if "--all" in flags:
        rest = [recipe, *(flag for flag in flags if flag != "--all")]
        return tyro.cli(TrainAll, prog="dicode train --all", args=rest, config=CONFIG)
    if recipe.endswith(".py"):
        raise ValueError(f"recipe: expected FILE.py:RUN, or FILE.py and --all for every stage in order, got {recipe!r}")

    default = load_run(recipe)
    kind = type(default)

    def train(
        run_folder: Path | None = None,
        minutes: float | None = None,
        run: Annotated[AvoidSubcommands[kind], arg(name="")] = default,  # type: ignore[valid-type]
    ) -> Train:
        return Train(recipe, run_folder, minutes, run)

    try:
        return tyro.cli(train, prog=f"dicode train {recipe}", description=kind.__doc__, args=flags)
    except Exception as error:  # of a dataclass in the recipe
        raise raised_in(recipe.rpartition(":")[0], error) from error
