"""Where bfloat16 is computed in: one place decides it for all that computes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_runs import runs, variants, write_cache

import dicode.device
from dicode.cli.data import Encode, encode
from dicode.device import compute_dtype, has_bfloat16, pick_device
from dicode.stopwatch import Stopwatch
from dicode.train.distributed import Processes
from dicode.train.loop import Training
from dicode.train.optim import Muon
from dicode.train.runs import LoopConfig
from dicode.train.stages import Run, run_recipe, stage_of

CPU = torch.device("cpu")
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "_convolution", "native_layer_norm"}


class Products(TorchDispatchMode):
    """Notes the dtypes of what is multiplied while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket.__name__ in PRODUCTS:
            self.dtypes |= {a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()}
        return func(*args, **(kwargs or {}))


def dtypes_of(work: Callable[[], object]) -> set[torch.dtype]:
    with Products() as products:
        work()
    return products.dtypes


def short(run: Run) -> Run:
    """Its first step, at the default precision."""
    optim = dataclasses.replace(run.loop.optim, steps=1)
    return dataclasses.replace(run, loop=dataclasses.replace(run.loop, optim=optim, precision="auto", tracker="none"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, and the first stage and tokenizer that later stages need."""
    folder = tmp_path_factory.mktemp("device")
    torch.set_num_threads(1)
    write_cache(folder / "cache", 7)
    for name in ("first_stage", "linear_code"):
        run_recipe(runs(folder)[name], folder / name, {})
    return folder


@pytest.mark.parametrize("native", [False, True], ids=["emulated", "native"])
@pytest.mark.parametrize("name", ["first_stage", "denoiser", "lm"])
def test_a_run_computes_in_bfloat16_only_where_the_device_has_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, native: bool
) -> None:
    """Latents and tokens are computed here too: the cache has none of the runs' dtype yet."""
    monkeypatch.setattr(dicode.device, "has_bfloat16", lambda device: native)
    for kept in (*(root / "cache").glob("*.latents-*"), *(root / "cache").glob("*.tokens-*")):
        kept.unlink()
    found = dtypes_of(lambda: run_recipe(short(runs(root)[name]), tmp_path / name, {}))
    assert torch.float32 in found
    assert (torch.bfloat16 in found) == native


@pytest.mark.parametrize("native", [False, True], ids=["emulated", "native"])
def test_muon_multiplies_in_the_dtype_of_its_run(root: Path, monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(dicode.device, "has_bfloat16", lambda device: native)
    run = short(variants(root)["muon"])
    found = [own.dtype for own in Training(stage_of(run), run.loop, Processes()).optimizers if isinstance(own, Muon)]
    assert found == [torch.bfloat16 if native else torch.float32]


@pytest.mark.parametrize("native", [False, True], ids=["emulated", "native"])
def test_encoding_a_cache_computes_in_bfloat16_only_where_the_device_has_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr(dicode.device, "has_bfloat16", lambda device: native)
    for kept in (*(root / "cache").glob("*.latents-*"), *(root / "cache").glob("*.tokens-*")):
        kept.unlink()
    asked: list[str] = []
    monkeypatch.setattr(dicode.device, "pick_device", lambda name: asked.append(name) or CPU)
    command = Encode(str(root / "cache"), str(root / "linear_code/best"), device="toaster")
    assert (torch.bfloat16 in dtypes_of(lambda: encode(command, Stopwatch()))) == native
    assert "toaster" in asked


def test_the_default_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LoopConfig().precision == "auto"
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(dicode.device, "has_bfloat16", lambda device, native=native: native)
        assert compute_dtype(CPU) == expected
        assert compute_dtype(CPU, "bfloat16") == torch.bfloat16 and compute_dtype(CPU, "float32") == torch.float32


@pytest.mark.parametrize("limit", ["AVX2", "avx512_core", "AVX512_CORE_VNNI"])
def test_processors_without_the_instruction_are_told(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN is held to them by a variable, and names itself able to multiply bfloat16 on AVX-512 without it."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert not has_bfloat16(CPU)


def test_a_processor_is_asked_for_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in dicode.device.ISA_LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dicode.device.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    for avx512, amx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=avx512: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=amx: has)
        assert has_bfloat16(CPU) == (avx512 or amx)
    monkeypatch.setattr(dicode.device.platform, "machine", lambda: "aarch64")  # there oneDNN alone knows
    assert has_bfloat16(CPU)


def test_a_device_without_numbers_is_refused() -> None:
    for name in ("meta", "toaster", "", "hpu"):
        with pytest.raises(ValueError, match="cannot be used here"):
            pick_device(name)
