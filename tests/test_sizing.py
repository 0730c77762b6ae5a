"""Sizes counted without weights are those of the real thing: published counts, closed forms, and what is allocated."""

import dataclasses
import functools
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dicode.cli import main
from dicode.lm.deep_lm import DeepTokenLM
from dicode.lm.sizes import SIZES, DeepLMConfig
from dicode.sizing import TrainingBytes, count_parameters, size_lm, size_tokenizer
from dicode.tokenizer.diffusion import DiffusionConfig
from dicode.tokenizer.encoder import EncoderConfig
from dicode.tokenizer.first_stage import FirstStageConfig
from dicode.tokenizer.known import DenoiserConfig
from dicode.tokenizer.resampler import ResamplerConfig
from dicode.tokenizer.sizes import TOKENIZERS
from dicode.tokenizer.video_tokenizer import TokenizerConfig, VideoTokenizer
from dicode.train.loop import OptimConfig, make_optimizers

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
    body="gpt2",
    width=256,
    depth=4,
    heads=4,
    positions=256,
    vocab_size=1000,
    token_width=48,
    max_keyframes=7,
    components=8,
    dropout=0.1,
)
LLAMA = dataclasses.replace(GPT2, body="llama", key_value_heads=2, feed_forward=640)
UNET = TokenizerConfig(  # the published arrangement: no key-frame head, two key frames of each clip's own
    size=16,
    clip_frames=4,
    tail_frame=3,
    null_image="black",
    first_stage=FirstStageConfig("kl", (32, 64), 4, (1,), (1,)),
    encoder=EncoderConfig("clip", width=64, depth=2, heads=2, size=56, patch=14, channels=3),
    resampler=ResamplerConfig(64, 2, 2, 32, 16, 64, 17, 48),
    denoiser=DenoiserConfig(
        "unet3d", context_frames=0, uses_key_latents=False, depth=1, heads=2, channels=(64, 96), text_width=32
    ),
    diffusion=DiffusionConfig("v_prediction"),
    steps=2,
    guidance=3.0,
)

lm_sizing, tokenizer_sizing = functools.cache(size_lm), functools.cache(size_tokenizer)


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


