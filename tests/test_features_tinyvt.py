"""TinyVT depends on motion and order, tells captions apart once trained, and is bundled; on clips drawn here."""

from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import draw_clip

from dicode.config import CheckpointError
from dicode.data.cache import CachedVideo, FrameCache
from dicode.evaluate.metrics import scores_of_sets
from dicode.features.extract import load_networks
from dicode.features.tinyvt import BUNDLED, WEIGHTS, TinyVT, TinyVTConfig
from dicode.lm.text import TextTokenizer

SMALL = TinyVTConfig(
    widths=(16, 24, 32), depths=(1, 1, 1), text_width=24, text_heads=2, text_length=12, vocab_size=300, joint_width=16
)
BUNDLED_LIMIT_BYTES = 2_500_000


def drawn_cache(folder: Path, count: int) -> list[str]:
    """A cache of drawn 64×64 clips, every fourth held out, the last without a caption; gives the captions."""
    clips, captions = zip(*(draw_clip(7 * i, 16, 64) for i in range(count)), strict=True)
    videos = tuple(
        CachedVideo("drawn", f"{i}.mp4", (text,) * (i < count - 1), i % 4 == 0, False, 16 * i, 16, 2.0)
        for i, text in enumerate(captions)
    )
    frames = torch.from_numpy(np.concatenate(clips))
    FrameCache(videos, frames, torch.arange(16, dtype=torch.float64).repeat(count) / 8).save(folder)
    return list(captions)


@pytest.fixture(scope="module")
def network() -> TinyVT:
    torch.manual_seed(0)
    return TinyVT(SMALL, TextTokenizer.train(["a red square moves right"], 300)).eval()


def test_clips_and_texts_do_not_depend_on_their_batch(network: TinyVT) -> None:
    clips = [draw_clip(seed, 16, 64)[0] for seed in range(3)]
    texts = ["a red square", "", "it moves to the right"]
    with torch.no_grad():
        together = network(torch.from_numpy(np.stack(clips)))
    for clip, row in zip(clips, together, strict=True):
        np.testing.assert_allclose(network.clip_vector(clip), row.numpy(), atol=1e-5)
    with torch.no_grad():
        read = network.read(texts)
    for text, row in zip(texts, read, strict=True):
        torch.testing.assert_close(network.read([text])[0].detach(), row, atol=1e-5, rtol=0)
    torch.testing.assert_close(read.norm(dim=1), torch.ones(3))


def test_order_and_direction_change_a_clips_vector(network: TinyVT) -> None:
    clip = draw_clip(1, 16, 64)[0]
    own = network.clip_vector(clip)
    for other in (clip[[*range(8, 16), *range(8)]], clip[::-1]):
        assert np.abs(network.clip_vector(other) - own).max() > 1e-3


def test_other_sizes_are_resized_and_clips_too_short_refused(network: TinyVT) -> None:
    large = draw_clip(1, 16, 128)[0]
    np.testing.assert_allclose(network.clip_vector(large), network.clip_vector(draw_clip(1, 16, 64)[0]), atol=0.1)
    with pytest.raises(ValueError, match="TinyVT: expected clips of 8 frames or more, got 7"):
        network.clip_vector(large[:7])


def test_a_folder_that_does_not_fit_is_refused(network: TinyVT, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path)
    assert TinyVT.from_pretrained(tmp_path).config == SMALL
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"joint_width": 16', '"joint_width": 8'))
    with pytest.raises(CheckpointError, match=r"of_clip\.weight: expected shape"):
        TinyVT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text.replace("joint_width", "joint_widht"))
    with pytest.raises(CheckpointError, match="did you mean 'joint_width'"):
        TinyVT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        TinyVT.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:Fréchet distance of")
def test_the_bundled_network_measures_under_its_own_name() -> None:
    box = load_networks(["EffLite0", "TinyVT"])["TinyVT"]
    assert isinstance(box, TinyVT) and not box.training
    assert (BUNDLED / WEIGHTS).stat().st_size <= BUNDLED_LIMIT_BYTES and (BUNDLED / "README.md").is_file()
    clips, captions = zip(*(draw_clip(seed, 16, 64) for seed in range(5)), strict=True)
    real, made = box.features(clips), {"made": box.features([255 - clip for clip in clips])}
    scores = scores_of_sets(box, real, made, [*captions[:4], ""])
    by_captions = {"alignment-TinyVT", "caption rank-TinyVT"}
    assert {"FVD-TinyVT", *by_captions} <= scores.keys()
    assert scores["FVD-TinyVT"].keys() == {"made"} and scores["FVD-TinyVT"]["made"].value > 0
    expected = [box.similarities(real.clips, captions)[i, i] for i in range(4)]
    assert scores["alignment-TinyVT"]["real"].value == pytest.approx(np.mean(expected))
    assert scores["caption rank-TinyVT"]["real"].n == 4
    of_one_caption = scores_of_sets(box, real, made, ["the same"] * 5)
    assert "FVD-TinyVT" in of_one_caption and by_captions.isdisjoint(of_one_caption)
    with pytest.raises(ValueError, match="got 'TinyVT=folder'"):
        load_networks(["TinyVT=folder"])
