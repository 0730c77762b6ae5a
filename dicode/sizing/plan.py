"""What a training run takes on given GPUs, before there is any data: memory, micro-batches of a batch, FLOPs, days.

Counted, on fake tensors: the run's own module, loss, backward pass, optimizer and (where asked for) recomputation.
Reckoned from the module's parameters: what DDP and FSDP2 hold beside. Assumed: the share of a GPU's peak that is
reached (`mfu`), and the share of its memory that can be used (`USABLE`).
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dicode.device import Gpu
from dicode.lm.deep_lm import DeepTokenLM
from dicode.sizing.count import PieceCost, batch_flops, piece_cost
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.lm import LanguageTraining
from dicode.train.loop import Stage
from dicode.train.optim import make_optimizers
from dicode.train.parallel import blocks_of, recompute_activations
from dicode.train.runs import LanguageRun, LoopConfig, Strategy, TokenizerRun
from dicode.train.speed import FLOAT32
from dicode.train.tokenizer import TokenizerTraining

USABLE = 0.9  # of a GPU's memory: CUDA and its libraries take 1 to 2 GiB, an allocator's fragments the rest
DAY_S = 86_400


@dataclass(frozen=True)
class Plan:
    """One run on some GPUs, its batch cut into as many micro-batches as the recipe says."""

    gpus: int
    strategy: Strategy
    trained: int  # parameters
    frozen: int
    steps: int
    batch_size: int  # samples a step, of all GPUs together
    micro_batches: int
    recomputes: bool  # blocks' activations in the backward pass
    bytes_held: dict[str, int]  # on each GPU while it trains …
    validation_bytes: int  # … and while it validates, before what that computes
    activations: dict[str, int]  # of the longest piece, the most at one time: with blocks' own kept, and recomputed
    fits: bool
    fewest_micro_batches: int | None  # with which it would; None: not even one sample a piece does
    step_flops: int
    computed_flops: int  # with what is computed twice
    step_s: float
    steps_a_day: float
    days: float

    def memory(self) -> dict[str, int]:
        """Bytes on each GPU: what is held, together, and what it would be otherwise."""
        return {
            **self.bytes_held,
            "together": sum(self.bytes_held.values()),
            **{f"activations, if {how}": count for how, count in self.activations.items()},
            "in validation, before activations": self.validation_bytes,
        }


class Planner:
    """Counts of one run, kept because its plans for several numbers of GPUs share them."""

    def __init__(self, run: TokenizerRun | LanguageRun) -> None:
        self.run, self.loop = run, run.loop
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.costs: dict[tuple[int, bool], PieceCost] = {}
        self.stages = {recomputes: blank_stage(run, self.fake) for recomputes in (False, True)}
        recompute_activations(self.stages[True].module)

    def cost(self, samples: int, recomputes: bool) -> PieceCost:
        """Of a piece of this many samples, of the longest kind."""
        if (samples, recomputes) not in self.costs:
            with self.fake:
                batch = blank_batches(self.run, samples)[-1][1]
                self.costs[samples, recomputes] = piece_cost(
                    self.stages[recomputes], batch, self.loop.precision != "float32"
                )
        return self.costs[samples, recomputes]

    def plan(self, gpus: int, gpu: Gpu, mfu: float) -> Plan:
        """The run on this many GPUs. Raises `ValueError` where its batch cannot be shared out among them."""
        loop, module, size = self.loop, self.stages[False].module, self.loop.optim.batch_size
        if loop.micro_batches % gpus or size % loop.micro_batches:
            raise ValueError(
                f"batch_size {size}: expected a multiple of micro_batches, and those of {gpus} GPUs; got "
                f"{loop.micro_batches} micro-batches"
            )

        def fits(micro_batches: int) -> bool:
            return (
                sum(state.values()) + self.cost(size // micro_batches, loop.checkpoint_activations).peak_bytes <= room
            )

        room, state = USABLE * gpu.memory_gib * 2**30, state_bytes(module, loop, gpus)
        samples = size // loop.micro_batches
        kept, recomputed = self.cost(samples, False), self.cost(samples, True)
        used = recomputed if loop.checkpoint_activations else kept
        with self.fake:
            batches = blank_batches(self.run, samples)
        flops = loop.micro_batches * sum(share * batch_flops(self.stages[False], b, self.fake) for share, b in batches)
        computed = flops * used.flops / kept.flops
        step_s = computed / (gpus * gpu.peak_flops * mfu)
        validation = validation_bytes(module, loop, gpus)
        could = [micro_batches for micro_batches in range(gpus, size + 1, gpus) if size % micro_batches == 0]
        return Plan(
            gpus=gpus,
            strategy=loop.strategy,
            trained=sum(p.numel() for p in module.parameters() if p.requires_grad),
            frozen=sum(p.numel() for p in module.parameters() if not p.requires_grad),
            steps=loop.optim.steps,
            batch_size=size,
            micro_batches=loop.micro_batches,
            recomputes=loop.checkpoint_activations,
            bytes_held={**state, "activations": used.peak_bytes},
            validation_bytes=validation,
            activations={"kept": kept.peak_bytes, "recomputed": recomputed.peak_bytes},
            fits=max(sum(state.values()) + used.peak_bytes, validation) <= room,
            fewest_micro_batches=next((micro_batches for micro_batches in could if fits(micro_batches)), None)
            if validation <= room
            else None,
            step_flops=round(flops),
            computed_flops=round(computed),
            step_s=step_s,
            steps_a_day=DAY_S / step_s,
            days=loop.optim.steps * step_s / DAY_S,
        )


def state_bytes(module: nn.Module, loop: LoopConfig, gpus: int) -> dict[str, int]:
    """What each GPU holds in training beside activations; all float32."""
    weights, trained, optimizer = _sizes(module, loop)
    shared = {"weights": weights, "gradients": trained, "moving average": trained, "optimizer": optimizer}
    if gpus == 1 or loop.strategy == "ddp":
        return shared  # DDP's buckets are the gradients themselves
    blocks = [[FLOAT32 * p.numel() for p in block.parameters()] for block in blocks_of(module)]
    largest = sorted(map(sum, blocks), reverse=True)[:2]  # the one that computes, and the next
    root = -sum(map(sum, blocks)) + sum(largest)
    return {
        **{name: -(-held // gpus) for name, held in shared.items()},
        "FSDP's whole weights": weights + root,
        "FSDP's whole gradients": trained + root,
    }


def validation_bytes(module: nn.Module, loop: LoopConfig, gpus: int) -> int:
    """What each GPU holds while it validates: a second set of weights, and with FSDP all of them whole."""
    weights, trained, optimizer = _sizes(module, loop)
    held = weights + 3 * trained + optimizer
    if gpus > 1 and loop.strategy == "fsdp":
        return -(-held // gpus) + weights
    return held


def _sizes(module: nn.Module, loop: LoopConfig) -> tuple[int, int, int]:
    """Bytes of all weights with buffers, of trained weights, and of what the loop's optimizers keep for them."""
    weights = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    states = [state for optimizer in make_optimizers(module, loop.optim) for state in optimizer.state.values()]
    return weights, trained, sum(value.nbytes for state in states for value in state.values())


