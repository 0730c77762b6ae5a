"""The command line: files it writes, what it says, how it fails."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dicode import __version__
from dicode.checkpoint import content_hash
from dicode.cli.app import main
from dicode.cli.common import RenderFlags, WriteFlags
from dicode.data.cache import FrameCache
from dicode.pipeline import DiCoDe
from dicode.stopwatch import Stopwatch
from dicode.tokenizer.config import SamplingConfig
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.loop import NonFiniteLossError
from dicode.video.read import read_metadata, read_video

PROMPT = "a swirling ice vortex"
FLAGS = {
    "": "--help",
    "generate": "--context-key-frames --continue-from --dead-band --decoder-guidance --decoder-temperature "
    "--device --dtype --eta --first-variance-scale --flow-steps --guidance --guidance-rescale --help --image --int8 "
    "--joins --last-image --loop --lossless --model --motion-scale --motion-tokens --offload --output --preview "
    "--prompts --reroll-clips --reroll-from --reroll-seed --revision --sample "
    "--scale --seconds --seed --sheet --steps --storyboard --stream --temperature --timings --vae-tiling "
    "--variance-scale",
    "tokenize": "--device --help --model --output --revision",
    "reconstruct": "--dead-band --decoder-guidance --decoder-temperature "
    "--device --dtype --eta --guidance-rescale --help --int8 --joins --model --motion-scale --motion-tokens "
    "--offload --output --revision --scale --seed --side-by-side --steps --vae-tiling",
    "train": "--help --minutes --run-folder",
    "finetune": "--alpha --batch-size --device --dropout --dtype --help --json --key-frames --loops --lr --minutes "
    "--model --output --parts --rank --revision --seed --steps --targets --work-folder",
    "assemble": "--context-key-frames --dead-band --decoder-guidance --decoder-temperature "
    "--dtype --eta --first-stage --first-variance-scale --flow-steps --guidance --guidance-rescale --help --joins "
    "--last --motion-scale --motion-tokens --output --steps --temperature --variance-scale",
    "evaluate": "--cache --device --dtype --features --help --long-prompts --long-seconds --output --parts "
    "--prompts --quick --repeats --report --scorer --seed --sheets",
    "benchmark": "--help",
    "benchmark ucf101": "--batch-size --c3d --confirm --device --fvd-clips --help --i3d --model --output --prompts "
    "--revision --samples --seed --shard --size --split --template --work-folder",
    "benchmark msrvtt": "--all-captions --batch-size --clip --confirm --device --fvd-clips --help --i3d --model "
    "--output --revision --samples --seed --shard --size --work-folder",
    "benchmark vbench": "--batch-size --device --help --model --output --revision --samples --scale --seconds --seed "
    "--shard",
    "data": "--help",
    "data index": "--help --validation-by",
    "data cache": "--dedupe --device --encode --files-per-shard --help --loops --max-fps --output --ray --scenes "
    "--size --validation-by --workers",
    "data stream": "--help --output --validation-by --workers",
    "data blocks": "--count --help --key-frames-only --output --ray --seed --shots --validation --within --workers",
    "data verify": "--help",
    "data encode": "--device --help --mirror --model",
    "data export": "--help --output",
    "data sheet": "--columns --count --help --only --output --seed --size",
    "info": "--batch-size --gpu --gpus --help --here --json --mfu --micro-batches --revision --strategy",
}
RECIPE = """
from dataclasses import dataclass, field

@dataclass(frozen=True)
class Inner:
    lr: float = 1e-3  # learning rate
    names: tuple[str, ...] = ("a",)

@dataclass(frozen=True)
class Run:
    '''A run for tests.'''
    steps: int = 5
    inner: Inner = field(default_factory=Inner)

def short() -> Run:
    return Run(steps=7)

def broken() -> int:
    return 3
"""


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command in this process."""
    capsys.readouterr()
    try:
        code = main([str(word) for word in argv])
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    out, err = capsys.readouterr()
    return code, out, err


def generate(capsys: pytest.CaptureFixture[str], model: Path, output: object, *more: object) -> str:
    code, out, err = run(capsys, "generate", PROMPT, "--model", model, "-o", output, "--scale", 2, *more)
    assert code == 0, err
    return out


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path.iterdir() if path.is_dir() else [path])}


