"""Scores of long videos are the numbers one can work out by hand, and the cost of length is a straight line's."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dicode.evaluate.long import (
    JOINS,
    clips_of,
    drift,
    end_contrast,
    frame_features,
    frames_compared,
    join_score,
    long_video,
    motion_over_time,
    over_time,
    similarity_over_time,
)
from dicode.evaluate.scores import Score
from dicode.evaluate.speed import VideoTime, check_length, memory_score, time_figures, timed_video
from dicode.features.extract import EfficientNetLite0Features
from dicode.pipeline import DiCoDe

few_clips = pytest.mark.filterwarnings("ignore:Fréchet distance of")


def video_of(steps: list[int]) -> np.ndarray:
    """Grey frames whose values go up by these steps, and down where they would leave 0…255."""
    values = [100]
    for step in steps:
        values.append(values[-1] + (step if values[-1] + step <= 255 else -step))
    return np.stack([np.full((2, 3, 3), value, np.uint8) for value in values])


def with_joins(inside: int, across: int, clips: int = 3, clip_frames: int = 4) -> np.ndarray:
    return video_of((([inside] * (clip_frames - 1) + [across]) * clips)[:-1])


def test_join_score_is_the_step_across_joins_over_the_step_inside_clips() -> None:
    one = join_score([with_joins(inside=2, across=6)], clip_frames=4)
    assert one == {"score": 3, "interval": (3, 3), "across": 6, "inside": 2, "n": 1, "still": 0}
    assert join_score([with_joins(5, 5)], clip_frames=4)["score"] == 1
    published = video_of([2, 2, 2, 9, 2, 2, 9, 2, 2])  # 4 frames, then 3 a clip
    assert join_score([published], clip_frames=4, repeated_frames=1)["score"] == 4.5


def test_join_score_pools_videos_by_their_joins_and_bounds_the_choice_of_videos() -> None:
    videos = [with_joins(1, 1, clips=2), with_joins(3, 9, clips=3)]  # 1 and 2 joins, 6 and 9 steps inside
    pooled = join_score(videos, clip_frames=4)
    assert pooled["across"] == pytest.approx((1 + 9 + 9) / 3) and pooled["inside"] == pytest.approx((6 + 27) / 15)
    assert pooled["score"] == pytest.approx(pooled["across"] / pooled["inside"])
    assert pooled["interval"] == (1, 3) and pooled["n"] == 2


def test_still_videos_are_counted_and_not_scored() -> None:
    jumps_only, moving = with_joins(0, 50), with_joins(2, 6)
    score = join_score([jumps_only, moving], clip_frames=4)
    assert (score["score"], score["n"], score["still"]) == (3, 1, 1)
    motion = motion_over_time([jumps_only, moving], window_frames=4, clip_frames=4)
    assert (motion["ratio"], motion["n"], motion["still"]) == (1, 1, 1)
    with pytest.raises(ValueError, match="got 1 videos, all still there"):
        join_score([jumps_only], clip_frames=4)
    with pytest.raises(ValueError, match="moves at its beginning, got 2 videos"):
        motion_over_time([jumps_only] * 2, window_frames=4, clip_frames=4)


def test_what_has_no_join_or_no_two_windows_is_refused() -> None:
    with pytest.raises(ValueError, match="video 1: expected more frames than a clip's 4, got 4"):
        join_score([with_joins(2, 6), with_joins(2, 6, clips=1)], clip_frames=4)
    with pytest.raises(ValueError, match="video 0: expected two windows of at least 3 frames, got windows of 7 in 12"):
        motion_over_time([with_joins(2, 6)], window_frames=7, clip_frames=4)


def test_motion_over_time_compares_both_ends_and_takes_no_jump_for_motion() -> None:
    slowing = video_of([4, 4, 4, 90, 4, 4, 4, 90, 3, 3, 3, 90, 1, 1, 1, 90, 1, 1, 1])  # joins after every fourth frame
    steady = with_joins(inside=2, across=60, clips=5)
    alone = motion_over_time([slowing], window_frames=8, clip_frames=4)
    assert (alone["ratio"], alone["first"], alone["last"]) == (0.25, 4, 1)
    both = motion_over_time([slowing, steady], window_frames=8, clip_frames=4)
    assert both["ratio"] == pytest.approx((1 + 2) / (4 + 2)) and both["interval"] == (0.25, 1)


def test_drift_of_shifted_features_has_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=(4, 3, 5))
    walk = np.concatenate([first, first + 1, 3 * first], axis=1)  # nine clips of four videos: three windows
    result = drift(walk, window=3)
    mean, spread = first.reshape(-1, 5).mean(0), np.trace(np.cov(first.reshape(-1, 5).T))
    assert result["by_window"] == pytest.approx([5, 4 * mean @ mean + 4 * spread])
    assert result["distance"] == result["by_window"][-1] and result["clips"] == 12


@few_clips
def test_drift_stands_out_from_chance_only_where_there_is_some() -> None:
    rng = np.random.default_rng(1)
    scenes = 5 * rng.normal(size=(8, 1, 6))  # videos differ more than clips of one do
    steady = scenes + rng.normal(size=(8, 30, 6))
    none = drift(steady, window=5)
    assert none["chance_interval"][0] < none["distance"] < none["chance_interval"][1]
    drifting = drift(steady + np.linspace(0, 4, 30)[:, None], window=5)
    assert len(drifting["by_window"]) == 5 and drifting["by_window"] == sorted(drifting["by_window"])
    assert drifting["distance"] > 3 * drifting["chance_interval"][1]
    assert drifting["interval"][0] > none["interval"][1]
    by_kernel = [
        drift(values, window=5, distance="MMD") for values in (steady, steady + np.linspace(0, 4, 30)[:, None])
    ]
    assert by_kernel[0]["chance_interval"][0] < by_kernel[0]["distance"] < by_kernel[0]["chance_interval"][1]
    assert by_kernel[1]["distance"] > 3 * by_kernel[1]["chance_interval"][1]
    for few in (1, 3):  # halves of which say nothing
        assert drift(steady[:few], window=5)["interval"] is None
    assert drift(steady, window=5, seed=1)["chance_interval"] != none["chance_interval"]
    with pytest.raises(ValueError, match="expected 1 to 15 of 30 clips a video, got 16"):
        drift(steady, window=16)


def test_a_video_falls_apart_into_the_clips_it_was_made_of() -> None:
    video = torch.from_numpy(with_joins(1, 2, clips=3))
    assert [len(clip) for clip in clips_of(video, 4)] == [4, 4, 4]
    assert [len(clip) for clip in clips_of(video[:9], 4)] == [4, 4]  # one frame alone shows no motion
    assert [len(clip) for clip in clips_of(video[:11], 4, repeated_frames=1)] == [4, 3, 3]
    assert torch.equal(torch.cat(clips_of(video, 4)), video)


def test_both_ends_of_videos_are_compared_by_what_a_frame_shows() -> None:
    grey, red = np.full((1, 4, 4, 3), 100, np.uint8), np.zeros((1, 4, 4, 3), np.uint8)
    red[..., 0] = 150
    stripes = np.tile(np.array([40, 160, 40, 160], np.uint8)[:, None], (1, 4, 1, 3))  # of the same mean as grey
    ends = end_contrast([np.concatenate([grey.repeat(20, 0), stripes.repeat(20, 0)])])
    assert {name.removeprefix("end_contrast of "): round(own.value) for name, own in ends.items()} == {
        "brightness": 0,
        "contrast": 60,
        "saturation": 0,
        "sharpness": 120,
    }
    turning = np.concatenate([red.repeat(3, 0), grey.repeat(37, 0)])
    red_ends = end_contrast([turning, grey.repeat(40, 0)])
    assert red_ends["end_contrast of saturation"].value == pytest.approx(150 * 0.25)  # half of three of six frames


def test_similarity_of_frames_falls_with_their_distance_in_a_walk_and_never_in_a_still_video() -> None:
    generator = torch.Generator().manual_seed(0)
    walks = [torch.randn(80, 16, generator=generator).cumsum(0) for _ in range(4)]
    found = similarity_over_time(walks, fps=8.0)
    assert [name.split()[3] for name in found] == ["0.125", "1", "2", "4", "8"]
    values = [score.value for score in found.values()]
    assert values == sorted(values, reverse=True) and values[0] > 0.9
    still = similarity_over_time([walk[:1].repeat(80, 1) for walk in walks], fps=8.0)
    assert [score.value for score in still.values()] == pytest.approx([1.0] * 5)


@few_clips
def test_videos_of_a_model_have_exactly_the_frames_asked_for_and_finite_scores(tiny_model: Path) -> None:
    model = DiCoDe.from_pretrained(tiny_model)
    videos = [long_video(model, "a red square", 16.0, 3, index, "chained") for index in range(2)]
    features = frame_features(EfficientNetLite0Features(image_size=32), videos)
    figures = over_time(model, videos, features, "EffLite0", seed=3)
    assert figures["frames"] == [128, 128] and figures["window_s"] == 2
    assert figures["drift"]["FVD-EffLite0"]["clips"] == 2
    assert len(figures["drift"]["FVD-EffLite0"]["by_window"]) == 7
    assert figures["drift"].keys() == {"FVD-EffLite0", "MMD-EffLite0"}
    assert len(frames_compared(videos, features, 8.0)) == 9 and not frames_compared([], [], 8.0)
    assert figures["join_score"]["score"] > 0 and figures["motion"]["ratio"] > 0


def test_deep_tokens_are_the_same_for_every_kind_of_joins(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DiCoDe.from_pretrained(tiny_model)
    write, written = model.lm.generate, []

    def kept(*given: object, **options: object) -> Iterator[torch.Tensor]:
        for key_frame in write(*given, **options):
            written.append(key_frame)
            yield key_frame

    monkeypatch.setattr(model.lm, "generate", kept)
    videos = {joins: long_video(model, "a red square", 6.0, 0, 0, joins) for joins in JOINS}
    assert (videos["chained"] != videos["parallel"]).any()
    first, *others = torch.stack(written).split(4)  # four key frames a video
    assert len(others) == len(JOINS) - 1 and all((other == first).all() for other in others)


def test_cost_of_length_is_read_off_the_line_through_short_videos() -> None:
    # 0.5 s at the start and 0.25 s a clip: 30 clips take 8 s, 1.0667 times thirty marginal clips
    late = (0.0, 0.0, 0.0, 9.0, 9.0)
    times = {
        clips * 2.0: [VideoTime(0.5 + 0.25 * clips + more, 0.1 * clips, clips * 16) for more in late]
        for clips in (1, 2, 3, 4, 30)
    }
    figures = time_figures(times, seconds=60.0, clip_s=2.0)
    values = {name: score.value for name, score in figures.items() if isinstance(score, Score)}
    assert values["marginal_clip_s"] == pytest.approx(0.25)
    assert values["median_s"] == 8 and values["time_ratio"] == pytest.approx(8 / 7.5)
    assert values["language_model_share"] == pytest.approx(3 / 8) and figures["frames"] == 480
    assert figures["median_s"].interval == (8, 17)
    # late repeats are late at every length: the slope stays, the ratio does not
    assert figures["marginal_clip_s"].interval == pytest.approx((0.25, 0.25))
    assert figures["time_ratio"].interval == pytest.approx((8 / 7.5, 17 / 7.5))
    assert all(score.n == 5 for score in figures.values() if isinstance(score, Score))


def test_memory_that_the_system_does_not_tell_is_no_figure() -> None:
    assert memory_score(np.median, np.array([1.0, np.nan])) is None
    assert memory_score(np.median, np.array([1.0, 1.0, 3.0])) == Score(1.0, None, 3)


def test_timing_tells_the_language_model_apart_and_leaves_the_model_as_it_was(tiny_model: Path) -> None:
    model = DiCoDe.from_pretrained(tiny_model)
    time = timed_video(model, "a red square", 4.0)
    assert 0 < time.language_model_s < time.total_s and time.frames == 32
    assert "generate" not in vars(model.lm)


def test_a_length_that_cannot_be_measured_is_refused_before_the_work(tiny_model: Path) -> None:
    model = DiCoDe.from_pretrained(tiny_model)
    check_length(model, 16.0)
    with pytest.raises(ValueError, match="31 key frames asked for, this model holds 9"):
        check_length(model, 60.0)
    with pytest.raises(ValueError, match="seconds: expected at least 6, to compare with shorter videos, got 4"):
        check_length(model, 4.0)
