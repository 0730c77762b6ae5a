"""Language models of five sizes over two orders of magnitude, on equal data: what size alone is worth.

    dicode scale CACHE … --family recipes/scale.py --tokenizer dicode/checkpoints/sprites

All see the same samples in the same order, all keep their last weights. Learning rates fall as the width rises, as
AdamW's must for the hidden layers' outputs to move alike in each (Yang et al. 2022, arXiv 2203.03466); results:
docs/scale.md.
"""

from dataclasses import replace

from dicode.lm.sizes import SIZES
from dicode.train.language import LanguageRun
from dicode.train.loop import LoopConfig
from dicode.train.optim import OptimConfig

LR, AT_WIDTH = 4e-3, 128  # tried on training clips kept out of training (docs/scale.md)
SAMPLES, BATCH_SIZE = 11_520, 16


def llama_300k() -> LanguageRun:
    """0.3 M parameters."""
    return _language_model(width=64, depth=4, heads=1)


def llama_1m() -> LanguageRun:
    """1 M."""
    return _language_model(width=128, depth=4, heads=2)


def llama_3m() -> LanguageRun:
    """3 M."""
    return _language_model(width=192, depth=6, heads=3)


def llama_10m() -> LanguageRun:
    """10 M."""
    return _language_model(width=320, depth=7, heads=5)


def llama_30m() -> LanguageRun:
    """32 M."""
    return _language_model(width=512, depth=9, heads=8)


def _language_model(width: int, depth: int, heads: int) -> LanguageRun:
    """The published arrangement, a mixture over one token after the other, with half of its components."""
    return LanguageRun(
        tokenizer="dicode/checkpoints/sprites",
        model=replace(
            SIZES["sprites"],
            width=width,
            depth=depth,
            heads=heads,
            vocab_size=1024,
            text_length=16,
            positions=16 + 17 * 8,
            max_keyframes=8,
            components=8,
            input_noise=0.3,
        ),
        longer=(),
        longer_share=(),
        from_start=0.5,
        long_captions=0.0,
        null_captions=0.1,
        word_dropout=0.3,
        loop=LoopConfig(
            tracker="none",
            log_every=60,
            evaluate_every=1_000_000,  # once, at the end
            checkpoint_every=240,
            optim=OptimConfig(
                steps=SAMPLES // BATCH_SIZE,
                batch_size=BATCH_SIZE,
                lr=LR * AT_WIDTH / width,
                warmup_steps=60,
                decay_fraction=0.5,
                weight_decay=0.05,
                ema_decay=0.99,
            ),
        ),
    )
