"""Work on many units: one after the other, by processes of this machine, or by Ray Data on many machines."""

import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any, TypeVar

from dicode.config import missing_extra

A = TypeVar("A")
B = TypeVar("B")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ANSWERS_IN_S = 10.0
RAY_STARTS = 6
LOCAL_STORE_BYTES = 100 * 2**20  # of a Ray of our own: the result of a unit is some text


def parallel_map(work: Callable[[A], B], units: Sequence[A], workers: int = 1, ray: str | None = None) -> Iterator[B]:
    """The results of `work` for all units, in any order. With `ray`, they are text.

    `ray` is the address of a cluster, `auto` for the one around, or `local` for one started here with `workers`
    workers; a unit whose worker dies there is done again by another.
    """
    if ray is not None:
        yield from _by_ray(work, units, workers, ray)
    elif workers > 1 and len(units) > 1:
        yield from _by_processes(work, units, min(workers, len(units)))
    else:
        yield from map(work, units)


def _by_processes(work: Callable[[A], B], units: Sequence[A], workers: int) -> Iterator[B]:
    with ProcessPoolExecutor(workers, get_context("spawn"), _prepare_process) as pool:
        try:
            for done in as_completed([pool.submit(_run, work, unit) for unit in units]):
                yield done.result()
        except BrokenProcessPool as error:
            advice = "the same command continues, and with fewer workers or files in a shard it needs less"
            raise OSError(f"a worker process was killed, perhaps for want of memory: {advice}") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()  # at once, with what is unfinished removed
            raise


def _prepare_process() -> None:
    import torch

    torch.set_num_threads(1)
    for number in SIGNALS:  # Ctrl-C reaches every process; only the first says so
        signal.signal(number, _leave)


def _leave(*_: object) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise SystemExit(1)


def _run(work: Callable[[A], B], unit: A) -> B:
    """Do a unit; a worker that was asked to leave removes what it is writing, and begins no other."""
    try:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
            raise SystemExit(1)
        return work(unit)
    except SystemExit:
        os._exit(1)  # the pool would catch it, and go on with the next unit


def _by_ray(work: Callable[[A], B], units: Sequence[A], workers: int, address: str) -> Iterator[B]:
    with ray_cluster(address, workers):
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False

        def run(row: dict[str, Any]) -> dict[str, Any]:
            return {"result": work(row["unit"])}

        items = [{"unit": unit} for unit in units]  # a block each, so that no more than one is done again
        blocks = ray.data.from_items(items, override_num_blocks=len(items))
        results = blocks.map(run, num_cpus=1, max_retries=4)  # a unit that kills five workers is an error, not bad luck
        yield from (row["result"] for row in results.iter_rows())


@contextmanager
def ray_cluster(address: str, workers: int) -> Iterator[None]:
    """Be connected to the Ray cluster of `address`, `auto` or `local` (see `parallel_map`); one around is kept."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise missing_extra(error, "cluster") from error
    start = not ray.is_initialized()
    if start and address == "local":
        _start_ray(workers)
    elif start:
        _check_answers(address)
        ray.init(address)
    try:
        yield
    finally:
        if start:
            ray.shutdown()


def _start_ray(workers: int) -> None:
    """Start a Ray of our own. Raises `OSError` where it does not come up: it gives itself half a minute."""
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")  # as --workers alone: by Ray's own 15, other programs starve them
    for attempt in range(1, RAY_STARTS + 1):
        try:
            ray.init("local", num_cpus=workers, object_store_memory=LOCAL_STORE_BYTES, include_dashboard=False)
            return
        except Exception as error:  # Ray has no class of its own for it
            ray.shutdown()
            if not any(word in str(error).lower() for word in ("timed out", "timeout", "deadline")):
                raise
            if attempt == RAY_STARTS:
                reason = f"Ray did not start in {RAY_STARTS} attempts, as on a machine that others use"
                raise OSError(f"--ray local: {reason} ({error}); --workers alone does without it") from error


def _check_answers(address: str) -> None:
    """Raise `OSError` for HOST:PORT where nobody listens: Ray would try for minutes, and then end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdecimal():
        raise ValueError(f"--ray: expected HOST:PORT, auto or local, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWERS_IN_S).close()
    except (OSError, OverflowError) as error:
        raise OSError(f"--ray {address}: no cluster answers there ({error})") from error
