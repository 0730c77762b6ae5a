"""Runs of the stages, as plain values, and the recipes that return them: functions of a Python file, `FILE.py:RUN`.

Importing it needs no torch, so that help comes at once.
"""

import math
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any, Literal

from dicode.config import (
    BatchSize,
    Count,
    Factor,
    Guidance,
    LearningRate,
    Positive,
    Precision,
    Range,
    Seed,
    Share,
    Side,
    TrainingSteps,
    Whole,
)
from dicode.config.user_code import RecipeError, load_file, load_function, run_own
from dicode.lm.config import DeepLMConfig
from dicode.lm.presets import SIZES
from dicode.tokenizer.config import FirstStageConfig, TokenizerConfig

Strategy = Literal["ddp", "fsdp"]
Tracker = Literal["none", "tensorboard", "trackio", "wandb"]
# Clips that a run validates with: spread evenly over the validation split, the same ones every time, however many
# there are in all. 512 give a loss to 2 % where clips differ by half of it.
VALIDATION_CLIPS = 512


@dataclass(frozen=True)
class OptimConfig:
    """Warm-up, a constant stretch, and a linear decay over the last `decay_fraction` of the steps.

    `muon` orthogonalises the updates of linear layers' weights, scaled to AdamW's size so that one `lr` serves both
    (arXiv 2502.16982); all other parameters stay with AdamW. `weight_decay` is for what multiplies activations: not for
    norms, biases, embeddings and other learned tables.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    steps: TrainingSteps = 10_000
    batch_size: BatchSize = 32  # samples a step, of all processes together
    lr: LearningRate = 1e-3
    warmup_steps: Whole = 200
    decay_fraction: Share = 0.2
    beta1: Share = 0.9
    beta2: Share = 0.95
    weight_decay: Share = 0.01
    clip_norm: Positive = 1.0
    ema_decay: Share = 0.999

    def lr_at(self, step: int) -> float:
        """Learning rate of `step`, counted from 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        left = (self.steps - step) / max(1, round(self.steps * self.decay_fraction))
        return self.lr * min(warm, 1.0, left)


@dataclass(frozen=True)
class LoopConfig:
    """What the loop itself needs; `precision` is that of matrix products, by autocast: weights are float32."""

    seed: Seed = 0
    device: str = "auto"
    precision: Precision = "auto"  # bfloat16 where the device has it
    compile: bool = False  # torch.compile: a minute once, then 1.4× the speed on CPUs; language model (docs/log.md)
    micro_batches: Count = 1  # in a step's batch, of samples of like size, for all processes; changes random numbers
    strategy: Strategy = "ddp"  # of several processes: each with all weights, or each with its share
    checkpoint_activations: bool = False  # compute blocks a second time in the backward pass instead of keeping them
    prefetch: bool = False  # draw the next step's batch in a thread meanwhile: for accelerators
    skip_non_finite: Whole = 0  # steps with NaN or infinity to leave out, and count, before the run stops
    tracker: Tracker = "tensorboard"
    log_samples: bool = False  # the sample numbers of every step, in log.jsonl
    log_every: Count = 20
    best: str | None = None  # validation metric that picks the weights of best/, '-' before it where less is better
    evaluate_every: Count = 1000
    checkpoint_every: Count = 500
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True)
class LoRAConfig:
    """Adapters that train in place of the weights of `init`; rank 0: none, the weights themselves train."""

    rank: Annotated[int, Range(0, 4096)] = 0
    alpha: Positive = 16.0  # what an adapter adds is scaled by alpha/rank
    dropout: Share = 0.0  # share of A that is left out of a training step
    targets: tuple[str, ...] = ()  # layers, by the ends of their names (q_proj v_proj); none named: every layer
    whole: tuple[str, ...] = ()  # parts of the names of weights that are trained whole, beside the adapters


@dataclass(frozen=True)
class FirstStageRun:
    """Train the image autoencoder on all frames of a cache; `init` continues from a checkpoint folder's weights.

    With `freeze_encoder` the decoder is trained alone: latents, hence deep tokens and what was trained on them, stay.
    """

    cache: str = "cache/sprites"
    init: str | None = None
    freeze_encoder: bool = False
    tokenizer: str | None = None  # on this first stage: half of the latents come from deep tokens, as they will in use
    rendered_share: Share = 0.0  # of the images: frames that this tokenizer renders of training clips, with …
    rendered_guidance: Guidance = 2.5  # … this decoder guidance
    rendered_motion_scale: Factor = 1.0  # … and this motion scale (`scale_motion`)
    model: FirstStageConfig = field(default_factory=FirstStageConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    perceptual_weight: Factor = 0.0  # of `perceptual_distance`; squared error alone leaves frames blurred
    adversarial_weight: Factor = 0.0  # of a `FeatureDiscriminator`, trained beside it; needs a perceptual_weight
    mirror: bool = True  # half of the images mirrored


@dataclass(frozen=True)
class LinearCodeRun:
    """Fit the linear code of a tokenizer, hence its deep tokens, to the latents of training frames; no step is taken.

    The denoiser of the tokenizer that it writes has random weights, and so has what computes motion tokens.
    """

    cache: str = "cache/sprites"
    first_stage: str = "runs/sprites-first_stage/best"
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    mirror: bool = False  # fit to mirrored frames too; set it as in the denoiser's run, which reuses the latents
    device: str = "auto"
    precision: Precision = "auto"


@dataclass(frozen=True)
class StreamConfig:
    """How a tokenizer's run decodes the clips of archives, where `cache` is an index of them (`dicode data stream`)."""

    workers: Whole = 4  # processes that decode, for each training process; 0: itself
    # height and width of frames, each of about the area of the model's frames; a video has the nearest shape, a
    # micro-batch one; none: the model's own
    buckets: tuple[tuple[Side, Side], ...] = ()


@dataclass(frozen=True)
class TokenizerRun:
    """Train the denoiser of a tokenizer, its resampler, motion encoder and motion decoder, from `init`.

    First stage, and code or image encoder, stay as in `init`. `trains` names a part that is trained alone: `code`, a
    learned code of key frames, by their squared error; `motion`, motion encoder and decoder, by the squared error of
    expected clips; `denoiser`, so that deep tokens, and what was trained on them, stay.
    """

    cache: str = "cache/sprites"  # of frames, or an index of archives whose clips are decoded while it trains
    init: str = "runs/sprites-linear_code/best"
    init_denoiser: str | None = None  # a checkpoint with the same denoiser, to begin with that part of it
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)  # of the denoiser, which is then trained alone
    token_noise: Factor = 0.2  # highest deviation of noise on the decoder's tokens (DESIGN §2.4)
    drop_tokens: Share = 0.1  # probability of the null condition of guidance
    mirror: bool = False  # half of the clips mirrored: twice the latents to compute and keep
    trains: Literal["all", "code", "motion", "denoiser"] = "all"
    whole_clips: bool = False  # clips lie where a language model has them: whole clips after their video's start
    frame_strides: tuple[int, int] | None = None  # least and highest, drawn for each clip; none: the model's own


