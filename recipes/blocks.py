r"""The bundled model `blocks`: captions of one to five clauses, in order, on scenes that `dicode` draws.

64×64, 8 fps, 16 frames a clip (docs/blocks.md).

    dicode data blocks -n 40000 --key-frames-only -o cache/blocks-keys --workers 2
    dicode data blocks -n 20000 --within 0.2 -o cache/blocks --workers 2
    dicode train recipes/blocks.py:first_stage
    dicode train recipes/blocks.py:code
    dicode train recipes/blocks.py:lm                   # key frames alone; may be trained beside the next two
    dicode train recipes/blocks.py:motion
    dicode train recipes/blocks.py:denoiser
    dicode train recipes/blocks.py:first_stage_decoder
    dicode train recipes/blocks.py:lm_motion
    dicode assemble runs/blocks-denoiser/best runs/blocks-lm_motion/best \
        --first-stage runs/blocks-first_stage_decoder/best -o blocks --dtype int8

The same command resumes an interrupted run. Where training stands: studies/blocks. Hours and results: docs/log.md.
"""

from dataclasses import replace

from dicode.lm.config import BodyConfig, HeadConfig
from dicode.lm.presets import SIZES
from dicode.tokenizer.presets import TOKENIZERS
from dicode.train.runs import (
    AugmentConfig,
    FirstStageRun,
    LanguageRun,
    LoopConfig,
    OptimConfig,
    TokenizerRun,
)

CACHE, KEY_FRAMES = "cache/blocks", "cache/blocks-keys"
MODEL = TOKENIZERS["blocks"]
STILL = replace(MODEL, motion=None)

# For `dicode train recipes/blocks.py --all`: in order, with the share of the time that each is worth.
STAGES = {
    "first_stage": 0.1, "code": 0.08, "lm": 0.2, "motion": 0.1, "denoiser": 0.12, "first_stage_decoder": 0.1,
    "lm_motion": 0.3,
}  # fmt: skip
SAMPLING = {"guidance": 2.5, "steps": 0, "dead_band": 2.0}


def first_stage() -> FirstStageRun:
    """Image autoencoder, 8× smaller along each side, 16 channels."""
    return FirstStageRun(
        cache=CACHE,
        model=MODEL.first_stage,
        mirror=False,
        loop=LoopConfig(
            evaluate_every=200,
            checkpoint_every=100,
            optim=OptimConfig(
                steps=3600, batch_size=16, lr=1.5e-3, warmup_steps=100, decay_fraction=0.5, ema_decay=0.995
            ),
        ),
    )


def _loop(steps: int, batch_size: int, lr: float) -> LoopConfig:
    optim = OptimConfig(
        optimizer="muon",
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        warmup_steps=100,
        decay_fraction=0.5,
        ema_decay=0.998,
    )
    return LoopConfig(evaluate_every=500, checkpoint_every=100, optim=optim)


def code() -> TokenizerRun:
    """The deep tokens of key frames: a code of their latents."""
    return TokenizerRun(
        cache=KEY_FRAMES,
        init="runs/blocks-first_stage/best",
        model=STILL,
        trains="code",
        token_noise=0.4,
        loop=_loop(steps=6000, batch_size=64, lr=3e-3),
    )


def motion() -> TokenizerRun:
    """What computes motion tokens, and the clips that are expected of them; tokens of key frames are fixed."""
    return TokenizerRun(
        cache=CACHE,
        init="runs/blocks-code/best",
        model=MODEL,
        trains="motion",
        whole_clips=True,  # every event begins and ends on a key frame
        loop=_loop(steps=6000, batch_size=32, lr=2e-3),
    )


def denoiser() -> TokenizerRun:
    """The video diffusion decoder, on clips; all tokens are fixed, and always given: it samples without guidance."""
    return TokenizerRun(
        cache=CACHE,
        init="runs/blocks-motion/best",
        model=MODEL,
        trains="denoiser",
        drop_tokens=0.0,
        whole_clips=True,
        loop=_loop(steps=8000, batch_size=16, lr=1e-3),
    )


def first_stage_decoder() -> FirstStageRun:
    """The decoder of the first stage, fine-tuned on rendered frames too: sharp pictures from the same latents."""
    return FirstStageRun(
        cache=CACHE,
        init="runs/blocks-first_stage/best",
        freeze_encoder=True,
        tokenizer="runs/blocks-denoiser/best",
        model=MODEL.first_stage,
        rendered_share=0.5,
        perceptual_weight=0.3,
        adversarial_weight=0.05,
        mirror=False,
        loop=LoopConfig(
            evaluate_every=500,
            checkpoint_every=100,
            optim=OptimConfig(
                steps=2000,
                batch_size=16,
                lr=4e-4,
                warmup_steps=50,
                decay_fraction=0.6,
                beta1=0.5,  # of both players; with 0.9 they chase each other
                ema_decay=0.995,
            ),
        ),
    )


def lm() -> LanguageRun:
    """A Llama with a flow head, token by token; every sample begins where its caption does.

    Where an object stands is left open by its caption. A head that draws a whole key frame at once smears it over all
    places; token by token the first token of an object decides. Those tokens would then tell the rest of it, and the
    caption would not be read: strong noise on them makes it be.
    """
    return LanguageRun(
        cache=KEY_FRAMES,
        tokenizer="runs/blocks-code/best",
        model=replace(
            SIZES["sprites"],
            body=BodyConfig("llama", width=160, depth=6, heads=4, feed_forward=320),
            head=HeadConfig("flow", width=128),
            token_width=MODEL.token_width,
            vocab_size=512,
            text_length=112,
            positions=112 + (MODEL.tokens_per_keyframe + 1) * 33,
            input_noise=1.0,
            attend_padding=False,
            residual_anchor=0.0,
        ),
        from_start=1.0,
        key_frames=6,
        longer=(),
        longer_share=(),
        augment=AugmentConfig(long_captions=0.0, null_captions=0.1, word_dropout=0.0, shift_key_frames=True),
        loop=LoopConfig(
            evaluate_every=500,
            checkpoint_every=100,
            best="-validation_loss",  # the scene is drawn anew for each caption: it has no clip of its own to be met
            micro_batches=4,
            optim=OptimConfig(
                optimizer="muon",
                steps=8000,
                batch_size=64,
                lr=1.5e-3,
                warmup_steps=100,
                decay_fraction=0.1,
                ema_decay=0.998,
            ),
        ),
    )


def lm_motion() -> LanguageRun:
    """The same with motion tokens, and with little noise, as it is sampled: objects keep their shapes."""
    run = lm()
    optim = replace(run.loop.optim, steps=4000, warmup_steps=30, decay_fraction=0.8, ema_decay=0.99)
    positions = 112 + (MODEL.block_tokens + 1) * 33
    return replace(
        run,
        cache=CACHE,
        tokenizer="runs/blocks-motion/best",
        init="runs/blocks-lm/best",
        model=replace(run.model, motion_tokens=MODEL.motion_tokens, positions=positions, input_noise=0.3),
        loop=replace(run.loop, optim=optim),
    )
