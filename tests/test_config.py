"""Configurations from JSON: every field has a type and a range, and an error names the file and the field."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dicode.checkpoint import CHECKPOINTS, SEAL, check_model_folder, check_seal, model_folder, read_config, save_weights
from dicode.cli.app import main, parse
from dicode.config import (
    CheckpointError,
    Items,
    Range,
    RangeError,
    check_ranges,
    config_from_dict,
    config_to_dict,
    shortened,
)
from dicode.device import pick_device
from dicode.lm.presets import SIZES, DeepLMConfig
from dicode.pipeline import DiCoDe
from dicode.storyboard import read_storyboard
from dicode.tokenizer.config import TokenizerConfig
from dicode.tokenizer.presets import TOKENIZERS


@dataclasses.dataclass(frozen=True)
class Inner:
    share: Annotated[float, Range(0, 1)] = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    count: Annotated[int, Range(1, 8)]
    plain: float = 1.0
    sizes: Annotated[tuple[Annotated[int, Range(1, 9)], ...], Items(1, 3)] = (1,)
    maybe: Annotated[float, Range(0, 2, above=True)] | None = None
    inner: Inner = dataclasses.field(default_factory=Inner)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "w.count: expected 1 to 8, got 0"),
        ({"count": 9}, "w.count: expected 1 to 8, got 9"),
        ({"count": 2**70}, "w.count: expected a number of at most 64 bits"),
        ({"count": True}, "w.count: expected int, got True"),
        ({"count": None}, "w.count: expected int, got None"),
        ({"count": 1, "plain": float("nan")}, "w.plain: expected a finite number, got nan"),
        ({"count": 1, "plain": 10**400}, "w.plain: expected float"),
        ({"count": 1, "plain": "1"}, "w.plain: expected float, got '1'"),
        ({"count": 1, "sizes": []}, "w.sizes: expected 1 to 3 values, got 0"),
        ({"count": 1, "sizes": [1, 10]}, "w.sizes.1.: expected 1 to 9, got 10"),
        ({"count": 1, "sizes": 3}, "w.sizes: expected a list, got 3"),
        ({"count": 1, "maybe": 0}, "w.maybe: expected a positive number, got 0 .at most 2."),
        ({"count": 1, "inner": {"share": 1.5}}, "w.inner.share: expected 0 to 1, got 1.5"),
        ({"count": 1, "inner": []}, "w.inner: expected a section of Inner"),
        ({"count": 1, "coutn": 2}, "unknown key 'coutn'"),
        ({}, "w: missing key 'count'"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_field(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_from_dict(Outer, values, "w")


def test_values_at_the_ends_of_a_range_are_taken_and_given_back() -> None:
    for values in ({"count": 1}, {"count": 8, "maybe": 2.0, "sizes": [1, 9, 9], "inner": {"share": 1.0}}):
        config = config_from_dict(Outer, values)
        assert config_from_dict(Outer, config_to_dict(config)) == config
        check_ranges(config)
    with pytest.raises(RangeError, match=r"^INNER.SHARE: expected 0 to 1, got nan"):
        check_ranges(Outer(1, inner=Inner(float("nan"))), str.upper)


def test_every_named_size_is_within_the_ranges() -> None:
    for config in (*TOKENIZERS.values(), *SIZES.values()):
        check_ranges(config)
        assert config_from_dict(type(config), config_to_dict(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ("[" * 100_000, "config.json: not readable as JSON .*nested too deeply"),
        ("9" * 5000, "config.json: not readable as JSON"),
        ("{", "config.json: not readable as JSON"),
    ],
)
def test_json_that_python_takes_or_chokes_on_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_a_value_in_an_error_is_short_however_large_it_is() -> None:
    bomb: list[Any] = ["x"]
    for _ in range(200):
        bomb = [bomb, bomb, bomb]
    assert max(len(shortened(value)) for value in (bomb, "x" * 10**6, 10**5000, {"a": "y" * 999})) <= 200


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("generate x --seconds 1e308", "--seconds: expected a positive number, got 1e+308"),
        ("generate x --scale 100000", "--scale: expected 1 to 64, got 100000"),
        ("generate x --steps 1000000000", "--steps: expected 1 to 1,000, got 1000000000"),
        ("generate x --guidance nan", "--guidance: expected 0 to 1,000, got nan"),
        ("generate x --seed -1", "--seed: expected 0 or more, got -1"),
        ("finetune a -o b --batch-size 0", "--batch-size: expected 1 to 1,048,576, got 0"),
        ("info --micro-batches 0", "--micro-batches: expected 1 or more, got 0"),
        ("info --gpus 1 0", "--gpus: expected 1 or more, got 0"),
        ("data cache a -o b --size 100000", "--size: expected 1 to 8,192, got 100000"),
        ("data cache a -o b --dedupe -1", "--dedupe: expected 0 to 64, got -1"),
        ("data cache a -o b --workers 0", "--workers: expected 1 to 1,024, got 0"),
        ("assemble a b -o c --motion-scale nan", "--motion-scale: expected 0 to 1,000, got nan"),
        ("train recipes/sprites.py:lm --loop.optim.lr nan", "--loop.optim.lr: expected a positive number, got nan"),
        (
            "train --run-folder x recipes/sprites.py:lm --model.body.width 0",
            "--model.body.width: expected 1 to 65,536, got 0",
        ),
    ],
)
def test_a_flag_out_of_range_is_named_before_any_work(capsys: Any, argv: str, message: str) -> None:
    assert main(argv.split()) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(RangeError):
        parse(argv.split())


def test_a_prompt_that_is_not_utf8_is_named(capsys: Any) -> None:
    assert main(["generate", "fire\udcffball"]) == 2
    assert "--prompt: expected text in UTF-8" in capsys.readouterr().err


def test_flags_may_stand_before_the_recipe() -> None:
    for argv in (["--run-folder", "x", "recipes/sprites.py:lm"], ["recipes/sprites.py:lm", "--run-folder", "x"]):
        command = parse(["train", *argv])
        assert (command.recipe, command.run_folder) == ("recipes/sprites.py:lm", Path("x"))


def test_what_nobody_foresaw_is_one_line_that_calls_itself_a_bug(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise AttributeError("'NoneType' object\nhas no attribute 'x'")

    monkeypatch.setattr("dicode.cli.info.info", broken)
    assert main(["info"]) == 70
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "this is a bug" in err and "test_config.py, line" in err
    monkeypatch.setattr("dicode.cli.info.info", lambda *_: bytearray(2**60))
    assert main(["info"]) == 2
    assert "not enough memory" in capsys.readouterr().err


def test_a_device_without_numbers_is_refused() -> None:
    for name in ("meta", "toaster", ""):
        with pytest.raises(ValueError, match="cannot be used here"):
            pick_device(name)


def test_what_computes_nothing_loads_no_network(drawn_clips: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom dicode.cli.app import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(*{'torch', 'diffusers', 'transformers', 'av'} & sys.modules.keys(), file=sys.stderr)"
    )
    for line, needed in (
        ("train recipes/sprites.py:lm --help", ""),
        ("train recipes/paper.py:gpt2 --help", ""),
        ("data --help", ""),
        ("generate --help", ""),
        (f"data index {drawn_clips}", "av"),
        (f"data sheet {drawn_clips} -o {tmp_path}/sheet.png", "av"),
    ):
        argv = [sys.executable, "-c", program, *line.split()]
        done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=300)
        assert done.stderr.splitlines()[-1].split() == needed.split(), line


def changed_header(path: Path, change: Any) -> None:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + size :])


def test_weights_of_another_type_or_content_than_was_saved_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    model = DiCoDe.from_pretrained(tiny_model)
    model.save_pretrained(tmp_path / "half", torch.float16)
    again = {file.name: file.read_bytes() for file in (tmp_path / "half").iterdir()}
    model.save_pretrained(tmp_path / "half", torch.float16)
    assert again == {file.name: file.read_bytes() for file in (tmp_path / "half").iterdir()}  # seals and all
    weights = tmp_path / "half/lm.safetensors"
    changed_header(weights, lambda header: header["embedding.place"].update(dtype="BF16"))
    with pytest.raises(CheckpointError, match=r"lm.safetensors: not the content that was saved"):
        DiCoDe.from_pretrained(tmp_path / "half")
    weights.write_bytes(again[weights.name])
    (tmp_path / "half/tokenizer.json").write_text(again["tokenizer.json"].decode().replace('"Lowercase"', '"NFD"', 1))
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not the content that was saved"):
        DiCoDe.from_pretrained(tmp_path / "half")


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_numbers_of_another_kind_are_refused(tmp_path: Path, tiny_model: Path, kind: torch.dtype) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "lm.safetensors"
    state = load_file(weights)
    save_file({**state, "embedding.place": state["embedding.place"].to(kind)}, weights)
    with pytest.raises(CheckpointError, match=r"embedding.place: expected F16 or BF16 or F32 or F64, got"):
        DiCoDe.from_pretrained(tmp_path)
    save_file({name: t.double() if t.is_floating_point() else t for name, t in state.items()}, weights)
    DiCoDe.from_pretrained(tmp_path)  # more digits are no harm, and what others wrote has no seal


def test_sizes_that_the_weights_do_not_have_take_no_memory(tmp_path: Path, tiny_model: Path) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["lm"]["body"] |= {"width": 65536, "feed_forward": 65536, "depth": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lm.safetensors does not fit .*"):  # 3,000 GiB, were they allocated
        DiCoDe.from_pretrained(tmp_path)


def test_the_files_of_the_box_are_sealed() -> None:
    for path in CHECKPOINTS.glob("*/*.safetensors"):
        check_seal(path)
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        beside = (path.parent / "tokenizer.json").is_file() and path.stem in ("lm", "video_text")
        assert len(header["__metadata__"][SEAL]) == (32 if beside else 16)


def half_a_model(folder: Path) -> None:
    with model_folder(folder) as made:
        (made / "w.safetensors").write_text("half")
        raise RuntimeError("halfway")


def test_a_model_is_never_written_over_files_of_others(tmp_path: Path, tiny_model: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    with model_folder(mine) as made:  # empty: taken
        save_weights(torch.nn.Linear(2, 2), made / "w.safetensors")
        (made / "config.json").write_text('{"format": 2}')
    with pytest.raises(RuntimeError, match="halfway"):
        half_a_model(mine)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    check_seal(mine / "w.safetensors")
    (mine / "README.md").write_text("card")
    with model_folder(mine) as made:
        (made / "config.json").write_text('{"format": 2, "lm": {}}')
    assert sorted(path.name for path in mine.iterdir()) == ["README.md", "config.json"]
    assert read_config(mine) == {"lm": {}}
    (mine / "thesis.tex").write_text("x")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "file").write_text("x")
    for folder, found in ((mine, "thesis.tex"), (foreign, "config.json"), (tmp_path / "file", "got a file")):
        with pytest.raises(CheckpointError, match=found):
            check_model_folder(folder)
    assert main(["assemble", str(tiny_model), str(tiny_model), "-o", str(mine)]) == 2
    assert (mine / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 20_000, "expected YAML .*recursion"),
        ("a: &a [x]\nb: *a", "has no aliases"),
        ("- {seconds: 1.0e+308, prompt: x}", "at most 86,400"),
        ("- {seconds: " + "9" * 5000 + ", prompt: x}", "expected YAML"),
        ("- {seconds: 2024-99-99, prompt: x}", "expected YAML"),
        ("- " + "x" * 10**6, "section of Shot|at most"),
    ],
)
def test_a_storyboard_that_grows_or_never_ends_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "board.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_storyboard(tmp_path / "board.yaml")
    assert len(str(caught.value)) < 1000


def test_prompts_of_a_list_keep_their_keys_and_their_folder_is_a_data_set(
    capsys: Any, tmp_path: Path, tiny_model: Path
) -> None:
    from dicode.data.index import read_index
    from dicode.video.read import read_metadata, read_video

    rows = [{"file": f"{i}.mp4", "caption": f"a red square {i}", "color": "red", "seed": i} for i in range(9)]
    (tmp_path / "captions.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, rows)))
    out = tmp_path / "folder"
    argv = [
        "generate",
        "--prompts",
        tmp_path / "captions.jsonl",
        "-o",
        f"{out}/",
        "--model",
        tiny_model,
        "--seconds",
        1,
    ]
    more = [*argv, "--scale", 1, "--lossless", "--seed", 4]
    assert main([str(word) for word in more]) == 0, capsys.readouterr().err
    records = read_index(out)
    assert [record.path.name for record in records] == [f"{i:03d}.mp4" for i in range(9)]
    assert [(record.caption, dict(record.extra)) for record in records] == [
        (row["caption"], {"color": "red", "seed": row["seed"]}) for row in rows
    ]
    said = read_metadata(out / "008.mp4")
    assert (said["prompt"], said["sample"], said["seed"]) == ("a red square 8", 8, 4)
    assert said["keys"] == {"color": "red", "seed": 8} and "scale" not in said
    model = DiCoDe.from_pretrained(tiny_model)
    for i in (0, 8):  # in batches as alone, but for the last bit
        (alone,) = model.generate(f"a red square {i}", seconds=1.0, seed=4, sample_index=i)
        made = read_video(out / f"{i:03d}.mp4", None, None).frames
        assert made.shape == alone.shape and abs(made.astype(int) - alone).max() <= 1
    (out / "notes.md").write_text("mine")
    assert main([str(word) for word in more]) == 2
    assert "holds 'notes.md'" in capsys.readouterr().err


def test_a_file_is_enlarged_to_be_watched_unless_a_scale_is_given(tmp_path: Path, tiny_model: Path) -> None:
    from dicode.video.read import read_metadata, read_video

    argv = ["generate", "x", "--model", str(tiny_model), "--seconds", "0.5", "-o", f"{tmp_path}/a.gif"]
    assert main(argv) == 0
    assert read_video(tmp_path / "a.gif", None, None).frames.shape[1:3] == (256, 256)
    assert read_metadata(tmp_path / "a.gif")["scale"] == 8


def test_a_model_size_and_a_tokenizer_are_plain_values() -> None:
    assert dataclasses.is_dataclass(DeepLMConfig) and dataclasses.is_dataclass(TokenizerConfig)


def test_a_section_that_no_part_reads_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"format": 2, "tokenizer": {}, "tokeniser": {}}')
    with pytest.raises(CheckpointError, match=r"config.json: unknown section .tokeniser. \(did you mean 'tokenizer'"):
        read_config(tmp_path)
