r"""`world`: what a robot's camera will see, after an instruction and, if given, an image.

64×64, 8 fps, 16 frames a clip, trained on `droid`, `rt1` and `bridge`; lab `f147f077` of `droid` is for validation.

    dicode data cache ../shared/data/{droid,rt1,bridge} -o cache/world --size 64 --validation-by lab=f147f077
    dicode train recipes/world.py:first_stage
    dicode train recipes/world.py:key_frames
    dicode train recipes/world.py:denoiser              # these two need nothing of each other
    dicode train recipes/world.py:lm
    dicode train recipes/world.py:lm_own
    dicode train recipes/world.py:first_stage_decoder
    dicode assemble runs/world-denoiser/best runs/world-lm_own/best -o world \
        --first-stage runs/world-first_stage_decoder/best

The bundled model was assembled with `--dtype int8 --guidance 2.5 --variance-scale 0.75 --first-variance-scale 0.2
--decoder-guidance 1.5 --motion-scale 1.3 --context-key-frames 6` as well.
Batches are for an accelerator, where `--loop.prefetch` helps. Stages of the bundled model continue earlier releases,
which began with `sprites`: its tokens of 48 numbers are the 32 of the fourth release, widened (studies/widths);
`denoiser` and `lm_own` are what the sixth added to the fifth. Its `lm_own` was trained with dicode 0.1, where the model
was conditioned on its own key frames in three of ten steps; that option gave no measurable gain
(`results/world-own.json`) and was removed. Hours, results, and what was continued on a CPU: docs/log.md.
"""

from dataclasses import replace

from dicode.lm.presets import SIZES, BodyConfig, HeadConfig
from dicode.tokenizer.presets import TOKENIZERS
from dicode.train.runs import AugmentConfig, FirstStageRun, LanguageRun, LoopConfig, OptimConfig, TokenizerRun

CACHE = "cache/world"
SPRITES = "dicode/checkpoints/sprites"
MODEL = TOKENIZERS["world"]

# For `dicode train recipes/world.py --all`: in order, with the share of the time that each is worth.
STAGES = {
    "first_stage": 0.12, "key_frames": 0.02, "denoiser": 0.4, "lm": 0.14, "lm_own": 0.2, "first_stage_decoder": 0.12
}  # fmt: skip
SAMPLING = {
    "guidance": 2.5, "variance_scale": 0.75, "first_variance_scale": 0.2, "decoder_guidance": 1.5, "motion_scale": 1.3,
    "context_key_frames": 6,
}  # fmt: skip


def first_stage() -> FirstStageRun:
    """Image autoencoder of the shape of `sprites`, 8× smaller along each side, 16 channels."""
    return FirstStageRun(
        cache=CACHE,
        init=SPRITES,
        perceptual_weight=0.1,
        loop=LoopConfig(
            evaluate_every=810,
            checkpoint_every=200,
            optim=OptimConfig(steps=3235, batch_size=64, lr=1e-3, warmup_steps=50, decay_fraction=0.5, ema_decay=0.998),
        ),
    )


def first_stage_decoder() -> FirstStageRun:
    """The same autoencoder's decoder once more, with a discriminator and on rendered frames, as that of `sprites`."""
    return FirstStageRun(
        cache=CACHE,
        init="runs/world-first_stage/best",
        freeze_encoder=True,
        tokenizer="runs/world-denoiser/best",
        rendered_share=0.5,
        rendered_guidance=1.5,
        rendered_motion_scale=1.3,
        perceptual_weight=0.3,
        adversarial_weight=0.05,
        loop=LoopConfig(
            evaluate_every=420,
            checkpoint_every=100,
            optim=OptimConfig(
                steps=1678, batch_size=32, lr=4e-4, warmup_steps=50, decay_fraction=0.6, beta1=0.5, ema_decay=0.998
            ),
        ),
    )


def key_frames() -> TokenizerRun:
    """The linear code, fitted, and small networks beside it, which add little (studies/tokens)."""
    return TokenizerRun(
        cache=CACHE,
        first_stage="runs/world-first_stage/best",
        model=MODEL,
        train_denoiser=False,
        mirror=True,
        images_per_step=96,
        loop=LoopConfig(
            evaluate_every=100,
            checkpoint_every=100,
            optim=OptimConfig(steps=200, batch_size=1, lr=2e-4, warmup_steps=50, decay_fraction=0.7, ema_decay=0.98),
        ),
    )


def denoiser() -> TokenizerRun:
    """The video diffusion decoder on clips, tokens fixed."""
    return TokenizerRun(
        cache=CACHE,
        first_stage="runs/world-first_stage/best",
        init="runs/world-key_frames/best",
        init_denoiser=SPRITES,
        freeze_key_frames=True,
        mirror=True,
        images_per_step=0,
        model=MODEL,
        loop=LoopConfig(
            evaluate_every=734,
            checkpoint_every=200,
            optim=OptimConfig(
                optimizer="muon",
                steps=2932,
                batch_size=160,
                lr=8e-4,
                warmup_steps=100,
                decay_fraction=0.7,
                ema_decay=0.999,
            ),
        ),
    )


def lm() -> LanguageRun:
    """A 2.0 M Llama with a flow head over key frames: which room a caption means, and what happens in it.

    Half of the samples begin anywhere, so that it continues an image of any moment; half are views of the clips, which
    teach how a picture continues, not which one to draw. Later key frames are residuals to the mean of the first and
    the previous one: key frames two seconds apart are no nearer to each other than to the first, and errors fade by
    half at every key frame of a context (docs/log.md).
    """
    return LanguageRun(
        cache=CACHE,
        tokenizer="runs/world-key_frames/best",
        model=replace(
            SIZES["sprites"],
            body=BodyConfig("llama", width=192, depth=4, heads=3, feed_forward=384, dropout=0.1),
            head=HeadConfig("flow", width=128),
            token_width=MODEL.resampler.token_width,
            vocab_size=1024,
            text_length=32,
            positions=32 + 16 * 33,
            input_noise=0.6,
            order="keyframe",
            end_frame_conditioning=True,
            predict_residual=True,
            residual_anchor=0.5,
        ),
        from_start=0.5,
        end_frame_prob=0.1,
        longer=(6,),
        longer_share=(0.1,),
        augment=AugmentConfig(
            long_captions=0.0,
            null_captions=0.1,
            word_dropout=0.25,
            word_swaps=0.1,
            swapped_words=0.7,
            views=8,
            view_share=0.5,
        ),
        loop=LoopConfig(
            evaluate_every=594,
            checkpoint_every=250,
            optim=OptimConfig(
                optimizer="muon",
                steps=2372,
                batch_size=64,
                lr=2e-3,
                warmup_steps=100,
                decay_fraction=0.7,
                ema_decay=0.998,
            ),
        ),
    )


def lm_own() -> LanguageRun:
    """Its second half: more real clips, and more that begin where the video does; captions were the last to be learnt.

    The tokens of a view take eight seconds of an H200, and four and a half minutes of a core.
    """
    first = lm()
    return replace(
        first,
        init="runs/world-lm/best",
        augment=replace(first.augment, views=10, view_share=0.4),
        from_start=0.65,
        loop=replace(
            first.loop,
            evaluate_every=806,
            optim=replace(first.loop.optim, steps=3220, batch_size=128, lr=1.5e-3, decay_fraction=0.8),
        ),
    )
