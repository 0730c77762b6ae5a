"""Everything that makes a video works with Wan at toy size, whose clips share a frame that is decoded with the clip."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz.models import write_tiny
from PIL import Image
from safetensors.torch import load_file
from test_wan import CONFIG
from toy_runs import write_cache

from dicode.cli.app import main
from dicode.diffusers_pipeline import DiCoDePipeline
from dicode.evaluate import speed
from dicode.evaluate.long import JOINS
from dicode.pipeline import DiCoDe
from dicode.serve.render import Work, render_live
from dicode.serve.request import Model, VideoRequest
from dicode.video.read import read_metadata, read_video

BOARD = "[2s: a red square] [2s: a blue circle moves down]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model with random weights."""
    names = ("clip_frames", "tokens_per_keyframe", "token_width", "first_stage", "resampler", "denoiser")
    own: dict[str, Any] = {name: getattr(CONFIG, name) for name in names}
    return write_tiny(tmp_path_factory.mktemp("wan") / "model", **own, null_tokens="grey_image")


@pytest.fixture(scope="module")
def model(folder: Path) -> DiCoDe:
    return DiCoDe.from_pretrained(folder)


def noise(frames: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8)


@torch.no_grad()
def through_first_stage(model: DiCoDe, frame: np.ndarray) -> np.ndarray:
    pixels = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    return model.tokenizer.frames_of(model.tokenizer.first_stage.encode(pixels)[:, None])[0, 0].numpy()


@pytest.mark.parametrize("given", ["continued", "image"])
def test_a_video_begins_with_the_frame_that_it_is_given(model: DiCoDe, given: str) -> None:
    frames = noise(20 if given == "continued" else 1)
    conditions = model.given(**{given: frames})
    assert conditions.before is not None and np.array_equal(conditions.before[0].numpy(), frames[-1:])
    made = np.concatenate([*model.generate("a red square", seconds=4.0, given=conditions)])
    assert len(made) == 32
    first = [through_first_stage(model, frame).astype(int) for frame in frames[-2:]]
    assert np.abs(made[0] - first[-1]).max() <= 1
    assert given == "image" or np.abs(made[0] - first[0]).max() > 1  # not the one before


def test_the_pipeline_of_diffusers_begins_with_the_frame_that_it_is_given(model: DiCoDe) -> None:
    frame = noise(1)[0]
    pipeline = DiCoDePipeline(model.tokenizer, model.lm)
    made = pipeline(
        "a red square", image=Image.fromarray(frame), seconds=2.0, num_videos_per_prompt=2, output_type="np"
    )
    first = np.abs(made.frames[:, 0] * 255 - through_first_stage(model, frame))
    assert made.frames.shape == (2, 16, 32, 32, 3) and first.max() < 1.1


def test_a_loop_ends_on_the_tokens_that_it_begins_with(model: DiCoDe) -> None:
    key_frames = [*model.write(["a red square"], seconds=4.0, given=model.given(loop=True))]
    assert len(key_frames) == 3 and torch.equal(key_frames[0], key_frames[2])
    assert not torch.equal(key_frames[0], key_frames[1])


def test_every_command_writes_16_frames_a_clip(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def frames_of(name: str, *flags: str, command: tuple[str, ...] = ("generate", "a red square")) -> np.ndarray:
        file = tmp_path / f"{name}.mp4"
        lossless = ["--lossless"] * (command[0] == "generate")
        fixed = ["--model", str(folder), "-o", str(file), "--scale", "1", *lossless]
        assert main([*command, *fixed, *flags]) == 0
        return read_video(file, fps=None).frames

    whole = frames_of("whole", "--seconds", "4", "--timings")
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines() if line.startswith("clip ")] == ["clip 0", "clip 1"]
    board = frames_of("board", command=("generate", BOARD))
    loop = frames_of("loop", "--seconds", "4", "--loop")
    streamed = frames_of("streamed", "--seconds", "4", "--stream", "--preview")
    more = frames_of("more", "--seconds", "2", "--continue-from", str(tmp_path / "whole.mp4"))
    assert [len(own) for own in (whole, board, loop, streamed, more)] == [32, 32, 32, 32, 16]
    assert np.array_equal(whole, streamed) and not np.array_equal(whole, loop) and not np.array_equal(whole, board)
    tokens = tmp_path / "tokens.safetensors"
    assert main(["tokenize", str(tmp_path / "whole.mp4"), "--model", str(folder), "-o", str(tokens)]) == 0
    assert load_file(tokens)["tokens"].shape == (3, 4, 6)  # the last frame held for the tail of the second clip
    again = [
        frames_of(f"again-{i}", command=("reconstruct", str(own)))
        for i, own in enumerate((tmp_path / "whole.mp4", tokens))
    ]
    assert len(again[0]) == 32 and np.array_equal(*again)
    assert main(["generate", "a", "--model", str(folder), "-o", str(tmp_path / "no.mp4"), "--joins", "parallel"]) == 2
    assert "'parallel' blends frames' latents" in capsys.readouterr().err


