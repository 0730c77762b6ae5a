"""SSIM, Inception Score, shares of moving clips and token rates, against formulas and libraries of others."""

import numpy as np
import pytest
from numpy import ndarray
from scipy.ndimage import correlate1d
from scipy.stats import entropy

from dicode.evaluate.metrics import ssim
from dicode.evaluate.reconstruction import token_rate
from dicode.evaluate.scores import inception_scores
from dicode.tokenizer.presets import TOKENIZERS


def blur(image: ndarray) -> ndarray:
    """Wang et al.'s window: 11 wide, deviation 1.5, over two axes."""
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    return correlate1d(correlate1d(image, window, axis=0, mode="mirror"), window, axis=1, mode="mirror")


def ssim_of_scipy(a: ndarray, b: ndarray) -> float:
    """Equation 13 of Wang et al. 2004 at every pixel, frames mirrored at their edges, mean over colours."""
    scores = []
    for colour in range(3):
        x, y = a[..., colour].astype(float), b[..., colour].astype(float)
        mean_x, mean_y = blur(x), blur(y)
        variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
        covariance = blur(x * y) - mean_x * mean_y
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        over = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        under = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
        scores.append((over / under).mean())
    return float(np.mean(scores))


def clip_of_noise(seed: int, frames: int = 4) -> ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 21, 33, 3), dtype=np.uint8)


def test_ssim_is_that_of_the_formula() -> None:
    real, noise = clip_of_noise(0), clip_of_noise(1)
    near = (0.8 * real + 0.2 * noise).astype(np.uint8)
    expected = [ssim_of_scipy(a, b) for a, b in zip(real, near, strict=True)]
    np.testing.assert_allclose(ssim(real, near), expected, atol=1e-4)
    np.testing.assert_allclose(ssim(real, real), 1, atol=1e-9)


def test_inception_score_is_that_of_scipy() -> None:
    logits = np.random.default_rng(0).normal(size=(40, 7))
    rows = np.exp(3 * logits) / np.exp(3 * logits).sum(axis=1, keepdims=True)
    parts = [np.exp(entropy(part.T, part.mean(axis=0)[:, None]).mean()) for part in np.split(rows, 4)]
    np.testing.assert_allclose(inception_scores(rows, splits=4), parts, atol=1e-9)


def test_inception_score_reaches_its_ends() -> None:
    assert inception_scores(np.eye(5).repeat(3, axis=0), splits=1) == pytest.approx(5)
    assert inception_scores(np.full((6, 5), 0.2), splits=2) == pytest.approx(1)


def test_what_is_no_probability_has_no_inception_scores() -> None:
    with pytest.raises(ValueError, match="rows of probabilities"):
        inception_scores(np.full((6, 5), 0.3), splits=2)
    with pytest.raises(ValueError, match="splits: expected 1 to the 6 samples, got 7"):
        inception_scores(np.full((6, 5), 0.2), splits=7)


def test_token_rates_of_the_published_and_the_small_tokenizer() -> None:
    small = token_rate(TOKENIZERS["sprites"])
    assert small == {"tokens": 8, "floats": 256, "bits": 4096, "compression": 64 * 64 * 3 * 8 * 8 / 4096}
    assert token_rate(TOKENIZERS["paper_tokenizer_256"])["tokens"] == pytest.approx(16 * 8 / 15)
