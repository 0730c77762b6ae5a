"""What an instruction changes when the first image is given."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from toy_runs import write_cache

from dicode.data.cache import FrameCache
from dicode.evaluate.instructions import (
    Continuation,
    another_caption,
    continuations,
    evaluate_instructions,
    figures_of,
)
from dicode.evaluate.samples import Samples, first_clip
from dicode.features.extract import EfficientNetLite0Features
from dicode.pipeline import DiCoDe

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lose their end"),  # the tiny model reads 12 text tokens
    pytest.mark.filterwarnings("ignore:Fréchet distance of"),  # and two clips are few
]


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    write_cache(tmp_path / "cache", count=12)
    return FrameCache.load(tmp_path / "cache")


def drawn(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)


def test_figures_differ_between_captions_with_and_without_effect() -> None:
    followed = [Continuation(drawn(i), drawn(i), drawn(i + 9), drawn(i + 90), ("a", "b")) for i in range(4)]
    ignored = [Continuation(drawn(i), drawn(i + 9), drawn(i + 9), drawn(i + 90), ("a", "b")) for i in range(4)]
    extractor = EfficientNetLite0Features()
    for clips, nearer, effect in ((followed, 1.0, 1.0), (ignored, 0.0, 0.0)):
        figures = figures_of(clips, extractor)
        assert figures["nearer_by_pixels"]["own caption"].value == nearer
        assert figures["nearer_by_features-EffLite0"]["own caption"].value == nearer
        assert figures["effect"]["other caption"].value == pytest.approx(effect, abs=0.05)
    assert figures_of(followed, extractor)["FVD-EffLite0"]["own caption"].value == pytest.approx(0, abs=1e-6)


def test_the_other_caption_is_of_the_same_data_set(cache: FrameCache) -> None:
    alone = dataclasses.replace(cache.videos[0], source="elsewhere", captions=("put it down",))
    pair = dataclasses.replace(alone, captions=("pick it up",))
    for index in range(20):
        assert another_caption([*cache.videos, alone, pair], alone, 0, index) == "pick it up"
    with pytest.raises(ValueError, match="elsewhere: expected captions other than 'put it down'"):
        another_caption([*cache.videos, alone], alone, 0, 0)


def test_clips_of_one_image_are_what_generate_makes_of_it_alone(tiny_model: Path, cache: FrameCache) -> None:
    model, videos = DiCoDe.from_pretrained(tiny_model), list(cache.videos[:2])
    others = [another_caption(cache.videos, video, 0, i) for i, video in enumerate(videos)]
    made = continuations(model, cache, videos, others, seed=3, indices=[5, 6])
    for i, (video, one) in enumerate(zip(videos, made, strict=True)):
        assert one.captions[0] != one.captions[1]
        given = model.given(image=first_clip(model.tokenizer.config, cache, video)[:1])
        for caption, clip in zip(one.captions, (one.own, one.other), strict=True):
            (alone,) = model.generate(caption, seconds=2.0, seed=3, sample_index=5 + i, given=given)
            assert np.abs(clip.astype(int) - alone).max() <= 1
        assert np.array_equal(one.real, first_clip(model.tokenizer.config, cache, video)[:-1])


def test_both_splits_are_measured_and_shown(tiny_model: Path, cache: FrameCache) -> None:
    figures, sheet = evaluate_instructions(Samples(DiCoDe.from_pretrained(tiny_model), cache), count=3)
    assert figures["n"] == 3 + 2  # clips 0 and 6 of twelve are held out
    assert figures["motion"].keys() == {"training: own caption", "validation: own caption"}
    assert "validation: first frame held" in figures["FVD-EffLite0"]
    assert sheet.height > sheet.width / 2
