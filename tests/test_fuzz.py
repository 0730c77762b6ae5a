"""A little of `python -m tests.fuzz` in the usual run, more of it under `slow`."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from fuzz import checkpoints, commands, guarded, is_fault


def outcomes(module: Any, folder: Path, seed: int, count: int) -> dict[str, str]:
    found = {}
    for number, case in enumerate(module.cases(seed, count)):
        (folder / str(number)).mkdir()
        found[str(case)] = module.run(case, folder / str(number))
    return found


@pytest.mark.parametrize("module", [checkpoints, commands], ids=["checkpoints", "commands"])
def test_damaged_and_random_input_is_refused_in_a_line_or_works(tmp_path, module):
    found = outcomes(module, tmp_path, seed=1, count=12)
    assert not {case: outcome for case, outcome in found.items() if is_fault(outcome)}
    assert "refused" in found.values()


@pytest.mark.slow
@pytest.mark.parametrize("module", [checkpoints, commands], ids=["checkpoints", "commands"])
def test_much_damaged_and_random_input_is_refused_in_a_line_or_works(tmp_path, module):
    found = outcomes(module, tmp_path, seed=2, count=300)
    assert not {case: outcome for case, outcome in found.items() if is_fault(outcome)}


def test_cases_are_those_of_their_seed():
    for module in (checkpoints, commands):
        one, again, other = ([str(case) for case in module.cases(seed, 150)] for seed in (0, 0, 1))
        assert one == again
        assert one != other


def test_a_crash_a_hang_an_exception_and_too_much_memory_are_told_apart(tmp_path):
    def fall() -> str:
        import ctypes
        import faulthandler

        faulthandler.disable()  # pytest's, which would print a stack that looks like a failure
        return str(ctypes.string_at(0))

    def spin() -> str:
        while True:
            pass

    assert guarded(lambda: "ok") == "ok"
    assert guarded(fall).startswith("crash: SIGSEGV")
    assert guarded(spin, processor_s=1).startswith("hang: 1 s")
    assert guarded(lambda: str(1 / 0)).startswith("traceback: ZeroDivisionError at test_fuzz.py")
    assert guarded(lambda: str(len(bytearray(2**31))), memory=2**29).startswith("traceback: MemoryError")
    with pytest.raises(ValueError, match="expected ok"):
        is_fault("fine")


def test_the_fuzz_finds_a_model_that_draws_another_video_and_a_file_that_is_gone(tmp_path, monkeypatch):
    case = checkpoints.Case("own", "bits", "lm.safetensors head.out.weight", seed=0)
    monkeypatch.setattr("dicode.checkpoint.check_seal", lambda path: None)
    folder = checkpoints.copied(checkpoints.folders()["own"], tmp_path / "model")
    shifted = folder / "lm.safetensors"
    from safetensors.torch import load_file, save_file

    state = load_file(shifted)
    shifted.unlink()
    save_file({name: value + 1 if value.is_floating_point() else value for name, value in state.items()}, shifted)
    assert checkpoints.outcome(case, folder, checkpoints.undamaged("own")).startswith("wrong: accepted")
    before = {"notes.md": (1, 1), "model/lm.safetensors": (2, 2)}
    assert commands.lost(before, {"notes.md": (1, 1)}, commands.Case(("info", "model"))) == "model/lm.safetensors"
    assert commands.lost(before, before, commands.Case(("info", "model"))) == ""


def test_every_module_of_the_fuzz_has_cases_and_a_run():
    for path in sorted(Path(__file__).with_name("fuzz").glob("[a-z]*.py")):
        if path.stem not in ("models", "truncated"):
            module = import_module(f"fuzz.{path.stem}")
            assert callable(module.cases) and callable(module.run), path