@dataclass(frozen=True)
class AugmentConfig:
    """How the samples of a language model vary: which caption, which of its words, which view of the video."""

    long_captions: Share = 0.4  # probability of the expanded caption, where there is one
    null_captions: Share = 0.1  # probability of no text, for guidance
    word_dropout: Share = 0.3  # probability of dropping words …
    dropped_words: Share = 0.3  # … and the share dropped
    word_swaps: Share = 0.0  # probability of replacing words by words of other captions (studies/heads) …
    swapped_words: Share = 0.5  # … and the share replaced
    views: Whole = 0  # augmented copies of every training video (`View`), whose first key frame has no loss
    view_share: Share = 0.5  # probability of such a view
    # begin the key frames of a step at a random number and place, so that longer videos meet no untrained ones
    shift_key_frames: bool = False


@dataclass(frozen=True)
class LanguageRun:
    """Train a language model on the deep tokens of a tokenizer; `init` continues from another run's weights.

    `body` begins from a language model for text, a GPT-2 or Llama of `transformers` with the sizes of `model`, and
    extends its vocabulary. Without either, the vocabulary is learnt from the captions or taken from `vocabulary`.
    """

    cache: str = "cache/sprites"
    tokenizer: str = "runs/sprites-linear_code/best"
    init: str | None = None
    body: str | None = None  # a folder, or an id of Hugging Face
    vocabulary: str | None = None  # a folder with tokenizer.json, or with vocab.json and merges.txt
    model: DeepLMConfig = field(default_factory=lambda: SIZES["sprites"])
    loop: LoopConfig = field(default_factory=LoopConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    key_frames: Count = 3  # of most samples: 4 s
    longer: tuple[Count, ...] = (9, 31)  # key frames of the steps that teach long videos, up to a minute …
    longer_share: tuple[Share, ...] = (0.08, 0.02)  # … and the share of steps of each
    end_frame_prob: Share = 0.0  # probability of conditioning on the last key frame (`model.end_frame_conditioning`)
    # probability of beginning where the video does; else anywhere in a loop, or whole clips into a longer video
    from_start: Share = 0.75
    scorer: str | None = None  # FILE.py:FUNCTION, as `dicode evaluate` takes it, on videos of a few validation captions


def load_run(recipe: str) -> Any:
    """Call RUN of `FILE.py:RUN`; raises `ValueError` where it is no function that returns a dataclass."""
    run = run_own(load_function(recipe, "recipe", "FILE.py:RUN, as in recipes/sprites.py:lm", "train"), recipe)
    if not is_dataclass(run):
        raise RecipeError(f"{recipe}: expected it to return a run (a dataclass), got {type(run).__name__}")
    return run


def runs_of(file: str) -> dict[str, Any]:
    """All runs of a recipe file by their names, in its order: functions without parameters that return a …Run."""
    module = load_file(Path(file), "recipe", "train")
    names = [
        name
        for name, value in vars(module).items()
        if isinstance(value, FunctionType) and value.__module__ == module.__name__ and not name.startswith("_")
        if not value.__code__.co_argcount and str(value.__annotations__.get("return")).rstrip("'>").endswith("Run")
    ]
    if not names:
        raise RecipeError(f"{file}: expected functions that return a run, as 'def lm() -> LanguageRun:', found none")
    return {name: load_run(f"{file}:{name}") for name in names}


def stages_of(file: str) -> tuple[dict[str, Any], dict[str, float], dict[str, Any]]:
    """Runs of a recipe file in the order of its `STAGES`, their shares of the time, and its `SAMPLING` if it has one.

    Raises `RecipeError` where the file does not say how to train it whole.
    """
    module = load_file(Path(file), "recipe", "train")
    shares: Any = getattr(module, "STAGES", None)
    given = shares.values() if isinstance(shares, dict) else ()
    if not given or not all(isinstance(share, int | float) and 0 < share < math.inf for share in given):
        raise RecipeError(
            f"{file}: expected STAGES, a dict of its runs in order with their shares of the time, such as "
            f"{{'first_stage': 0.3, 'lm': 0.7}}, got {shares!r}; or name one run, as in {file}:lm"
        )
    runs = {name: load_run(f"{file}:{name}") for name in shares}
    return runs, {name: float(share) for name, share in shares.items()}, dict(getattr(module, "SAMPLING", {}))
