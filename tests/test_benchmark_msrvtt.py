"""`dicode benchmark msrvtt` on a miniature of its folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_folders import write_msrvtt, write_networks
from safetensors.torch import load_file
from test_evaluate_networks import clip_folder  # noqa: F401 - a fixture

from dicode.benchmarks.sets import drawn_captions, msrvtt_videos, shuffled
from dicode.cli.app import main
from dicode.features.networks import Clip, clip_file
from dicode.files import sha256_of
from dicode.pipeline import DiCoDe

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.jit
    pytest.mark.filterwarnings("ignore:.*lose their end"),  # the tiny model reads 12 text tokens
    pytest.mark.filterwarnings("ignore:Fréchet distance of"),  # and a few clips are few
    pytest.mark.filterwarnings("always:.*not to be compared"),
    pytest.mark.filterwarnings("always:.*not known to be"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_msrvtt(tmp_path_factory.mktemp("msrvtt"), "TestVideo", "test_videodatainfo.json")


@pytest.fixture(scope="module")
def i3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_networks(tmp_path_factory.mktemp("networks"))[0]


def msrvtt(folder: Path, i3d: Path, clip: object, model: Path, output: Path, *more: object) -> int:
    files = ["--i3d", i3d, "--clip", clip, "--model", model, "-o", output, "--batch-size", 2, "--size", 40]
    return main([str(word) for word in ["benchmark", "msrvtt", folder, *files, *more]])


def values(output: Path) -> dict[str, Any]:
    return json.loads(output.read_text())["values"]


def test_clipsim_is_the_mean_over_frames_and_samples(folder, i3d, clip_folder, tiny_model, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "msrvtt.json"
    assert msrvtt(folder, i3d, clip_folder, tiny_model, output, "--confirm", sha256_of(i3d)) == 0
    assert "CLIPSIM-unconfirmed-CLIP: 5 samples where the protocol takes 2990" in capsys.readouterr().err
    model, network = DiCoDe.from_pretrained(tiny_model), Clip(clip_folder)
    captions = shuffled(drawn_captions(msrvtt_videos(folder), seed=0), 0, "samples")
    similarities = []
    for i, caption in enumerate(captions):
        clip = next(model.generate(caption, seconds=2.0, seed=0, sample_index=i))
        similarities.append((network.frame_features(clip) @ network.text_features([caption]).T).mean().item())
    found = values(output)
    assert found["CLIPSIM-unconfirmed-CLIP"]["value"] == pytest.approx(np.mean(similarities), abs=1e-3)
    low, high = found["CLIPSIM-unconfirmed-CLIP"]["interval"]
    assert (
        min(similarities) - 1e-3 < low <= found["CLIPSIM-unconfirmed-CLIP"]["value"] <= high < max(similarities) + 1e-3
    )
    assert found["FVD"].items() >= {"samples": 5, "real_clips": 5, "protocol_real_clips": 2990}.items()
    assert found["FVD"]["interval"] is not None
    assert (found["captions"], found["real_videos_too_short"]) == ("one a video", 0)


def test_shards_and_all_captions(folder, i3d, clip_folder, tiny_model, tmp_path, capsys):  # noqa: F811
    outputs = [tmp_path / "whole.json", tmp_path / "shared.json"]
    flags = ["--all-captions", "--fvd-clips", 3]
    assert msrvtt(folder, i3d, clip_folder, tiny_model, outputs[0], *flags) == 0
    assert "FVD-unconfirmed-I3D" in (out := capsys.readouterr().out) and "(3 samples, protocol 2990)" in out
    for number in (3, 1, 2):
        assert msrvtt(folder, i3d, clip_folder, tiny_model, outputs[1], *flags, "--shard", f"{number}/3") == 0
    assert values(outputs[0]) == values(outputs[1])
    found = values(outputs[0])
    assert found["CLIPSIM-unconfirmed-CLIP"].items() >= {"samples": 15, "protocol_samples": 59_794}.items()
    assert found["FVD-unconfirmed-I3D"].items() >= {"samples": 3, "real_clips": 3, "interval": None}.items()
    assert msrvtt(folder, i3d, clip_folder, tiny_model, outputs[0], "--samples", 6) == 2
    assert "samples: expected at most the 5 captions, got 6" in capsys.readouterr().err


def test_missing_networks_are_named(folder, i3d, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert msrvtt(folder, tmp_path / "i3d.pt", "nobody/nothing", tiny_model, tmp_path / "a.json") == 2
    assert "--i3d: expected i3d_torchscript.pt of StyleGAN-V" in capsys.readouterr().err
    assert msrvtt(folder, i3d, tmp_path, tiny_model, tmp_path / "a.json") == 2
    assert "--clip: expected openai/clip-vit-base-patch32" in capsys.readouterr().err
    assert msrvtt(folder, i3d, "nobody/nothing", tiny_model, tmp_path / "a.json") == 2
    assert "'nobody/nothing': no folder here, not in the cache" in capsys.readouterr().err


def test_the_published_pickle_is_read_and_no_other(clip_folder, tmp_path, monkeypatch):  # noqa: F811
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    pickle = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), pickle)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"--clip: expected openai/.* got .*model\.safetensors, where no file is"
    ):
        clip_file(str(folder), [])
    monkeypatch.setattr("dicode.features.networks.CLIP_PICKLE_SHA256", sha256_of(pickle))
    found, file = clip_file(str(folder), [])
    assert (found, file.figure("CLIPSIM")) == (folder, "CLIPSIM")
    torch.testing.assert_close(Clip(found).text_features(["a spark"]), Clip(clip_folder).text_features(["a spark"]))


def test_both_layouts_give_the_test_videos_in_order(folder, tmp_path):
    other = write_msrvtt(tmp_path, "videos/all", "videodatainfo.json")
    for place in (folder, other):
        videos = msrvtt_videos(place)
        assert [video.path.stem for video in videos] == ["video7", "video8", "video9", "video10", "video11"]
        assert all(len(video.captions) == 3 for video in videos)


def test_a_caption_is_drawn_by_seed_and_video_alone(folder):
    videos = msrvtt_videos(folder)
    captions = drawn_captions(videos, seed=3)
    assert all(caption in video.captions for caption, video in zip(captions, videos, strict=True))
    assert drawn_captions(videos[::-1], seed=3) == captions[::-1]
    assert len({tuple(drawn_captions(videos, seed)) for seed in range(8)}) > 4


def test_a_folder_of_another_form_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="found no such file and no such folder"):
        msrvtt_videos(tmp_path)
    (tmp_path / "TestVideo").mkdir()
    notes = tmp_path / "videodatainfo.json"
    notes.write_text("[]")
    with pytest.raises(ValueError, match=r"expected videos \(video_id, split\) and sentences"):
        msrvtt_videos(tmp_path)
    notes.write_text(json.dumps({"videos": [{"video_id": "video9", "split": "test"}], "sentences": []}))
    with pytest.raises(ValueError, match="expected a caption at least of every test video, 1 without: video9"):
        msrvtt_videos(tmp_path)
    notes.write_text(json.dumps({"videos": [{"video_id": "video9", "split": "train"}], "sentences": []}))
    with pytest.raises(ValueError, match="expected videos of the split test, found none among 1"):
        msrvtt_videos(tmp_path)
    notes.write_text((folder / "test_videodatainfo.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"5 are missing, the first being video11\.mp4"):
        msrvtt_videos(tmp_path)
