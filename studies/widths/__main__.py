"""How well deep tokens of several widths reconstruct single frames, by linear codes.

    python studies/widths world cache/world results/world-widths.json

widen.py writes a model of wider tokens to train on from.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dicode.data.cache import FrameCache
from dicode.evaluate.metrics import PERCEPTUAL
from dicode.features.extract import FeatureMaps, perceptual_distance
from dicode.provenance import write_result
from dicode.shapes import ImageLatents
from dicode.tokenizer.encoder import LinearCode
from dicode.tokenizer.linear import fit_projections
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.cached import frames_to_pixels, psnr_db

WIDTHS = (16, 24, 32, 40, 48, 56, 64)
FITTED, SHOWN = 10_000, 300  # training frames that codes are fitted to, and other frames of either split to decode
AT_ONCE = 100


@torch.no_grad()
def main(name: str, cache: str, output: str) -> None:
    """Figures of both splits by width, and those of the first stage alone and of the model's own tokens."""
    tokenizer, frames = VideoTokenizer.from_pretrained(name), FrameCache.load(cache)
    training = frames.subset(validation=False).frame_rows()[:]
    latents = encoded(tokenizer, frames.frames[spread(training[::2], FITTED)])
    frames_of = {
        "training": frames.frames[spread(training[1::2], SHOWN)],
        "validation": frames.frames[spread(frames.subset(validation=True).frame_rows()[:], SHOWN)],
    }
    values: dict[str, Any] = {}
    for split, those in frames_of.items():
        source = encoded(tokenizer, those)
        own = torch.cat([tokenizer.key_latents(tokenizer.tokens_of(part)) for part in source.split(AT_ONCE)])
        values[split] = {
            "first stage": fidelity(tokenizer, those, source, source),
            "model": fidelity(tokenizer, those, source, own),
        }
        for width in WIDTHS:
            code = LinearCode(tokenizer.config.tokens_per_keyframe, width, *latents.shape[1:3])
            fit_projections(code, latents)
            values[split][f"width {width}"] = fidelity(tokenizer, those, source, code.latents(code.tokens(source)))
    command = shlex.join(["python", "studies/widths", name, cache, output])
    write_result(Path(output), f"{name}: what tokens of other widths would tell", values, SHOWN, 0, command)


def spread(rows: Tensor, count: int) -> Tensor:
    """`count` of these rows, evenly, or all."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


def encoded(tokenizer: VideoTokenizer, frames: Tensor) -> ImageLatents:
    """First-stage latents of cached frames."""
    return torch.cat([tokenizer.first_stage.encode(frames_to_pixels(part)) for part in frames.split(AT_ONCE)])


def fidelity(
    tokenizer: VideoTokenizer, frames: Tensor, source: ImageLatents, latents: ImageLatents
) -> dict[str, float]:
    """How near decoded latents come to the frames they stand for, and to the latents they were."""
    maps, psnr, distances = FeatureMaps(), [], []
    for those, part in zip(frames.split(AT_ONCE), latents.split(AT_ONCE), strict=True):
        pixels, shown = frames_to_pixels(those), tokenizer.first_stage.decode(part)
        psnr.append(psnr_db(shown, pixels))
        distances.append(float(perceptual_distance(maps(shown), maps(pixels))) * len(those))
    lost = (latents - source).square().mean() / source.var()
    return {"psnr_db": float(torch.cat(psnr).mean()), PERCEPTUAL: sum(distances) / len(frames), "lost": float(lost)}


if __name__ == "__main__":
    main(*sys.argv[1:])
