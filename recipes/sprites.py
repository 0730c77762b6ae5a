r"""The default bundled model, `sprites`: 64×64, 8 fps, 16 frames a clip, trained on `spells` and `emoji`.

    dicode data cache ../shared/data/spells ../shared/data/emoji -o cache/sprites --size 64 --loops
    dicode train recipes/sprites.py:first_stage
    dicode train recipes/sprites.py:linear_code
    dicode train recipes/sprites.py:denoiser            # these two are independent
    dicode train recipes/sprites.py:lm
    dicode train recipes/sprites.py:flow_map
    dicode train recipes/sprites.py:first_stage_decoder
    dicode assemble runs/sprites-flow_map/best runs/sprites-lm/best -o sprites \
        --first-stage runs/sprites-first_stage_decoder/best

The bundled model was assembled with `--dtype int8 --guidance 1.5 --variance-scale 1 --flow-steps 6 --steps 4
--decoder-temperature 0.95 --motion-scale 1.3 --context-key-frames 8`.
To train it further: `--first-stage`, `--tokenizer` and `--init` take `dicode/checkpoints/sprites`; its denoiser is a
flow map, so that the recipe to train it with is `flow_map`.

The same command resumes an interrupted run. Hours and results of each: docs/log.md.
"""

from dataclasses import replace

from dicode.lm.config import BodyConfig, HeadConfig
from dicode.lm.presets import SIZES
from dicode.tokenizer.presets import TOKENIZERS
from dicode.train.runs import (
    AugmentConfig,
    FirstStageRun,
    LanguageRun,
    LinearCodeRun,
    LoopConfig,
    OptimConfig,
    TokenizerRun,
)

MODEL = TOKENIZERS["sprites"]
STEPS_OF_MAP = 1500

# For `dicode train recipes/sprites.py --all`: in order, with the hours that each is worth.
STAGES = {
    "first_stage": 0.9, "linear_code": 0.1, "denoiser": 4.3, "flow_map": 0.5, "lm": 3.6, "first_stage_decoder": 0.7,
}  # fmt: skip
SAMPLING = {
    "guidance": 1.5, "variance_scale": 1.0, "flow_steps": 6, "steps": 4, "decoder_temperature": 0.95,
    "motion_scale": 1.3, "context_key_frames": 8,
}  # fmt: skip


def first_stage() -> FirstStageRun:
    """Image autoencoder, 8× smaller along each side, 16 channels (12× fewer numbers)."""
    return FirstStageRun(
        loop=LoopConfig(
            evaluate_every=250,
            checkpoint_every=250,
            optim=OptimConfig(steps=3000, batch_size=32, lr=1e-3, warmup_steps=100, ema_decay=0.995),
        ),
    )


def first_stage_decoder() -> FirstStageRun:
    """The decoder of the same autoencoder, fine-tuned: sharp frames from the same latents, even from blurred ones.

    Half of its inputs are frames rendered by the tokenizer; of the rest, half are frames decoded from deep tokens. The
    loss adds a perceptual distance and a discriminator. The bundled decoder was first trained for 2,900 steps without
    discriminator and rendered frames (docs/log.md).
    """
    return FirstStageRun(
        init="runs/sprites-first_stage/best",
        freeze_encoder=True,
        tokenizer="runs/sprites-denoiser/best",
        rendered_share=0.5,
        perceptual_weight=0.3,
        adversarial_weight=0.05,
        loop=LoopConfig(
            evaluate_every=550,
            checkpoint_every=200,
            optim=OptimConfig(
                steps=2200,
                batch_size=16,
                lr=4e-4,
                warmup_steps=50,
                decay_fraction=0.6,
                beta1=0.5,  # of both players; with 0.9 they chase each other
                ema_decay=0.995,
            ),
        ),
    )


def linear_code() -> LinearCodeRun:
    """The deep tokens: a linear code of the latents, fitted in closed form (studies/tokens)."""
    return LinearCodeRun(model=MODEL, mirror=True)


def denoiser() -> TokenizerRun:
    """The video diffusion decoder on clips, tokens fixed."""
    return TokenizerRun(
        init="runs/sprites-linear_code/best",
        mirror=True,
        model=MODEL,
        loop=LoopConfig(
            evaluate_every=500,
            checkpoint_every=250,
            optim=OptimConfig(
                optimizer="muon",
                steps=12_000,
                batch_size=16,
                lr=1e-3,
                warmup_steps=200,
                decay_fraction=0.4,
                ema_decay=0.998,
            ),
        ),
    )


def flow_map() -> TokenizerRun:
    """The denoiser as a flow map: clips in a few forward passes, without guidance, which it has learnt."""
    run = denoiser()
    optim = replace(run.loop.optim, steps=STEPS_OF_MAP, lr=3e-4, warmup_steps=50, decay_fraction=0.6)
    return replace(
        run,
        init="runs/sprites-denoiser/best",
        model=replace(
            MODEL,
            denoiser=replace(MODEL.denoiser, flow_map=True, fused_guidance=2.5),
            sampling=MODEL.sampling.changed(steps=4, decoder_guidance=1.0),
        ),
        loop=replace(run.loop, evaluate_every=500, optim=optim),
    )


def lm() -> LanguageRun:
    """A 2.9 M Llama on the deep tokens of `linear_code`; small beside the tokenizer.

    Strong noise on input tokens makes it depend on the caption; Muon memorises captions faster (docs/log.md). Key
    frames by flow matching with swapped words were the best of ten variants (studies/heads); the bundled model was
    trained before word swaps were added.
    """
    return LanguageRun(
        tokenizer="runs/sprites-linear_code/best",
        model=replace(
            SIZES["sprites"],
            body=BodyConfig("llama", width=192, depth=6, heads=3, feed_forward=384),
            head=HeadConfig("flow", width=128),
            vocab_size=1536,
            text_length=64,
            input_noise=1.0,
            order="keyframe",
            end_frame_conditioning=True,
        ),
        from_start=0.8,
        end_frame_prob=0.15,
        longer=(9,),
        longer_share=(0.05,),
        augment=AugmentConfig(
            long_captions=0.3, null_captions=0.08, word_dropout=0.25, word_swaps=0.1, swapped_words=0.7
        ),
        loop=LoopConfig(
            evaluate_every=500,
            checkpoint_every=250,
            optim=OptimConfig(
                optimizer="muon",
                steps=12_000,
                batch_size=32,
                lr=1.5e-3,
                warmup_steps=100,
                decay_fraction=0.7,
                ema_decay=0.998,
            ),
        ),
    )
