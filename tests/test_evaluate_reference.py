"""Real clips: features are computed only where needed, once; errors where it moves; blindness."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_tokenizer import tiny_config
from toy_runs import write_cache

from dicode.data.cache import FrameCache
from dicode.evaluate.metrics import PAIR_METRICS, PERCEPTUAL, moving_box, scores_of_pairs
from dicode.evaluate.reconstruction import hold_head, psnr_score
from dicode.evaluate.report import page
from dicode.evaluate.samples import RealClips
from dicode.evaluate.scores import Score, blindness, with_blindness
from dicode.features.extract import EfficientNetLite0Features, Features
from dicode.features.tinyvt import TinyVT

Made = list[int]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Made:
    """How many frames EffLite0 was given, a call each; its features are made up."""
    made: Made = []

    def features(self: object, frames: np.ndarray) -> torch.Tensor:
        made.append(len(frames))
        return torch.from_numpy(frames).float().mean((1, 2)).repeat(1, 427)[:, :1280].contiguous()

    monkeypatch.setattr(EfficientNetLite0Features, "frame_features", features)
    return made


def test_features_are_of_the_clips_asked_for_and_kept_in_the_cache_folder(tmp_path: Path, counted: Made) -> None:
    write_cache(tmp_path, count=8)
    config, network = tiny_config(), EfficientNetLite0Features()
    cache = FrameCache.load(tmp_path)
    real_clips, videos = RealClips(cache, config, tmp_path), [cache.videos[0], cache.videos[6]]
    assert real_clips.missing(network, videos) == 2
    first = real_clips.features(network, videos)
    assert counted == [16, 16] and real_clips.missing(network, videos) == 0
    (kept,) = tmp_path.glob("features-EffLite0-*.safetensors")
    assert {name: tuple(value.shape) for name, value in load_file(kept).items()} == {
        "clips": (2, 2560),
        "probabilities": (2, 1000),
    }
    again = RealClips(FrameCache.load(tmp_path), config, tmp_path).features(network, videos)
    assert counted == [16, 16]
    np.testing.assert_array_equal(first.clips, again.clips)
    np.testing.assert_array_equal(first.probabilities, again.probabilities)
    assert FrameCache.load(tmp_path).videos  # the cache is still one
    save_file({"mean": torch.zeros(2, 1280)}, kept)  # as written before 0.2
    RealClips(FrameCache.load(tmp_path), config, tmp_path).features(network, videos)
    assert counted == [16] * 4


def test_features_of_another_cache_or_network_are_never_taken(tmp_path: Path, counted: Made) -> None:
    write_cache(tmp_path, count=8)
    network = EfficientNetLite0Features()

    def compute(**changes: float) -> None:
        cache = FrameCache.load(tmp_path)
        RealClips(cache, tiny_config(**changes), tmp_path).features(network, cache.videos[:1])

    compute()
    index = tmp_path / "index.json"
    index.write_text(index.read_text() + "\n")
    compute()
    compute(fps=4.0)
    with torch.no_grad():
        next(iter(network._network.parameters())).add_(1)
    compute()
    assert counted == [16] * 4 and len(list(tmp_path.glob("features-*"))) == 4


def ranked_by(network: TinyVT, cosines: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> str | None:
    monkeypatch.setattr(network, "similarities", lambda vectors, texts: cosines)
    captions = [f"caption {i:02}" for i in range(len(cosines))]
    return blindness(network, Features(np.zeros((len(cosines), 160))), captions)


def test_a_network_that_ranks_real_clips_at_chance_is_called_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    network, random = TinyVT.from_pretrained(), np.random.default_rng(0)
    noise = random.normal(size=(40, 40))
    assert ranked_by(network, noise + 2 * np.eye(40), monkeypatch) is None
    said = ranked_by(network, noise, monkeypatch)
    assert said is not None and "TinyVT is blind here" in said and "40 clips; chance is 50" in said
    assert blindness(EfficientNetLite0Features(), Features(np.zeros((2, 2))), ["a", "b"]) is None


def test_blindness_stands_beside_every_figure_of_that_network_and_no_other() -> None:
    figures: dict[str, Any] = {
        "FVD-TinyVT": {"generated": Score(1.0, (0.5, 1.5), 9)},
        "FVD-EffLite0": {"generated": Score(2.0, (1.5, 2.5), 9)},
    }
    made = with_blindness(figures, {"TinyVT": "it sees nothing", "CLIP": "it measured nothing"})
    assert made["FVD-TinyVT"] == {"generated": {"value": 1.0, "interval": (0.5, 1.5), "n": 9, "blind": True}}
    assert made["FVD-EffLite0"] == figures["FVD-EffLite0"] and made["blind"] == {"TinyVT": "it sees nothing"}
    assert with_blindness({"FVD-EffLite0": {}}, {"TinyVT": "it sees nothing"}) == {"FVD-EffLite0": {}}
    made["FVD-EffLite0"] = {"generated": dataclasses.asdict(made["FVD-EffLite0"]["generated"])}
    text = page("tiny", {"generation": {"values": made, "n": 9, "command": ""}}, {})
    assert text.count("it sees nothing") == 1 and text.count("The network is blind here") == 1


def test_errors_count_where_the_real_clip_moves() -> None:
    clip = np.full((16, 32, 32, 3), 100, np.uint8)
    for i in range(16):
        clip[i, 4:8, i : i + 4] = 200  # an object of a sixty-fourth of the picture
    background = clip.copy()
    background[:, 20:] += 50
    network = EfficientNetLite0Features()
    candidates = {"shifted": [clip + np.uint8(10)], "away": [background], "held": [hold_head(clip)]}
    scores = scores_of_pairs([clip], candidates, network)["psnr_in_motion"]
    assert scores is not None and scores["shifted"].value == pytest.approx(10 * np.log10(255**2 / 100))
    assert scores["away"].value == 60.0
    assert scores["held"].value < psnr_score([clip], [hold_head(clip)])["mean_db"] - 8
    assert scores_of_pairs([hold_head(clip)], {"a": [clip]}, network)["psnr_in_motion"] is None
    both = scores_of_pairs([hold_head(clip), clip], {"a": [clip, clip]}, network)["psnr_in_motion"]
    assert both is not None and (both["a"].value, both["a"].n) == (60.0, 1)


def test_errors_in_the_moving_box_are_those_of_the_frames_after_the_first_there() -> None:
    real = np.full((5, 40, 30, 3), 100, np.uint8)
    assert moving_box(real) is None
    for i in range(5):
        real[i, 3:8, 2 + 5 * i : 6 + 5 * i] = 180  # five rows, from column 2 to 25
    real[2, 39, 0] = 123  # noise
    assert moving_box(real) == (slice(0, 16), slice(2, 26))
    real = np.roll(real, 32, axis=1)  # at the bottom edge: rows 35 to 39
    assert moving_box(real) == (slice(24, 40), slice(2, 26))
    network, name = EfficientNetLite0Features(), f"{PERCEPTUAL} in the moving box"
    squared, perceived = (PAIR_METRICS[key].value for key in ("squared error in the moving box", name))
    worse = real.copy()
    worse[0] = worse[:, :24] = 0  # the first frame, and what is not in the box
    assert squared(real, worse, network) == perceived(real, worse, network) == 0.0
    worse[1:, 24:, 2:26] = real[1:, 24:, 2:26] + np.uint8(3)
    assert squared(real, worse, network) == pytest.approx(9.0)
    worse[1:, 24:, 2:26] = 255 - real[1:, 24:, 2:26]
    assert (perceived(real, worse, network) or 0) > 0.01
    assert squared(hold_head(real), real, network) is None


def test_features_go_with_the_cache_that_they_are_of(tmp_path: Path, counted: Made) -> None:
    write_cache(tmp_path, count=8)
    cache = FrameCache.load(tmp_path)
    RealClips(cache, tiny_config(), tmp_path).features(EfficientNetLite0Features(), cache.videos[:1])
    (tmp_path / "features-mine.safetensors").touch()
    write_cache(tmp_path, count=9)
    assert [path.name for path in tmp_path.glob("features-*")] == ["features-mine.safetensors"]


def test_a_cache_that_may_only_be_read_is_evaluated_all_the_same(
    tmp_path: Path, counted: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    write_cache(tmp_path, count=8)
    monkeypatch.setattr("dicode.evaluate.samples.put", refused)
    cache = FrameCache.load(tmp_path)
    real_clips = RealClips(cache, tiny_config(), tmp_path)
    with pytest.warns(UserWarning, match=r"features of real clips are not kept there \(.*Permission denied"):
        features = real_clips.features(EfficientNetLite0Features(), cache.videos[:2])
    assert features.clips is not None and features.clips.shape == (2, 2560)
