"""How long each stage of a command takes."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Stopwatch:
    """Seconds spent in named stages; while an inner stage runs, the outer one stands still."""

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
        """Time the making of every item, not what is done with it."""
        iterator = iter(items)
        while True:
            with self.stage(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def text(self, before: Mapping[str, float] | None = None) -> str:
        """The seconds of each stage, or those added since an earlier copy of `seconds`."""
        added = {name: seconds - (before or {}).get(name, 0.0) for name, seconds in self.seconds.items()}
        return " · ".join(f"{name} {seconds:.2f} s" for name, seconds in added.items() if seconds > 0)

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._running:
            name = self._running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
