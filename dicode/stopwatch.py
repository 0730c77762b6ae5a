"""Times of a command's stages, and the progress of long work."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import ClassVar, TypeVar

from tqdm import tqdm

FIRST_AFTER_S = 2.0  # no line for shorter work
EVERY_S = 30.0
T = TypeVar("T")


class Stopwatch:
    """Seconds spent in named stages; an inner stage's are not counted for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block."""
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def timed(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Time the iteration itself, not what is done with its items."""
        iterator = iter(items)
        while True:
            with self.stage(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def text(self, before: Mapping[str, float] | None = None) -> str:
        """The seconds of each stage, since `before`, an earlier copy of `seconds`, if given."""
        spent = {name: seconds - (before or {}).get(name, 0.0) for name, seconds in self.seconds.items()}
        return " · ".join(f"{name} {seconds:.2f} s" for name, seconds in spent.items() if seconds > 0)

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._running:
            name = self._running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


class Progress:
    """A context for `total` units of work (None: uncounted), on stderr: a bar on a terminal, else lines.

    The first line comes after two seconds, the next ones every half minute, with the units done and the time left. Of
    nested work only the innermost prints.
    """

    _running: ClassVar[list["Progress"]] = []  # the innermost last

    def __init__(self, what: str, total: int | None = None, unit: str = ""):
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self._bar: tqdm | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Progress":
        self._running.append(self)
        self._began_s = time.monotonic()
        if sys.stderr.isatty():
            self._bar = tqdm(desc=self.what, total=self.total, unit=self.unit or "it", delay=FIRST_AFTER_S, leave=False)
        else:
            self._thread = threading.Thread(target=self._print_lines, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._running.remove(self)
        if self._bar is not None:
            self._bar.close()
        if self._thread is not None:
            self._thread.join()

    def update(self, count: int = 1) -> None:
        """Count units that are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def write(self, text: str) -> None:
        """A line on stdout, above the bar where there is one."""
        tqdm.write(text)

    def line(self, spent_s: float) -> str:
        """The progress after so many seconds, as one line."""
        unit = f" {self.unit}{'es' if self.unit.endswith('ch') else 's'}" if self.unit else ""
        if self.total in (None, 1):
            return f"{self.what}: {duration(spent_s)} so far"
        if not self.done:
            return f"{self.what}: {self.total:,}{unit}" + (f", {duration(spent_s)} so far" if spent_s > EVERY_S else "")
        left_s = spent_s * (self.total - self.done) / self.done
        return f"{self.what}: {self.done:,} of {self.total:,}{unit}, about {duration(left_s)} to go"

    def _print_lines(self) -> None:
        wait_s = FIRST_AFTER_S
        while not self._ended.wait(wait_s):
            if self._running[-1:] == [self]:
                print(self.line(time.monotonic() - self._began_s), file=sys.stderr, flush=True)
            wait_s = EVERY_S


def tracked(items: Iterable[T], what: str, unit: str = "") -> Iterator[T]:
    """Iterate with a `Progress`."""
    with Progress(what, len(items) if isinstance(items, Sized) else None, unit) as progress:
        for item in items:
            yield item
            progress.update()


def duration(seconds: float) -> str:
    """E.g. '3 d 4 h', '2 h 5 min', '40 s'."""
    days, rest = divmod(round(seconds), 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    units = [(days, "d"), (hours, "h"), (minutes, "min"), (left, "s")]
    first = next((i for i, (count, _) in enumerate(units) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in units[first : first + 2] if count) or "0 s"
