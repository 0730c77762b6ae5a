"""A user's scorer: its answers are compared with the keys of caption lines, by key, beside chance."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from dicode.evaluate.scorer import ALL, Scorer, agrees, scorer_metrics
from dicode.recipe_files import RecipeError


def scorer_of(folder: Path, body: str) -> Scorer:
    (folder / "mine.py").write_text(f"def found(frames):\n    {body}\n")
    return Scorer(f"{folder}/mine.py:found")


def frames_of(value: int) -> np.ndarray:
    return np.full((3, 4, 4, 3), value, np.uint8)


def test_accuracy_of_each_key_stands_beside_that_of_shuffled_videos(tmp_path: Path) -> None:
    scorer = scorer_of(tmp_path, "return {'shade': int(frames[0, 0, 0, 0]), 'half': bool(frames.mean() > 4), 'x': 1}")
    truths = [{"shade": i % 5, "half": i > 4, "caption": "a"} for i in range(10)]
    made = scorer_metrics(scorer, [frames_of(i) for i in range(10)], truths)
    assert made.keys() == {"shade", "half", ALL}  # neither what lines lack nor what the scorer lacks
    assert (made["shade"].value, made["half"].value, made[ALL].value) == (0.5, 1.0, 0.5)
    assert made["half"].chance == pytest.approx(4 / 9)  # of nine others four are on the same side
    assert made["shade"].chance == pytest.approx(5 / 90)  # videos 0 to 4 each fit one other
    z, n, p = norm.ppf(0.975), 10, 0.5  # Wilson 1927
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert made["shade"].interval == pytest.approx((0.5 - half, 0.5 + half))
    assert made["half"].interval[0] < 0.8 and made["half"].n == 10


def test_a_video_without_a_key_is_left_out_of_it(tmp_path: Path) -> None:
    scorer = scorer_of(tmp_path, "return {'a': 1, 'b': 2}")
    made = scorer_metrics(scorer, [frames_of(i) for i in range(3)], [{"a": 1, "b": 2}, {"a": 1}, {"b": 3}])
    assert {key: (own.value, own.n) for key, own in made.items()} == {"a": (1.0, 2), "b": (0.5, 2), ALL: (1.0, 1)}


@pytest.mark.parametrize(
    ("found", "true", "right"),
    [
        (" Red ", "red", True),
        ("red", "blue", False),
        (3, 3, True),
        (3.0, 3, True),
        (33, 34, False),
        (1.04, 1.1, True),
        (1.04, 1.2, False),
        (True, 1, False),
        (True, True, True),
        (None, "red", False),
        ("3", 3, False),
        ([1, 2], [1, 2], True),
    ],
)
def test_answers_are_right_where_they_mean_the_same(found: object, true: object, right: bool) -> None:
    assert agrees(found, true) is right


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 3", r"mine.py:found: expected it to return a dict with names for keys, got 3"),
        ("return {}", r"expected a key of the caption lines, which have event; it returned none"),
        ("return {'evnt': 1}", r"which have event; it returned evnt"),
        ("return frames['x']", r"mine.py, line 2 \(return frames\['x'\]\): IndexError"),
    ],
)
def test_what_a_scorer_does_wrong_is_said_in_one_line(tmp_path: Path, body: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        scorer_metrics(scorer_of(tmp_path, body), [frames_of(0)], [{"event": "a jump"}])


def test_a_scorer_cannot_change_the_frames_of_others(tmp_path: Path) -> None:
    frames = frames_of(7)
    scorer_of(tmp_path, "frames[:] = 0; return {'a': 1}")(frames)
    assert (frames == 7).all()
