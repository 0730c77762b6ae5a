"""The published model (arXiv 2412.04446) and its family of language models: 256×256, 8 fps, 16 frames a clip.

    dicode data cache FOLDER… -o cache/videos --size 256 --max-fps 24
    dicode convert dynamicrafter model.ckpt -o checkpoints/dynamicrafter
    dicode train recipes/paper.py:paper_tokenizer_256
    dicode train recipes/paper.py:gpt2
    dicode assemble runs/paper-paper_tokenizer_256/best runs/paper-gpt2/best -o paper

Each is sized for four GPUs of 80 GB: it sets the micro-batches and the strategy that fit there (memory and days:
docs/paper-scale.md; another machine: `dicode info recipes/paper.py:gpt2 --gpus 8 --micro-batches 16`):

    torchrun --nproc-per-node 4 -m dicode train recipes/paper.py:gpt2

None of these runs has been made. Steps, batch sizes and learning rates are common for such sizes and untested; hours
and results are unknown. The tokenizer uses v-prediction and a schedule of zero terminal SNR, as DynamiCrafter-512 does.
DynamiCrafter-256 predicts epsilon: starting from it needs `--model.objective epsilon` and is refused without. Clips are
sampled with frame strides of 1 to 6, as far as the cache has the frames: a cache at 24 fps allows 2 to 6, one at 8 fps
only 6, at a third of the size; archives that are decoded while it trains (`dicode data stream`, docs/data.md) have all
the frames of their videos. A run reads its cache from disk through memory maps: a frame takes 0.2 MB, its latents
16 kB, its deep tokens 33 kB.
"""

from dataclasses import replace

from dicode.lm.config import DeepLMConfig
from dicode.lm.presets import SIZES
from dicode.tokenizer.presets import TOKENIZERS
from dicode.train.runs import AugmentConfig, LanguageRun, LoopConfig, OptimConfig, Strategy, TokenizerRun

PRIOR = "checkpoints/dynamicrafter"


def paper_tokenizer_256() -> TokenizerRun:
    """Resampler and U-Net, 1.49 B parameters, from a video prior; CLIP ViT-H/14 and Stable Diffusion's VAE are frozen.

    `--init` also takes the published tokenizer (`dicode convert official`).
    """
    return TokenizerRun(
        cache="cache/videos",
        init=PRIOR,
        model=TOKENIZERS["paper_tokenizer_256"],
        token_noise=0.0,
        frame_strides=(1, 6),
        loop=LoopConfig(
            micro_batches=4,
            evaluate_every=2000,
            checkpoint_every=1000,
            optim=OptimConfig(steps=100_000, batch_size=8, lr=1e-5, warmup_steps=1000, ema_decay=0.9999),
        ),
    )


def paper_motion() -> TokenizerRun:
    """The same with 16 motion tokens a clip (docs/motion-tokens.md): an encoder of 54 M parameters more."""
    return replace(paper_tokenizer_256(), model=TOKENIZERS["paper_motion"])


def gpt2_mini() -> LanguageRun:
    """51 M and 18 M parameters, from scratch."""
    return _language_model(SIZES["gpt2-mini"], lr=6e-4)


def distilgpt2() -> LanguageRun:
    """82 M and 27 M parameters; `--body distilbert/distilgpt2`."""
    return _language_model(SIZES["distilgpt2"], lr=6e-4)


def gpt2() -> LanguageRun:
    """GPT-2's 124 M parameters and 27 M for deep tokens, from scratch.

    From its published weights, at an equally untested learning rate:

        dicode train recipes/paper.py:gpt2 --body openai-community/gpt2 --loop.optim.lr 1e-4

    `--vocabulary FOLDER` uses its vocabulary alone; without either, a vocabulary is learnt from the captions.
    """
    return _language_model(SIZES["gpt2"], lr=6e-4)


def gpt2_motion() -> LanguageRun:
    """GPT-2 on the tokens of `paper_motion`, 33 positions a key frame: more than its published weights have."""
    model = replace(SIZES["gpt2"], motion_tokens=16, positions=80 + 33 * 32)
    return replace(_language_model(model, lr=6e-4), tokenizer="runs/paper-paper_motion/best")


def gpt2_medium() -> LanguageRun:
    """355 M and 37 M parameters; `--body openai-community/gpt2-medium`."""
    return _language_model(SIZES["gpt2-medium"], lr=3e-4)


def gpt2_large() -> LanguageRun:
    """774 M and 47 M parameters; `--body openai-community/gpt2-large`."""
    return _language_model(SIZES["gpt2-large"], lr=2.5e-4)


def llama_1b() -> LanguageRun:
    """1.24 B and 78 M parameters; `--body meta-llama/Llama-3.2-1B`."""
    return _language_model(SIZES["llama-1b"], lr=2e-4)


def llama_3b() -> LanguageRun:
    """3.21 B and 123 M parameters; `--body meta-llama/Llama-3.2-3B`. FSDP: its state exceeds one GPU of 80 GB."""
    return _language_model(SIZES["llama-3b"], lr=1.6e-4, micro_batches=8, strategy="fsdp")


def _language_model(model: DeepLMConfig, lr: float, micro_batches: int = 4, strategy: Strategy = "ddp") -> LanguageRun:
    """From scratch; learning rates are those of GPT-3's family (arXiv 2005.14165, table 2.1) at the nearest size."""
    return LanguageRun(
        cache="cache/videos",
        tokenizer="runs/paper-paper_tokenizer_256/best",
        model=model,
        augment=AugmentConfig(long_captions=0.0, word_dropout=0.0),
        loop=LoopConfig(
            micro_batches=micro_batches,
            strategy=strategy,
            evaluate_every=2000,
            checkpoint_every=1000,
            optim=OptimConfig(
                steps=100_000, batch_size=64, lr=lr, warmup_steps=2000, weight_decay=0.1, ema_decay=0.9999
            ),
        ),
    )
