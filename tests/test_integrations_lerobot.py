"""LeRobot data sets as they are written, in both versions: from folder to cache, and through the notebook."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from drawn_lerobot import CAMERAS, FPS, LENGTHS, PATHS, drawn_episode, write_lerobot

from dicode.data.build import CacheOptions, build_cache
from dicode.data.cache import FrameCache
from dicode.data.index import read_data
from dicode.video.read import read_video

NOTEBOOK = Path(__file__).parents[1] / "integrations/lerobot/robot.ipynb"


@pytest.fixture(scope="module", params=PATHS)
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lerobot(tmp_path_factory.mktemp("lerobot") / request.param, request.param)


def test_a_cache_holds_each_episode_of_each_camera_from_its_first_frame_to_its_last(data, tmp_path):
    found = read_data(str(data))
    assert found.lists == ["meta/ (LeRobot)"] and not found.unread
    build_cache(found.records, tmp_path / "cache", CacheOptions(size=96), 1, None, None)
    cache = FrameCache.load(tmp_path / "cache")
    seen = set()
    for video in cache.videos:
        number, camera = video.extra["episode_index"], video.extra["camera"]
        drawn, task = drawn_episode(number, camera)
        frames = cache.frames[video.first : video.first + video.count].numpy()
        assert len(frames) == LENGTHS[number] and video.captions == (task,)
        assert video.period_s == pytest.approx(LENGTHS[number] / FPS)
        for own, expected in zip(frames, drawn, strict=True):  # a neighbouring episode has another colour or shape
            assert np.abs(own.astype(int) - expected).mean() < 4
        assert video.validation == (number == 0)
        seen.add((number, camera))
    assert seen == {(number, camera) for number in range(len(LENGTHS)) for camera in CAMERAS}


def test_an_episode_whose_video_is_missing_is_a_bad_file_and_the_others_are_read(data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    last = max(folder.glob("videos/**/*.mp4"))
    last.unlink()
    units = build_cache(read_data(str(folder)).records, tmp_path / "cache", CacheOptions(size=16), 1, None, None)
    bad = [file.reason for unit in units for file in unit.bad]
    assert bad and all(str(last) in reason and "no such file" in reason for reason in bad)
    assert len(FrameCache.load(tmp_path / "cache").videos) == 2 * len(LENGTHS) - len(bad)


def as_script(notebook: Path, **parameters: object) -> str:
    """The code of a notebook, parameters changed, its shell lines as IPython runs them."""
    lines = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            lines += "".join(cell["source"]).splitlines()
            if "parameters" in cell["metadata"].get("tags", []):
                lines += [f"{name} = {value!r}" for name, value in parameters.items()]
    command = f"import subprocess; subprocess.run(f'''{sys.executable} -m \\1''', shell=True, check=True)"
    return "\n".join(re.sub(r"^!(.*)", command, line) for line in lines) + "\n"


def test_the_notebook_runs_on_a_drawn_data_set(tmp_path, tiny_model):
    data = write_lerobot(tmp_path / "robot", "v3.0")
    script = tmp_path / "notebook.py"
    script.write_text(as_script(NOTEBOOK, DATA=str(data), MODEL=str(tiny_model), STEPS=2), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{drawn_episode(0, CAMERAS[0])[1]} - {math.ceil(LENGTHS[0] / FPS * 8)} frames" in done.stdout
    assert read_video(tmp_path / "sheet.png").frames.size
    assert (tmp_path / "my_robot/lm.safetensors").is_file()


def test_the_notebook_is_kept_without_outputs():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells and all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
