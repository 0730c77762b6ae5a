"""Give a model wider deep tokens: the first numbers of each token stay, the further ones encode what these leave out.

    python studies/widths/widen.py world 64 cache/world wide

For a model with linear code, an `hourglass` and a flow head. Denoiser and language model get zero weights for the new
numbers (Net2WiderNet, arXiv 1511.05641, with zeros), so their outputs stay the same until they are trained on.
"""

import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dicode.checkpoint import load_state
from dicode.checkpoint.saving import check_model_folder, model_folder
from dicode.data.cache import FrameCache
from dicode.lm.deep_lm import DeepTokenLM
from dicode.pipeline import DiCoDe
from dicode.shapes import ImageLatents
from dicode.tokenizer.encoder import LinearCode
from dicode.tokenizer.linear import fit_projections
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.cached import first_stage_latents
from dicode.train.linear_code import MOST_FITTED

# Weights with an axis over the numbers of one deep token
OF_DENOISER = ("tokens.weight", "network.tokens.weight")
OF_LANGUAGE_MODEL = ("embedding.mlp.0.weight", "head.read.weight", "head.write.weight", "head.write.bias")


def widen(name_or_folder: str | Path, token_width: int, cache: FrameCache, output: Path) -> None:
    """Write the wider model."""
    check_model_folder(output)
    narrow = DiCoDe.from_pretrained(name_or_folder)
    held, lm = narrow.tokenizer, narrow.lm
    kinds = (held.config.resampler, held.config.denoiser.kind, lm.config.head.kind)
    if kinds != (None, "hourglass", "flow"):
        raise ValueError(f"{name_or_folder}: expected a linear code, a denoiser 'hourglass' and a head 'flow'")
    torch.manual_seed(0)
    wide = VideoTokenizer(replace(held.config, token_width=token_width))
    wide.first_stage.load_state_dict(held.first_stage.state_dict())
    latents = first_stage_latents(held, cache)
    rows = cache.subset(validation=False).frame_rows()
    extend(wide.linear_code, held.linear_code, latents[rows.spread(MOST_FITTED), 0].float())
    grow(wide.denoiser, held.denoiser.state_dict(), OF_DENOISER)
    wide_lm = DeepTokenLM(replace(lm.config, token_width=token_width), lm.text)
    grow(wide_lm, lm.state_dict(), OF_LANGUAGE_MODEL)
    with model_folder(output) as folder:
        DiCoDe(wide, wide_lm).save_pretrained(folder)


@torch.no_grad()
def extend(wide: LinearCode, narrow: LinearCode, latents: ImageLatents) -> None:
    """Set `wide` to a narrower code and, beside it, `fit_projections` of its residuals."""
    n = wide.num_tokens
    held, width = (linear.out_features // n for linear in (narrow.encode, wide.encode))
    if narrow.num_tokens != n or held >= width:
        raise ValueError(f"expected {n} tokens of less than {width} numbers, got {narrow.num_tokens} of {held}")
    # the narrow code reconstructs matrix · latents + offset
    matrix = narrow.decode.weight.double() @ narrow.encode.weight.double()
    offset = narrow.decode.weight.double() @ narrow.encode.bias.double() + narrow.decode.bias.double()
    flat = latents.flatten(1).double()
    rest = LinearCode(n, width - held, latents.shape[1], wide.size).double()
    fit_projections(rest, (flat - flat @ matrix.T - offset).view_as(latents))
    projection = rest.encode.weight - rest.encode.weight @ matrix
    bias = rest.encode.bias - rest.encode.weight @ offset

    def beside(first: Tensor, second: Tensor, dim: int = 0) -> Tensor:
        first, second = (part.double().unflatten(dim, (n, -1)) for part in (first, second))
        return torch.cat([first, second], dim + 1).flatten(dim, dim + 1)

    wide.encode.weight.copy_(beside(narrow.encode.weight, projection))
    wide.encode.bias.copy_(beside(narrow.encode.bias, bias))
    wide.decode.weight.copy_(beside(narrow.decode.weight, rest.decode.weight, 1))
    wide.decode.bias.copy_(narrow.decode.bias + rest.decode.bias)


def grow(module: nn.Module, narrower: Mapping[str, Tensor], names: Collection[str]) -> None:
    """Load the state of a narrower module, with zeros for what the tensors of these names lack."""
    grown = dict(narrower)
    for name in grown.keys() & set(names):
        grown[name] = narrower[name].new_zeros(module.get_parameter(name).shape)
        grown[name][tuple(slice(size) for size in narrower[name].shape)] = narrower[name]
    load_state(module, grown, "the narrower model")


if __name__ == "__main__":
    widen(sys.argv[1], int(sys.argv[2]), FrameCache.load(sys.argv[3]), Path(sys.argv[4]))
