"""Everything a video can be made from, as Python and as a command: images, videos, loops, storyboards, re-rolls."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import PROMPT, interrupt_after_a_clip, run

from dicode.pipeline import DiCoDe, Given
from dicode.seeds import SeedPlan
from dicode.storyboard import Shot
from dicode.tokenizer.config import SamplingConfig
from dicode.tokenizer.encoder import FirstStage
from dicode.video.read import read_metadata, read_video

SIZE = 32


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> DiCoDe:
    return DiCoDe.from_pretrained(tiny_model)


def picture(seed: int, frames: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, SIZE, SIZE, 3), dtype=np.uint8)


def key_frames(model: DiCoDe, prompt: str | Sequence[Shot], **options: Any) -> torch.Tensor:
    return torch.stack(list(model.write([prompt], **options)), dim=1)


def video(model: DiCoDe, prompt: str | Sequence[Shot] = PROMPT, **options: Any) -> np.ndarray:
    return np.concatenate(list(model.generate(prompt, **options)))


def test_an_image_is_the_first_key_frame_and_the_tokens_are_the_encoders(model: DiCoDe) -> None:
    image = picture(1)
    given = model.given(image=image)
    tokens = key_frames(model, PROMPT, seconds=6.0, given=given)
    assert tokens.shape[1] == 4
    assert torch.equal(tokens[:, :1], model.tokenizer.encode_frames(image))
    assert not torch.equal(tokens[:, 1:], key_frames(model, PROMPT, seconds=6.0)[:, 1:])
    assert len(video(model, seconds=6.0, given=given)) == 48


def test_continuing_a_video_reads_the_key_frames_the_encoder_gives(model: DiCoDe) -> None:
    old = picture(2, frames=37)  # key frames counted from the last frame: 4, 20, 36
    given = model.given(continued=old)
    encoded = model.tokenizer.encode(torch.from_numpy(old[4:])[None])
    assert given.key_frames is not None and torch.equal(given.key_frames, encoded)
    tokens = key_frames(model, PROMPT, seconds=4.0, given=given)
    assert torch.equal(tokens[:, 0], encoded[:, -1]) and tokens.shape[1] == 3
    by_hand = list(
        model.lm.generate(
            model.text.encode([PROMPT], 12), 2, prefix=encoded, sampling=SamplingConfig(variance_scale=0.5)
        )
    )
    torch.testing.assert_close(tokens[:, 1:], torch.stack(by_hand, dim=1))
    context = model.tokenizer.config.denoiser.context_frames
    assert given.before is not None and np.array_equal(given.before[0].numpy(), old[36 - context : 36])
    joined = video(model, seconds=2.0, given=given, joins="chained")
    unseen = video(model, seconds=2.0, given=Given(given.key_frames), joins="chained")
    assert (joined != unseen).any()


@pytest.mark.parametrize(
    ("frames", "places"),
    [(1, [0]), (8, [7]), (9, [0, 8]), (16, [0, 15]), (17, [0, 16]), (20, [3, 19]), (48, [0, 15, 31, 47])],
)
def test_how_a_continued_video_began_is_among_its_key_frames(model: DiCoDe, frames: int, places: list[int]) -> None:
    """A clip of 16 frames has no key frame but its first: from its last one alone a video would begin anew."""
    old = np.concatenate([picture(i) for i in range(frames)])
    given = model.given(continued=old)
    assert given.key_frames is not None
    assert torch.equal(given.key_frames, model.tokenizer.encode_frames(old[places]))
    tokens = key_frames(model, PROMPT, seconds=2.0, given=given)
    ids = model.text.encode([PROMPT], model.lm.config.text_length)
    written = next(model.lm.generate(ids, 1, prefix=given.key_frames, sampling=SamplingConfig(variance_scale=0.5)))
    torch.testing.assert_close(tokens[:, 1], written)  # as the key frame that follows all of these


def test_a_single_frame_can_be_continued_too(model: DiCoDe) -> None:
    given = model.given(continued=picture(2))
    assert given.before is None and given.key_frames is not None and given.key_frames.shape[1] == 1


def test_two_images_are_reached_after_the_time_asked_for(model: DiCoDe) -> None:
    first, last = picture(1), picture(2)
    for seconds, clips in ((2.0, 1), (6.0, 3)):
        given = model.given(image=first, last_image=last)
        tokens = key_frames(model, PROMPT, seconds=seconds, given=given)
        assert tokens.shape[1] == clips + 1
        assert torch.equal(tokens[:, 0], model.tokenizer.encode_frames(first)[:, 0])
        assert torch.equal(tokens[:, -1], model.tokenizer.encode_frames(last)[:, 0])


def test_a_loop_ends_on_its_first_key_frame(model: DiCoDe) -> None:
    tokens = key_frames(model, PROMPT, seconds=6.0, given=model.given(loop=True))
    assert torch.equal(tokens[:, 0], tokens[:, -1]) and not torch.equal(tokens[:, 0], tokens[:, 1])
    of_image = key_frames(model, PROMPT, seconds=6.0, given=model.given(image=picture(3), loop=True))
    assert torch.equal(of_image[:, -1], model.tokenizer.encode_frames(picture(3))[:, 0])


def test_beginnings_and_ends_that_exclude_each_other_raise(model: DiCoDe) -> None:
    with pytest.raises(ValueError, match="begins with one of them"):
        model.given(image=picture(0), continued=picture(0, 4))
    for other in ({"last_image": picture(0)}, {"continued": picture(0, 4)}):
        with pytest.raises(ValueError, match="loop"):
            model.given(loop=True, **other)
    with pytest.raises(ValueError, match="expected frames of"):
        model.given(image=picture(0)[:, :8])


def test_a_storyboard_changes_the_prompt_after_the_key_frame_that_ends_a_shot(model: DiCoDe) -> None:
    shots = [Shot(PROMPT, 4.0), Shot("a fireball", 2.0)]
    tokens = key_frames(model, shots)
    plain = key_frames(model, PROMPT, seconds=6.0)
    assert tokens.shape[1] == 4
    torch.testing.assert_close(tokens[:, :3], plain[:, :3])
    assert (tokens[:, 3] - plain[:, 3]).abs().max() > 1e-3
    other = list(
        model.lm.generate(
            model.text.encode(["a fireball"], 12), 1, prefix=tokens[:, :3], sampling=SamplingConfig(variance_scale=0.5)
        )
    )
    torch.testing.assert_close(tokens[:, 3], other[0])
    assert len(video(model, shots)) == 48
    of_one = key_frames(model, [Shot(PROMPT, 2.0), Shot(PROMPT, 4.0)])
    torch.testing.assert_close(of_one, plain)


def test_a_storyboard_begins_with_a_given_image(model: DiCoDe) -> None:
    given = model.given(image=picture(4), loop=True)
    tokens = key_frames(model, [Shot(PROMPT, 2.0), Shot("a fireball", 4.0)], given=given)
    assert tokens.shape[1] == 4
    assert torch.equal(tokens[:, 0], tokens[:, 3])


def test_storyboards_say_their_own_length(model: DiCoDe) -> None:
    shots = [Shot(PROMPT, 2.0)]
    with pytest.raises(ValueError, match="seconds"):
        model.generate(shots, seconds=4.0)
    with pytest.raises(ValueError, match="of one batch"):
        model.generate_batch([shots, [Shot(PROMPT, 4.0)]])
    with pytest.raises(ValueError, match="key frames asked for"):
        model.generate([Shot(PROMPT, 10.0), Shot("a fireball", 10.0)])
    pair = [torch.cat(list(model.generate_batch([a, b])), dim=1) for a, b in [(shots, [Shot("a fireball", 2.0)])]]
    assert np.array_equal(pair[0][0].numpy(), video(model, shots))


def test_a_window_goes_on_beyond_the_models_positions(model: DiCoDe) -> None:
    frames = video(model, seconds=40.0, context_key_frames=4, steps=1)
    assert len(frames) == 320
    with pytest.raises(ValueError, match="set context_key_frames"):
        model.generate(PROMPT, seconds=40.0)


def test_re_rolled_clips_differ_and_those_before_do_not(model: DiCoDe) -> None:
    first = video(model, seconds=8.0, seed=1)
    rolled = video(model, seconds=8.0, seed=SeedPlan(1, reroll_from=2, reroll_seed=5))
    assert np.array_equal(rolled[:32], first[:32])
    assert all((rolled[i : i + 16] != first[i : i + 16]).any() for i in (32, 48))


def test_key_frames_rendered_again_are_the_streamed_video(model: DiCoDe) -> None:
    tokens = list(model.write([PROMPT], seconds=6.0, seed=2))
    again = torch.cat(list(model.render(iter(tokens), 6.0, seed=2)), dim=1)[0].numpy()
    assert np.array_equal(again, video(model, seconds=6.0, seed=2))


@pytest.mark.parametrize("joins", ["chained", "parallel", "independent"])
def test_a_batch_gives_what_each_prompt_gives_alone(model: DiCoDe, joins: str) -> None:
    prompts = [PROMPT, "a fireball", "arcane curse"]
    together = torch.cat(list(model.generate_batch(prompts, seconds=6.0, seed=3, joins=joins)), dim=1).numpy()
    for i, prompt in enumerate(prompts):
        alone = video(model, prompt, seconds=6.0, seed=3, sample_index=i, joins=joins)
        assert np.abs(together[i].astype(int) - alone).max() <= 1


# the command


def test_commands_take_images_videos_and_storyboards(capsys: Any, tmp_path: Path, tiny_model: Path) -> None:
    Image.fromarray(picture(1)[0]).resize((90, 70)).save(tmp_path / "a.png")
    (tmp_path / "story.yaml").write_text("- {seconds: 2, prompt: a spark}\n- {seconds: 2, prompt: a fireball}\n")
    base = ["generate", "--model", tiny_model, "--scale", 1, "-o", tmp_path / "out.mp4"]
    cases: dict[str, tuple[list[object], dict[str, Any]]] = {
        "image": ([PROMPT, "--image", tmp_path / "a.png", "--loop"], {"image": "a.png", "loop": True, "seconds": 4.0}),
        "story": (["--storyboard", tmp_path / "story.yaml"], {"prompt": "[2s: a spark] [2s: a fireball]"}),
        "inline": (["[2s: a spark] [4s: a fireball]"], {"seconds": 6.0}),
        "reroll": ([PROMPT, "--reroll-from", 1, "--reroll-seed", 7], {"reroll_from": 1, "reroll_seed": 7}),
        "reroll one": ([PROMPT, "--reroll-from", 0, "--reroll-clips", 1], {"reroll_seed": 1, "reroll_clips": 1}),
        "long": (
            [PROMPT, "--seconds", 20, "--context-key-frames", 3, "--steps", 1],
            {"context_key_frames": 3, "seconds": 20.0},
        ),
    }
    for more, expected in cases.values():
        code, _, err = run(capsys, *base, *more)
        assert code == 0, err
        metadata = read_metadata(tmp_path / "out.mp4")
        assert metadata.items() >= expected.items()
        assert len(read_video(tmp_path / "out.mp4", fps=None).frames) == metadata["seconds"] * 8
    end = [
        "--last-image",
        tmp_path / "a.png",
        "--continue-from",
        tmp_path / "out.mp4",
        "--context-key-frames",
        3,
        "--seconds",
        2,
    ]
    code, _, err = run(capsys, *base[:-1], tmp_path / "more.mp4", PROMPT, *end)
    assert code == 0, err
    assert read_metadata(tmp_path / "more.mp4").items() >= {"continue_from": "out.mp4", "last_image": "a.png"}.items()


def test_a_file_of_prompts_makes_a_video_a_line(capsys: Any, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\na fireball\n")
    base = ["generate", "--model", tiny_model, "--seconds", 2, "--scale", 1]
    sheet = ["--sheet", tmp_path / "s.png"]
    code, _, err = run(capsys, *base, "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "v.mp4", *sheet)
    assert code == 0, err
    made = {path.name for path in tmp_path.iterdir()} - {"prompts.txt"}
    assert made == {"v-000.mp4", "v-000.json", "v-001.mp4", "v-001.json", "s-000.png", "s-001.png"}
    code, _, err = run(capsys, *base, "a fireball", "--sample", 1, "-o", tmp_path / "alone.mp4")
    assert code == 0, err
    assert (tmp_path / "alone.mp4").read_bytes() == (tmp_path / "v-001.mp4").read_bytes()


def test_exactly_one_source_of_prompts_is_asked_for(capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    for more, message in (
        ([], "expected one of PROMPT"),
        ([PROMPT, "--prompts", tmp_path / "empty.txt"], "expected one of PROMPT"),
        (["--prompts", tmp_path / "empty.txt"], "found none"),
        ([PROMPT, "--reroll-from", -1], "--reroll-from: expected 0 or more, got -1"),
        ([PROMPT, "--reroll-seed", 1], "--reroll-from"),
        ([PROMPT, "--reroll-clips", 1], "--reroll-clips: needs --reroll-from"),
        (["[2s: ]"], "prompt"),
    ):
        code, _, err = run(capsys, "generate", *more)
        assert code == 2 and message in err


def test_a_preview_comes_first_from_the_same_key_frames(capsys: Any, tmp_path: Path, tiny_model: Path) -> None:
    base = ["generate", PROMPT, "--model", tiny_model, "--scale", 1, "--steps", 5]
    code, out, err = run(capsys, *base, "--preview", "-o", tmp_path / "a.mp4")
    assert code == 0, err
    assert out.index("a.preview.mp4") < out.index("a.mp4:")
    assert read_metadata(tmp_path / "a.preview.mp4")["steps"] == 2
    run(capsys, *base, "-o", tmp_path / "b.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_preview_of_a_folder_without_a_slash_is_a_folder(capsys: Any, tmp_path: Path, tiny_model: Path) -> None:
    argv = ["generate", PROMPT, "--model", tiny_model, "--seconds", 2, "--preview", "-o", tmp_path / "frames"]
    code, _, err = run(capsys, *argv)
    assert code == 0, err
    assert {path.name for path in tmp_path.iterdir()} == {"frames", "frames.preview"}
    assert len(read_video(tmp_path / "frames.preview").frames) == 16


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-o", "a.avi"], "ending in .mp4, .webm, .gif"),
        (["-o", "a.mp4", "--sheet", "s.txt"], "s.txt: expected a name ending in .png"),
        (["-o", "a.mp4", "--sheet", "no/s.png"], "no such folder"),
        (["-o", "taken.mp4"], "taken.json: would be replaced and was not written by dicode"),
        (["-o", "frames", "--preview"], "frames.preview: holds files that dicode did not write"),
        (["-o", "a.mp4", "--scale", "100000"], "--scale: expected 1 to 64, got 100000"),
    ],
)
def test_outputs_are_checked_before_a_model_is_looked_for(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken.json").write_text('{"my": "notes"}')
    Path("frames.preview").mkdir()
    Path("frames.preview/holiday.png").touch()
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run(capsys, "generate", PROMPT, "--model", "no_such_model", *flags)
    assert code == 2
    assert said in err
    assert sorted(tmp_path.rglob("*")) == before


def test_frames_that_are_not_finite_are_no_video(
    capsys: Any, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = FirstStage.decode
    monkeypatch.setattr(FirstStage, "decode", lambda self, latents: decode(self, latents) * float("nan"))
    code, _, err = run(capsys, "generate", PROMPT, "--model", tiny_model, "-o", tmp_path / "a.mp4")
    assert code == 2
    assert "rendered frames hold values that are not finite" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "frames/"])
def test_a_streamed_video_that_is_stopped_ends_playable(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, name: str
) -> None:
    interrupt_after_a_clip(monkeypatch)
    argv = ["generate", PROMPT, "--model", tiny_model, "--stream", "--seconds", 8, "-o", f"{tmp_path}/{name}"]
    code, _, err = run(capsys, *argv)
    assert (code, err) == (130, f"dicode: interrupted; {tmp_path}/{name} ends after 2 s\n")
    assert len(read_video(tmp_path / name, fps=None).frames) == 16
    path = tmp_path / name
    note = json.loads((path / "metadata.json" if path.is_dir() else path.with_suffix(".json")).read_text())
    assert note.items() >= {"prompt": PROMPT, "frames": 16, "stopped_early": True}.items()
