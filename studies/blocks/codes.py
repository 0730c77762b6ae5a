"""Key frames of a cache through a model's code, and through linear codes of fewer and of more numbers.

    python studies/blocks/codes.py MODEL CACHE OUT.json

Linear ones are principal components of latents of training key frames. Errors are of validation key frames' latents;
PSNR is against what the first stage makes of the latents themselves.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from dicode.data.cache import FrameCache
from dicode.data.columns import CachedVideo
from dicode.provenance import write_result
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.cached import first_stage_latents, key_frames_of, psnr_db, splits

FITTED, MEASURED = 8000, 600  # key frames at most
NUMBERS = (64, 128, 256, 512)  # of a linear code
NOISE = 0.3  # deviation of noise on the model's tokens, which have variance 1
SETS = ("seen", "combinations", "orders")


@torch.no_grad()
def main(argv: Sequence[str]) -> None:
    """Measure every code."""
    model, folder, output = argv
    tokenizer = VideoTokenizer.from_pretrained(model)
    cache, training, validation = splits(folder)
    latents = first_stage_latents(tokenizer, cache)
    fitted = latents[rows_of(training, training.videos, tokenizer.config.clip_s)[:FITTED], 0].float()
    chosen = [video for video in validation.videos if video.extra["set"] in SETS]
    real = latents[rows_of(validation, chosen, tokenizer.config.clip_s)[:MEASURED], 0].float()
    tokens = tokenizer.tokens_of(real)
    noise = NOISE * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
    values = {
        f"the model's, {tokens[0].numel()} numbers": figures(tokenizer, real, tokenizer.key_latents(tokens)),
        f"the model's, with noise of {NOISE}": figures(tokenizer, real, tokenizer.key_latents(tokens + noise)),
    }
    for numbers in NUMBERS:
        if numbers < min(len(fitted), fitted[0].numel()):
            values[f"linear, {numbers} numbers"] = figures(tokenizer, real, linear(fitted, numbers)(real))
    write_result(Path(output), "codes of key frames", values, len(real), 0, shlex.join(["python", *sys.argv]))


def rows_of(cache: FrameCache, videos: Sequence[CachedVideo], clip_s: float) -> Tensor:
    """Rows of the key frames of some videos."""
    return torch.cat([cache.clip_rows(video, 0.0, key_frames_of(video, clip_s), 1 / clip_s) for video in videos])


def linear(latents: Tensor, numbers: int) -> Callable[[Tensor], Tensor]:
    """To the leading principal components of these latents, and back."""
    flat = latents.flatten(1).double()
    mean = flat.mean(0)
    _, components = torch.linalg.eigh((flat - mean).T @ (flat - mean))
    kept = components[:, -numbers:]
    return lambda own: ((own.flatten(1).double() - mean) @ kept @ kept.T + mean).float().view_as(own)


def figures(tokenizer: VideoTokenizer, real: Tensor, made: Tensor) -> dict[str, float]:
    """Squared error of latents, and mean PSNR of their pictures in dB."""
    psnr = [
        psnr_db(*(tokenizer.first_stage.decode(own) for own in pair))
        for pair in zip(made.split(64), real.split(64), strict=True)
    ]
    return {"error": functional.mse_loss(made, real).item(), "psnr_db": torch.cat(psnr).mean().item()}


if __name__ == "__main__":
    main(sys.argv[1:])
