"""What a command would replace: files of its own and no others, and never one that it reads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from toy_runs import write_cache

from dicode.checkpoint.saving import model_folder
from dicode.cli.app import main
from dicode.files import whole_folder
from dicode.video.sheet import save_sheet
from dicode.video.write import VideoWriter

GENERATE = "generate x --seconds 2 --model MODEL"
Made = dict[str, bytes]


def contents(folder: Path) -> Made:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files of somebody's, and a model."""
    shutil.copytree(tiny_model, tmp_path / "MODEL")
    write_cache(tmp_path / "CACHE")
    with VideoWriter(tmp_path / "holiday.mp4") as writer:
        writer.write(np.zeros((17, 32, 32, 3), np.uint8))
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    (tmp_path / "notes.json").write_text('{"name": "x"}')
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    (tmp_path / "page.html").write_text("<!doctype html>")
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(2):
        shutil.copy(tmp_path / "holiday.mp4", clips / f"{number:03d}.mp4")
    lines = [{"file": f"{number:03d}.mp4", "caption": "mine"} for number in range(2)]
    (clips / "captions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run = tmp_path / "run"
    for name in ("best/mine", "last/mine", "step-by-step/mine", "recipe.py", "log.jsonl", ".download.part"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{GENERATE} -o holiday.mp4", "holiday.mp4: would be replaced and was not written by dicode"),
        (f"{GENERATE} --sheet picture.png", "picture.png: would be replaced"),
        ("generate --prompts clips/captions.jsonl -o clips/ --model MODEL", "captions.jsonl: is read by this command"),
        ("generate --prompts prompts.txt -o clips/ --model MODEL", "clips: holds '000.mp4'"),
        ("tokenize holiday.mp4 -o weights.safetensors --model MODEL", "weights.safetensors: would be replaced"),
        ("tokenize holiday.mp4 -o MODEL/lm.safetensors --model MODEL", "lm.safetensors: would be replaced"),
        ("info MODEL --json notes.json", "notes.json: would be replaced"),
        ("info MODEL --json MODEL/config.json", "config.json: would be replaced"),
        ("data check CACHE --json CACHE/index.json", "index.json: would be replaced"),
        ("data sheet clips -o picture.png", "picture.png: would be replaced"),
        ("tune MODEL --cache CACHE --json notes.json", "notes.json: would be replaced"),
        ("evaluate MODEL --cache CACHE --parts speed --report page.html", "page.html: would be replaced"),
        ("train RECIPE:first_stage --cache CACHE --run-folder run", "run: holds 'best', and no run"),
        ("data blocks -n 1 -o EMPTY", "-o: expected the name of a folder"),
        ("data export CACHE -o EMPTY", "-o: expected the name of a folder"),
        ("data export CACHE -o .", "'.' is the current folder or a mount point"),
        ("convert vae weights.safetensors -o .", "'.' is the current folder or a mount point"),
        ("benchmark vbench clips/captions.jsonl -o EMPTY", "-o: expected the name of a folder"),
    ],
)
def test_files_of_others_stay(
    place: Path, command: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(place)
    recipe = str(Path(__file__).parents[1] / "recipes/small.py")
    words = [word.replace("EMPTY", "").replace("RECIPE", recipe) for word in command.split()]
    if command.endswith("-o ."):
        (place / "new").mkdir()
        monkeypatch.chdir(place / "new")
        words = [f"../{word}" if (place / word).exists() and word != "." else word for word in words]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert contents(place) == before


@pytest.mark.parametrize(
    "again",
    [
        "generate x --seconds 2 --model MODEL --continue-from own.mp4 -o own.mp4",
        "generate x --seconds 2 --model MODEL --image own.png --sheet own.png -o other.mp4",
        "reconstruct own.mp4 -o own.mp4 --model MODEL",
    ],
)
def test_a_file_that_is_read_is_not_replaced(place: Path, again: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GENERATE.split(), "-o", "own.mp4", "--sheet", "own.png"]) == 0
    assert main([*GENERATE.split(), "-o", "own.mp4", "--sheet", "own.png"]) == 0  # its own may be replaced
    before = contents(place)
    assert main(again.split()) == 2
    assert "is read by this command; write elsewhere" in capsys.readouterr().err
    assert contents(place) == before


def test_a_folder_of_videos_is_made_again_from_another_list(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--prompts", "prompts.txt", "--seconds", "2", "--model", "MODEL", "-o", "videos/"]
    assert main(command) == 0 and main(command) == 0
    command[2] = "videos/captions.jsonl"
    assert main(command) == 2
    assert "videos/captions.jsonl: is read by this command" in capsys.readouterr().err
    (place / "videos/.000.mp4.12345678.part").touch()  # of one that was killed
    command[2] = "prompts.txt"
    assert main(command) == 0


def test_tokens_of_a_frame_more_are_read(place: Path) -> None:
    assert main(["tokenize", "holiday.mp4", "-o", "holiday.safetensors", "--model", "MODEL"]) == 0  # of 17 frames
    assert main(["reconstruct", "holiday.safetensors", "-o", "again.mp4", "--model", "MODEL"]) == 0


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_sheet_is_known_again(tmp_path: Path, suffix: str) -> None:
    for _ in range(2):
        save_sheet(tmp_path / f"sheet{suffix}", [np.zeros((2, 8, 8, 3), np.uint8)])
    Image.new("RGB", (8, 8)).save(tmp_path / f"mine{suffix}")
    with pytest.raises(FileExistsError, match="not written by dicode"):
        save_sheet(tmp_path / f"mine{suffix}", [np.zeros((2, 8, 8, 3), np.uint8)])


def frames(output: Path) -> None:
    with VideoWriter(f"{output}/") as writer:
        writer.write(np.zeros((2, 8, 8, 3), np.uint8))


def folder(output: Path) -> None:
    with whole_folder(output) as new:
        (new / "made").touch()


@pytest.mark.parametrize("write", [frames, folder])
def test_a_link_keeps_leading_to_its_folder(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and any((tmp_path / "disk").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_a_mounted_disk_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.ismount", lambda path: True)
    with pytest.raises(ValueError, match="mount point"), model_folder(tmp_path / "disk"):
        pytest.fail("the block must not be entered")
