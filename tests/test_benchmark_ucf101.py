"""`dicode benchmark ucf101` on a miniature of its folder: the figures, what is kept, how work is shared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_folders import COUNTS, write_networks, write_ucf101

from dicode.benchmarks.protocols import real_clip
from dicode.benchmarks.sets import class_prompts, class_words, share_out, shuffled, ucf101_videos
from dicode.cli.app import main
from dicode.evaluate.scores import frechet_score, set_score
from dicode.features.networks import PUBLISHED, ClipNetwork
from dicode.files import sha256_of
from dicode.pipeline import DiCoDe

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.jit
    pytest.mark.filterwarnings("ignore:.*lose their end"),  # the tiny model reads 12 text tokens
    pytest.mark.filterwarnings("ignore:Fréchet distance of"),  # and six clips are few
    pytest.mark.filterwarnings("always:.*not to be compared"),
    pytest.mark.filterwarnings("always:.*not known to be"),
]
SAMPLES, BATCH = 31, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ucf101(tmp_path_factory.mktemp("ucf101"))


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_networks(tmp_path_factory.mktemp("networks"))


def ucf101(folder: Path, networks: tuple[Path, Path], model: Path, output: Path, *more: object) -> int:
    files = ["--i3d", networks[0], "--c3d", networks[1], "--model", model, "-o", output]
    counts = ["--samples", SAMPLES, "--fvd-clips", 6, "--batch-size", BATCH, "--size", 40]
    return main([str(word) for word in ["benchmark", "ucf101", folder, *files, *counts, *more]])


def values(output: Path) -> dict[str, Any]:
    return json.loads(output.read_text())["values"]


@pytest.fixture(scope="module")
def whole(
    folder: Path, networks: tuple[Path, Path], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The result of one run by one process."""
    output = tmp_path_factory.mktemp("whole") / "ucf101.json"
    assert ucf101(folder, networks, tiny_model, output) == 0
    return output


def test_figures_are_those_of_the_samples_and_the_real_clips(folder, networks, tiny_model, whole):
    model, (i3d, c3d) = DiCoDe.from_pretrained(tiny_model), map(ClipNetwork, ("I3D", "C3D"), networks)
    shares = share_out(SAMPLES, dict(sorted(COUNTS.items())))  # classes in order
    prompts = shuffled([class_words(name) for name, n in shares.items() for _ in range(n)], 0, "samples")
    clips: list[np.ndarray] = []
    for first in range(0, SAMPLES, BATCH):
        numbers = list(range(first, min(first + BATCH, SAMPLES)))
        made = model.generate_batch([prompts[i] for i in numbers], seconds=2.0, seed=0, sample_indices=numbers)
        clips += list(next(made).numpy())
    probabilities = np.stack([c3d.clip_vector(clip) for clip in clips]).astype(float)
    splits = np.array_split(probabilities, 10)
    scores = [np.exp((part * np.log(part / part.mean(axis=0))).sum(axis=1).mean()) for part in splits]
    assert np.mean(scores) > 1.01
    found = values(whole)
    assert found["Inception Score-unconfirmed-C3D"]["value"] == pytest.approx(np.mean(scores), rel=1e-6)
    assert found["Inception Score-unconfirmed-C3D"]["deviation"] == pytest.approx(np.std(scores), rel=1e-6)

    order = shuffled([path for files in ucf101_videos(folder).values() for path in files], 0, "real clips")
    real = []
    for slot in range(6):
        candidates = [real_clip(path, 8.0, 40, 0) for path in order[slot::6]]
        real += [i3d.clip_vector(clip) for clip in candidates if clip is not None][:1]
    a, b = np.stack(real).astype(float), np.stack([i3d.clip_vector(clip) for clip in clips[:6]]).astype(float)
    values_a, vectors_a = np.linalg.eigh(np.cov(a.T))
    root_a = vectors_a * np.sqrt(values_a.clip(0)) @ vectors_a.T
    cross = np.sqrt(np.linalg.eigvalsh(root_a @ np.cov(b.T) @ root_a).clip(0)).sum()  # the trace of (ΣaΣb)^½
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * cross
    assert found["FVD-unconfirmed-I3D"]["value"] == pytest.approx(expected, rel=1e-6)
    assert found["real_videos_too_short"] == 6 - len(real)
    error = set_score(lambda one, other: frechet_score(one, other).value, a, b, paired=False, halves=400).interval
    assert found["FVD-unconfirmed-I3D"]["interval"] == pytest.approx(error, rel=0.2)
    assert found["Inception Score-unconfirmed-C3D"]["interval"] is None  # three clips a split


