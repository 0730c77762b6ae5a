"""`dicode benchmark vbench`: the files that VBench's own tool looks for."""

import json
from pathlib import Path

import numpy as np
import pytest

from dicode.benchmarks.sets import vbench_prompts
from dicode.cli.app import main
from dicode.pipeline import DiCoDe
from dicode.video.read import read_video

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lose their end"),  # the tiny model reads 12 text tokens
    pytest.mark.filterwarnings("always:.*not to be compared"),
]
PROMPTS = ["a swirling ice vortex", "A 3D model of a 1800s victorian house."]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([*PROMPTS, "", PROMPTS[0]]) + "\n")
    return file


def vbench(prompts: Path, output: Path, model: Path, *more: object) -> int:
    flags = ["-o", output, "--model", model, "--batch-size", 3, *more]
    return main([str(word) for word in ["benchmark", "vbench", prompts, *flags]])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_folder_holds_five_videos_a_prompt_and_nothing_else(prompts, tiny_model, tmp_path, capsys):
    output = tmp_path / "videos"
    assert vbench(prompts, output, tiny_model) == 0
    assert set(contents(output)) == {f"{prompt}-{index}.mp4" for prompt in PROMPTS for index in range(5)}
    assert len(set(contents(output).values())) == 10
    result = json.loads((tmp_path / "videos.json").read_text())
    assert (result["n"], result["values"]["prompts"], result["values"]["samples"]) == (10, 2, 5)
    assert "10 videos of 2 prompts" in capsys.readouterr().out
    video = read_video(output / f"{PROMPTS[1]}-3.mp4", fps=None)
    expected = next(DiCoDe.from_pretrained(tiny_model).generate(PROMPTS[1], seconds=2.0, sample_index=1003))
    assert video.frames.shape == expected.shape == (16, 32, 32, 3)
    assert np.abs(video.frames.astype(int) - expected).mean() < 12  # what H.264 costs noise


def test_what_is_missing_is_made_again_the_same(prompts, tiny_model, tmp_path, monkeypatch):
    output = tmp_path / "videos"
    assert vbench(prompts, output, tiny_model) == 0
    before = contents(output)
    gone = [f"{PROMPTS[0]}-4.mp4", f"{PROMPTS[1]}-0.mp4"]
    for name in gone:
        (output / name).unlink()
    others = {file.name: file.stat().st_mtime_ns for file in output.iterdir()}
    assert vbench(prompts, output, tiny_model) == 0
    assert contents(output) == before
    assert {name: (output / name).stat().st_mtime_ns for name in others} == others
    monkeypatch.setattr(DiCoDe, "generate_batch", None)  # nothing is left to make
    assert vbench(prompts, output, tiny_model) == 0


def test_shards_write_what_one_process_writes(prompts, tiny_model, tmp_path, capsys):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert vbench(prompts, whole, tiny_model) == 0
    assert vbench(prompts, shared, tiny_model, "--shard", "2/2") == 0
    assert "this share is done; videos still to come from others: 6" in capsys.readouterr().out
    assert not (tmp_path / "shared.json").exists()
    assert vbench(prompts, shared, tiny_model, "--shard", "1/2") == 0
    assert contents(shared) == contents(whole)
    assert (tmp_path / "shared.json").exists()


def test_more_videos_a_prompt_begin_with_the_same_ones(prompts, tiny_model, tmp_path, capsys):
    assert vbench(prompts, tmp_path / "two", tiny_model, "--samples", 2, "--batch-size", 1) == 0
    assert "VBench, every prompt: 2 samples where the protocol takes 5" in capsys.readouterr().err
    assert vbench(prompts, tmp_path / "three", tiny_model, "--samples", 3, "--batch-size", 1) == 0
    three = contents(tmp_path / "three")
    assert {name: three[name] for name in contents(tmp_path / "two")} == contents(tmp_path / "two")


def test_videos_of_another_run_or_of_others_are_refused(prompts, tiny_model, tmp_path, capsys):
    output = tmp_path / "videos"
    assert vbench(prompts, output, tiny_model, "--seconds", 1) == 0
    before = contents(output)
    assert vbench(prompts, output, tiny_model, "--seconds", 1.5) == 2
    assert "seconds: there 1.0, asked 1.5" in capsys.readouterr().err
    assert contents(output) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.mp4").touch()
    assert vbench(prompts, tmp_path / "mine", tiny_model) == 2
    assert "holds files that this command did not write" in capsys.readouterr().err


def test_prompts_come_from_text_or_from_the_published_list(prompts, tmp_path):
    assert vbench_prompts(prompts) == PROMPTS
    listed = tmp_path / "VBench_full_info.json"
    entries = [{"prompt_en": prompt, "dimension": ["color"]} for prompt in [*PROMPTS, PROMPTS[0]]]
    listed.write_text(json.dumps(entries))
    assert vbench_prompts(listed) == PROMPTS
    listed.write_text(json.dumps([{"prompt": "a"}]))
    with pytest.raises(ValueError, match="expected a list of objects with prompt_en"):
        vbench_prompts(listed)
    for text, message in ((" \n", "found none"), ("black/white\n", "can be no file name: 'black/white'")):
        prompts.write_text(text)
        with pytest.raises(ValueError, match=message):
            vbench_prompts(prompts)


def test_prompts_of_windows_tools_have_no_mark_and_no_carriage_return(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffa café\r\n\r\na fox\u2028runs\r\n".encode())
    assert vbench_prompts(tmp_path / "p.txt") == ["a café", "a fox\u2028runs"]
    (tmp_path / "p.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([{"prompt_en": " a fox "}]).encode())
    assert vbench_prompts(tmp_path / "p.json") == ["a fox"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"a fox\ncaf\xe9\n", "p.txt, line 2: not UTF-8"),
        ("p.json", b"[" * 200_000, "p.json: not JSON (nested too deeply)"),
        ("p.json", b"[" + b"9" * 5000 + b"]", "p.json: not JSON"),
        ("p.json", b'[{"prompt_en": 3}]', "p.json: expected a list of objects with prompt_en"),
        ("p.json", b"{", "p.json: not JSON"),
    ],
)
def test_prompts_that_cannot_be_read_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert main(["benchmark", "vbench", str(tmp_path / name), "-o", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
