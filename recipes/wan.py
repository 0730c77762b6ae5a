"""A tokenizer on Wan2.1-T2V-1.3B, and a language model of its deep tokens: 256×256, 16 fps, 33 frames a clip.

    dicode convert wan Wan2.1-T2V-1.3B-Diffusers -o checkpoints/wan --image-encoder open_clip_pytorch_model.bin
    dicode data cache FOLDER… -o cache/videos --size 256 --max-fps 16
    dicode train recipes/wan.py:adapters            # one GPU of 24 GB: what is new, and adapters of the transformer
    dicode train recipes/wan.py:whole               # one of 80 GB, or several: everything
    dicode train recipes/wan.py:gpt2                # tokens stay as they are from here on; or after the next one
    dicode train recipes/wan.py:flow_map            # one of 80 GB, or several: clips in 1 to 4 steps without guidance
    dicode assemble runs/wan-flow_map/best runs/wan-gpt2/best -o wan

The first two also train without a cache, on archives of videos of several shapes (docs/data.md):

    dicode data stream TARS… -o cache/stream
    dicode train recipes/wan.py:whole --cache cache/stream --stream.buckets 256 256 192 320 320 192

None of these runs has been made: memory and days are computed (`dicode info recipes/wan.py:whole --gpu h100-80gb`).
Clips are encoded while training, by the frozen autoencoder, so that no latents are kept.
"""

from dataclasses import replace

from dicode.lm.presets import SIZES
from dicode.tokenizer.presets import TOKENIZERS
from dicode.train.runs import AugmentConfig, LanguageRun, LoopConfig, LoRAConfig, OptimConfig, TokenizerRun

MODEL = TOKENIZERS["wan"]  # with OpenCLIP's tower; "wan_siglip": as `--image-encoder` names one of SigLIP
NEW = ("image_embedder", "add_k_proj", "add_v_proj", "norm_added_k", "resampler")  # random, or without effect, at first


def adapters() -> TokenizerRun:
    """Resampler, the path by which its tokens are read, and adapters of rank 32 of all attention."""
    return TokenizerRun(
        cache="cache/videos",
        init="checkpoints/wan",
        model=MODEL,
        lora=LoRAConfig(rank=32, alpha=32.0, targets=("to_q", "to_k", "to_v"), whole=NEW),
        token_noise=0.0,
        loop=LoopConfig(
            micro_batches=8,
            checkpoint_activations=True,
            evaluate_every=1000,
            checkpoint_every=500,
            optim=OptimConfig(steps=20_000, batch_size=8, lr=1e-4, warmup_steps=500, ema_decay=0.999),
        ),
    )


def whole() -> TokenizerRun:
    """All of the transformer, after its adapters."""
    first = adapters()
    optim = replace(first.loop.optim, steps=100_000, batch_size=32, lr=1e-5, ema_decay=0.9999)
    loop = replace(first.loop, micro_batches=8, optim=optim)
    return replace(first, init="runs/wan-adapters/best", lora=LoRAConfig(), loop=loop)


def flow_map() -> TokenizerRun:
    """The transformer of `whole` made to jump: four forward passes a clip, where it takes 24 pairs of them."""
    run = whole()
    model = replace(
        run.model,
        denoiser=replace(run.model.denoiser, flow_map=True, fused_guidance=MODEL.sampling.decoder_guidance),
        sampling=run.model.sampling.changed(steps=4, decoder_guidance=1.0),
    )
    optim = replace(run.loop.optim, steps=20_000, ema_decay=0.999)
    return replace(
        run,
        init="runs/wan-whole/best",
        model=model,
        trains="denoiser",
        loop=replace(run.loop, optim=optim),
    )


def gpt2() -> LanguageRun:
    """GPT-2 on its tokens, as in recipes/paper.py."""
    return LanguageRun(
        cache="cache/videos",
        tokenizer="runs/wan-whole/best",
        model=SIZES["gpt2"],
        augment=AugmentConfig(long_captions=0.0, word_dropout=0.0),
        loop=LoopConfig(
            micro_batches=4,
            evaluate_every=2000,
            checkpoint_every=1000,
            optim=OptimConfig(
                steps=100_000, batch_size=64, lr=6e-4, warmup_steps=2000, weight_decay=0.1, ema_decay=0.9999
            ),
        ),
    )