def test_counts_stand_beside_those_of_the_protocol_and_a_warning_names_them(
    whole, folder, networks, tiny_model, capsys
):
    found = values(whole)
    assert found["Inception Score-unconfirmed-C3D"].items() >= {"samples": 31, "protocol_samples": 10_000}.items()
    assert found["FVD-unconfirmed-I3D"].items() >= {"samples": 6, "protocol_samples": 2048}.items()
    assert (found["classes"], found["protocol_classes"], found["size"], found["real_size"]) == (3, 101, 32, 40)
    result = json.loads(whole.read_text())
    assert (result["name"], result["n"], result["seed"]) == ("tiny: zero-shot ucf101", 31, 0)
    assert ucf101(folder, networks, tiny_model, whole) == 0  # all parts are there: no more than the figures again
    out, err = capsys.readouterr()
    assert "FVD-unconfirmed-I3D: 6 samples where the protocol takes 2048: not to be compared with published" in err
    assert "FVD-unconfirmed-I3D: 6 real clips where the protocol takes 2048" in err
    assert "UCF-101: 3 classes where the protocol takes 101" in err
    assert ", 6 samples, protocol 2048)" in out
    assert values(whole) == found


def test_an_interrupted_run_goes_on_to_the_same_figures(
    folder, networks, tiny_model, whole, tmp_path, monkeypatch, capsys
):
    original, calls = DiCoDe.generate_batch, []

    def interrupted(self: DiCoDe, *given: Any, **options: Any) -> Any:
        calls.append(options["sample_indices"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *given, **options)

    output = tmp_path / "ucf101.json"
    with monkeypatch.context() as patched:
        patched.setattr(DiCoDe, "generate_batch", interrupted)
        assert ucf101(folder, networks, tiny_model, output) == 130
        kept = {path.name for path in (tmp_path / "ucf101.work").iterdir()}
        assert "finished parts are kept; the same command continues" in capsys.readouterr().err
        assert not output.exists()
        assert kept == {
            "run.json",
            *(f"{part}.safetensors" for part in ("real-00000", "samples-00000", "samples-00001")),
        }
        calls[:] = [[]] * 3
        assert ucf101(folder, networks, tiny_model, output) == 0
    assert calls[3:] == [list(range(16, 24)), list(range(24, 31))]
    assert values(output) == values(whole)


def test_shards_together_give_the_figures_of_one_process_to_the_last_bit(
    folder, networks, tiny_model, whole, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "ucf101.json"
    assert ucf101(folder, networks, tiny_model, output, "--shard", "2/2") == 0
    assert "this share is done; parts still to come from others: 3" in capsys.readouterr().out
    assert not output.exists()
    monkeypatch.setenv("RANK", "0")  # the other share, by what torchrun sets
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ucf101(folder, networks, tiny_model, output, "--shard", "1/2") == 2
    assert "torchrun shares the work out already" in capsys.readouterr().err
    assert ucf101(folder, networks, tiny_model, output) == 0
    assert values(output) == values(whole)


def test_parts_of_another_run_are_refused(folder, networks, tiny_model, whole, capsys):
    before = whole.read_bytes()
    assert ucf101(folder, networks, tiny_model, whole, "--seed", 1) == 2
    assert "holds parts of another run (" in (err := capsys.readouterr().err)
    assert "seed: there 0, asked 1" in err
    assert ucf101(folder, networks, tiny_model, whole, "--template", "a video of {}") == 2
    assert "prompts: there" in capsys.readouterr().err
    assert whole.read_bytes() == before


def test_only_a_file_known_as_the_published_one_gives_its_name(
    folder, networks, tiny_model, whole, tmp_path, capsys, monkeypatch
):
    known = sha256_of(networks[1])
    monkeypatch.setitem(PUBLISHED, "I3D", sha256_of(networks[0]))
    (tmp_path / "ucf101.work").symlink_to(whole.with_suffix(".work"))
    assert ucf101(folder, networks, tiny_model, tmp_path / "ucf101.json", "--confirm", known) == 0
    found = values(tmp_path / "ucf101.json")
    assert {"FVD", "Inception Score"} <= found.keys()
    assert not any("unconfirmed" in key for key in found)
    assert "not known to be" not in capsys.readouterr().err
    assert ucf101(folder, networks, tiny_model, whole, "--confirm", "1" * 64) == 2
    assert "expected the SHA-256 of a file given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--i3d", "nowhere.pt"], "--i3d: expected i3d_torchscript.pt of StyleGAN-V"),
        (["--c3d", "nowhere.pt"], "--c3d: expected c3d_ucf101.pt of StyleGAN-V"),
        (["--samples", "9"], "samples: expected 10 or more, got 9"),
        (["--fvd-clips", "1"], "--fvd-clips: expected 2 or more, got 1"),
        (["--batch-size", "0"], "--batch-size: expected 1 to 1,048,576, got 0"),
        (["--template", "a video"], "template: expected one {} where the class goes, got 'a video'"),
        (["--shard", "0/2"], "--shard: expected NUMBER/COUNT from 1/COUNT to COUNT/COUNT, got '0/2'"),
    ],
)
def test_what_cannot_be_measured_is_said_before_any_work(
    folder, networks, tiny_model, tmp_path, capsys, flags, message
):
    assert ucf101(folder, networks, tiny_model, tmp_path / "ucf101.json", *flags) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_missing_networks_are_named(folder, tiny_model, tmp_path, capsys):
    assert main(["benchmark", "ucf101", str(folder), "--model", str(tiny_model), "-o", str(tmp_path / "a.json")]) == 2
    assert "--i3d: expected i3d_torchscript.pt of StyleGAN-V" in capsys.readouterr().err


