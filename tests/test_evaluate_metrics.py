"""The measures agree with closed forms and independent implementations."""

import warnings
from collections.abc import Callable

import jaxtyping
import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.stats import rankdata
from torchmetrics.functional.image import peak_signal_noise_ratio

from dicode.evaluate.metrics import psnr_db, psnr_in_motion, ssim
from dicode.features.metrics import (
    at_joins,
    bootstrap_interval,
    frame_steps,
    frechet_distance,
    kernel_distance,
    motion,
    percentile_rank,
    similarities,
    squared_error,
)


def _features(seed: int, n: int, width: int, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return scale * rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


def test_a_mean_far_larger_than_the_deviation_costs_no_precision() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 3)), 2 + rng.normal(size=(500, 3))
    assert frechet_distance(a + 1e7, b + 1e7) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_frechet_distance_agrees_with_the_matrix_square_root() -> None:
    a, b = _features(1, 400, 12), _features(2, 300, 12, scale=2.0)
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    distance = frechet_distance(a, b)
    assert distance == pytest.approx(expected, rel=1e-8)
    assert distance == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_frechet_distance_of_scaled_and_shifted_gaussians_has_the_closed_form() -> None:
    # If b = c·a + s with c > 0, the distance is |μb-μa|² + (c-1)² Tr Σa, whatever the samples.
    a = _features(3, 200, 9)
    b = 1.7 * a + np.arange(9)
    expected = ((b.mean(0) - a.mean(0)) ** 2).sum() + 0.7**2 * np.trace(np.cov(a.T))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_is_exact_and_warns_when_samples_are_fewer_than_features() -> None:
    a = _features(4, 11, 60)
    with pytest.warns(UserWarning, match="60 features from 11 samples is biased"):
        distance = frechet_distance(a, 3 * a)
    expected = 4 * (a.mean(0) ** 2).sum() + 4 * np.trace(np.cov(a.T))
    assert distance == pytest.approx(expected, rel=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = _features(4, 60, 60)
        assert frechet_distance(full, full) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_takes_axes_before_the_last_for_samples() -> None:
    a, b = _features(1, 40, 3), _features(2, 40, 3)
    assert frechet_distance(a.reshape(8, 5, 3), b) == frechet_distance(a, b)


def test_kernel_distance_has_the_expectation_of_the_kernel_whatever_the_number_of_samples() -> None:
    """Of x ~ N(0, I) and y ~ N(m, I): E k is |E xxᵀ|² / width² for the kernel of degree 2."""
    generator, width, shift = np.random.default_rng(0), 5, 0.6
    second = np.eye(width) + shift**2
    expected = (width + (second**2).sum() - 2 * np.trace(second)) / width**2
    for count in (4, 40):
        draws = [
            kernel_distance(generator.normal(size=(count, width)), shift + generator.normal(size=(2 * count, width)))
            for _ in range(4000 // count)
        ]
        error = np.std(draws) / len(draws) ** 0.5
        assert np.mean(draws) == pytest.approx(expected, abs=4 * error) and error < 0.1 * expected
    same = [kernel_distance(*generator.normal(size=(2, 8, width))) for _ in range(400)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 20 and min(same) < 0 < max(same)


def test_kernel_distance_by_hand_and_of_other_kernels() -> None:
    one, other = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[2.0, 0.0], [2.0, 2.0], [0.0, 0.0]])
    kernel = lambda a, b: (a @ b / 2 + 1) ** 3  # noqa: E731
    pairs = [kernel(x, y) for x in one for y in other]
    within = (
        kernel(one[0], one[1]),
        (kernel(other[0], other[1]) + kernel(other[0], other[2]) + kernel(other[1], other[2])) / 3,
    )
    assert kernel_distance(one, other, degree=3, constant=1.0) == pytest.approx(sum(within) - 2 * np.mean(pairs))
    with pytest.raises(ValueError, match="at least 2 samples"):
        kernel_distance(one[:1], other)
    with pytest.raises(ValueError, match="one width"):
        kernel_distance(one, np.zeros((5, 3)))
    with pytest.raises(ValueError, match="NaN or infinity, first: 1"):
        kernel_distance(one, np.array([[1.0, 0.0], [np.nan, 0.0]]))


def test_what_has_no_frechet_distance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 of 3 samples hold NaN or infinity, first: 2"):
        frechet_distance(np.array([[1.0], [2.0], [np.nan]]), np.zeros((3, 1)))
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_distance(np.zeros((1, 2)), np.zeros((5, 2)))
    with pytest.raises(ValueError, match="one width, got 2 and 3"):
        frechet_distance(np.zeros((5, 2)), np.zeros((5, 3)))


def test_psnr_of_frames_is_that_of_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    real, candidate = (rng.integers(0, 256, (3, 4, 5, 3)).astype(np.uint8) for _ in range(2))
    images = (torch.from_numpy(clip).double() for clip in (candidate, real))
    expected = peak_signal_noise_ratio(*images, data_range=255.0, dim=(1, 2, 3), reduction="none")
    np.testing.assert_allclose(psnr_db(squared_error(real, candidate)), expected, rtol=1e-6)
    assert psnr_db(squared_error(real, real)) == pytest.approx(60.0)


@pytest.mark.parametrize("score", [squared_error, ssim, lambda *pair: psnr_in_motion(*pair, None)])
def test_frames_of_floats_are_refused_rather_than_taken_for_0_to_255(
    score: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as where a user calls it
    clip = np.random.default_rng(0).integers(0, 256, (2, 12, 13, 3)).astype(np.uint8)
    score(clip, clip)
    for other in (clip / 255, clip.astype(np.int64), clip[:1]):
        for pair in ((clip, other), (other, clip)):
            with pytest.raises(ValueError, match=r"expected clips of uint8 \(0…255\) and of one shape, got "):
                score(*pair)


def test_motion_is_the_mean_absolute_step_and_does_not_wrap_around() -> None:
    frames = np.zeros((4, 3, 5, 3), np.uint8)
    frames[1], frames[2], frames[3] = 250, 0, 6
    assert motion(frames) == pytest.approx((250 + 250 + 6) / 3)
    with pytest.raises(ValueError, match="at least 2 frames"):
        motion(frames[:1])


def test_similarities_are_centred_cosines() -> None:
    rng = np.random.default_rng(1)
    queries, references = rng.normal(size=(4, 6)) + 5, rng.normal(size=(7, 6)) + 5
    q, x = queries[2] - references.mean(0), references[3] - references.mean(0)
    assert similarities(queries, references)[2, 3] == pytest.approx(q @ x / np.sqrt(q @ q * (x @ x)))


def test_centring_finds_the_match_that_a_shared_offset_hides() -> None:
    references = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]) + 1000
    queries = 1000 + np.array([[0.1, 0.9], [-0.2, -0.1]])
    assert similarities(queries, references).argmax(axis=1).tolist() == [1, 2]


