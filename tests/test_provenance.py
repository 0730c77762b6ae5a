"""A result file says what was measured and comes back as it was written."""

import shutil
import subprocess
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from dicode import provenance
from dicode.evaluate.scores import Score
from dicode.provenance import read_result, write_result


def test_result_round_trips_with_everything_needed_to_repeat_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "motion.json"
    score = Score(0.9, (0.8, 1.0), 7)
    values = {"motion": score, "share": np.float32(0.5), "ranks": np.array([1, 2]), "loss": torch.tensor(0.25)}
    written = write_result(path, "motion of sprites", values, n=7, seed=3, command="dicode evaluate — é", device="cpu")
    result = read_result(path)
    assert result == written
    assert '"interval": [0.8, 1.0]' in path.read_text() and '"ranks": [1, 2]' in path.read_text()
    assert result["values"] == {
        "motion": {"value": 0.9, "interval": [0.8, 1.0], "n": 7},
        "share": 0.5,
        "ranks": [1, 2],
        "loss": 0.25,
    }
    assert (result["n"], result["seed"], result["command"]) == (7, 3, "dicode evaluate — é")
    assert result["device"].startswith("cpu: ") and f"{torch.get_num_threads()} threads" in result["device"]
    assert datetime.fromisoformat(result["date"]).tzinfo is not None
    assert result["versions"]["torch"] == torch.__version__ and "dicode" in result["versions"]
    assert [file.name for file in path.parent.iterdir()] == ["motion.json"]


def test_values_that_are_no_figures_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with pytest.raises(ValueError, match=r"values.psnr\[1\]: expected a finite number, got inf"):
        write_result(path, "x", {"psnr": [1.0, float("inf")]}, n=2, seed=0, command="x")
    with pytest.raises(TypeError, match=r"values.model: .* got Linear"):
        write_result(path, "x", {"model": torch.nn.Linear(1, 1)}, n=2, seed=0, command="x")
    assert not path.exists()
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected a result with name"):
        read_result(path)


def test_commit_is_that_of_the_checkout_and_none_outside_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "dicode" / "provenance.py"
    copy.parent.mkdir(parents=True)
    shutil.copy(provenance.__file__, copy)
    monkeypatch.setattr(provenance, "__file__", str(copy))
    nothing = {"commit": None, "uncommitted_changes": None}
    assert provenance.describe_commit() == nothing

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "core.hooksPath=/dev/null")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    assert provenance.describe_commit() == nothing  # installed inside some other checkout: not tracked there
    git("add", ".")
    assert provenance.describe_commit() == nothing  # tracked, but there is no commit yet
    git("commit", "-m", "first")
    assert provenance.describe_commit() == {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": False}
    copy.write_text("# changed\n")
    assert provenance.describe_commit()["uncommitted_changes"] is True
