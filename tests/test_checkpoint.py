"""Checkpoints: strict and lean loading, dtypes."""

import dataclasses
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_lm_deep_lm import CONFIG, build, saved
from test_tokenizer import DENOISERS, RESAMPLER, tiny_tokenizer
from torch import Tensor, nn

from dicode import checkpoint as hub
from dicode.checkpoint import CHECKPOINTS, SEAL, check_seal, load_state, load_weights, read_config
from dicode.checkpoint.saving import check_model_folder, model_folder, save_weights, write_config
from dicode.cli.app import main
from dicode.config import CheckpointError
from dicode.lm.deep_lm import DeepTokenLM
from dicode.pipeline import DiCoDe
from dicode.tokenizer.config import FirstStageConfig, SamplingConfig
from dicode.tokenizer.video_tokenizer import TokenizerParts, VideoTokenizer

REPOSITORY = "someone/tiny"
CHECKPOINT = ["config.json", "first_stage.safetensors", "lm.safetensors", "tokenizer.json", "tokenizer.safetensors"]


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a module holds: parameters, buffers in checkpoints or not, plain attributes."""
    found = {}
    for prefix, part in module.named_modules():
        for values in (part._parameters, part._buffers, part.__dict__):
            found |= {f"{prefix}.{name}": value for name, value in values.items() if isinstance(value, Tensor)}
    return found


def assert_same(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name


# strict and lean loading


def linear() -> nn.Linear:
    return nn.Linear(3, 2)


def test_every_problem_of_a_file_is_reported_and_the_module_left_as_it_was(tmp_path):
    module, path = linear(), tmp_path / "weights.safetensors"
    before = {name: value.clone() for name, value in module.state_dict().items()}
    save_file({"weight": torch.ones(3, 2), "bais": torch.tensor([1.0, torch.inf])}, path)
    with pytest.raises(CheckpointError) as error:
        load_weights(module, path)
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert lines == [
        f"{path} does not fit the model of its config.json:",
        "missing bias (2,)",
        "unexpected bais (did you mean 'bias'?)",
        "weight: expected shape (2, 3), got (3, 2)",
        "bais: holds NaN or infinity in torch.float32",
    ]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_values_beyond_the_asked_dtype_are_refused():
    state = {"weight": torch.full((2, 3), 1e5), "bias": torch.zeros(2)}
    load_state(linear(), state, "here")
    with pytest.raises(CheckpointError, match=r"weight: holds NaN or infinity in torch.float16"):
        load_state(linear().half(), state, "here")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no such file; the checkpoint folder is incomplete"),
        (lambda path: path.write_bytes(b""), "not a readable safetensors file"),
        (lambda path: path.write_bytes(b"\xff" * 100), "not a readable safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "not a readable safetensors file"),
        (lambda path: torch.save(linear().state_dict(), path), "not a readable safetensors file"),
    ],
    ids=["missing", "empty", "garbage", "longer", "pickle"],
)
def test_what_is_no_whole_safetensors_file_is_refused(tmp_path, damage, message):
    path = tmp_path / "weights.safetensors"
    save_weights(linear(), path)
    damage(path)
    with pytest.raises(CheckpointError, match=f"weights.safetensors: {message}"):
        load_weights(linear(), path)


def test_loading_holds_one_tensor_of_the_file_at_a_time(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    module, again = (nn.Sequential(*(linear() for _ in range(4))) for _ in range(2))
    save_weights(module, path)
    given: list[weakref.ref[Tensor]] = []

    @contextmanager
    def watched(*arguments: Any, **options: Any) -> Iterator[SimpleNamespace]:
        def get_tensor(name: str) -> Tensor:
            assert not any(held() is not None for held in given)
            value = file.get_tensor(name)
            given.append(weakref.ref(value))
            return value

        with safe_open(*arguments, **options) as file:
            yield SimpleNamespace(keys=file.keys, get_slice=file.get_slice, get_tensor=get_tensor)

    monkeypatch.setattr(hub, "safe_open", watched)
    load_weights(again, path)
    assert_same(again, module)
    assert len(given) == 8


TOKENIZERS = {
    **{name: {"denoiser": denoiser} for name, denoiser in DENOISERS.items()},
    "wan": {"denoiser": DENOISERS["wan"], "tail_frame": 15},
    "change": {"denoiser": dataclasses.replace(DENOISERS["hourglass"], predict_residual=True)},
    "clip and kl": {
        "first_stage": FirstStageConfig(
            kind="kl", channels=(8, 8, 8), latent_channels=5, encoder_blocks=(1,), decoder_blocks=(1,)
        ),
        "resampler": RESAMPLER,
    },
}


def save_tokenizer(folder: Path, **changes: Any) -> None:
    write_config(folder, {"tokenizer": tiny_tokenizer(**changes).save_pretrained(folder)})


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where initialisation would be skipped, NaN is written, so that what is not loaded afterwards shows."""

    def poison(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) in hub.INITIALISERS:
            with torch.no_grad():
                return (kwargs["tensor"] if "tensor" in kwargs else args[0]).fill_(torch.nan)
        return func(*args, **kwargs)

    monkeypatch.setattr(hub.without_initialisation, "__torch_function__", poison)


