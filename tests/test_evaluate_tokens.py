"""Scores of a language model's samples agree with closed forms."""

import numpy as np
import pytest
from scipy.stats import norm

from dicode.evaluate.tokens import captions_with_variants, diversity, energy_score


def test_energy_score_by_hand() -> None:
    truth, near = np.array([3.0, 4.0, 0.0, 0.0]), np.zeros((2, 4))
    assert energy_score([near], [truth]).mean == 2.5  # 5 away, no spread, divided by √4
    pair = np.array([[0.0] * 4, [6.0, 8.0, 0.0, 0.0]])  # either side of the truth, 10 apart
    both = energy_score([near, pair], [truth, truth])
    assert (both.error, both.spread, both.n) == (2.5, 2.5, 2)
    assert both.mean == pytest.approx((2.5 + 0) / 2) and both.interval == (0, 2.5)


def test_energy_score_in_one_dimension_is_the_crps_of_a_gaussian() -> None:
    # Gneiting & Raftery 2007, equation 21: σ (z (2Φ(z) - 1) + 2φ(z) - 1/√π)
    drawn = np.random.default_rng(0).normal(1.0, 2.0, size=(4000, 1))
    for y in (1.0, 4.0):
        z = (y - 1) / 2
        expected = 2 * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
        assert energy_score([drawn], [np.array([y])]).mean == pytest.approx(expected, abs=0.05)


def test_energy_score_is_unbiased_in_the_number_of_samples() -> None:
    rng = np.random.default_rng(1)
    truths = list(rng.normal(size=(4000, 3)))
    few, many = (energy_score([rng.normal(size=(s, 3)) for _ in truths], truths).mean for s in (2, 12))
    assert few == pytest.approx(many, abs=0.03)


def test_energy_score_is_least_for_the_true_distribution() -> None:
    rng = np.random.default_rng(2)
    truths = list(rng.normal(size=(500, 8)))
    scores = {scale: energy_score([scale * rng.normal(size=(16, 8)) for _ in truths], truths) for scale in (0, 1, 2)}
    assert scores[1].mean < min(scores[0].mean, scores[2].mean)
    assert scores[0].spread == 0 and scores[1].interval[0] < scores[1].mean < scores[1].interval[1]


def test_diversity_is_one_for_draws_like_the_real_variants_and_zero_for_copies() -> None:
    rng = np.random.default_rng(3)
    real = [rng.normal(size=(5, 40)) for _ in range(60)]
    assert diversity([rng.normal(size=(16, 40)) for _ in real], real).ratio == pytest.approx(1, abs=0.02)
    assert diversity([np.ones((4, 40))] * 60, real).ratio == 0
    assert diversity([0.5 * variants for variants in real], real).ratio == pytest.approx(0.5)


def test_diversity_weighs_captions_by_how_much_their_variants_differ() -> None:
    points = np.array([[0.0], [1.0]])
    score = diversity([2 * points, points], [points, 3 * points])
    assert (score.ratio, score.generated, score.real, score.n) == (3 / 4, 1.5, 2, 2)
    with pytest.raises(ValueError, match="real variants of 1 captions are all the same, first: caption 1"):
        diversity([points, points], [points, 0 * points])
    with pytest.raises(ValueError, match="at least 2 points, got 1"):
        diversity([points[:1]], [points])


def test_captions_with_variants_are_those_that_enough_clips_carry() -> None:
    captions = ["Wave", ("wave ", "WAVE"), "fist", "", ("Fist", "a fist"), "wave", "", "", "Ear"]
    assert captions_with_variants(captions, least=3) == {"Wave": [0, 1, 5]}
    assert list(captions_with_variants(captions, least=2)) == ["fist", "Wave"]
    assert captions_with_variants([], least=1) == {}
