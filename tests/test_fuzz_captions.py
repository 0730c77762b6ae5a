"""Damaged lists of captions; `python -m tests.fuzz captions=5000` tries more of them."""

from pathlib import Path

import pytest

from tests.fuzz import captions, is_fault


@pytest.mark.parametrize(("seed", "count"), [(0, 64), pytest.param(1, 5000, marks=pytest.mark.slow)])
def test_no_clip_is_lost_or_takes_the_caption_of_another(tmp_path: Path, seed: int, count: int) -> None:
    outcomes = []
    for number, case in enumerate(captions.cases(seed, count)):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcomes.append((captions.run(case, folder), case))
    assert [found for found in outcomes if is_fault(found[0])] == []
    assert {outcome for outcome, _ in outcomes} == {"ok", "refused"}


def test_faults_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("file,caption\nv0001.mp4,ice m0002\n")
    assert captions.outcome(tmp_path, "").startswith("wrong: v0001.mp4 has the caption of ['0002']")
    (tmp_path / "captions.csv").write_text("file,caption\nv0001.mp4,fire m0001\n")
    assert captions.outcome(tmp_path, "v0001.mp4 v0002.mp4") == "wrong: lost without a word: ['v0002.mp4']"