def texts(config: DeepLMConfig, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(batch, config.text_length, dtype=torch.long)
    return ids, torch.randn(batch, config.keyframe_limit, config.tokens_per_keyframe, config.token_width)


def denoising_loss(model: VideoTokenizer) -> Tensor:
    config, encoder = model.config, model.config.encoder
    dtype = model.resampler.latents.dtype
    clips = torch.randn(BATCH, config.clip_frames, config.first_stage.latent_channels, *[config.latent_size] * 2)
    tokens = model.tokens_of(torch.randn(2 * BATCH, encoder.channels, encoder.size, encoder.size, dtype=dtype))
    known = model.known(tokens.unflatten(0, (BATCH, 2)).to(dtype))
    return functional.mse_loss(model.denoiser(clips.to(dtype), torch.full((BATCH,), 500.0), known), clips)


def train_twice(model: torch.nn.Module, loss: Callable[[], Tensor]) -> None:
    """Two steps in the order of `train/loop.py`, with all that it keeps beside the model."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = make_optimizers(model, OptimConfig())
    average = [p.detach().clone() for p in trained]
    with sdpa_kernel([SDPBackend.MATH]):
        for _ in range(2):
            value = loss()
            model.zero_grad(set_to_none=True)
            value.backward()
            for optimizer in optimizers:
                optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, trained, 0.1)


def assert_allocates(training: Callable[[], object], expected: TrainingBytes) -> None:
    """All together, and what is left of it for activations."""
    most, together = most_allocated(training), expected.on(1)["together_float32"]
    assert most == pytest.approx(together, rel=0.1)
    assert most - together + expected.activations_float32 == pytest.approx(expected.activations_float32, rel=0.1)


@pytest.mark.parametrize("name", NAMESAKES)
def test_each_language_model_is_its_namesake_with_the_named_extra_layers(name):
    config = SIZES[name]
    w, d, n = config.width, config.token_width, config.tokens_per_keyframe
    numbers = 2 * config.components * d + config.components
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
    config, sizing = GPT2, lm_sizing(GPT2, BATCH)
    s, w, d = 80 + 7 * 17, config.width, config.token_width
    attended = 2 * 2 * w * config.depth  # query by key, weights by value, for each pair of positions
    body = 2 * 12 * w**2 * config.depth
    ends = 2 * (d * w + w**2), 2 * (w**2 + w * (2 * 8 * d + 8))  # embedding, head
    read = s * body + s * s * attended + 7 * 16 * sum(ends)
    assert list(sizing.flops.values())[:2] == [read, body + s * attended + sum(ends)]
    no_gradient_to_tokens = 2 * d * w * 7 * 16
    assert sizing.flops["sequence trained on"] == 3 * read - no_gradient_to_tokens


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=lambda config: config.body)
def test_flops_of_a_language_model_are_those_of_real_tensors(config):
    model, sizing = DeepTokenLM(config), lm_sizing(config, BATCH)
    real = real_flops(lambda: model(*texts(config)).loss.backward())
    assert sizing.flops["sequence trained on"] * BATCH == real


@pytest.mark.parametrize("config", [TokenizerConfig(), UNET], ids=lambda config: config.denoiser.kind)
def test_flops_of_a_tokenizer_are_those_of_real_tensors(config):
    model, sizing = VideoTokenizer(config), tokenizer_sizing(config, BATCH)
    assert sizing.flops["clip trained on"] * BATCH == real_flops(lambda: denoising_loss(model).backward())
    model.eval().requires_grad_(False)
    frames = torch.zeros(1, 2, config.size, config.size, 3, dtype=torch.uint8)
    assert sizing.flops["key frame encoded"] * 2 == real_flops(lambda: model.encode(frames))
    tokens = torch.zeros(1, 2, config.resampler.queries, config.resampler.token_width)
    decoded = next(count for name, count in sizing.flops.items() if name.startswith("clip decoded"))
    assert decoded == real_flops(lambda: list(model.decode(tokens)))


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=lambda config: config.body)
def test_memory_to_train_a_language_model_is_what_is_allocated(config):
    def work() -> None:
        model = DeepTokenLM(config)
        train_twice(model, lambda: model(*texts(config)).loss)

    assert_allocates(work, lm_sizing(config, BATCH).training_bytes)


@pytest.mark.parametrize("text_length", [16, 500], ids=["long video", "long prompt"])
def test_memory_to_generate_is_what_is_allocated(text_length):
    config = dataclasses.replace(GPT2, text_length=text_length, max_keyframes=9, depth=2, positions=1024)
    model = DeepTokenLM(config).eval()
    ids = texts(config, 1)[0]
    held = lm_sizing(config, BATCH).inference_bytes
    with torch.no_grad():  # the shape checks hide from `generate`'s own that it wraps a generator
        most = most_allocated(lambda: list(model.generate(ids, config.keyframe_limit)))
    assert most == pytest.approx(held["key/value cache"] + held["activations"], rel=0.1)
    assert held["weights"] == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("config", [TokenizerConfig(), UNET], ids=lambda config: config.denoiser.kind)
def test_memory_to_train_a_tokenizer_is_what_is_allocated(config):
    def work() -> None:
        model = VideoTokenizer(config)
        train_twice(model, lambda: denoising_loss(model))

    assert_allocates(work, tokenizer_sizing(config, BATCH).training_bytes)


def test_memory_to_train_in_bfloat16_is_what_is_allocated():
    model = VideoTokenizer(UNET).bfloat16()
    model.normalizer.float()  # torch's batch normalisation on CPUs takes no bfloat16
    most = most_allocated(lambda: denoising_loss(model).backward())
    assert most == pytest.approx(tokenizer_sizing(UNET, BATCH).training_bytes.activations_bfloat16, rel=0.1)


@pytest.mark.parametrize("config", [TokenizerConfig(), UNET], ids=lambda config: config.denoiser.kind)
def test_memory_to_decode_is_what_is_allocated(config):
    model = VideoTokenizer(config).eval()
    tokens = torch.randn(1, 2, config.resampler.queries, config.resampler.token_width)
    most = most_allocated(lambda: list(model.decode(tokens, steps=2)))
    assert most == pytest.approx(tokenizer_sizing(config, BATCH).inference_bytes["activations"], rel=0.1)


def test_all_but_activations_is_shared_out_among_gpus():
    alone = TrainingBytes(400, 300, 300, 600, 50, 25)
    assert alone.on(1)["together_float32"] == 1650
    assert alone.on(4) == {
        "weights": 100,
        "moving_average": 75,
        "gradients": 75,
        "optimizer": 150,
        "activations_float32": 50,
        "together_float32": 450,
        "activations_bfloat16": 25,
        "together_bfloat16": 425,
    }


def test_info_of_a_preset_says_and_keeps_what_was_counted(capsys, tmp_path):
    assert main(["info", "distilgpt2", "--gpus", "1", "4", "--json", f"{tmp_path}/info.json"]) == 0
    out = capsys.readouterr().out
    assert "distilgpt2: a preset, without weights" in out
    kept = json.loads((tmp_path / "info.json").read_text())["values"]["language model"]
    sizing = size_lm(SIZES["distilgpt2"])
    assert kept["parameters"] == sizing.parameters
    assert kept["training_bytes"] == {"1 GPU": sizing.training_bytes.on(1), "4 GPUs": sizing.training_bytes.on(4)}
    assert f"{sum(sizing.parameters.values()):,}" in out
    assert f"{sizing.training_bytes.on(4)['together_float32'] / 2**30:.2f}" in out


def test_info_names_the_nearest_preset_and_refuses_no_gpus(capsys):
    assert main(["info", "gpt2-lagre"]) == 2
    assert "did you mean 'gpt2-large'?" in capsys.readouterr().err
    assert main(["info", "gpt2", "--gpus", "0"]) == 2
    assert "at least 1, got 1 and [0]" in capsys.readouterr().err


@pytest.mark.parametrize("order", ["token", "keyframe"])
@pytest.mark.parametrize("head", ["gaussian", "regression", "flow"])
def test_every_head_and_order_is_sized(head: str, order: str) -> None:
    config = dataclasses.replace(SIZES["sprites"], head=head, order=order, depth=2, width=64, heads=2, flow_width=48)
    sized = size_lm(config)
    assert sum(sized.parameters.values()) == sum(p.numel() for p in DeepTokenLM(config).parameters())
    written = [flops for name, flops in sized.flops.items() if name.endswith("written")]
    assert len(written) == 1 and written[0] > 0
