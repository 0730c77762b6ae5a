"""Sizes counted without weights are those of the real thing: published counts, closed forms, and what is allocated."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from test_tokenizer import tiny_config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from toy_runs import write_cache

from dicode.checkpoint.saving import write_config
from dicode.cli.app import main
from dicode.device import GPUS, Gpu, peak_flops
from dicode.lm.config import BodyConfig, DeepLMConfig, HeadConfig, HeadName
from dicode.lm.deep_lm import DeepTokenLM
from dicode.lm.presets import SIZES
from dicode.seeds import generator_for
from dicode.sizing.count import count_parameters, micro_batch_cost, size_lm, size_tokenizer
from dicode.sizing.plan import Planner, blank_batches, blank_stage, state_bytes, training_needs
from dicode.tokenizer.config import (
    DenoiserConfig,
    EncoderConfig,
    FirstStageConfig,
    ResamplerConfig,
    SamplingConfig,
    TokenizerConfig,
)
from dicode.tokenizer.presets import TOKENIZERS
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.loop import Stage
from dicode.train.optim import make_optimizers
from dicode.train.runs import LanguageRun, LoopConfig, OptimConfig, TokenizerRun, load_run
from dicode.train.stages import stage_of

NAMESAKES = {
    "distilgpt2": 81_912_576,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "llama-1b": 1_235_814_400,
    "llama-3b": 3_212_749_824,
}
BATCH = 2
GPT2 = DeepLMConfig(
    BodyConfig("gpt2", width=256, depth=4, heads=4, dropout=0.1),
    head=HeadConfig(components=8),
    positions=256,
    vocab_size=1000,
    token_width=48,
    max_keyframes=7,
)
LLAMA = dataclasses.replace(
    GPT2, body=dataclasses.replace(GPT2.body, kind="llama", key_value_heads=2, feed_forward=640)
)
UNET = TokenizerConfig(  # the published arrangement: no key latents, two key frames of each clip's own
    size=16,
    clip_frames=4,
    tail_frame=3,
    null_tokens="grey_image",
    first_stage=FirstStageConfig("kl", (32, 64), 4, (1,), (1,)),
    token_width=48,
    resampler=ResamplerConfig(64, 2, 2, 32, encoder=EncoderConfig(width=64, depth=2, heads=2, size=56)),
    denoiser=DenoiserConfig("unet3d", context_frames=0, depth=1, heads=2, channels=(64, 96), text_width=32),
    objective="v_prediction",
    sampling=SamplingConfig(steps=2, decoder_guidance=3.0),
)


def most_allocated(work: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator gave out at one time for `work`, as the profiler saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def real_flops(work: Callable[[], object]) -> int:
    """As torch's own counter has them, for tensors with content; fused CPU kernels would hide theirs from it."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel([SDPBackend.MATH]):
            work()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", NAMESAKES)
def test_each_language_model_is_its_namesake_with_the_named_extra_layers(name):
    config = SIZES[name]
    w, d, n = config.body.width, config.token_width, config.tokens_per_keyframe
    numbers = 2 * config.head.components * d + config.head.components
    embedding = d * w + w + w * w + w + (config.max_keyframes + n) * w
    head = w * w + w + w * numbers + numbers
    added = 66 * w  # rows of the vocabulary
    with torch.device("meta"):
        model = DeepTokenLM(config)
    assert count_parameters(model) - embedding - head - added == NAMESAKES[name]


def test_the_published_unet_has_1_44_billion_parameters():
    with torch.device("meta"):
        model = VideoTokenizer(TOKENIZERS["paper_tokenizer_256"])
    assert count_parameters(model.denoiser) == pytest.approx(1.44e9, rel=0.01)


def test_flops_of_a_language_model_are_those_of_the_closed_form():
    config, sizing = GPT2, size_lm(GPT2)
    s, w, d = 80 + 7 * 17, config.body.width, config.token_width
    attended = 2 * 2 * w * config.body.depth  # query by key, weights by value, for each pair of positions
    body = 2 * 12 * w**2 * config.body.depth
    ends = 2 * (d * w + w**2), 2 * (w**2 + w * (2 * 8 * d + 8))  # embedding, head
    read = s * body + s * s * attended + 7 * 16 * sum(ends)
    assert list(sizing["flops"].values()) == [read, body + s * attended + sum(ends)]
    no_gradient_to_tokens = 2 * d * w * 7 * 16
    assert training_needs(config, BATCH, [])[0] == 3 * read - no_gradient_to_tokens


