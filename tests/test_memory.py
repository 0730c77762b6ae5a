"""Generation in less memory: parts that take turns, 8-bit matrices, tiles; the same videos, or nearly."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sizing import most_allocated
from test_tokenizer import tiny_tokenizer
from test_wan import CONFIG, FIRST_STAGE, tokenizer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from toy_runs import LM, write_cache

from dicode.checkpoint.saving import as_saved, write_config
from dicode.cli.app import main
from dicode.lm.config import BodyConfig
from dicode.lm.deep_lm import DeepTokenLM
from dicode.memory import Offload, offload, to_int8, to_int8_tokenizer
from dicode.pipeline import DiCoDe, at_first
from dicode.seeds import generator_for
from dicode.sizing.count import micro_batch_cost, weight_bytes
from dicode.sizing.generation import ALL, OFFLOAD, REST, generation_bytes, generation_parts, in_turns
from dicode.sizing.plan import blank_batches, blank_stage, encoding
from dicode.tokenizer.config import TokenizerConfig
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.runs import LoopConfig, OptimConfig, TokenizerRun
from dicode.train.speed import Meter
from dicode.train.stages import stage_of
from dicode.video.read import read_metadata

CPU = torch.device("cpu")
GPT2 = dataclasses.replace(LM, body=BodyConfig("gpt2", width=32, depth=1, heads=2))


def wan(**changes: Any) -> VideoTokenizer:
    """With guidance, and without zeros that would hide what depends on what."""
    guided = CONFIG.sampling.changed(decoder_guidance=2.0)
    made = tokenizer(sampling=guided, null_tokens="grey_image", **changes)
    for parameter in made.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return made


def language_model(config: Any = LM) -> DeepTokenLM:
    torch.manual_seed(0)
    return DeepTokenLM(config).eval()


def test_parts_that_take_turns_make_the_same_video_one_at_a_time() -> None:
    model, lm, tokens = wan(), language_model(), torch.randn(1, 3, 4, 6)
    ids = torch.zeros(1, LM.text_length, dtype=torch.long)
    expected = torch.cat(list(model.decode(tokens)), dim=1), torch.stack(list(lm.generate(ids, 3)))
    homes = {id(p): p.data_ptr() for p in (*model.parameters(), *lm.parameters())}
    turns = offload(model, lm, CPU)
    order: list[nn.Module] = []
    bring = turns.bring

    def watched(part: nn.Module) -> None:
        bring(part)
        away = [p for other in turns.homes if other is not part for p in other.parameters()]
        assert all(p.data_ptr() == homes[id(p)] for p in away), "two parts are on the device"
        assert all(p.data_ptr() != homes[id(p)] for p in part.parameters())
        if not order or order[-1] is not part:
            order.append(part)

    turns.bring = watched  # type: ignore[method-assign]
    made = torch.cat(list(model.decode(tokens)), dim=1), torch.stack(list(lm.generate(ids, 3)))
    for own, plain in zip(made, expected, strict=True):
        assert torch.equal(own, plain)
    stage, denoiser = model.first_stage.autoencoder, model.denoiser
    # null tokens; then each clip is rendered, decoded, and its last frame encoded for the next one
    assert order == [model.encoder, denoiser, stage, model.encoder, denoiser, stage, lm]


def test_a_tokenizer_without_a_language_model_takes_turns() -> None:
    model = wan()
    frames = torch.randint(0, 256, (1, 33, 32, 32, 3), dtype=torch.uint8)
    expected = torch.cat(list(model.decode(model.encode(frames))), dim=1)
    turns = offload(model, None, CPU)
    assert len(turns.homes) == 3
    assert torch.equal(torch.cat(list(model.decode(model.encode(frames))), dim=1), expected)


def test_a_part_comes_back_for_what_its_generator_still_has_to_give() -> None:
    class Counter(nn.Linear):
        def counted(self) -> Iterator[int]:
            for number in range(2):
                assert turns.present is self
                yield number

    one, other = Counter(1, 1), Counter(1, 1)
    turns = Offload(CPU)
    for part in (one, other):
        turns.add(part, part, "counted")
    assert [*zip(one.counted(), other.counted(), strict=True)] == [(0, 0), (1, 1)]


def test_key_frames_come_before_any_clip() -> None:
    order = []

    def shots() -> Iterator[torch.Tensor]:
        for number in range(3):
            order.append(f"written {number}")
            yield torch.zeros(1, 4, 6)

    for number, _ in enumerate(at_first(shots)):
        order.append(f"rendered {number}")
    assert order[:4] == ["written 0", "written 1", "written 2", "rendered 0"]


def test_a_model_with_turns_generates_what_it_does_without(tiny_model: Path) -> None:
    plain, turning = (DiCoDe.from_pretrained(tiny_model) for _ in range(2))
    turning.offload("cpu")
    both = [[*model.generate("a red square", seconds=4.0, seed=3)] for model in (plain, turning)]
    assert len(both[0]) == 2
    for one, other in zip(*both, strict=True):
        assert (one == other).all()
    with pytest.raises(ValueError, match="other than the CPU"):
        DiCoDe.from_pretrained(tiny_model, offload=True)
    with pytest.raises(ValueError, match="save it with dtype"):  # whose tensors have other names
        DiCoDe.from_pretrained(tiny_model, int8=True).save_pretrained(tiny_model)


@pytest.mark.parametrize("kind", ["wan", "wan22"])
def test_tiles_differ_from_whole_frames_by_little(kind: Any) -> None:
    """By at most a quarter of the deviation at random weights, most of it attention in the middle that sees a tile."""
    config = dataclasses.replace(CONFIG, size=64, frame_width=96, first_stage=FIRST_STAGE)
    if kind == "wan22":
        config = dataclasses.replace(config, first_stage=dataclasses.replace(FIRST_STAGE, kind=kind, decoder_width=4))
    torch.manual_seed(0)
    stage = VideoTokenizer(config).eval().first_stage
    height, width = config.latent_shape
    latents = torch.randn(1, 5, 5, height, width)
    with torch.no_grad():
        pixels = stage.decode_clips(latents)
        whole = stage.encode_clips(pixels)
        tiled = copy.deepcopy(stage)
        tiled.enable_tiling(64)
        assert torch.equal(tiled.encode_clips(pixels[..., :64]), stage.encode_clips(pixels[..., :64]))  # one tile
        both = [(tiled.decode_clips(latents), pixels), (tiled.encode_clips(pixels), whole)]
    assert not torch.equal(*both[0])
    assert kind == "wan22" or not torch.equal(*both[1])  # whose tiles the library counts in patches: here a single one
    for own, expected in both:
        assert own.shape == expected.shape
        assert (own - expected).abs().mean() < 0.25 * expected.std()
    with pytest.raises(ValueError, match="'tiny'"):
        tiny_tokenizer().first_stage.enable_tiling()


def test_int8_matrices_are_those_that_are_stored_and_nearly_those_before() -> None:
    model = wan()
    noisy, t, pair = torch.randn(1, 5, 5, 8, 8), torch.tensor([500.0]), torch.randn(1, 2, 4, 6)
    with torch.no_grad():
        condition = model.conditioning(pair)
        before = model.denoiser(noisy, t, condition)
        stored = copy.deepcopy(model.denoiser)
        for layer in stored.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(as_saved(layer.weight, torch.int8))
        as_stored = stored(noisy, t, condition)
        for denoiser in (model.denoiser, stored):  # those read from an 8-bit file stay as they were stored
            to_int8(denoiser, torch.float32)
            torch.testing.assert_close(denoiser(noisy, t, condition), as_stored, rtol=1e-5, atol=1e-6)
    assert 0 < (as_stored - before).norm() < 0.01 * before.norm()
    matrices = [p for p in model.denoiser.parameters() if p.dtype == torch.int8]
    assert sum(p.numel() for p in matrices) > 0.8 * sum(p.numel() for p in model.denoiser.parameters())


@pytest.mark.parametrize("config", [LM, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_model_writes_and_renders_in_its_type(config: Any, dtype: torch.dtype) -> None:
    model, lm = wan(), language_model(config)
    before = weight_bytes(model.denoiser)
    to_int8_tokenizer(model, dtype)
    to_int8(lm, dtype)
    assert weight_bytes(model.denoiser) - model.denoiser.null_text.nbytes < 0.6 * before
    kinds = {p.dtype for part in (model, lm) for p in part.parameters()}
    assert kinds == {torch.int8, torch.float32, dtype}  # float32: the scale of a row
    assert {p.dtype for p in model.first_stage.parameters()} == {dtype}
    (clip,) = model.decode(torch.randn(1, 2, 4, 6))
    assert clip.shape == (1, 17, 32, 32, 3)
    ids = torch.zeros(1, LM.text_length, dtype=torch.long)
    assert all(tokens.isfinite().all() for tokens in lm.generate(ids, 2))


def test_the_command_notes_what_changes_a_video(tiny_model: Path, tmp_path: Path, capsys: Any) -> None:
    flags = ["generate", "a red square", "--seconds", "1", "--model", str(tiny_model)]
    for name, more in (("plain", []), ("int8", ["--int8"])):
        assert main([*flags, "-o", str(tmp_path / f"{name}.mp4"), *more]) == 0
    notes = [read_metadata(tmp_path / f"{name}.mp4") for name in ("plain", "int8")]
    assert notes[1]["int8"] is True and "int8" not in notes[0]
    assert main([*flags, "-o", str(tmp_path / "no.mp4"), "--offload", "--device", "cpu"]) == 2
    assert "other than the CPU" in capsys.readouterr().err
    assert main([*flags, "-o", str(tmp_path / "no.mp4"), "--vae-tiling"]) == 2
    assert "vae_tiling" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(64, None), (48, 80)], ids=str)
def test_memory_to_generate_is_what_is_allocated_with_turns_and_without(shape: tuple[int, int | None]) -> None:
    """Of a denoiser larger than its first stage: CPUs unfold the input of a 3-D convolution, 27 times its size."""
    denoiser = dataclasses.replace(CONFIG.denoiser, width=192, depth=6, heads=4)
    stage = dataclasses.replace(FIRST_STAGE, channels=(2, 4, 4))
    model = wan(size=shape[0], frame_width=shape[1], denoiser=denoiser, first_stage=stage)
    lm, tokens = language_model(), torch.randn(1, 3, 4, 6)
    parts = generation_parts(model.config, LM, torch.float32)
    most = most_allocated(lambda: list(model.decode(tokens)))
    assert most == pytest.approx(max(part.activations for part in parts.values()), rel=0.1)
    resident = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *lm.parameters(), *lm.buffers()))
    counted = generation_bytes(model.config, LM, torch.float32)
    assert counted[ALL] == pytest.approx(resident + most, rel=0.1)
    offload(model, lm, CPU)  # whose copies are allocated here too
    in_turn = most_allocated(lambda: list(model.decode(tokens)))
    assert in_turn == pytest.approx(in_turns(parts) - parts[REST].weights, rel=0.1)
    assert counted[OFFLOAD] == pytest.approx(parts[REST].weights + in_turn, rel=0.1)


def test_less_memory_is_counted_for_each_flag() -> None:
    config = dataclasses.replace(CONFIG, size=512, frame_width=640)
    counted = list(generation_bytes(config, LM, torch.bfloat16).values())
    assert len(counted) == 4 and counted == sorted(counted, reverse=True) and counted[0] > counted[-1]
    assert len(generation_bytes(TokenizerConfig(), None, torch.float32)) == 2  # no tiles


def test_what_a_plan_says_that_a_micro_batch_of_wan_takes_is_what_is_allocated(tmp_path: Path) -> None:
    """But for the encoding of its clips, which is counted beside it: see above for CPUs."""
    write_cache(tmp_path / "cache")
    prior = wan()
    write_config(tmp_path / "prior", {"tokenizer": prior.save_pretrained(tmp_path / "prior")})
    for flow_map in (False, True):
        denoiser = dataclasses.replace(prior.config.denoiser, flow_map=flow_map)
        model = dataclasses.replace(prior.config, denoiser=denoiser)
        optim = OptimConfig(batch_size=6)
        loop = LoopConfig(precision="float32", micro_batches=2, optim=optim)
        run = TokenizerRun(str(tmp_path / "cache"), str(tmp_path / "prior"), model=model, loop=loop)
        stage, fake = stage_of(run), FakeTensorMode(allow_non_fake_inputs=True)
        batch = stage.batch(torch.arange(3), generator_for(0))
        batch |= dict(zip(("clips", "keys"), stage.inputs(batch), strict=True))  # encoded before
        del batch["frames"]
        for parameter in stage.module.train().parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

        def work(stage: Any = stage, batch: Any = batch) -> None:
            with sdpa_kernel([SDPBackend.MATH]):
                stage.loss(batch, generator_for(1))[0].backward()

        blank = blank_stage(run, fake)
        with fake:
            given = blank_batches(run, 3)[0][1]
            assert {name: t.shape for name, t in given.items()} == {name: t.shape for name, t in batch.items()}
            counted = micro_batch_cost(blank, given, bf16=False, on_gpu=False).peak_bytes
            encoded = encoding(blank, run, 3, bf16=False)
        assert counted == pytest.approx(most_allocated(work), rel=0.1)
        pixels = torch.zeros(3, 17, 3, 32, 32)
        with Meter() as meter, torch.no_grad():
            stage.module.first_stage.encode_clips(pixels)
        assert encoded.peak_bytes == pytest.approx(meter.peak_bytes, rel=0.1) and encoded.flops > 0