def test_classes_become_words():
    names = ["ApplyEyeMakeup", "YoYo", "HandstandPushups", "TaiChi", "CleanAndJerk", "Archery"]
    words = ["apply eye makeup", "yo yo", "handstand pushups", "tai chi", "clean and jerk", "archery"]
    assert [class_words(name) for name in names] == words
    assert class_prompts(["YoYo"], "a person plays {}") == {"YoYo": "a person plays yo yo"}


def test_prompts_of_a_file_replace_the_template(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"YoYo": "a boy plays with a yo-yo", "Other": "another"}))
    assert class_prompts(["YoYo"], file=file) == {"YoYo": "a boy plays with a yo-yo"}
    with pytest.raises(ValueError, match=r"expected a sentence for each class, 1 have none, first: Archery"):
        class_prompts(["Archery", "YoYo"], file=file)


def test_samples_are_shared_out_in_proportion():
    assert share_out(11, COUNTS) == {"ApplyEyeMakeup": 5, "YoYo": 4, "HandstandPushups": 2}
    counts = {f"c{i}": 95 + i * 7 % 73 for i in range(101)}
    shares = share_out(10_000, counts)
    assert sum(shares.values()) == 10_000
    exact = {name: 10_000 * count / sum(counts.values()) for name, count in counts.items()}
    assert all(abs(shares[name] - exact[name]) < 1 for name in counts)


def test_lists_choose_the_videos_of_a_split(folder):
    counts = {split: {n: len(v) for n, v in ucf101_videos(folder, split).items()} for split in ("all", "train", "test")}
    assert counts["all"] == COUNTS
    assert counts["test"] == dict.fromkeys(COUNTS, 1)
    assert counts["train"] == {name: count - 1 for name, count in COUNTS.items()}


def test_an_incomplete_folder_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected UCF-101/<ClassName>/v_\*\.avi in it"):
        ucf101_videos(tmp_path)
    (tmp_path / "UCF-101").symlink_to(folder / "UCF-101")
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "testlist01.txt").write_text("YoYo/v_YoYo_g99_c01.avi\n")
    with pytest.raises(FileNotFoundError, match=r"1 are missing, the first being YoYo/v_YoYo_g99_c01\.avi"):
        ucf101_videos(tmp_path, "test")
    (lists / "classInd.txt").write_text("1 YoYo\n2 Archery\n")
    with pytest.raises(FileNotFoundError, match=r"1 have no videos, the first being Archery"):
        ucf101_videos(tmp_path)


def test_a_real_clip_is_sixteen_frames_in_a_row_from_a_place_of_its_own(folder):
    from dicode.video.read import read_video

    files = ucf101_videos(folder)["ApplyEyeMakeup"]
    frames = read_video(files[0], 8.0, 24).frames
    clip = real_clip(files[0], 8.0, 24, seed=0)
    assert clip is not None
    assert any((frames[start : start + 16] == clip).all() for start in range(len(frames) - 15))
    assert real_clip(ucf101_videos(folder)["YoYo"][1], 8.0, 24, seed=0) is None
    assert torch.equal(torch.from_numpy(clip), torch.from_numpy(real_clip(files[0], 8.0, 24, seed=0)))