def loaded_with_initialisation(kind: Any, source: Any) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dicode.checkpoint.without_initialisation", nullcontext)
        return kind.from_pretrained(source)


@pytest.mark.parametrize("kind", [VideoTokenizer, DeepTokenLM])
def test_the_model_in_the_box_is_bit_equal_without_initialisation(poisoned, kind):
    assert_same(kind.from_pretrained(), loaded_with_initialisation(kind, None))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_are_bit_equal_without_initialisation(poisoned, tmp_path, name):
    save_tokenizer(tmp_path, **TOKENIZERS[name])
    assert_same(VideoTokenizer.from_pretrained(tmp_path), loaded_with_initialisation(VideoTokenizer, tmp_path))


@pytest.mark.parametrize(
    "changes",
    [{}, {"body": "gpt2"}, {"body": dataclasses.replace(CONFIG.body, rope_factor=8.0)}, {"head": "regression"}],
    ids=["llama", "gpt2", "rope_factor", "regression"],
)
def test_language_models_are_bit_equal_without_initialisation(poisoned, tmp_path, changes):
    saved(build(**changes), tmp_path)
    assert_same(DeepTokenLM.from_pretrained(tmp_path), loaded_with_initialisation(DeepTokenLM, tmp_path))


def test_initialisation_is_skipped_inside_and_only_there():
    with hub.without_initialisation():
        before = torch.get_rng_state()
        nn.Linear(30, 20)
        nn.Conv2d(3, 4, 3)
        assert torch.equal(torch.get_rng_state(), before)
        assert nn.Parameter(torch.ones(2)).tolist() == [1.0, 1.0]
    torch.manual_seed(3)
    one = nn.Linear(30, 20)
    torch.manual_seed(3)
    assert torch.equal(one.weight, nn.Linear(30, 20).weight)


def test_the_two_files_of_a_tokenizer_hold_all_of_it():
    tokenizer = tiny_tokenizer()
    first_stage = {f"first_stage.{name}" for name in tokenizer.first_stage.state_dict()}
    assert first_stage | TokenizerParts(tokenizer).state_dict().keys() == tokenizer.state_dict().keys()


# dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_dtype_is_that_of_parameters_and_buffers_stay_float32(tiny_model, dtype):
    model = DiCoDe.from_pretrained(tiny_model, dtype=dtype)
    for part in (model.tokenizer, model.lm):
        assert {value.dtype for value in part.parameters()} == {dtype}
        assert {value.dtype for value in part.buffers() if value.is_floating_point()} == {torch.float32}
    whole = DiCoDe.from_pretrained(tiny_model)
    expected = whole.tokenizer.linear_code.decode.weight.to(dtype)
    assert torch.equal(model.tokenizer.linear_code.decode.weight, expected)
    clips = list(model.generate("a red square", seconds=3.0))
    assert [clip.shape for clip in clips] == [(16, 32, 32, 3), (8, 32, 32, 3)]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_tokenizer_works_in_bfloat16_as_in_float32(tmp_path, name):
    save_tokenizer(tmp_path, **TOKENIZERS[name])
    whole, halved = (VideoTokenizer.from_pretrained(tmp_path, dtype=dtype) for dtype in (None, torch.bfloat16))
    frames = torch.randint(0, 256, (1, 17, 32, 32, 3), generator=torch.manual_seed(1)).byte()
    tokens = whole.encode(frames)
    close(halved.encode(frames), tokens, 0.05)
    one, other = (
        next(part.decode(tokens, sampling=SamplingConfig(steps=2, decoder_guidance=1.5))).float()
        for part in (whole, halved)
    )
    close(other, one, 0.15)


