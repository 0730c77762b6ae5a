"""Memory, micro-batches, FLOPs and days of a training run on given GPUs, before there is any data.

Counted on fake tensors: the run's own module, loss, backward pass, optimizer and recomputation. Derived from the
parameters: what DDP and FSDP2 hold beside. Assumed: the share of a GPU's peak that is reached (`mfu`), and the share
of its memory that can be used (`USABLE`).
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dicode.device import Gpu
from dicode.lm.config import DeepLMConfig
from dicode.lm.deep_lm import DeepTokenLM
from dicode.sizing.count import (
    FusedAttention,
    MicroBatchCost,
    batch_flops,
    count_parameters,
    micro_batch_cost,
    weight_bytes,
)
from dicode.tokenizer.config import TokenizerConfig
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.distributed import blocks_of, recompute_activations
from dicode.train.lm import LanguageTraining
from dicode.train.loop import Stage
from dicode.train.lora import add_adapters, train_whole
from dicode.train.optim import make_optimizers
from dicode.train.runs import LanguageRun, LoopConfig, TokenizerRun
from dicode.train.speed import FLOAT32, Meter
from dicode.train.tokenizer import TokenizerTraining, freeze

USABLE = 0.9  # of a GPU's memory: CUDA and its libraries take 1 to 2 GiB, an allocator's fragments the rest
DAY_S = 86_400


class Planner:
    """Counts of one run, shared by its plans for several numbers of GPUs."""

    def __init__(self, run: TokenizerRun | LanguageRun) -> None:
        self.run, self.loop = run, run.loop
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.costs: dict[tuple[int, bool], MicroBatchCost] = {}
        self.stages = {recomputes: blank_stage(run, self.fake) for recomputes in (False, True)}
        recompute_activations(self.stages[True].module)

    def cost(self, samples: int, recomputes: bool) -> MicroBatchCost:
        """Cost of a micro-batch of this many samples, of the longest kind."""
        if (samples, recomputes) not in self.costs:
            with self.fake:
                batch, bf16 = blank_batches(self.run, samples)[-1][1], self.loop.precision != "float32"
                cost = micro_batch_cost(self.stages[recomputes], batch, bf16)
                encoded = encoding(self.stages[recomputes], self.run, samples, bf16)
            cost = cost._replace(flops=cost.flops + encoded.flops, peak_bytes=max(cost.peak_bytes, encoded.peak_bytes))
            self.costs[samples, recomputes] = cost
        return self.costs[samples, recomputes]

    def step_flops(self) -> float:
        """FLOPs of a step without recomputation: the mean over the kinds of batches that its stage draws."""
        samples = self.loop.optim.batch_size // self.loop.micro_batches
        with self.fake:
            batches, encoded = blank_batches(self.run, samples), encoding(self.stages[False], self.run, samples, False)
        flops = sum(share * batch_flops(self.stages[False], batch, self.fake) for share, batch in batches)
        return self.loop.micro_batches * (flops + encoded.flops)

    def plan(self, gpus: int, gpu: Gpu, mfu: float) -> dict[str, Any]:
        """The run on this many GPUs, with the micro-batches of its recipe.

        Raises `ValueError` where its batch cannot be shared out among them.
        """
        loop, module, size = self.loop, self.stages[False].module, self.loop.optim.batch_size
        if loop.micro_batches % gpus or size % loop.micro_batches:
            raise ValueError(
                f"batch_size {size}: expected a multiple of micro_batches, and those of {gpus} GPUs; got "
                f"{loop.micro_batches} micro-batches"
            )
        room, state = USABLE * gpu.memory_gib * 2**30, state_bytes(module, loop, gpus)
        held, validation = sum(state.values()), validation_bytes(module, loop, gpus)
        samples, recomputes = size // loop.micro_batches, loop.checkpoint_activations
        kept, recomputed = self.cost(samples, False), self.cost(samples, True)
        used = recomputed if recomputes else kept
        possible = [n for n in range(gpus, size + 1, gpus) if size % n == 0] if validation <= room else []
        fitting = (n for n in possible if held + self.cost(size // n, recomputes).peak_bytes <= room)
        flops = self.step_flops()
        computed = flops * used.flops / kept.flops
        step_s = computed / (gpus * gpu.peak_flops * mfu)
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        return {
            "strategy": loop.strategy,
            "trained": trained,  # parameters
            "frozen": count_parameters(module) - trained,
            "steps": loop.optim.steps,
            "batch_size": size,  # samples a step, of all GPUs together
            "micro_batches": loop.micro_batches,
            "recomputes": recomputes,  # blocks' activations in the backward pass
            "bytes_held": {**state, "activations": used.peak_bytes},  # on each GPU while it trains …
            "validation_bytes": validation,  # … and while it validates, before what that computes
            # of the longest micro-batch, the most at one time
            "activations": {"kept": kept.peak_bytes, "recomputed": recomputed.peak_bytes},
            "fits": max(held + used.peak_bytes, validation) <= room,
            "fewest_micro_batches": next(fitting, None),  # that would fit; None: not even one sample at a time does
            "step_flops": round(flops),
            "computed_flops": round(computed),  # with what is computed twice
            "step_s": step_s,
            "days": loop.optim.steps * step_s / DAY_S,
        }


def training_needs(
    config: TokenizerConfig | DeepLMConfig, samples: int, gpus: Sequence[int]
) -> tuple[int, dict[int, dict[str, int]]]:
    """FLOPs of a training sample, the longest there is; and bytes on each of so many GPUs that shard the state (FSDP2).

    Each GPU takes this many samples at a time. Activations are with fused attention, `float32` or under autocast.
    """
    loop = LoopConfig(strategy="fsdp")
    if isinstance(config, TokenizerConfig):
        run: TokenizerRun | LanguageRun = TokenizerRun(model=config, loop=loop)
    else:
        run = LanguageRun(model=config, loop=loop, key_frames=config.keyframe_limit, longer=(), longer_share=())
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    stage = blank_stage(run, fake)
    with fake:
        ((_, batch),) = blank_batches(run, samples)
        costs = {name: micro_batch_cost(stage, batch, name == "bfloat16") for name in ("float32", "bfloat16")}
    needs = {}
    for n in gpus:
        held = {name.replace(" ", "_"): count for name, count in state_bytes(stage.module, loop, n).items()}
        shared, needs[n] = sum(held.values()), held
        for name, cost in costs.items():
            held |= {f"activations_{name}": cost.peak_bytes, f"together_{name}": shared + cost.peak_bytes}
    return batch_flops(stage, batch, fake) // samples, needs


def state_bytes(module: nn.Module, loop: LoopConfig, gpus: int) -> dict[str, int]:
    """Bytes on each GPU in training, without activations; all float32."""
    weights, trained, optimizer = _sizes(module, loop)
    shared = {"weights": weights, "gradients": trained, "moving average": trained, "optimizer": optimizer}
    if gpus == 1 or loop.strategy == "ddp":
        return shared  # DDP's buckets are the gradients themselves
    blocks = [[FLOAT32 * p.numel() for p in block.parameters()] for block in blocks_of(module)]
    largest = sorted(map(sum, blocks), reverse=True)[:2]  # the block that computes, and the next
    root = -sum(map(sum, blocks)) + sum(largest)
    return {
        **{name: -(-held // gpus) for name, held in shared.items()},
        "FSDP's whole weights": weights + root,
        "FSDP's whole gradients": trained + root,
    }


def validation_bytes(module: nn.Module, loop: LoopConfig, gpus: int) -> int:
    """Bytes on each GPU in validation: a second set of weights, with FSDP all of them whole."""
    weights, trained, optimizer = _sizes(module, loop)
    held = weights + 3 * trained + optimizer
    if gpus > 1 and loop.strategy == "fsdp":
        return -(-held // gpus) + weights
    return held


def _sizes(module: nn.Module, loop: LoopConfig) -> tuple[int, int, int]:
    """Bytes of all weights with buffers, of trained weights, and of the state of their optimizers."""
    weights = weight_bytes(module)
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    states = [state for optimizer in make_optimizers(module, loop.optim) for state in optimizer.state.values()]
    return weights, trained, sum(value.nbytes for state in states for value in state.values())


def blank_stage(run: TokenizerRun | LanguageRun, fake: FakeTensorMode) -> Stage:
    """A stage whose loss can be computed: without data, its weights fake CPU tensors."""
    stage: Any
    with torch.device("meta"):
        if isinstance(run, TokenizerRun):
            stage = object.__new__(TokenizerTraining)
            stage.module = VideoTokenizer(run.model)
            freeze(stage.module, run)
            if run.lora.rank:
                add_adapters(stage.module.denoiser, run.lora, run.loop.seed)
                train_whole(stage.module, run.lora.whole)
        elif isinstance(run, LanguageRun) and not run.lora.rank:
            stage = object.__new__(LanguageTraining)
            stage.module = DeepTokenLM(run.model)
            stage.module.backbone.as_on_a_gpu = True
        else:
            raise ValueError(f"{type(run).__name__}: plans are for a tokenizer or a whole language model")
    stage.run, stage.best = run, ""
    with fake:
        stage.module.to_empty(device="cpu").train()
    return cast(Stage, stage)


def blank_batches(run: TokenizerRun | LanguageRun, samples: int) -> list[tuple[float, dict[str, Tensor]]]:
    """Empty batches of each shape that the stage draws, the longest last, with their shares of the steps."""
    if isinstance(run, TokenizerRun):
        return [(1.0, _clips(run, samples))]
    kinds = [(1.0 - sum(run.longer_share), run.key_frames), *zip(run.longer_share, run.longer, strict=True)]
    return [(share, _texts(run, samples, k)) for share, k in sorted(kinds, key=lambda kind: kind[1])]


def _clips(run: TokenizerRun, samples: int) -> dict[str, Tensor]:
    model = run.model
    whole = model.first_stage.frames_a_latent > 1  # context and tail key frame are among them
    frames = model.latent_frames if whole else model.denoiser.context_frames + model.clip_span
    latents = model.first_stage.latent_channels, *model.latent_shape
    source = latents if model.resampler is None else (3, *model.frame_shape)
    return {
        "clips": torch.empty(samples, frames, *latents),
        "keys": torch.empty(2 * samples, *source),
        "has_context": torch.ones(samples, dtype=torch.bool),
        "frame_stride": torch.ones(samples),
    }


def encoding(stage: Stage, run: TokenizerRun | LanguageRun, samples: int, bf16: bool) -> Meter:
    """What it takes to encode a micro-batch's clips before its loss: nothing where their latents are cached."""
    meter = Meter()
    if isinstance(run, TokenizerRun) and run.model.first_stage.frames_a_latent > 1:
        first_stage = cast(VideoTokenizer, stage.module).first_stage
        pixels = torch.empty(samples, run.model.clip_frames, 3, *run.model.frame_shape)
        with meter, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16), FusedAttention():
            first_stage.encode_clips(pixels)
    return meter


def _texts(run: LanguageRun, samples: int, key_frames: int) -> dict[str, Tensor]:
    model = run.model
    return {
        "text_ids": torch.zeros(samples, model.text_length, dtype=torch.long),
        "tokens": torch.empty(samples, key_frames, model.block_tokens, model.token_width),
        "mask": torch.ones(samples, key_frames, dtype=torch.bool),
        "goal": torch.tensor(False),
        "first_keyframe": torch.tensor(0),
    }
