"""Metrics put cases in their known order, and claim nothing of those that they cannot tell apart."""

import numpy as np
import pytest

from dicode.evaluate.ranking import CASES, UNCLAIMED, claimed, known_cases, rank_cases
from dicode.evaluate.scores import Score
from dicode.video.synthetic import draw_clip

COUNT = 12


def blurred(clip: np.ndarray, window: int) -> np.ndarray:
    """Every pixel the mean of a square around it: what a decoder loses."""
    near = [np.roll(clip, (y, x), (1, 2)).astype(float) for y in range(window) for x in range(window)]
    return np.mean(near, axis=0).astype(np.uint8)


@pytest.fixture(scope="module")
def cases() -> dict[str, list[np.ndarray]]:
    real = [draw_clip(seed)[0] for seed in range(COUNT)]
    generated = [blurred(draw_clip(seed + 30)[0], 7) for seed in range(COUNT)]  # other clips, and worse
    return known_cases(real, [blurred(clip, 3) for clip in real], generated)


@pytest.mark.filterwarnings("ignore:Fréchet distance of")
def test_metrics_rank_drawn_cases_in_their_known_order(cases: dict[str, list[np.ndarray]]) -> None:
    made = rank_cases(cases, ["a shape"] * COUNT)
    metrics = {"PSNR", "SSIM", "perceptual-EffLite0", "FVD-EffLite0", "IS-EffLite0"}
    assert made.keys() == {*metrics, "rank of the true clip-EffLite0", "dynamic share"}
    assert {metric: row["ranked"] for metric, row in made.items() if not row["ranked"]} == {"dynamic share": None}
    distances = [made["FVD-EffLite0"]["cases"][case].value for case in CASES]
    assert distances == sorted(distances) and made["FVD-EffLite0"]["better"] == "lower"
    assert made["PSNR"]["cases"]["real"].value == 60  # the ceiling: they are the same clips
    assert [made["PSNR"]["cases"][case] for case in ("generation", "shuffled")] == [UNCLAIMED] * 2
    assert made["IS-EffLite0"]["cases"]["shuffled"] == UNCLAIMED
    assert all(score.n == COUNT for row in made.values() for score in row["cases"].values() if score != UNCLAIMED)


def test_shuffled_clips_hold_the_generated_frames_and_noise_holds_every_value(
    cases: dict[str, list[np.ndarray]],
) -> None:
    assert list(cases) == list(CASES)
    for shuffled, generated in zip(cases["shuffled"], cases["generation"], strict=True):
        assert (shuffled != generated).any()
        assert sorted(frame.tobytes() for frame in shuffled) == sorted(frame.tobytes() for frame in generated)
    assert all(np.unique(clip).size == 256 for clip in cases["noise"])
    again = known_cases(cases["real"], cases["reconstruction"], cases["generation"])
    assert (again["noise"][3] == cases["noise"][3]).all() and (again["shuffled"][3] == cases["shuffled"][3]).all()


def test_a_metric_that_errs_or_ties_is_said_not_to_rank() -> None:
    def ranked(metric: str, *values: float) -> bool | None:
        scores = {case: Score(float(value), None, 2) for case, value in zip(CASES, values, strict=True)}
        ranks: bool | None = claimed(metric, scores)["ranked"]
        return ranks

    assert ranked("FVD-I3D", 1, 2, 3, 4, 5)
    assert ranked("FVD-I3D", 1, 2, 4, 3, 5) is False and ranked("FVD-I3D", 1, 2, 2, 4, 5) is False
    assert ranked("IS-EffLite0", 2, 3, 4, 0, 1)  # of real and made clips it does not say which is better
    assert ranked("PSNR", 60, 20, 0, 99, 8)  # of generated and shuffled clips it claims nothing
    assert ranked("CLIPSIM-base", 0.3, 0.2, 0.1, 0, 0.1) is False
    assert ranked("dynamic share", 5, 4, 3, 2, 1) is None


def test_neighbours_whose_intervals_overlap_are_undecided() -> None:
    spans = {"real": (1.0, 2.0), "reconstruction": (1.5, 3.0), "generation": (4.0, 5.0), "shuffled": None}
    scores = {case: Score(float(i), spans.get(case, (7.0, 8.0)), 9) for i, case in enumerate(CASES)}
    row = claimed("FVD-I3D", scores)
    assert row["undecided"] == ["real, reconstruction", "generation, shuffled", "shuffled, noise"] and row["ranked"]
