"""Language models of five sizes over two orders of magnitude, on equal data; the last weights of each are measured.

    python studies/scale CACHE …

With AdamW (learning rate 4e-3 at width 128, falling as the width rises) 0.3 M and 1 M had the same loss after 720
steps, that of a normal distribution; with Muon they were 0.06 nats apart after 500.
"""

from dataclasses import replace

from dicode.lm.config import BodyConfig
from dicode.lm.presets import SIZES
from dicode.train.runs import AugmentConfig, LanguageRun, LoopConfig, OptimConfig

LR = 3e-3  # of Muon, whose updates have one size at every width; tried on training clips kept out of training
SAMPLES, BATCH_SIZE = 5_120, 16


def llama_200k() -> LanguageRun:
    """0.2 M parameters."""
    return _language_model(width=48, depth=3, heads=1)


def llama_600k() -> LanguageRun:
    """0.6 M."""
    return _language_model(width=96, depth=4, heads=2)


def llama_2m() -> LanguageRun:
    """2 M."""
    return _language_model(width=160, depth=6, heads=2)


def llama_7m() -> LanguageRun:
    """7 M."""
    return _language_model(width=288, depth=6, heads=3)


def llama_19m() -> LanguageRun:
    """19 M."""
    return _language_model(width=448, depth=7, heads=7)


def _language_model(width: int, depth: int, heads: int) -> LanguageRun:
    """The published arrangement, a mixture over one token after the other, with half of its components."""
    model = replace(
        SIZES["sprites"], body=BodyConfig("llama", width=width, depth=depth, heads=heads),
        head=replace(SIZES["sprites"].head, components=8), vocab_size=1024, text_length=16, positions=16 + 17 * 8,
        max_keyframes=8, input_noise=0.3,
    )  # fmt: skip
    optim = OptimConfig(
        steps=SAMPLES // BATCH_SIZE, batch_size=BATCH_SIZE, optimizer="muon", lr=LR, warmup_steps=30,
        decay_fraction=0.5, weight_decay=0.05, ema_decay=0.99,
    )  # fmt: skip
    loop = LoopConfig(
        tracker="none", log_every=60, evaluate_every=1_000_000, checkpoint_every=160, optim=optim
    )  # evaluated once, at the end
    return LanguageRun(
        tokenizer="dicode/checkpoints/sprites", model=model, longer=(), longer_share=(), from_start=0.5,
        augment=AugmentConfig(long_captions=0.0, null_captions=0.1, word_dropout=0.3), loop=loop,
    )  # fmt: skip