@pytest.mark.parametrize("changes", [{}, {"body": "gpt2"}, {"head": "regression"}], ids=str)
def test_every_language_model_works_in_bfloat16_as_in_float32(tmp_path, changes):
    saved(build(**changes), tmp_path)
    whole, halved = (DeepTokenLM.from_pretrained(tmp_path, dtype=dtype) for dtype in (None, torch.bfloat16))
    assert whole.text is not None
    ids = whole.text.encode(["a red square"], whole.config.text_length)
    one, other = (next(part.generate(ids, 1, sampling=SamplingConfig(variance_scale=0.0))) for part in (whole, halved))
    assert other.dtype == torch.float32
    close(other, one, 0.1)


def close(found: Tensor, expected: Tensor, share: float) -> None:
    """The error is less than this share of the values' deviation, in the mean of squares."""
    assert (found - expected).square().mean().sqrt() < share * expected.std()


def test_a_dtype_that_is_no_floating_point_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"dtype: expected a floating-point one, got torch.int8"):
        VideoTokenizer.from_pretrained(tiny_model, dtype=torch.int8)


def test_int8_keeps_matrices_within_half_a_step_a_row_and_the_rest_as_float16(tmp_path, tiny_model):
    model = DiCoDe.from_pretrained(tiny_model)
    model.save_pretrained(tmp_path / "small", torch.int8)
    model.save_pretrained(tmp_path / "half", torch.float16)
    again = DiCoDe.from_pretrained(tmp_path / "small")
    for ours, theirs in ((model.tokenizer, again.tokenizer), (model.lm, again.lm)):
        for name, value in ours.state_dict().items():
            found = theirs.state_dict()[name]
            assert found.dtype == value.dtype, name
            if value.is_floating_point() and value.ndim > 1:
                step = value.abs().amax(tuple(range(1, value.ndim)), keepdim=True) / 127
                assert ((found - value).abs() <= 0.501 * step).all(), name
            else:
                torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-6)
    assert read_config(tmp_path / "small")["deep_tokens"] == again.tokenizer.token_hash()
    assert again.tokenizer.token_hash() != model.tokenizer.token_hash()
    small, half = (sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors")) for n in ("small", "half"))
    assert small < 0.9 * half  # of so small a model names and scales are the most
    frames = torch.randint(0, 256, (1, 17, 32, 32, 3), generator=torch.manual_seed(1)).byte()
    tokens = model.tokenizer.encode(frames)
    close(again.tokenizer.encode(frames), tokens, 0.05)
    one, other = (next(part.tokenizer.decode(tokens)).float() for part in (model, again))
    close(other, one, 0.15)


def test_a_quantized_row_of_zeros_stays_zero(tmp_path):
    module = linear()
    module.weight.data[0] = 0
    save_weights(module, tmp_path / "w.safetensors", torch.int8)
    load_weights(again := linear(), tmp_path / "w.safetensors")
    assert (again.weight[0] == 0).all()


def test_quantized_tensors_and_their_scales_belong_together(tmp_path):
    save_weights(linear(), tmp_path / "w.safetensors", torch.int8)
    whole = load_file(tmp_path / "w.safetensors")
    assert set(whole) == {"weight", "weight.int8_scales", "bias"}
    for name, changed in (
        ("weight.int8_scales", {k: v for k, v in whole.items() if k != "weight.int8_scales"}),
        ("unexpected bias2.int8_scales", {**whole, "bias2.int8_scales": torch.ones(1)}),
    ):
        save_file(changed, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match=name):
            load_weights(linear(), tmp_path / "other.safetensors")


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


def test_bundled_weights_are_sealed() -> None:
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
        (made / "config.json").write_text('{"format": 3}')
    with pytest.raises(RuntimeError, match="halfway"):
        half_a_model(mine)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    check_seal(mine / "w.safetensors")
    (mine / "README.md").write_text("card")
    with model_folder(mine) as made:
        (made / "config.json").write_text('{"format": 3, "lm": {}}')
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


def test_a_section_that_no_part_reads_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"format": 3, "tokenizer": {}, "tokeniser": {}}')
    with pytest.raises(CheckpointError, match=r"config.json: unknown section .tokeniser. \(did you mean 'tokenizer'"):
        read_config(tmp_path)


def test_a_model_of_an_older_version_ends_in_one_line_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"format": 2, "tokenizer": {"key_head_width": 192, "linear_code": true}}')
    assert main(["info", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected format 3, got 2" in line and "dicode before 0.3 wrote formats 1 and 2" in line
