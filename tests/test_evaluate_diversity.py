"""Diversity beside that of real variants of a caption."""

import numpy as np
import pytest

from dicode.evaluate.diversity import captions_with_variants, diversity


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
    captions = ["Wave", "wave ", "fist", "", "Fist", "WAVE", "", "", "Ear"]
    assert captions_with_variants(captions, least=3) == {"Wave": [0, 1, 5]}
    assert list(captions_with_variants(captions, least=2)) == ["fist", "Wave"]
    assert captions_with_variants([], least=1) == {}
