"""Intervals of set figures are what repeated draws of clips give; which network measured is in the metric's name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from synthetic import draw_clip
from test_evaluate_networks import StandIn3D, StandInC3D, StandInInception, clip_folder, saved  # noqa: F401

from dicode.evaluate.metrics import scores_of_pairs, scores_of_sets
from dicode.evaluate.scores import Score, class_score, frechet_score, mean_score, repeats_score, set_score
from dicode.features.extract import EfficientNetLite0Features, FeatureMaps, load_networks, perceptual_distance


def clips_of_noise(count: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (16, 24, 40, 3), dtype=np.uint8) for _ in range(count)]


def test_frechet_score_is_that_of_the_formula() -> None:
    generator = np.random.default_rng(0)
    real, made = generator.normal(size=(40, 3)), 1 + generator.normal(size=(40, 3)) @ generator.normal(size=(3, 3))
    a, b = np.cov(real.T), np.cov(made.T)
    expected = ((real.mean(0) - made.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    score = frechet_score(real, made)
    assert (score.value, score.n) == (pytest.approx(expected), 40)
    frames = frechet_score(real.reshape(20, 2, 3), made.reshape(20, 2, 3))  # the same vectors, two frames a clip
    assert (frames.value, frames.n) == (pytest.approx(expected), 20)


@pytest.mark.parametrize("made", [61, 40])  # as many and paired, or not
def test_interval_of_a_frechet_distance_is_as_wide_as_new_draws_of_clips_scatter(made: int) -> None:
    generator = np.random.default_rng(1)
    scale = np.array([2.0, 1.0, 0.5])
    scores = [
        frechet_score(
            generator.normal(size=(61, 3)) * scale, 1 + generator.normal(size=(made, 3)), seed=draw, paired=made == 61
        )
        for draw in range(150)
    ]
    assert all(score.n == made for score in scores)
    scatter = np.std([score.value for score in scores])
    widths = [score.interval[1] - score.interval[0] for score in scores if score.interval is not None]
    assert np.mean(widths) / (2 * 1.96) == pytest.approx(scatter, rel=0.2)


def test_interval_holds_the_value_where_a_bootstrap_would_not() -> None:
    generator = np.random.default_rng(2)
    real, made = generator.normal(size=(30, 20)), generator.normal(size=(30, 20))

    def distance(rows: np.ndarray) -> float:
        return frechet_score(real[rows], made[rows]).value

    drawn = [distance(generator.integers(0, 30, 30)) for _ in range(40)]
    score = frechet_score(real, made)
    assert score.interval is not None and score.interval[0] < score.value < score.interval[1]
    assert min(drawn) > score.value  # every resample with replacement is farther


def test_score_of_a_mean_has_its_textbook_error() -> None:
    values = np.random.default_rng(3).normal(size=200)
    by_halves, by_bootstrap = set_score(lambda rows: rows.mean() + 10, values, halves=400), mean_score(values)
    error = 1.96 * values.std() / np.sqrt(200)
    assert by_halves.interval == pytest.approx((by_halves.value - error, by_halves.value + error), rel=0.02)
    assert by_bootstrap.interval == pytest.approx((values.mean() - error, values.mean() + error), abs=0.03)


def test_sets_too_small_to_halve_have_no_interval_and_unequal_pairs_no_score() -> None:
    assert set_score(lambda rows: rows.sum(), np.ones(3)).interval is None
    assert set_score(lambda rows: rows.sum(), np.ones(1)) == Score(1.0, None, 1)
    assert set_score(lambda a, b: a.sum() + b.sum(), np.ones(9), np.ones(3), paired=False) == Score(12.0, None, 3)
    with pytest.raises(ValueError, match=r"equally many clips, got \[4, 5\]"):
        set_score(lambda a, b: 0.0, np.ones(4), np.ones(5))


@pytest.mark.filterwarnings("ignore:Fréchet distance of")
def test_interval_of_fewer_clips_than_features_is_not_narrower_than_new_draws_scatter() -> None:
    generator = np.random.default_rng(4)
    scores = [
        frechet_score(generator.normal(size=(24, 60)), 0.3 + generator.normal(size=(24, 60)), seed=draw)
        for draw in range(30)
    ]
    errors = [(score.interval[1] - score.value) / 1.96 for score in scores if score.interval is not None]
    assert np.mean(errors) > np.std([score.value for score in scores])


def test_class_score_of_certain_classes_is_their_number() -> None:
    assert class_score(np.eye(5).repeat(4, axis=0)).value == pytest.approx(5)
    assert class_score(np.full((40, 5), 0.2)).interval == pytest.approx((1, 1))


def test_class_score_has_an_interval_where_halves_fill_the_splits() -> None:
    generator = np.random.default_rng(5)

    def drawn(count: int) -> np.ndarray:
        sharp = np.exp(3 * generator.normal(size=(count, 8)))
        return sharp / sharp.sum(axis=1, keepdims=True)

    assert class_score(drawn(399), splits=10).interval is None and class_score(drawn(39)).interval is None
    scores = [class_score(drawn(400), seed=draw, splits=10) for draw in range(60)]
    errors = [(score.interval[1] - score.value) / 1.96 for score in scores if score.interval is not None]
    assert 0.8 < np.mean(errors) / np.std([score.value for score in scores]) < 1.6  # halves are split anew: some more


def test_repeats_have_an_interval_from_five_on() -> None:
    assert repeats_score(np.median, np.array([1.0, 2.0, 3.0, 9.0])) == Score(2.5, None, 4)
    assert repeats_score(np.median, np.array([1.0, 2.0, 3.0, 9.0, 4.0])) == Score(3.0, (1.0, 9.0), 5)


def test_efflite_classes_of_a_clip_are_those_of_its_mean_logits() -> None:
    network, clips = EfficientNetLite0Features(image_size=32), clips_of_noise(2)
    own = network._network
    with torch.no_grad():
        images = (torch.from_numpy(clips[1]).permute(0, 3, 1, 2).float() - 127) / 128
        images = torch.nn.functional.interpolate(images, (32, 32), mode="bilinear", antialias=True)
        expected = own(images).mean(0).softmax(0)  # the package's own way through pool, dropout and classifier
    probabilities = network.features(clips).probabilities
    np.testing.assert_allclose(probabilities[1], expected.numpy(), rtol=1e-3, atol=1e-7)


def test_frame_scores_are_of_the_frames_at_a_quarter_and_three_quarters() -> None:
    real = [draw_clip(i)[0] for i in range(2)]
    others = [clip.copy() for clip in real]
    for clip in others:
        clip[[0, 1, 2, 3, 5, 11, 13, 14, 15]] = 0
    network = EfficientNetLite0Features()
    scores = scores_of_pairs(real, {"same": others, "worse": [255 - clip for clip in real]}, network)
    assert scores["SSIM"]["same"].value == pytest.approx(1)
    assert scores["perceptual-EffLite0"]["same"].value == pytest.approx(0, abs=1e-6)

    def pixels(clip: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(clip[[4, 12]].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1

    with torch.no_grad():
        maps = FeatureMaps()
        expected = [float(perceptual_distance(maps(pixels(255 - clip)), maps(pixels(clip)))) for clip in real]
    assert scores["perceptual-EffLite0"]["worse"].value == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Fréchet distance of")
def test_each_network_gives_the_metrics_that_it_is_known_for(tmp_path: Path, clip_folder: Path) -> None:  # noqa: F811
    files = {"I3D": StandIn3D(), "C3D": StandInC3D(), "Inception": StandInInception()}
    specs = ["EffLite0", *(f"{name}={saved(net, tmp_path / f'{name}.pt')}" for name, net in files.items())]
    networks = load_networks([*specs, f"CLIP={clip_folder}"])
    assert list(networks) == [*specs[1:], f"CLIP={clip_folder}"]
    real, made = clips_of_noise(5), clips_of_noise(5, seed=1)
    scores = {}
    for network in networks.values():
        features = {"made": network.features(made)}
        scores |= scores_of_sets(network, network.features(real), features, [f"clip {i}" for i in range(5)])
    assert set(scores) == {
        *("FVD-I3D", "MMD-I3D", "IS-C3D", "FID-Inception", "KID-Inception", "IS-Inception", "FVD-CLIP", "MMD-CLIP"),
        *(f"CLIPSIM-{clip_folder.name}", "caption rank-CLIP"),
    }
    vectors = [np.stack([networks[specs[1]].clip_vector(clip) for clip in side]) for side in (real, made)]
    assert scores["FVD-I3D"]["made"].value == frechet_score(*vectors).value
    assert scores["IS-C3D"].keys() == {"real", "made"}


def test_networks_that_cannot_be_are_refused_by_name(clip_folder: Path) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=r"expected EffLite0, TinyVT, I3D=PATH, .* got 'VGG=x'"):
        load_networks(["EffLite0", "VGG=x"])
    with pytest.raises(ValueError, match="got 'I3D'"):
        load_networks(["I3D"])
    with pytest.raises(ValueError, match="one network of the name CLIP, got a second"):
        load_networks([f"CLIP={clip_folder}", f"CLIP={clip_folder}/."])