def test_percentile_rank_is_the_share_of_farther_entries() -> None:
    scores = np.array([[0.9, 0.1, 0.5, 0.3, 0.2], [0.9, 0.1, 0.5, 0.3, 0.2], [1.0, 1.0, 1.0, 1.0, 1.0]])
    assert percentile_rank(scores, np.array([0, 3, 4])).tolist() == [100.0, 50.0, 50.0]


def test_percentile_rank_agrees_with_scipy_and_is_50_by_chance() -> None:
    rng = np.random.default_rng(2)
    scores, true_index = rng.integers(0, 20, (900, 31)).astype(float), rng.integers(0, 31, 900)
    ranks = percentile_rank(scores, true_index)
    expected = [100 * (rankdata(row)[i] - 1) / 30 for row, i in zip(scores, true_index, strict=True)]
    np.testing.assert_allclose(ranks, expected)
    assert ranks.mean() == pytest.approx(50, abs=3)


def test_bootstrap_interval_of_a_mean_is_the_normal_one_and_repeats() -> None:
    sample = np.random.default_rng(3).normal(4, 2, 400)
    low, high = bootstrap_interval(np.mean, sample, seed=1, resamples=2000)
    half = 1.96 * sample.std() / np.sqrt(400)
    assert low == pytest.approx(sample.mean() - half, abs=0.03)
    assert high == pytest.approx(sample.mean() + half, abs=0.03)
    assert bootstrap_interval(np.mean, sample, seed=1, resamples=2000) == (low, high)
    assert bootstrap_interval(np.mean, sample, seed=2, resamples=2000) != (low, high)
    with pytest.raises(ValueError, match="not empty"):
        bootstrap_interval(np.mean, sample[:0])


def test_bootstrap_resamples_rows_even_of_a_sample_of_one() -> None:
    rows = np.array([[3.0, 2.0]])
    assert bootstrap_interval(lambda drawn: drawn[:, 0].sum() / drawn[:, 1].sum(), rows, resamples=3) == (1.5, 1.5)


def test_frame_steps_are_the_mean_absolute_difference_of_neighbours() -> None:
    frames = np.random.default_rng(4).integers(0, 256, (5, 3, 4, 3)).astype(np.uint8)
    np.testing.assert_allclose(frame_steps(frames), np.abs(np.diff(frames.astype(float), axis=0)).mean(axis=(1, 2, 3)))


def test_joins_lie_where_one_clip_ends_and_the_next_begins() -> None:
    ours, published = at_joins(49, 16), at_joins(47, 16, repeated_frames=1)
    assert np.flatnonzero(ours).tolist() == [15, 31, 47] and len(ours) == 48
    # published: 16 frames, then 15 a clip, for the first of each has been shown
    assert np.flatnonzero(published).tolist() == [15, 30, 45]
