"""Damaged and random input, drawn from a seed: `python -m tests.fuzz videos=2000 … -o results/faults.json`.

Each module here has `cases(seed, count)` and `run(case, folder)`, which gives an outcome:

ok        worked, and gave what the undamaged part holds
refused   one line, that says what to do
crash: …, hang: …, traceback: …, wrong: …    faults; wrong is what was accepted and came out otherwise than it should
"""

import gc
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

FAULTS = ("crash:", "hang:", "traceback:", "wrong:")
MOST_PROCESSOR_S = 60
MOST_WALL_S = 300  # where nothing is computed, a pipe is waited for
GIB = 2**30


def forked() -> int:
    """`os.fork`, whose child frees nothing of this process's garbage: PyAV's waits for threads that a child lacks."""
    gc.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads
        child = os.fork()
    if child:
        gc.unfreeze()
    return child


def guarded(work: Callable[[], str], processor_s: int = MOST_PROCESSOR_S, memory: int = 2 * GIB) -> str:
    """The outcome of `work` in a forked process, which may take so many more bytes than this one holds.

    A dead child is a crash, one that uses up its time a hang.
    """
    reads, writes = os.pipe()
    child = forked()
    if child == 0:
        os.close(reads)
        code = 1
        try:
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + memory, held + memory))
            resource.setrlimit(resource.RLIMIT_CPU, (processor_s, processor_s + 5))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXCPU, signal.SIG_DFL)
            try:
                outcome = work()
            except BaseException as error:
                outcome = unexpected(error)
            os.write(writes, outcome[:1000].encode("utf-8", "replace"))
            code = 0
        finally:
            os._exit(code)
    os.close(writes)
    said = b""
    deadline_s = time.monotonic() + MOST_WALL_S
    while select.select([reads], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
        part = os.read(reads, 65536)
        if not part:
            break
        said += part
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reads)
    _, status = os.waitpid(child, 0)
    if time.monotonic() >= deadline_s:
        return f"hang: nothing for {MOST_WALL_S} s"
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return f"hang: {processor_s} s of processor time" if name in ("SIGXCPU", "SIGKILL") else f"crash: {name}"
    return said.decode() if said else f"crash: exit {os.waitstatus_to_exitcode(status)}"


def unexpected(error: BaseException) -> str:
    """The outcome of an exception that nobody caught, with the line that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else "?"
    return f"traceback: {type(error).__name__} at {where}: {' '.join(str(error).split())[:300]}"


def is_fault(outcome: str) -> bool:
    """Whether an outcome is a fault; raises `ValueError` for what is no outcome."""
    if outcome in ("ok", "refused"):
        return False
    if outcome.startswith(FAULTS):
        return True
    raise ValueError(f"expected ok, refused, or one of {', '.join(FAULTS)}, got {outcome!r}")
