"""What `dicode data check` finds of drawn clips."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dicode.cli.app import main
from dicode.data.cache import CachedVideo, FrameCache
from dicode.data.check import Findings, ends_where_it_begins, moving
from dicode.video.timed import Video

SIZE = 64


def crossing(frames: int, side: int, there_and_back: bool = False) -> Video:
    """A black square that moves over white ground, and back again."""
    clip = np.full((frames, SIZE, SIZE, 3), 255, np.uint8)
    for number in range(frames):
        way = number / frames
        left = round((SIZE - side) * (1 - abs(2 * way - 1) if there_and_back else way))
        clip[number, 20 : 20 + side, left : left + side] = 0
    return clip


def write_clips(folder: Path, there_and_back: bool = False) -> Path:
    """Twelve clips at 8 fps, four of them of one second, the others of three; a caption of each stands for four."""
    videos, frames, times = [], [], []
    first = 0
    for number in range(12):
        count = 8 if number % 3 == 0 else 24
        captions = (f"a square of kind {number % 3} moves to the right",)
        videos.append(CachedVideo("drawn", f"{number}.mp4", captions, number == 0, False, first, count, count / 8))
        frames.append(torch.from_numpy(crossing(count, 6 + number % 2, there_and_back)))
        times.append(torch.arange(count, dtype=torch.float64) / 8)
        first += count
    FrameCache(tuple(videos), torch.cat(frames), torch.cat(times)).save(folder)
    return folder


def test_what_a_cache_is_like_is_said_in_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, file = write_clips(tmp_path / "cache"), tmp_path / "findings.json"
    assert main(["data", "check", str(cache), "--json", str(file)]) == 0
    found = json.loads(file.read_text())["values"]
    assert (found["clips"], found["validation"], found["captions"], found["most_repeated"]) == (12, 1, 3, 4)
    assert (found["median_s"], found["longest_s"], found["shorter"]) == (3.0, 3.0, pytest.approx(1 / 3))
    assert (found["looping"], found["seamless"], found["sided"]) == (0.0, 0.0, 1.0)
    row = 6.5 / SIZE  # a band as high as the square
    assert found["changing"] == pytest.approx(row, rel=0.2)
    assert all(5 < found["moving_db"][name] < found["psnr_db"][name] < 60 for name in ("sprites", "world"))
    said = capsys.readouterr().out
    assert "33% of clips are shorter than 2 s" in said and "lm --key-frames 2" in said
    assert "captions tell left from right: leave mirroring off" in said


def test_clips_that_end_where_they_begin_are_loops() -> None:
    assert ends_where_it_begins(crossing(24, 8, there_and_back=True))
    assert not ends_where_it_begins(crossing(24, 8))
    assert not ends_where_it_begins(np.repeat(crossing(4, 8)[:1], 24, axis=0))  # a still
    assert not ends_where_it_begins(crossing(3, 8, there_and_back=True))


def test_what_moves_is_what_leaves_the_mean_frame() -> None:
    clip = crossing(24, 8)
    expected = (clip != clip[:1]).any((0, 3)) | (clip[0] == 0).any(-1)
    found = moving(clip)
    assert found[20:28].sum() == pytest.approx(expected[20:28].sum(), rel=0.15)
    assert not found[:20].any() and not found[28:].any()


PLAIN = Findings(
    clips=500, validation=34, median_s=4.2, longest_s=6.0, shorter=0.0, looping=0.0, seamless=0.1,
    captioned=1.0, captions=480, most_repeated=3, text_tokens=12, sided=0.0, changing=0.2,
    psnr_db={"sprites": 25.0, "world": 24.0}, moving_db={"sprites": 21.5, "world": 20.0}, change_variance=1.3,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "train a first stage of your own"),
        (
            {"psnr_db": {"sprites": 25.0, "world": 28.0}, "moving_db": {"sprites": 20.0, "world": 23.0}},
            "--first-stage world",
        ),
        ({"seamless": 0.9, "median_s": 1.5, "shorter": 0.8}, "cache them with --loops"),
        ({"median_s": 9.0}, "clips of 9.0 s have 5 key frames: lm --key-frames 5"),
        ({"validation": 0}, "no clip is kept for validation"),
        ({"captioned": 0.25}, "75% of clips have no caption"),
        ({"text_tokens": 41}, "lm --model.text-length 48 --model.positions 576"),
        ({"captions": 3, "most_repeated": 600}, "few captions stand for many clips"),
        ({"change_variance": 0.2}, "residual-anchor 0 is worth trying"),
        ({}, "leave lm --model.residual-anchor at None"),
    ],
)
def test_settings_follow_from_what_was_found(changes: dict[str, object], said: str) -> None:
    assert any(said in line for line in replace(PLAIN, **changes).advice())  # type: ignore[arg-type]