def test_clips_come_one_by_one_and_join_in_one_frame(model: DiCoDe) -> None:
    """A clip is rendered when it is asked for, and the next one is given the frame that it ends on."""
    calls: list[torch.Tensor] = []
    hook = model.tokenizer.denoiser.register_forward_pre_hook(lambda _, given: calls.append(given[2].context))
    clips = model.generate("a red square", seconds=6.0)
    first = next(clips)
    assert len(calls) == 2  # steps
    second = next(clips)
    assert len(calls) == 4
    hook.remove()
    with torch.no_grad():
        shared = model.tokenizer.context_of(torch.from_numpy(first[-1:])[None])
    torch.testing.assert_close(calls[-1][:1], shared)
    assert [len(first), len(second), *map(len, clips)] == [17, 16, 15]


def test_reconstruct_takes_the_flags_for_less_memory(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video = ["generate", "a red square", "--seconds", "2", "--model", str(folder), "-o", str(tmp_path / "in.mp4")]
    assert main([*write_video, "--scale", "1", "--lossless"]) == 0
    flags = ["reconstruct", str(tmp_path / "in.mp4"), "--model", str(folder), "--scale", "1"]
    for name, more in (("plain", []), ("int8", ["--int8"]), ("tiles", ["--vae-tiling"])):
        assert main([*flags, "-o", str(tmp_path / f"{name}.mp4"), *more]) == 0
    plain, int8, tiles = (read_metadata(tmp_path / f"{name}.mp4") for name in ("plain", "int8", "tiles"))
    assert int8["int8"] is True and tiles["vae_tiling"] is True and not {"int8", "vae_tiling"} & plain.keys()
    files = [read_video(tmp_path / f"{name}.mp4", fps=None).frames for name in ("plain", "int8", "tiles")]
    assert not np.array_equal(files[0], files[1]) and np.array_equal(files[0], files[2])  # frames of a single tile
    assert main([*flags, "-o", str(tmp_path / "no.mp4"), "--offload", "--device", "cpu"]) == 2
    assert "other than the CPU" in capsys.readouterr().err


def test_a_live_video_goes_on_from_the_frame_that_two_clips_share(
    folder: Path, model: DiCoDe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicode.serve.render.AHEAD_S", 1000.0)
    rendered: list[tuple[Any, torch.Tensor]] = []
    original = model.render

    def render(*key_frames: Any, **draws: Any) -> Any:
        for clip in original(*key_frames, **draws):
            rendered.append((draws["given"].before, clip))
            yield clip

    monkeypatch.setattr(model, "render", render)
    known, request = Model(str(folder)), VideoRequest(prompt="a red square", live=True, size="32x32")
    work = Work(model, known, request, tmp_path, tmp_path / "files", lambda *_: None)
    prompts = chain([("a red square", False), ("it grows", False), ("it grows", False)], [("", True)])
    assert render_live(work, lambda: next(prompts), 60.0) == 6.0
    (_, first), (before, second), (later, _) = rendered
    assert first.shape[1] == 17
    assert torch.equal(before, first[:, -1:]) and torch.equal(later, second[:, -1:])
    assert len(read_video(tmp_path / "files/video.mp4", fps=None).frames) == 48


@pytest.mark.filterwarnings("ignore:Fréchet distance of", "ignore:.*texts are longer than the model's")
def test_it_is_evaluated_with_the_joins_that_it_has(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "whole_process", lambda *_: speed.WholeProcess(2.5, 0.25))
    write_cache(tmp_path / "cache")
    flags = ["evaluate", str(folder), "--cache", str(tmp_path / "cache"), "-o", str(tmp_path), "--features", "EffLite0"]
    few = ["--prompts", "2", "--long-prompts", "2", "--long-seconds", "6", "--repeats", "1"]
    assert main([*flags, *few, "--parts", "reconstruction", "long"]) == 0
    parts = [json.loads((tmp_path / f"model-{part}.json").read_text())["values"] for part in ("reconstruction", "long")]
    assert {"reconstruction", "first_stage", "hold_head"} <= parts[0]["psnr"].keys()
    assert parts[1]["joins"].keys() == {*JOINS} - {"parallel"}
    assert parts[1]["joins"]["chained"]["frames"] == [48, 48]
