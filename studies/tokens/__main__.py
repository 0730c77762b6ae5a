"""What deep tokens keep of validation key frames, at several strengths of noise: writes results/tokens.json.

    python studies/tokens cache/sprites NAME=TOKENIZER_FOLDER …

All tokenizers must share the encoder of one first stage; its linear codes are measured beside them.
"""

import sys

import torch
from torch import Tensor

from dicode.checkpoint import resolve
from dicode.data.cache import FrameCache
from dicode.features.extract import EfficientNetLite0Features
from dicode.features.metrics import frechet_distance
from dicode.provenance import write_result
from dicode.tokenizer.encoder import LinearCode
from dicode.tokenizer.linear import fit_projections
from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS, VideoTokenizer
from dicode.train.cached import first_stage_latents

NOISE = (0.0, 0.1, 0.2, 0.4)  # deviation, where the tokens' is 1


class Linear:
    """A linear code for `queries` tokens of this width, fitted to latents, with the interface of a tokenizer."""

    def __init__(self, queries: int, width: int, latents: Tensor):
        self.code = LinearCode(queries, width, *latents.shape[1:3])
        self.variance = fit_projections(self.code, latents)

    def tokens_of(self, latents: Tensor) -> Tensor:
        tokens = self.code.tokens(latents)
        return (tokens.flatten(1) / self.variance.sqrt()).view_as(tokens)

    def key_latents(self, tokens: Tensor) -> Tensor:
        return self.code.latents(tokens)


@torch.no_grad()
def main(cache_folder: str, *named: str) -> None:
    """Mean squared error of key latents over all validation frames; FVD of clips made of them, frame by frame."""
    folders = dict(argument.split("=", 1) for argument in named)
    tokenizers = {name: VideoTokenizer.from_pretrained(folder) for name, folder in folders.items()}
    first = next(iter(tokenizers.values()))
    cache = FrameCache.load(cache_folder)
    source = resolve(next(iter(folders.values()))) / FIRST_STAGE_WEIGHTS
    latents = first_stage_latents(first, cache, source)
    training, held = (cache.subset(validation=held).frame_rows()[:] for held in (False, True))
    resampler = first.config.resampler
    linear = Linear(resampler.queries, resampler.token_width, latents[training[::2], 0].float())
    codes: dict[str, Linear | VideoTokenizer] = {"linear": linear, **tokenizers}
    real = latents[held, 0].float()
    values: dict[str, dict[str, float]] = {"variance": {"of latents": float(real.var())}}
    for name, tokenizer in codes.items():
        values[name] = {}
        for noise in NOISE:
            generator, errors = torch.Generator().manual_seed(0), []
            for part in real.split(256):
                tokens = tokenizer.tokens_of(part)
                tokens = tokens + noise * torch.randn(tokens.shape, generator=generator)
                errors.append((tokenizer.key_latents(tokens) - part).square().mean((1, 2, 3)))
            values[name][f"error at noise {noise}"] = float(torch.cat(errors).mean())
        values[name]["FVD-EffLite0, every frame a key frame"] = fvd(cache, tokenizer, first)
        print(name, values[name], flush=True)
    command = " ".join(["python studies/tokens", cache_folder, *named])
    write_result("results/tokens.json", "deep tokens: what they keep", values, len(real), 0, command)


def fvd(cache: FrameCache, tokenizer: VideoTokenizer | Linear, decoder: VideoTokenizer) -> float:
    """Of the first clips of all validation videos, each frame through its own tokens, against the real ones."""
    config, extractor = decoder.config, EfficientNetLite0Features()
    clips, made = [], []
    for video in cache.subset(validation=True).videos:
        clip = cache.frames[cache.clip_rows(video, 0.0, config.clip_frames, config.fps)]
        pixels = clip.permute(0, 3, 1, 2).float() / 127.5 - 1
        through = tokenizer.key_latents(tokenizer.tokens_of(decoder.first_stage.encode(pixels)))
        clips.append(clip.numpy())
        made.append(decoder.frames_of(through[None])[0].numpy())
    return frechet_distance(*(extractor.features(those).vectors for those in (clips, made)))


if __name__ == "__main__":
    main(*sys.argv[1:])
