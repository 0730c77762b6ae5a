"""What a signal to stop does to a run in training."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

RESUME_EXIT_CODE = 75  # EX_TEMPFAIL: stopped by a signal, with everything kept; the same command continues


class Stopped(SystemExit):
    """Leaves the process with the exit code for "resume me"."""

    def __init__(self) -> None:
        super().__init__(RESUME_EXIT_CODE)


class StopSignal:
    """While active, the first SIGTERM or SIGINT only sets `asked`; a second one acts as it would without us.

    May be entered again further in, where one function hands it to the next.
    """

    def __init__(self) -> None:
        self.asked = self._cuts = False
        self._before: dict[int, Any] = {}
        self._depth = 0

    def __enter__(self) -> "StopSignal":
        self._depth += 1
        if self._depth == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    @contextmanager
    def cutting(self) -> Iterator[None]:
        """In here a signal raises `Stopped` at once: for long work that leaves nothing half done behind it."""
        self._cuts = True
        try:
            if self.asked:
                raise Stopped
            yield
        finally:
            self._cuts = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
        self.asked = True
        if self._cuts:
            raise Stopped
