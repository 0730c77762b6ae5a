"""Configurations: every field has a type and a range, and an error names the field."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest

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
from dicode.lm.config import DeepLMConfig
from dicode.lm.presets import SIZES
from dicode.pipeline import DiCoDe
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
        ("generate x --steps 1000000000", "--steps: expected 0 to 1,000, got 1000000000"),
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
