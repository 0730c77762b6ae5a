"""The model in the box, `sprites`: 64×64, 8 fps, 16 frames a clip, trained on `spells` and `emoji`.

    dicode data cache ../shared/data/spells ../shared/data/emoji -o cache/sprites --size 64
    dicode train recipes/sprites.py:first_stage
    dicode train recipes/sprites.py:tokenizer
    dicode train recipes/sprites.py:lm
"""

from dicode.tokenizer.first_stage import FirstStageConfig
from dicode.train.images import FirstStageRun
from dicode.train.loop import LoopConfig, OptimConfig


def first_stage() -> FirstStageRun:
    """Image autoencoder, 8× smaller along each side, 16 channels (12× fewer numbers)."""
    return FirstStageRun(
        model=FirstStageConfig(encoder_blocks=(0, 2, 2, 3), decoder_blocks=(3, 2, 2, 1)),
        loop=LoopConfig(
            evaluate_every=250,
            checkpoint_every=250,
            optim=OptimConfig(steps=3000, batch_size=32, lr=1e-3, warmup_steps=100, ema_decay=0.995),
        ),
    )
