"""Progress of long work, with a terminal and without."""

import io
import time

import pytest

from dicode import stopwatch
from dicode.stopwatch import Progress, duration, tracked


def test_a_line_says_what_is_left_from_what_was_done() -> None:
    work = Progress("computing latents", 1200, "frame")
    assert work.line(2.0) == "computing latents: 1,200 frames"
    assert work.line(40.0) == "computing latents: 1,200 frames, 40 s so far"
    work.update(300)
    assert work.line(60.0) == "computing latents: 300 of 1,200 frames, about 3 min to go"
    assert Progress("validating").line(61.0) == "validating: 1 min 1 s so far"


def test_lines_come_without_a_terminal_while_one_item_lasts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stopwatch, "FIRST_AFTER_S", 0.01)
    monkeypatch.setattr(stopwatch, "EVERY_S", 0.01)
    printed = io.StringIO()
    monkeypatch.setattr("sys.stderr", printed)
    items = []
    for item in tracked([1, 2], "working", "clip"):
        items.append(item)
        if item == 1:
            begun_s = time.monotonic()
            while printed.getvalue().count("\n") < 3 and time.monotonic() < begun_s + 600:
                time.sleep(0.01)
    assert items == [1, 2]
    assert printed.getvalue().startswith("working: 2 clips") and printed.getvalue().count("\n") >= 3


def test_only_the_innermost_work_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "FIRST_AFTER_S", 0.01)
    monkeypatch.setattr(stopwatch, "EVERY_S", 0.01)
    printed = io.StringIO()
    monkeypatch.setattr("sys.stderr", printed)

    def last_lines() -> set[str]:
        """What the next three lines begin with, at the most after a minute."""
        began_s, before = time.monotonic(), printed.getvalue().count("\n")
        while printed.getvalue().count("\n") < before + 4 and time.monotonic() < began_s + 60:
            time.sleep(0.01)
        return {line.split(":")[0] for line in printed.getvalue().splitlines()[before + 1 :]}

    with Progress("outer"):
        with Progress("inner"):
            assert last_lines() == {"inner"}
        assert last_lines() == {"outer"}
    assert Progress("reading", 3, "batch").line(0.0) == "reading: 3 batches"
    assert Progress("reading", 1, "batch").line(2.0) == "reading: 2 s so far"  # the one unit tells nothing


def test_short_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(tracked([1, 2, 3], "working")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (40.0, "40 s"), (300.0, "5 min"), (7500.0, "2 h 5 min"), (273_600.0, "3 d 4 h")]
)
def test_durations_have_at_most_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