def blank_stage(run: TokenizerRun | LanguageRun, fake: FakeTensorMode) -> Stage:
    """A stage as far as its loss needs it: no data, and weights that are fake CPU tensors."""
    stage: Any
    with torch.device("meta"):
        if isinstance(run, TokenizerRun) and not run.freeze_key_frames and run.train_denoiser:
            stage = object.__new__(TokenizerTraining)
            stage.module, stage.head = VideoTokenizer(run.model), run.model.denoiser.context_frames
        elif isinstance(run, LanguageRun) and not run.lora.rank:
            stage = object.__new__(LanguageTraining)
            stage.module = DeepTokenLM(run.model)
            stage.module.backbone._choose_attention = _as_on_a_gpu
        else:
            raise ValueError(f"{type(run).__name__}: plans are for a whole tokenizer or a language model")
    stage.run, stage.best = run, ""
    with fake:
        stage.module.to_empty(device="cpu").train()
    return cast(Stage, stage)


def _as_on_a_gpu(trains_on_cpu: bool) -> None:
    """In place of `Backbone._choose_attention`: what `transformers` takes by itself, the fused one."""


def blank_batches(run: TokenizerRun | LanguageRun, samples: int) -> list[tuple[float, dict[str, Tensor]]]:
    """Batches of the shapes that the run's stage draws, the longest last, each with its share of the steps."""
    if isinstance(run, TokenizerRun):
        return [(1.0, _clips(run, samples))]
    kinds = [(1.0 - sum(run.longer_share), run.key_frames), *zip(run.longer_share, run.longer, strict=True)]
    return [(share, _texts(run, samples, k)) for share, k in sorted(kinds, key=lambda kind: kind[1])]


def _clips(run: TokenizerRun, samples: int) -> dict[str, Tensor]:
    model = run.model
    frames = max(
        model.denoiser.context_frames + model.clip_frames, model.denoiser.context_frames + model.tail_frame + 1
    )
    latents = model.first_stage.latent_channels, model.latent_size, model.latent_size
    source = latents if model.encoder.reads_latents else (3, model.size, model.size)
    keys = 2 * samples + run.images_per_step // run.loop.micro_batches
    return {
        "clips": torch.empty(samples, frames, *latents),
        "keys": torch.empty(keys, *source),
        "key_latents": torch.empty(keys, *latents),
        "has_context": torch.ones(samples, dtype=torch.bool),
        "frame_stride": torch.ones(samples),
    }


def _texts(run: LanguageRun, samples: int, key_frames: int) -> dict[str, Tensor]:
    model = run.model
    return {
        "text_ids": torch.zeros(samples, model.text_length, dtype=torch.long),
        "tokens": torch.empty(samples, key_frames, model.tokens_per_keyframe, model.token_width),
        "mask": torch.ones(samples, key_frames, dtype=torch.bool),
        "goal": torch.tensor(False),
        "own": torch.tensor(
            False
        ),  # draws of `self_rollout_prob` are not counted: a tenth of such a step (docs/log.md)
    }
