"""Parameters, FLOPs and memory of a model, counted without weights.

A model's own code runs on tensors with a shape only (torch's meta device, its fake tensors), in seconds and in no
memory. Not counted: work space of kernels such as cuDNN's, and what an allocator wastes.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from dicode.lm.config import DeepLMConfig
from dicode.lm.deep_lm import DeepTokenLM
from dicode.lm.heads import Head
from dicode.tokenizer.config import TokenizerConfig
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.loop import Stage
from dicode.train.speed import BFLOAT16, FLOAT32, Meter


def size_tokenizer(config: TokenizerConfig) -> dict[str, dict[str, int]]:
    """Parameters of a tokenizer, FLOPs (a multiply-add is two) to encode a key frame and to decode a clip, and bytes.

    Bytes are of one sample in float32; half of it where all is bfloat16.
    """
    guided = 1 if config.sampling.decoder_guidance == 1.0 else 2  # with guidance a clip is denoised twice, as a batch
    with torch.device("meta"):
        used = VideoTokenizer(config).eval().requires_grad_(False)
        key_frame = torch.empty(1, 3, *config.frame_shape)
        pair = torch.empty(1, 2, config.block_tokens, config.token_width)
        clip = torch.empty(1, config.latent_frames, config.first_stage.latent_channels, *config.latent_shape)
        frames = torch.empty(config.clip_span, 3, *config.frame_shape)
        encode = cost(lambda: used.tokens_of(used.source_of(key_frame)))
        pairs, clips = pair.expand(guided, -1, -1, -1), clip.expand(guided, -1, -1, -1, -1)
        motion = cost(lambda: used.motion_of(used.first_stage.encode(frames)[None])) if config.motion else None
        condition = cost(lambda: used.conditioning(pairs))
        denoise = cost(lambda: used.denoiser(clips, torch.empty(guided), used.conditioning(pairs)))
        first_stage = cost(lambda: used.frames_of(clip))
    parts = {name: count_parameters(part) for name, part in used.named_children()}
    forwards = config.sampling.steps * guided
    once, null = (denoise.flops - condition.flops) // guided, encode.flops if config.null_tokens == "grey_image" else 0
    around = condition.flops // guided + first_stage.flops + null
    return {
        "parameters": {name: count for name, count in parts.items() if count},
        "flops": {
            "key frame encoded": encode.flops,
            **({"motion of a clip encoded": motion.flops} if motion else {}),
            "denoiser once on a clip": once,
            f"clip decoded: {forwards} × denoiser, first stage": forwards * once + around,
        },
        "inference_bytes": {
            "weights": weight_bytes(used),
            "activations": max(own.peak_bytes for own in (encode, motion, denoise, first_stage) if own),
        },
    }


def size_lm(config: DeepLMConfig) -> dict[str, Any]:
    """As `size_tokenizer` for a language model at its full length: a forward pass, and its last token.

    `bytes_a_token` are those read for one deep token, all bfloat16, without embedding tables, which are looked up. Of a
    flow head one Euler step counts.
    """
    length = config.text_length + config.keyframe_limit * config.block_length
    with torch.device("meta"):
        used = DeepTokenLM(config).eval().requires_grad_(False)
        ids = torch.zeros(1, config.text_length, dtype=torch.long)
        tokens = torch.empty(1, config.keyframe_limit, config.block_tokens, config.token_width)
        read = cost(lambda: used(ids, tokens))
        ahead = used.tokens_per_step  # positions computed for as many tokens
        prompt = cost(lambda: _next_tokens(used, used.backbone.new_cache(), config.text_length + ahead))
        with Meter() as meter, FusedAttention():
            past = used.backbone.new_cache()
            used.backbone(torch.empty(1, length - ahead, config.body.width), past)
            meter.flops, meter.peak_bytes = 0, meter.bytes
            _next_tokens(used, past, ahead)
    body = config.body
    cached = 2 * body.depth * (body.key_value_heads or body.heads) * (body.width // body.heads) * length
    looked_up = sum(count_parameters(m) for m in used.modules() if isinstance(m, nn.Embedding))
    text = count_parameters(used.backbone.text_embedding)
    return {
        "parameters": {
            "body": count_parameters(used.backbone) - text,
            "text embedding": text,
            "deep-token embedding": count_parameters(used.embedding),
            "head": count_parameters(used.head),
        },
        "flops": {f"sequence of {length} read": read.flops, f"deep token{'s' * (ahead > 1)} written": meter.flops},
        "inference_bytes": {
            "weights": weight_bytes(used),
            "key/value cache": FLOAT32 * cached,
            "activations": max(meter.peak_bytes, prompt.peak_bytes) - FLOAT32 * cached,
        },
        "bytes_a_token": BFLOAT16 * (count_parameters(used) - looked_up + cached),
    }


def batch_flops(stage: Stage, batch: Any, fake: FakeTensorMode) -> int:
    """FLOPs of the loss of one batch of fake tensors and its gradients, with attention as plain products."""
    trained = [p for p in stage.module.parameters() if p.requires_grad]
    with fake, sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"), Meter() as meter:
        loss, _ = stage.loss(batch, torch.Generator())
        torch.autograd.grad(loss, trained, allow_unused=True)
    return meter.flops


class MicroBatchCost(NamedTuple):
    """Cost of one micro-batch, beside weights, gradients and optimizer."""

    flops: int  # with recomputation in the backward pass, of blocks and of fused attention
    kept_bytes: int  # kept by autograd for the backward pass
    peak_bytes: int  # the most at one time


def micro_batch_cost(stage: Stage, batch: Any, bf16: bool, on_gpu: bool = True) -> MicroBatchCost:
    """Run a stage on fake CPU tensors (its module's and the batch's), within their `FakeTensorMode`.

    With `on_gpu` attention is fused, and norms are float32 under autocast, as on CUDA.
    """
    for p in stage.module.parameters():
        p.grad = torch.empty_like(p) if p.requires_grad else None  # there already, so not counted
    modes = (FusedAttention(), GpuAutocast()) if on_gpu else (sdpa_kernel(SDPBackend.MATH), nullcontext())
    with Meter() as meter, modes[0], modes[1]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = stage.loss(batch, torch.Generator())
        kept = meter.bytes
        # `loss.backward()` would leave the modes, and blocks would recompute in other dtypes
        _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)
    return MicroBatchCost(meter.flops, kept, meter.peak_bytes)


def count_parameters(module: nn.Module) -> int:
    """Trained and frozen ones."""
    return sum(p.numel() for p in module.parameters())


def weight_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


class FusedAttention(TorchFunctionMode):
    """Keeps attention of meta tensors one operation, as on CPUs and GPUs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        args, kwargs = positional(args, kwargs or {})
        return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], scale=kwargs.get("scale"))[0]


class GpuAutocast(TorchFunctionMode):
    """Autocast as on GPUs, on CPU tensors: norms in float32, fused attention in bfloat16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_autocast_enabled("cpu"):
            if func in (functional.layer_norm, functional.group_norm, functional.rms_norm):
                args = (args[0].float(), *args[1:])
            elif func is functional.scaled_dot_product_attention:
                args, kwargs = positional(args, kwargs or {})
                args = (*(tensor.bfloat16() for tensor in args[:3]), *args[3:])
        return func(*args, **(kwargs or {}))


def positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of attention with query, key and value first, which diffusers gives by name."""
    own = dict(kwargs)
    return (*args, *(own.pop(name) for name in ("query", "key", "value")[len(args) :])), own


def cost(work: Callable[[], object]) -> Meter:
    """Cost of calling `work` on meta tensors, with fused attention."""
    with Meter() as meter, FusedAttention():
        work()
    return meter


def _next_tokens(model: DeepTokenLM, past: Any, positions: int) -> Tensor:
    hidden = model.backbone(torch.empty(1, positions, model.config.body.width), past)[:, -model.tokens_per_step :]
    mean = cast(Head, model.head).mean(hidden)
    return model.embedding(mean[:, None], model.config.keyframe_limit - 1)
