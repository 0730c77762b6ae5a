"""A user's Python file never stands for a library, and what goes wrong in it is one line that names the place."""

import sys
from pathlib import Path

import pytest

from dicode.config.user_code import RecipeError, load_function, run_own
from dicode.train.runs import load_run

RUN = "from dataclasses import dataclass\n@dataclass\nclass Run:\n    steps: int = 3\ndef run():\n    return Run()\n"


def test_a_file_of_a_library_s_name_leaves_the_library_alone(tmp_path: Path) -> None:
    import tokenizers
    import torch  # noqa: F401

    for name in ("tokenizers", "torch", "json", "dicode"):
        (tmp_path / f"{name}.py").write_text(RUN)
        before = sys.modules[name]
        assert load_run(f"{tmp_path / name}.py:run").steps == 3
        assert sys.modules[name] is before
    assert sys.modules["tokenizers"] is tokenizers and hasattr(tokenizers, "Tokenizer")


def test_files_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    for folder, steps in (("a", 3), ("b", 4)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(RUN.replace("= 3", f"= {steps}"))
    first, second = (load_function(f"{tmp_path}/{at}/same.py:run", "recipe", "", "train") for at in ("a", "b"))
    assert (first().steps, second().steps) == (3, 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def run(:\n", "line 1: invalid syntax"),
        ("x = 1\nx / 0\n", "line 2 (x / 0): ZeroDivisionError: division by zero"),
        ("def run():\n    return {}['lr']\n", "line 2 (return {}['lr']): KeyError: 'lr'"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("def run():\n    return 1\n", "expected it to return a run (a dataclass), got int"),
        ("def runs():\n    return 1\n", "no function 'run' (did you mean 'runs'?)"),
    ],
)
def test_what_a_file_raises_is_said_in_one_line_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(RecipeError) as raised:
        load_run(f"{tmp_path}/mine.py:run")
    assert said in str(raised.value) and "mine.py" in str(raised.value) and "\n" not in str(raised.value)


def test_what_a_function_is_called_with_reaches_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def double(x):\n    return 2 * x\n")
    spec = f"{tmp_path}/mine.py:double"
    function = load_function(spec, "scorer", "FILE.py:FUNCTION", "evaluate")
    assert run_own(function, spec, 4) == 8
    with pytest.raises(RecipeError, match=r"mine.py, line 2 \(return 2 \* x\): TypeError"):
        run_own(function, spec, None)
