"""How long an evaluation takes is counted in clips, by what each part makes and measures, times what one clip took."""

import pytest

from dicode.evaluate.estimate import Work, work_of

COUNTS = {
    "validation": 10,
    "missing": 100,
    "prompts": 20,
    "images": 7,
    "scored": 3,
    "repeats": 2,
    "long": 16,
    "events": 5,
}


def test_work_is_that_of_the_parts_asked_for() -> None:
    work = work_of(("generation", "scorer"), **COUNTS)
    assert work == {"generation": Work(generated=20 + 10, measured=100 + 20 + 10), "scorer": Work(3, 3)}
    assert work_of(("reconstruction",), **COUNTS)["reconstruction"].reconstructed == 10


def test_seconds_are_those_of_the_units_measured() -> None:
    assert Work(3, 2, 10, 1).seconds(Work(0.5, 0.25, 0.125, 4.0)) == pytest.approx(1.5 + 0.5 + 1.25 + 4.0)
