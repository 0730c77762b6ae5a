"""A model of your own data, about a thousand clips, in an hour on any two CPU cores, with or without bfloat16.

    dicode data cache my_clips/ -o cache/mine
    dicode data check cache/mine                                    # statistics, and settings that suit these clips
    dicode train recipes/small.py --all --cache cache/mine --minutes 55 -o my_model
    dicode generate "…" --model my_model

64×64, 8 fps, clips of 16 frames. docs/train.md explains every stage and the figures that its log should show.

`SIZE` is the one dial: every width is a multiple of it, and time grows with its square. 16 suits an hour; 24 takes
twice the time, 32 four times, for a GPU or a night. Some fields must agree between stages, since each reads the output
of those before it: `MODEL` (first stage, deep tokens, denoiser) in the first three, its `token_width` and number of
tokens also in the language model. All others may be changed stage by stage.
"""

from dataclasses import replace

from dicode.lm.config import BodyConfig, HeadConfig
from dicode.lm.presets import SIZES
from dicode.tokenizer.config import DenoiserConfig, FirstStageConfig, TokenizerConfig
from dicode.train.runs import (
    AugmentConfig,
    FirstStageRun,
    LanguageRun,
    LinearCodeRun,
    LoopConfig,
    OptimConfig,
    TokenizerRun,
)

SIZE = 16

MODEL = TokenizerConfig(
    # no convolutions at full resolution but the last one: half of the time, and flat areas need none
    first_stage=FirstStageConfig(channels=(3 * SIZE,) * 4, encoder_blocks=(0, 1, 2, 2), decoder_blocks=(2, 2, 1, 0)),
    denoiser=DenoiserConfig(predict_residual=True, width=12 * SIZE, heads=3, fine_width=4 * SIZE, fine_blocks=2),
)

# In order, with the share of the time that each is worth.
STAGES = {"first_stage": 0.26, "linear_code": 0.02, "denoiser": 0.28, "lm": 0.44}

# How a model of an hour is sampled; `dicode tune` finds what suits one that was trained.
SAMPLING = {"guidance": 2.0, "variance_scale": 0.5, "decoder_guidance": 2.0, "steps": 12}


def first_stage() -> FirstStageRun:
    """Image autoencoder, 8× smaller along each side, 16 channels. Good enough: 26 dB PSNR on validation frames."""
    return FirstStageRun(
        model=MODEL.first_stage,
        loop=_loop(OptimConfig(steps=1500, batch_size=24, lr=1.5e-3, decay_fraction=0.5, ema_decay=0.995)),
    )


def linear_code() -> LinearCodeRun:
    """The deep tokens: a linear code of the latents, fitted in closed form."""
    return LinearCodeRun(first_stage="runs/small-first_stage/best", model=MODEL)


def denoiser() -> TokenizerRun:
    """The video diffusion decoder on clips, tokens fixed."""
    return TokenizerRun(
        init="runs/small-linear_code/best",
        model=MODEL,
        loop=_loop(OptimConfig(steps=2200, batch_size=16, lr=1.5e-3, decay_fraction=0.5, ema_decay=0.997)),
    )


def lm() -> LanguageRun:
    """A small Llama that predicts deep tokens from a caption."""
    return LanguageRun(
        tokenizer="runs/small-linear_code/best",
        model=replace(
            SIZES["sprites"],
            body=BodyConfig("llama", width=8 * SIZE, depth=5, heads=2, feed_forward=16 * SIZE),
            head=HeadConfig("flow", width=8 * SIZE),
            token_width=MODEL.token_width,
            vocab_size=1024,
            text_length=24,
            positions=24 + 16 * 33,
            input_noise=1.0,
            order="keyframe",
            end_frame_conditioning=True,
        ),
        key_frames=3,
        longer=(),
        longer_share=(),
        from_start=0.8,
        end_frame_prob=0.1,
        # a higher word_dropout would leave one in four captions of one word without any
        augment=AugmentConfig(long_captions=0.3, word_dropout=0.1, word_swaps=0.1),
        loop=_loop(OptimConfig(steps=3500, batch_size=32, lr=2e-3, decay_fraction=0.7, ema_decay=0.997)),
    )


def _loop(optim: OptimConfig) -> LoopConfig:
    """Eight evaluations; AdamW, which without bfloat16 units makes two steps in the time of one with Muon."""
    every = -(-optim.steps // 8)
    return LoopConfig(evaluate_every=every, checkpoint_every=every, optim=replace(optim, warmup_steps=50))
