"""What a model takes before there is one: parameters, FLOPs and memory, counted on torch's meta device.

Tensors there have a shape and no content: the model's own code runs in seconds and in no memory, whatever its size.
`tests/test_sizing.py` compares the memory with what torch's allocator hands out on a CPU. Not seen is what a kernel
keeps to itself, such as the work space of cuDNN, nor what an allocator wastes.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from dicode.lm.deep_lm import DeepTokenLM
from dicode.lm.heads import Head
from dicode.lm.sizes import DeepLMConfig
from dicode.shapes import ClipLatents
from dicode.tokenizer.video_tokenizer import TokenizerConfig, VideoTokenizer

FLOAT32, BFLOAT16 = 4, 2  # bytes a number


@dataclass(frozen=True)
class TrainingBytes:
    """What a training step of `train/loop.py` holds with AdamW, float32 but where a name says otherwise."""

    weights: int  # frozen ones and buffers too
    moving_average: int
    gradients: int
    optimizer: int  # AdamW's two moments
    activations_float32: int  # of the whole batch, with attention as plain products: so the loop computes it in float32
    activations_bfloat16: int  # all of them, fused attention; autocast adds copies of weights and keeps some float32

    def on(self, gpus: int) -> dict[str, int]:
        """On each of this many GPUs, where all but activations is shared out among them (FSDP's full sharding)."""
        held = {name: -(-count // gpus) for name, count in asdict(self).items() if not name.startswith("activations")}
        shared = sum(held.values())
        return {
            **held,
            "activations_float32": self.activations_float32,
            "together_float32": shared + self.activations_float32,
            "activations_bfloat16": self.activations_bfloat16,
            "together_bfloat16": shared + self.activations_bfloat16,
        }


@dataclass(frozen=True)
class Sizing:
    """What was counted of one model: numbers of parameters, FLOPs (a multiply-add is two) and bytes."""

    parameters: dict[str, int]
    flops: dict[str, int]
    inference_bytes: dict[str, int]  # one sample, float32; half of it where all is bfloat16
    training_bytes: TrainingBytes
    bytes_a_token: int | None = None  # language model: read to write one deep token, all bfloat16


def size_tokenizer(config: TokenizerConfig, batch_size: int = 1) -> Sizing:
    """Count a tokenizer: a key frame encoded, a clip decoded, a training step on cached latents of clips."""
    with torch.device("meta"):
        used = VideoTokenizer(config).eval().requires_grad_(False)
        key_frame = torch.empty(1, 3, config.size, config.size)
        pair = torch.empty(1, 2, config.resampler.queries, config.resampler.token_width)
        clip = _clips(config, 1)
        encode = cost(lambda: used.tokens_of(used.source_of(key_frame)))
        told = cost(lambda: used.known(pair))
        denoise = cost(lambda: used.denoiser(clip, torch.empty(1), used.known(pair)))
        first_stage = cost(lambda: used.frames_of(clip))
        model = VideoTokenizer(config).train()
        flops, training = training_cost(model, lambda: _denoising_loss(model, batch_size))
    parts = {name: count_parameters(part) for name, part in model.named_children()}
    forwards, once = config.steps * (1 if config.guidance == 1.0 else 2), denoise.flops - told.flops
    around = told.flops + first_stage.flops + (encode.flops if config.null_image == "black" else 0)
    return Sizing(
        parameters={name: count for name, count in parts.items() if count},
        flops={
            "key frame encoded": encode.flops,
            "denoiser once on a clip": once,
            f"clip decoded: {forwards} × denoiser, first stage": forwards * once + around,
            "clip trained on": flops // batch_size,
        },
        inference_bytes={
            "weights": training.weights,
            "activations": max(encode.peak_bytes, denoise.peak_bytes, first_stage.peak_bytes),
        },
        training_bytes=training,
    )


def size_lm(config: DeepLMConfig, batch_size: int = 1) -> Sizing:
    """Count a language model at its full length: a sequence read at once, its last token written, a training step.

    Embedding tables are looked up, not read: no part of the bytes a token. Of a flow head one Euler step counts.
    """
    length = config.text_length + config.keyframe_limit * config.block_length
    with torch.device("meta"):
        used = DeepTokenLM(config).eval().requires_grad_(False)
        texts = _texts(config, 1)
        read = cost(lambda: used(*texts))
        ahead = used.together  # positions that are read to write as many tokens
        prompt = cost(lambda: _next_tokens(used, used.backbone.new_cache(), config.text_length + ahead))
        with Meter() as meter, FusedAttention():
            cache = used.backbone.new_cache()
            used.backbone(torch.empty(1, length - ahead, config.width), cache)
            meter.flops, meter.peak_bytes = 0, meter.bytes
            _next_tokens(used, cache, ahead)
        model = DeepTokenLM(config).train()
        batch = _texts(config, batch_size)
        flops, training = training_cost(model, lambda: model(*batch).loss)
    cached = 2 * config.depth * (config.key_value_heads or config.heads) * (config.width // config.heads) * length
    looked_up = sum(count_parameters(m) for m in model.modules() if isinstance(m, nn.Embedding))
    text = count_parameters(model.backbone.body.get_input_embeddings())
    return Sizing(
        parameters={
            "body": count_parameters(model.backbone) - text,
            "text embedding": text,
            "deep-token embedding": count_parameters(model.embedding),
            "head": count_parameters(model.head),
        },
        flops={
            f"sequence of {length} read": read.flops,
            f"deep token{'s' * (ahead > 1)} written": meter.flops,
            "sequence trained on": flops // batch_size,
        },
        inference_bytes={
            "weights": training.weights,
            "key/value cache": FLOAT32 * cached,
            "activations": max(meter.peak_bytes, prompt.peak_bytes) - FLOAT32 * cached,
        },
        training_bytes=training,
        bytes_a_token=BFLOAT16 * (count_parameters(model) - looked_up + cached),
    )


def training_cost(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[int, TrainingBytes]:
    """FLOPs and memory of a training step. As in the loop, the last step's gradients stay until the loss is known."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops, activations = [], []
    for float_bytes, attention in ((FLOAT32, nullcontext()), (BFLOAT16, FusedAttention())):
        model.zero_grad(set_to_none=True)
        with Meter(float_bytes) as meter, attention:
            value = loss()
            forward_peak = meter.peak_bytes
            value.backward()
        flops.append(meter.flops)
        activations.append(max(forward_peak, meter.peak_bytes - float_bytes * trained))
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    one = FLOAT32 * trained
    return flops[0], TrainingBytes(weights, one, one, 2 * one, *activations)


def count_parameters(module: nn.Module) -> int:
    """Numbers that training changes, or froze."""
    return sum(p.numel() for p in module.parameters())


class Meter(TorchDispatchMode):
    """Counts the FLOPs of what runs inside it, and the bytes of the tensors made there until their last use is gone.

    `float_bytes` counts every floating-point number as if it had this many. The formulas for FLOPs are those of
    torch's `FlopCounterMode`; following storages is the idea of its `MemTracker`, which is no public interface.
    """

    def __init__(self, float_bytes: int = FLOAT32) -> None:
        super().__init__()
        self.float_bytes = float_bytes
        self.held: dict[int, int] = {}  # bytes of each storage
        self.flops = self.bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return True  # transformers asks whether all positions follow one another
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._hold(tensor)
        return result

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.held:
            self.held[key] = size * self.float_bytes // FLOAT32 if tensor.is_floating_point() else size
            self.bytes += self.held[key]
            self.peak_bytes = max(self.peak_bytes, self.bytes)
            weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        self.bytes -= self.held.pop(key)


class FusedAttention(TorchFunctionMode):
    """Keeps attention in one operation, as CPUs and GPUs compute it; torch takes that of meta tensors apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], scale=(kwargs or {}).get("scale"))[0]


def cost(work: Callable[[], object]) -> Meter:
    """What calling `work` on meta tensors takes, with fused attention; its result is let go."""
    with Meter() as meter, FusedAttention():
        work()
    return meter


def _clips(config: TokenizerConfig, batch_size: int) -> ClipLatents:
    side = config.latent_size
    return torch.empty(batch_size, config.clip_frames, config.first_stage.latent_channels, side, side)


def _denoising_loss(model: VideoTokenizer, batch_size: int) -> Tensor:
    """As stage 1 has it, without the single frames that the key-frame head learns from beside the clips."""
    clips, encoder = _clips(model.config, batch_size), model.config.encoder
    tokens = model.tokens_of(torch.empty(2 * batch_size, encoder.channels, encoder.size, encoder.size))
    known = model.known(rearrange(tokens, "(b two) n d -> b two n d", two=2))
    return functional.mse_loss(model.denoiser(clips, torch.empty(batch_size), known), torch.empty_like(clips))


def _texts(config: DeepLMConfig, batch_size: int) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(batch_size, config.text_length, dtype=torch.long)
    return ids, torch.empty(batch_size, config.keyframe_limit, config.tokens_per_keyframe, config.token_width)


def _next_tokens(model: DeepTokenLM, cache: Any, positions: int) -> Tensor:
    hidden = model.backbone(torch.empty(1, positions, model.config.width), cache)[:, -model.together :]
    mean = cast(Head, model.head).mean(hidden)
    return model.embedding(mean[:, None], model.config.keyframe_limit - 1)