@pytest.mark.parametrize("config", [TokenizerConfig(), UNET], ids=lambda config: config.denoiser.kind)
def test_flops_of_a_tokenizer_are_those_of_real_tensors(config):
    model, sizing = VideoTokenizer(config).eval().requires_grad_(False), size_tokenizer(config)
    frames = torch.zeros(1, 2, config.size, config.size, 3, dtype=torch.uint8)
    assert sizing["flops"]["key frame encoded"] * 2 == real_flops(lambda: model.encode(frames))
    tokens = torch.zeros(1, 2, config.tokens_per_keyframe, config.token_width)
    decoded = next(count for name, count in sizing["flops"].items() if name.startswith("clip decoded"))
    assert decoded == real_flops(lambda: list(model.decode(tokens)))


@pytest.mark.parametrize("text_length", [16, 500], ids=["long video", "long prompt"])
def test_memory_to_generate_is_what_is_allocated(text_length):
    config = dataclasses.replace(
        GPT2, body=dataclasses.replace(GPT2.body, depth=2), text_length=text_length, max_keyframes=9, positions=1024
    )
    model = DeepTokenLM(config).eval()
    ids = torch.zeros(1, config.text_length, dtype=torch.long)
    held = size_lm(config)["inference_bytes"]
    with torch.no_grad():  # the shape checks hide from `generate`'s own that it wraps a generator
        most = most_allocated(lambda: list(model.generate(ids, config.keyframe_limit)))
    assert most == pytest.approx(held["key/value cache"] + held["activations"], rel=0.1)
    assert held["weights"] == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("config", [TokenizerConfig(), UNET], ids=lambda config: config.denoiser.kind)
def test_memory_to_decode_is_what_is_allocated(config):
    model = VideoTokenizer(config).eval()
    tokens = torch.randn(1, 2, config.tokens_per_keyframe, config.token_width)
    most = most_allocated(lambda: list(model.decode(tokens, sampling=model.config.sampling.changed(steps=2))))
    assert most == pytest.approx(size_tokenizer(config)["inference_bytes"]["activations"], rel=0.1)