def interrupt_after_a_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = DiCoDe.render

    def interrupted(self: DiCoDe, *given: Any, **options: Any) -> Any:
        yield next(whole(self, *given, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(DiCoDe, "render", interrupted)


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.gif", "frames/"])
def test_generate_writes_each_format_with_its_metadata(capsys, tmp_path, tiny_model, name):
    out = generate(capsys, tiny_model, f"{tmp_path}/{name}", "--seconds", 2.5, "--seed", 3, "--guidance", 1.5)
    path = tmp_path / name
    video = read_video(path, fps=None)
    assert video.frames.shape == (20, 64, 64, 3)
    assert video.fps == pytest.approx(8, rel=0.01)
    metadata = read_metadata(path)
    assert metadata.pop("weights") == content_hash(*tiny_model.glob("*.safetensors"))
    assert metadata.pop("fps", 8.0) == 8.0  # a folder needs to say it
    assert metadata.pop("scale") == 2
    assert metadata == {
        "prompt": PROMPT,
        "seed": 3,
        "sample": 0,
        "seconds": 2.5,
        "guidance": 1.5,
        "variance_scale": 0.5,
        "first_variance_scale": None,
        "temperature": 1.0,
        "flow_steps": 8,
        "context_key_frames": 0,
        "decoder_guidance": 1.0,
        "decoder_temperature": 1.0,
        "guidance_rescale": 0.0,
        "eta": 0.0,
        "motion_scale": 1.0,
        "dead_band": 0.0,
        "motion_tokens": None,
        "steps": 2,
        "joins": "chained",
        "model": "tiny",
        "dicode": __version__,
    }
    if path.is_file():
        assert json.loads(path.with_suffix(".json").read_text()).items() >= metadata.items()
    assert out.startswith(f"{path}: 2.5 s, 20 frames")
    assert re.search(r"load .* s · decode .* s · language model .* s · write .* s", out)
    assert "real-time factor" in out


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(capsys, tmp_path, tiny_model):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate(capsys, tiny_model, tmp_path / f"{name}.mp4", "--seconds", 2, "--seed", seed)
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_generate_writes_what_the_python_api_yields(capsys, tmp_path, tiny_model):
    generate(capsys, tiny_model, f"{tmp_path}/frames/", "--seconds", 3, "--seed", 4, "--scale", 1, "--steps", 3)
    clips = list(DiCoDe.from_pretrained(tiny_model).generate(PROMPT, seconds=3.0, seed=4, steps=3))
    assert [len(clip) for clip in clips] == [16, 8]
    assert (read_video(tmp_path / "frames").frames == np.concatenate(clips)).all()


def test_half_precision_is_nearly_the_same_video_and_said_in_its_metadata(capsys, tmp_path, tiny_model):
    said = {"float32": None, "bfloat16": "bfloat16"}
    for dtype in said:
        made, again = (f"{tmp_path}/{kind}-{dtype}/" for kind in ("made", "again"))
        generate(capsys, tiny_model, made, "--seconds", 2, "--scale", 1, "--seed", 4, "--dtype", dtype)
        asked = ("-o", again, "--scale", 1, "--dtype", dtype, "--model", tiny_model)
        assert run(capsys, "reconstruct", f"{tmp_path}/made-float32/", *asked)[0] == 0
    for kind in ("made", "again"):
        folders = [tmp_path / f"{kind}-{dtype}" for dtype in said]
        whole, half = (read_video(folder, 8.0, None).frames.astype(int) for folder in folders)
        assert 0 < np.abs(whole - half).mean() < (2 if kind == "again" else 255)  # a draw may fall out otherwise
        assert [read_metadata(folder).get("dtype") for folder in folders] == list(said.values())


def test_sheet_and_timings_show_every_clip(capsys, tmp_path, tiny_model):
    sheet = tmp_path / "sheet.png"
    out = generate(capsys, tiny_model, tmp_path / "a.gif", "--seconds", 4, "--sheet", sheet, "--timings")
    assert re.findall(r"^clip (\d): .*decode", out, re.MULTILINE) == ["0", "1"]
    assert "peak memory" in out
    with Image.open(sheet) as image:
        assert image.height == 2 * (2 * 32 + 2)


def test_sampling_options_are_the_fields_of_its_configuration():
    asked = WriteFlags.__dataclass_fields__ | RenderFlags.__dataclass_fields__
    assert list(asked) == list(SamplingConfig.__dataclass_fields__)
    assert {field.default for field in asked.values()} == {None}  # left out: the model's own


def test_tokens_give_the_same_file_as_their_video(capsys, tmp_path, tiny_model, drawn_clips):
    video, tokens = drawn_clips / "videos" / "0000.mp4", tmp_path / "tokens.safetensors"
    code, out, err = run(capsys, "tokenize", video, "-o", tokens, "--model", tiny_model)
    assert code == 0, err
    assert "3 key frames × 4 tokens × 6 numbers for 20 frames at 8 fps" in out
    saved = load_file(tokens)["tokens"]
    assert saved.shape == (3, 4, 6)
    assert str(saved.dtype) == "torch.float32"
    with safe_open(tokens, framework="pt") as file:
        note = file.metadata()
    assert (note["source"], note["frames"], note["fps"], note["model"]) == ("0000.mp4", "20", "8.0", "tiny")
    for source, name in ((video, "a.mp4"), (tokens, "b.mp4")):
        code, _, err = run(capsys, "reconstruct", source, "-o", tmp_path / name, "--model", tiny_model, "--seed", 5)
        assert code == 0, err
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert read_metadata(tmp_path / "a.mp4")["steps"] == 2  # the model's own
    assert len(read_video(tmp_path / "a.mp4").frames) == 20


@pytest.mark.parametrize(
    ("tokens", "frames", "message"),
    [
        (torch.zeros(3, 4, 6, dtype=torch.int32), "20", "expected tokens of finite floats, got torch.int32"),
        (torch.zeros(3, 4, 6, dtype=torch.complex64), "20", "expected tokens of finite floats, got torch.complex64"),
        (torch.full((3, 4, 6), torch.nan), "20", "expected tokens of finite floats, got torch.float32, or NaN"),
        *[
            (torch.zeros(3, 4, 6), frames, f"expected 1 to 33 frames of 3 key frames, got {frames!r}")
            for frames in ("abc", "", "3.5", "0", "-5", "34", "9" * 5000, "²")
        ],
    ],
)
def test_damaged_tokens_are_refused(capsys, tmp_path, tiny_model, tokens, frames, message):
    save_file({"tokens": tokens}, tmp_path / "t.safetensors", {"frames": frames})
    code, _, err = run(
        capsys, "reconstruct", tmp_path / "t.safetensors", "-o", tmp_path / "a.mp4", "--model", tiny_model
    )
    assert code == 2 and message[:60] in err and len(err) < 1000
    assert not (tmp_path / "a.mp4").exists()


def test_side_by_side_shows_the_video_at_the_left(capsys, tmp_path, tiny_model, drawn_clips):
    video = drawn_clips / "videos" / "0001.gif"
    argv = ["reconstruct", video, "-o", f"{tmp_path}/both/", "--model", tiny_model, "--side-by-side", "--scale", 1]
    code, _, err = run(capsys, *argv)
    assert code == 0, err
    both = read_video(tmp_path / "both").frames
    assert both.shape == (20, 32, 64, 3)
    assert (both[:, :, :32] == read_video(video, size=32).frames).all()
    assert (both[:, :, 32:] != both[:, :, :32]).any()


def test_tokens_of_another_model_are_refused(capsys, tmp_path, tiny_model):
    import torch

    tokens = tmp_path / "tokens.safetensors"
    save_file({"tokens": torch.zeros(2, 4, 6)}, tokens, {"model": "other", "weights": "0" * 16})
    code, _, err = run(capsys, "reconstruct", tokens, "-o", tmp_path / "a.mp4", "--model", tiny_model)
    assert (code, list(tmp_path.iterdir())) == (2, [tokens])
    assert "made by model 'other'" in err
    save_file({"tokens": torch.zeros(2, 5, 6)}, tokens)
    code, _, err = run(capsys, "reconstruct", tokens, "-o", tmp_path / "a.mp4", "--model", tiny_model)
    assert code == 2
    assert "expected one tensor 'tokens' of k × 4 × 6, got {'tokens': (2, 5, 6)}" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", " ", "--model", "MODEL"], "expected a prompt of at least one word"),
        (["generate", "x", "--model", "nowhere"], "no checkpoint at 'nowhere'"),
        (["generate", "x", "--model", "MODEL", "--seconds", "100"], "51 key frames asked for, this model holds 9"),
        (["generate", "x", "--model", "MODEL", "--seconds", "nan"], "seconds: expected a positive number, got nan"),
        (["generate", "x", "--model", "MODEL", "-o", "a.avi"], "a.avi: expected a name ending in .mp4"),
        (["generate", "x", "--model", "MODEL", "-o", "no/a.mp4"], "no: no such folder to write 'a.mp4' in"),
        (["generate", "x", "--model", "MODEL", "--sheet", "no/a.png"], "no: no such folder to write 'a.png' in"),
        (["generate", "x", "--model", "MODEL", "--device", "toaster"], "device toaster: cannot be used here"),
        (["tokenize", "nothing.mp4", "--model", "MODEL"], "nothing.mp4: no such file or folder"),
        (["tokenize", "VIDEO", "-o", "tokens.pt", "--model", "MODEL"], "expected a name ending in .safetensors"),
        (["reconstruct", "t.safetensors", "--side-by-side"], "--side-by-side: t.safetensors holds tokens"),
        (["reconstruct", "t.safetensors", "--model", "MODEL"], "t.safetensors: no such file"),
        (["train", "recipe.py"], "recipe: expected FILE.py:RUN"),
        (["train", "nothing.py:lm"], "nothing.py: no such recipe file"),
        (["train", "recipe.py:shot"], "no function 'shot' (did you mean 'short'?)"),
        (["train", "recipe.py:broken"], "expected it to return a run (a dataclass), got int"),
        (["data", "sheet", "nowhere"], "nowhere: no such index file or folder"),
        (["data", "cache", "-o", "cache"], "expected at least one folder of clips, got none"),
    ],
)
def test_an_expected_error_is_one_line_and_leaves_nothing(
    capsys, tmp_path, monkeypatch, tiny_model, drawn_clips, argv, message
):
    monkeypatch.chdir(tmp_path)
    Path("recipe.py").write_text(RECIPE)
    names = {"MODEL": tiny_model, "VIDEO": drawn_clips / "videos" / "0000.mp4"}
    code, out, err = run(capsys, *(names.get(word, word) for word in argv))
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("dicode: ")
    assert err.count("\n") == 1
    assert {path.name for path in Path().iterdir()} - {"__pycache__"} == {"recipe.py"}