def test_info_of_a_preset_says_and_keeps_what_was_counted(capsys, tmp_path):
    assert main(["info", "distilgpt2", "--gpus", "1", "4", "--json", f"{tmp_path}/info.json"]) == 0
    out = capsys.readouterr().out
    assert "distilgpt2: a preset, without weights" in out
    kept = json.loads((tmp_path / "info.json").read_text())["values"]["language model"]
    sizing, (flops, needs) = size_lm(SIZES["distilgpt2"]), training_needs(SIZES["distilgpt2"], 1, [1, 4])
    assert kept["parameters"] == sizing["parameters"] and kept["flops"]["sequence trained on"] == flops
    assert kept["training_bytes"] == {"1 GPU": needs[1], "4 GPUs": needs[4]}
    weights, shared = needs[1]["weights"], ("weights", "moving_average", "gradients", "optimizer")
    assert weights == sizing["inference_bytes"]["weights"]
    assert all(needs[4][name] == -(-needs[1][name] // 4) for name in shared)  # FSDP
    assert f"{sum(sizing['parameters'].values()):,}" in out
    assert f"{needs[4]['together_float32'] / 2**30:.2f}" in out


def test_info_names_the_nearest_preset_and_refuses_no_gpus(capsys):
    assert main(["info", "gpt2-lagre"]) == 2
    assert "did you mean 'gpt2-large'?" in capsys.readouterr().err
    assert main(["info", "gpt2", "--gpus", "0"]) == 2
    assert "--gpus: expected 1 or more, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("order", ["token", "keyframe"])
@pytest.mark.parametrize("head", get_args(HeadName))
def test_every_head_and_order_is_sized(head: str, order: str) -> None:
    config = dataclasses.replace(
        SIZES["sprites"],
        body=dataclasses.replace(SIZES["sprites"].body, depth=2, width=64, heads=2),
        head=dataclasses.replace(SIZES["sprites"].head, kind=head, width=48),
        order=order,
    )
    sized = size_lm(config)
    assert sum(sized["parameters"].values()) == sum(p.numel() for p in DeepTokenLM(config).parameters())
    written = [flops for name, flops in sized["flops"].items() if name.endswith("written")]
    assert len(written) == 1 and written[0] > 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Any]:
    """A run of either kind whose data are there: a batch of 6 in 2 micro-batches, 3 key frames."""
    cache = tmp_path_factory.mktemp("cache")
    write_cache(cache, count=8)
    loop = LoopConfig(micro_batches=2, optim=OptimConfig(batch_size=6, optimizer="muon"))
    lm = dataclasses.replace(
        LLAMA, body=dataclasses.replace(LLAMA.body, width=32, depth=3, heads=2, dropout=0.0), vocab_size=300,
        token_width=6, tokens_per_keyframe=4, text_length=12,
    )  # fmt: skip
    return {
        "tokenizer": TokenizerRun(cache=str(cache), init=str(tiny_model), model=tiny_config(), loop=loop),
        "lm": LanguageRun(
            cache=str(cache), tokenizer=str(tiny_model), model=lm, loop=loop, longer=(), longer_share=(), key_frames=3
        ),
    }


def piece(stage: Stage) -> Any:
    return stage.batch(torch.arange(3), generator_for(0))


def bytes_saved(stage: Stage, batch: dict[str, Tensor], bf16: bool) -> int:
    """What autograd saves of real tensors that are neither parameters and buffers nor the batch."""
    given = {t.untyped_storage().data_ptr() for t in (*stage.module.state_dict().values(), *batch.values())}
    saved: dict[int, int] = {}
    kept = []  # else a storage's address could be another's by the end

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with saved_tensors_hooks(note, lambda tensor: tensor), sdpa_kernel([SDPBackend.MATH]), autocast:
        stage.loss(batch, generator_for(1))
    return sum(saved.values())


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", ["tokenizer", "lm"])
def test_what_a_plan_says_is_kept_for_backward_is_what_autograd_saves(runs, name: str, bf16: bool) -> None:
    real, fake = stage_of(runs[name]), FakeTensorMode(allow_non_fake_inputs=True)
    real.module.train()
    saved = bytes_saved(real, piece(real), bf16)
    blank = blank_stage(runs[name], fake)
    if name == "lm":
        blank.module.backbone.as_on_a_gpu = False  # attention as on this CPU
    with fake:
        counted = micro_batch_cost(blank, blank_batches(runs[name], 3)[0][1], bf16, on_gpu=False).kept_bytes
    assert counted == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize("name", ["tokenizer", "lm"])
def test_what_a_plan_says_a_micro_batch_takes_at_the_most_is_what_is_allocated(runs, name: str) -> None:
    real, fake = stage_of(runs[name]), FakeTensorMode(allow_non_fake_inputs=True)
    batch = piece(real)
    for parameter in real.module.train().parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None  # of micro-batches before

    def work() -> None:
        with sdpa_kernel([SDPBackend.MATH]):
            real.loss(batch, generator_for(1))[0].backward()

    blank = blank_stage(runs[name], fake)
    if name == "lm":
        blank.module.backbone.as_on_a_gpu = False  # attention as on this CPU
    with fake:
        counted = micro_batch_cost(blank, blank_batches(runs[name], 3)[0][1], bf16=False, on_gpu=False).peak_bytes
    assert counted == pytest.approx(most_allocated(work), rel=0.1)


@pytest.mark.parametrize("name", ["tokenizer", "lm"])
def test_a_plan_knows_the_shapes_of_batches(runs, name: str) -> None:
    ((share, batch),) = blank_batches(runs[name], 3)
    assert share == 1
    assert {key: (t.shape, t.dtype) for key, t in batch.items()} == {
        key: (t.shape, t.dtype) for key, t in piece(stage_of(runs[name])).items()
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["tokenizer", "lm"])
def test_the_bytes_of_weights_and_optimizer_are_those_after_a_step(runs, name: str, optimizer: Any) -> None:
    loop = dataclasses.replace(runs[name].loop, optim=OptimConfig(optimizer=optimizer))
    stage = stage_of(runs[name])
    stage.loss(piece(stage), generator_for(1))[0].backward()
    optimizers = make_optimizers(stage.module, loop.optim)
    for part in optimizers:
        part.step()
    blank = blank_stage(runs[name], FakeTensorMode(allow_non_fake_inputs=True))
    trained = [p for p in stage.module.parameters() if p.requires_grad]
    assert state_bytes(blank.module, loop, 1) == {
        "weights": sum(t.nbytes for t in (*stage.module.parameters(), *stage.module.buffers())),
        "gradients": sum(p.grad.nbytes for p in trained if p.grad is not None),
        "moving average": sum(p.nbytes for p in trained),
        "optimizer": sum(t.nbytes for part in optimizers for held in part.state.values() for t in held.values()),
    }


@pytest.mark.parametrize("name", ["tokenizer", "lm"])
def test_flops_of_a_step_are_those_of_real_tensors(runs, name: str) -> None:
    stage = stage_of(runs[name])
    real = real_flops(lambda: stage.loss(piece(stage), generator_for(1))[0].backward())
    assert Planner(runs[name]).step_flops() == 2 * real


def test_flops_of_a_step_are_the_mean_over_its_lengths(runs) -> None:
    short, long = (dataclasses.replace(runs["lm"], key_frames=k) for k in (3, 6))
    mixed = dataclasses.replace(short, longer=(6,), longer_share=(0.5,))
    ends = [Planner(run).step_flops() for run in (short, long)]
    assert Planner(mixed).plan(1, GPUS["l4"], 0.5)["step_flops"] == sum(ends) / 2


def test_fsdp_shares_the_state_out_and_holds_what_it_gathers(runs) -> None:
    run = runs["lm"]
    module = blank_stage(run, FakeTensorMode(allow_non_fake_inputs=True)).module
    sharded = dataclasses.replace(run.loop, strategy="fsdp")
    alone, several = (state_bytes(module, sharded, gpus) for gpus in (1, 4))
    assert {name: several[name] for name in alone} == {name: -(-count // 4) for name, count in alone.items()}
    block = 4 * count_parameters(module.backbone.body.layers[0])
    assert several["FSDP's whole weights"] == alone["weights"] - block  # 2 of 3 blocks at a time
    assert several["FSDP's whole gradients"] == alone["gradients"] - block
    assert state_bytes(module, run.loop, 4) == alone  # DDP


def test_a_plan_finds_the_fewest_pieces_that_fit(runs, monkeypatch) -> None:
    planner = Planner(runs["lm"])
    state = sum(state_bytes(planner.stages[False].module, runs["lm"].loop, 1).values())
    three, two = (planner.cost(samples, recomputes=False).peak_bytes for samples in (3, 2))
    assert two < three

    def plan(most: int) -> Any:
        monkeypatch.setattr("dicode.sizing.plan.USABLE", (state + most) / 2**30)
        return planner.plan(1, Gpu("", 1, 1e12), 0.5)

    roomy, tight = plan(three), plan(two)
    assert (roomy["fits"], roomy["fewest_micro_batches"]) == (True, 2)
    assert (tight["fits"], tight["fewest_micro_batches"]) == (False, 3)
    assert roomy["step_s"] == pytest.approx(roomy["step_flops"] / 0.5e12, rel=0.05)
    assert roomy["days"] * 86_400 == pytest.approx(runs["lm"].loop.optim.steps * roomy["step_s"])
    with pytest.raises(ValueError, match="those of 4 GPUs; got 2 micro-batches"):
        planner.plan(4, GPUS["l4"], 0.5)


def test_recomputing_blocks_keeps_less_and_computes_more(runs) -> None:
    model = runs["lm"].model
    deeper = dataclasses.replace(model, body=dataclasses.replace(model.body, depth=8))
    planner = Planner(dataclasses.replace(runs["lm"], model=deeper))
    kept, recomputed = (planner.cost(3, recomputes) for recomputes in (False, True))
    assert recomputed.kept_bytes < kept.kept_bytes and recomputed.peak_bytes < kept.peak_bytes
    assert recomputed.flops > kept.flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name(monkeypatch, name: str, tflops: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == tflops * 1e12


def test_the_peak_of_a_cpu_is_measured() -> None:
    assert 0 < peak_flops(torch.device("cpu")) < 1e15


def test_info_of_a_recipe_plans_all_its_runs_as_flags_change_them(capsys, tmp_path) -> None:
    recipe = tmp_path / "small.py"
    recipe.write_text(
        "from dataclasses import replace\n"
        "from dicode.lm.presets import SIZES\n"
        "from dicode.train.lm import LanguageRun\n\n\n"
        "def of_depth(depth):\n"
        "    config = SIZES['sprites']\n"
        "    return replace(config, body=replace(config.body, depth=depth))\n\n\n"
        "def tiny() -> LanguageRun:\n"
        "    return LanguageRun(model=of_depth(1), longer=(), longer_share=())\n\n\n"
        "def small() -> LanguageRun:\n"
        "    return replace(tiny(), model=of_depth(2))\n"
    )
    flags = ["--gpus", "2", "--gpu", "l4", "--micro-batches", "8", "--strategy", "fsdp", "--batch-size", "16"]
    assert main(["info", str(recipe), *flags, "--json", f"{tmp_path}/plans.json"]) == 0
    out = capsys.readouterr().out
    assert "tiny: 10,000 steps with a batch of 16" in out and "2 × l4" in out
    assert "Assumed: 40% of 121 TFLOP/s; 90% of 24 GiB" in out
    kept = json.loads((tmp_path / "plans.json").read_text())["values"]
    assert kept.keys() == {"assumed", "tiny", "small"}
    plan = kept["small"]["2 GPUs"]
    assert (plan["micro_batches"], plan["strategy"], plan["batch_size"], plan["fits"]) == (8, "fsdp", 16, True)
    assert main(["info", f"{recipe}:tiny", "--gpus", "2"]) == 2
    assert "those of 2 GPUs; got 1 micro-batches" in capsys.readouterr().err
    assert main(["info", f"{recipe}:tiny", "--gpu", "a100-80"]) == 2
    assert "did you mean 'a100-80gb'" in capsys.readouterr().err


def test_info_of_one_part_says_what_that_takes(capsys, tmp_path, tiny_model) -> None:
    tokenizer = VideoTokenizer(tiny_config())
    section = tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_config(tmp_path / "tokenizer", {"tokenizer": section})
    assert main(["info", str(tmp_path / "tokenizer")]) == 0
    out = capsys.readouterr().out
    assert f"{count_parameters(tokenizer):,}" in out and "language model" not in out
    lm = DeepTokenLM.from_pretrained(tiny_model)
    # as a language model's run leaves it: the tokenizer's configuration, not its weights
    write_config(tmp_path / "lm", {"lm": lm.save_pretrained(tmp_path / "lm"), "tokenizer": section})
    assert main(["info", str(tmp_path / "lm")]) == 0
    out = capsys.readouterr().out
    assert f"{count_parameters(lm):,}" in out and "key frame encoded" not in out


def test_the_published_plans_are_of_the_paper_recipes_and_fit() -> None:
    root = Path(__file__).parents[1]
    plans = json.loads((root / "results/plans.json").read_text(encoding="utf-8"))["values"]
    assert plans.pop("assumed")["gpu"] == "a100-80gb"
    assert len(plans) == 10
    for name, plan in ((name, plans[name]["4 GPUs"]) for name in plans):
        loop = load_run(f"{root}/recipes/paper.py:{name}").loop
        asked = (
            loop.micro_batches,
            loop.strategy,
            loop.checkpoint_activations,
            loop.optim.batch_size,
            loop.optim.steps,
        )
        assert asked == (plan["micro_batches"], plan["strategy"], plan["recomputes"], plan["batch_size"], plan["steps"])
        assert plan["fits"], name