def test_debugging_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("DICODE_DEBUG", "1")
    with pytest.raises(ValueError, match="nowhere"):
        main(["generate", "x", "--model", "nowhere"])


def test_a_loss_that_is_not_finite_is_one_line_and_exit_code_1(capsys, monkeypatch):
    def train(*_: Any) -> int:
        raise NonFiniteLossError("step 3: loss is nan")

    monkeypatch.setattr("dicode.cli.info.info", train)
    assert run(capsys, "info") == (1, "", "dicode: step 3: loss is nan\n")


@pytest.mark.parametrize(("word", "nearest"), [("--guidence", "--guidance"), ("--sed", "--seed")])
def test_an_unknown_flag_names_the_nearest(capsys, tiny_model, word, nearest):
    code, _, err = run(capsys, "generate", PROMPT, word, 3)
    assert code == 2
    assert nearest in err


@pytest.mark.parametrize("name", ["out.mp4", "frames/"])
def test_an_interrupt_leaves_no_file(capsys, tmp_path, monkeypatch, tiny_model, name):
    interrupt_after_a_clip(monkeypatch)
    code, out, err = run(capsys, "generate", PROMPT, "--model", tiny_model, "-o", f"{tmp_path}/{name}")
    assert (code, out, err) == (130, "", "dicode: interrupted; no unfinished file is left\n")
    assert list(tmp_path.iterdir()) == []


HANGING_S = 600  # no measure of speed


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send to one process")
def test_ctrl_c_in_the_middle_leaves_no_file(tmp_path, tiny_model):
    argv = ["generate", PROMPT, "--seconds", "16", "--steps", "500", "--model", str(tiny_model), "-o", "out.mp4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dicode", *argv],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
        # a job in the background ignores SIGINT, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline_s = time.monotonic() + HANGING_S
    while not list(tmp_path.glob(".out.mp4.*")):  # the first clip is being written
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline_s, "no clip appeared"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANGING_S)
    assert process.returncode == 130 and err.endswith("dicode: interrupted; no unfinished file is left\n"), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", FLAGS)
def test_flags_are_the_frozen_ones(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(capsys, *command.split(), "--help")
    assert code == 0
    assert (
        sorted(set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", out)) - {"--version", "--threads"}) == FLAGS[command].split()
    )
    # tyro takes comments for help texts: a flag without one gets that of the flag above
    rows = re.split(r"^[│ ] (?=\S)", re.sub(r"^[╭╰ ][─-].*|│$", "", out, flags=re.MULTILINE), flags=re.MULTILINE)[1:]
    texts = [" ".join(row.partition("  ")[2].replace("│", " ").split()).partition("(default:")[0] for row in rows]
    assert rows
    assert all(texts) and len(set(texts)) == len(texts), texts


def test_help_and_version_need_no_library_that_takes_time_to_load():
    program = (
        "import sys\nfrom dicode.cli.app import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "slow = {'torch', 'numpy', 'diffusers', 'transformers', 'av', 'scipy', 'PIL', 'fsspec', 'yaml'}\n"
        "assert not slow & sys.modules.keys(), slow & sys.modules.keys()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for words, expected in (
        ("--help", "usage: dicode"),
        ("generate --help", "usage: dicode generate"),
        ("--version", f"dicode {__version__}"),
    ):
        argv = [sys.executable, "-c", program, *words.split()]
        out = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout
        assert out.startswith(expected)


def test_threads_are_limited_and_wait_asleep(capsys):
    show = "sys.exit = lambda code: print(os.environ.get('GOMP_SPINCOUNT'), torch.get_num_threads())\n"
    program = "import os, sys\nfrom dicode.cli.app import console\nimport torch\n" + show + "console()"
    flags = ["info", "sprites", "--threads", "1"]
    for given, expected in (
        ({}, "2000 1"),
        ({"GOMP_SPINCOUNT": "7"}, "7 1"),
        ({"OMP_WAIT_POLICY": "active"}, "None 1"),
    ):
        environment = {
            **{k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")},
            **given,
        }
        done = subprocess.run(
            [sys.executable, "-c", program, *flags], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == expected
    for wrong in (["--threads", "0"], ["--threads"], ["--threads", "all"]):
        code, _, err = run(capsys, "info", "sprites", *wrong)
        assert code == 2 and "--threads: expected a number from 1 on" in err


def test_train_hands_the_run_with_its_overrides_to_training(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.py").write_text(RECIPE)
    seen: list[Any] = []

    def run_recipe(*given: Any) -> dict[str, float]:
        seen.append(given)
        return {"psnr_db": 21.5, "step": 40.0}

    monkeypatch.setitem(sys.modules, "dicode.train.stages", types.SimpleNamespace(run_recipe=run_recipe))
    code, out, err = run(capsys, "train", "recipe.py:short", "--inner.lr", "2e-4", "--inner.names", "x", "y")
    assert code == 0, err
    (run_, folder, recipe, source, minutes) = seen.pop()
    assert source == Path("recipe.py") and minutes is None
    assert (run_.steps, run_.inner.lr, run_.inner.names) == (7, 2e-4, ("x", "y"))
    assert folder == Path("runs/recipe-short")
    assert recipe == {
        "recipe": "recipe.py:short",
        "run": {"steps": 7, "inner": {"lr": 2e-4, "names": ["x", "y"]}},
        "dicode": __version__,
    }
    assert "psnr_db 21.5" in out
    assert run(capsys, "train", "recipe.py:short", "--run-folder", "elsewhere", "--steps", "9")[0] == 0
    assert (seen[0][0].steps, seen.pop()[1]) == (9, Path("elsewhere"))
    code, _, err = run(capsys, "train", "recipe.py:short", "--inner.lrr", "2e-4")
    assert (code, seen) == (2, [])
    assert "--inner.lr" in err
    code, out, _ = run(capsys, "train", "recipe.py:short", "--help")
    assert code == 0
    assert "learning rate" in out


def test_a_stopped_training_passes_its_exit_code_on(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.py").write_text(RECIPE)

    def run_recipe(*_: Any) -> dict[str, float]:
        raise SystemExit(75)

    monkeypatch.setitem(sys.modules, "dicode.train.stages", types.SimpleNamespace(run_recipe=run_recipe))
    assert run(capsys, "train", "recipe.py:short")[0] == 75


@pytest.fixture
def spoilt_clips(tmp_path: Path, drawn_clips: Path) -> Path:
    """The drawn clips with two bad files among them."""
    folder = tmp_path / "spoilt"
    shutil.copytree(drawn_clips, folder)
    (folder / "videos" / "0002.mp4").write_bytes(b"")
    (folder / "videos" / "0003.gif").unlink()
    return folder


def test_index_lists_bad_files_and_exits_with_their_count(capsys, tmp_path, drawn_clips, spoilt_clips):
    code, out, _ = run(capsys, "data", "index", drawn_clips)
    line, *rows = out.splitlines()
    assert (code, line) == (0, f"{drawn_clips}: 6 clips, 6 with captions, 1 for validation; 0 bad files")
    table = {row[2:18].strip(): row[19:] for row in rows}
    assert table["seconds"] == "15.0, from 2.5 to 2.5, median 2.5" and table["under 2 s"] == "0"
    assert (table["frames a second"], table["sizes"], table["read"]) == ("8 (6)", "40×40 (6)", "captions.jsonl")
    assert table["captions"] == "6 clips with, 0 without; 6 different texts"
    code, out, _ = run(capsys, "data", "index", spoilt_clips, drawn_clips, tmp_path / "nowhere")
    assert code == 3
    bad = [line for line in out.splitlines() if line.startswith("bad: ")]
    assert [Path(line.split(": ")[1]).name for line in bad] == ["0002.mp4", "0003.gif", "nowhere"]
    assert f"{spoilt_clips}: 4 clips" in out


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_a_reader_that_stops_early_is_no_error(tiny_model):
    command = f"{sys.executable} -m dicode info {tiny_model} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_index_counts_no_more_than_an_exit_code_holds(capsys, tmp_path):
    lines = [json.dumps({"file": f"{i}.mp4", "caption": "x"}) for i in range(300)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    assert run(capsys, "data", "index", tmp_path)[0] == 125


def test_cache_holds_every_frame_of_the_good_files(capsys, tmp_path, drawn_clips, spoilt_clips):
    options = ["--size", 24, "--max-fps", 4, "--loops"]
    code, out, err = run(capsys, "data", "cache", drawn_clips, spoilt_clips, "-o", tmp_path / "cache", *options)
    assert code == 2
    assert err.count("bad: ") == 2
    assert "10 clips (2 for validation), 100 frames of 24×24" in out
    cache = FrameCache.load(tmp_path / "cache")
    assert cache.frames.shape == (100, 24, 24, 3)
    assert [video.first for video in cache.videos] == list(range(0, 100, 10))
    assert {(video.source, video.loops, video.count) for video in cache.videos} == {
        (drawn_clips.name, True, 10),
        ("spoilt", True, 10),
    }
    video = cache.videos[1]
    assert (video.file, video.captions) == ("videos/0001.gif", ("a green square moves right",))
    assert video.period_s == pytest.approx(2.5)
    rows = cache.clip_rows(video, start_s=0.0, num_frames=10, fps=4.0)
    expected = read_video(drawn_clips / video.file, fps=4.0, size=24).frames
    assert (cache.frames[rows].numpy() == expected).all()


def test_encode_puts_latents_and_tokens_where_training_looks_and_a_new_cache_drops_them(
    capsys, tmp_path, drawn_clips, tiny_model
):
    making = ["data", "cache", drawn_clips, "-o", tmp_path / "cache", "--size", 32]
    assert run(capsys, *making)[0] == 0
    code, out, err = run(capsys, "data", "encode", tmp_path / "cache", "--model", tiny_model)
    assert code == 0, err
    assert "latents (120, 1, 5, 8, 8) of frames, and 4×6 deep tokens of every key frame" in out
    made = {path.suffixes[0][1:].split("-")[0]: path for path in (tmp_path / "cache").glob("*.*-*.safetensors")}
    cache, tokenizer = FrameCache.load(tmp_path / "cache"), VideoTokenizer.from_pretrained(tiny_model)
    tokens, latents = (load_file(made[name])["values"] for name in ("tokens", "latents"))
    assert len(latents) == len(cache.frames) and len(tokens) == 12  # of 2.5 s each clip: at 0 and 2 s
    expected = tokenizer.encode(cache.frames[[0, 16]][None])[0]
    torch.testing.assert_close(tokens[:2].float(), expected, atol=0.1, rtol=0.1)  # bfloat16 and float16
    again = tmp_path / "again"
    code, out, err = run(capsys, *making[:3], "-o", again, "--size", 32, "--encode", tiny_model, "--device", "cpu")
    assert code == 0 and f"{again}: latents (120, 1, 5, 8, 8) of frames" in out, err
    assert all((again / path.name).read_bytes() == path.read_bytes() for path in made.values())
    assert run(capsys, *making)[0] == 0  # the shard is there, and stays
    assert sorted((tmp_path / "cache").glob("*.*-*.safetensors")) == sorted(made.values())
    assert run(capsys, *making[:-1], 24)[0] == 0
    assert not list((tmp_path / "cache").glob("*.*-*.safetensors"))


def test_sheet_shows_as_many_clips_as_asked_for(capsys, tmp_path, spoilt_clips):
    sheet = tmp_path / "sheet.png"
    code, out, err = run(capsys, "data", "sheet", spoilt_clips, "-o", sheet, "--count", 3, "--size", 16)
    assert (code, out) == (0, f"{sheet}: 3 of 6 clips\n"), err
    with Image.open(sheet) as image:
        assert image.height == 3 * (16 + 2)


def test_a_sheet_of_no_clip_that_can_be_read_names_those_there_are(capsys, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    code, out, err = run(capsys, "data", "sheet", tmp_path, "-o", tmp_path / "sheet.png")
    assert (code, out) == (2, "") and not (tmp_path / "sheet.png").exists()
    assert f"bad: {tmp_path}/a.mp4: " in err and f"dicode: {tmp_path}: none of 1 clips can be read" in err


def test_info_counts_parameters_and_rates(capsys, tiny_model):
    model = DiCoDe.from_pretrained(tiny_model)
    code, out, err = run(capsys, "info", tiny_model)
    assert code == 0, err
    for part in (model.tokenizer, model.lm):
        assert re.search(rf"together +{sum(p.numel() for p in part.parameters()):,}\n", out)
    assert re.search(r"deep tokens \(float32\) +2 +12 +384", out)  # 4 tokens of 6 numbers every two seconds
    assert re.search(r"pixels \(uint8\) +8,192 +24,576 +196,608", out)
    assert "up to 16 s" in out


def test_assemble_joins_two_runs_and_keeps_how_to_sample_them(capsys, tmp_path, tiny_model):
    code, out, err = run(capsys, "assemble", tiny_model, tiny_model, "-o", tmp_path / "joined", "--steps", 5)
    assert code == 0, err
    assert "guidance 1.0, variance_scale 0.5, first_variance_scale None, temperature 1.0, flow_steps 8" in out
    own = DiCoDe.from_pretrained(tiny_model).sampling
    assert own.variance_scale == 0.5 and own.steps == 2
    assert DiCoDe.from_pretrained(tmp_path / "joined").sampling == dataclasses.replace(own, steps=5)


def test_a_stopwatch_gives_time_to_the_innermost_stage(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("dicode.stopwatch.time.perf_counter", lambda: next(clock))
    watch = Stopwatch()
    with watch.stage("outer"), watch.stage("inner"):
        pass
    assert watch.seconds == {"outer": 2.0, "inner": 1.0}
    assert list(watch.timed("items", "ab")) == ["a", "b"]
    assert watch.seconds["items"] == 3.0  # the third look finds the end
    assert watch.text({"outer": 2.0, "inner": 0.5}) == "inner 0.50 s · items 3.00 s"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows tells no process its peak memory")
def test_peak_memory_is_not_that_of_the_process_that_starts_the_command():
    ask = "from dicode.device import peak_memory_mib; print(peak_memory_mib())"
    held = bytearray(2**30)
    held[:: 2**12] = b"x" * 2**18  # touched, so that it is there
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    out = subprocess.run(
        [sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert 50 < float(out) < 900 and len(held) == 2**30
