"""From a trained model to one of wider deep tokens, which says the same until the further numbers are trained."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dicode.checkpoint import check_model_folder, load_state, model_folder, resolve
from dicode.config import read_config, write_config
from dicode.data.cache import FrameCache
from dicode.device import pick_device
from dicode.lm.deep_lm import SECTION, DeepTokenLM
from dicode.pipeline import DiCoDe
from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS, VideoTokenizer
from dicode.train.tokenizer import first_stage_latents, fit_linear_code

# What reads or writes the numbers of one deep token, and nothing else of its shape.
OF_DENOISER = ("tokens.weight", "network.tokens.weight")
OF_LANGUAGE_MODEL = ("embedding.mlp.0.weight", "head.read.weight", "head.write.weight", "head.write.bias")


def widen(name_or_folder: str | Path, token_width: int, cache: FrameCache, output: Path, device: str = "auto") -> None:
    """Write a model whose deep tokens begin with the numbers of another's, and go on with what these leave out.

    The further numbers are the linear code of what the narrower ones do not tell of the cache's training frames
    (`LinearCode.extend`); denoiser and language model get zeros for them, which read nothing and write nothing, so that
    training goes on from what they had learnt (Net2WiderNet, arXiv 1511.05641, with zeros). The networks beside the
    code begin anew, adding nothing: what they added is not kept. Without a language model there, none is written.

    Raises `ValueError` where the tokens would not become wider, or hold more than the latents, and for parts that
    cannot be widened: a tokenizer without linear code, other denoisers than `hourglass`, other heads than `flow`.
    """
    check_model_folder(output)  # before any work
    computes = pick_device(device)
    folder = resolve(name_or_folder)
    held, sections = VideoTokenizer.from_pretrained(folder), read_config(folder)
    config = held.config
    if held.linear_code is None or config.denoiser.kind != "hourglass":
        raise ValueError(f"{name_or_folder}: expected a linear code and a denoiser 'hourglass', to widen both")
    lm = DeepTokenLM.from_pretrained(folder) if SECTION in sections else None
    if lm is not None and lm.config.head != "flow":  # what others write for a number of a token is several
        raise ValueError(f"{name_or_folder}: expected a language model with head 'flow', got {lm.config.head!r}")
    torch.manual_seed(0)
    wide = VideoTokenizer(replace(config, resampler=replace(config.resampler, token_width=token_width)))
    wide.first_stage.load_state_dict(held.first_stage.state_dict())
    latents = first_stage_latents(held.to(computes), cache, folder / FIRST_STAGE_WEIGHTS)
    held.cpu()
    fit_linear_code(wide, latents, cache.subset(validation=False).frame_rows(), narrower=held)
    grow(wide.denoiser, held.denoiser.state_dict(), OF_DENOISER)
    if lm is None:
        with model_folder(output) as made:
            write_config(made, {"tokenizer": wide.save_pretrained(made)})
        return
    wide_lm = DeepTokenLM(replace(lm.config, token_width=token_width), lm.text)
    grow(wide_lm, lm.state_dict(), OF_LANGUAGE_MODEL)
    with model_folder(output) as made:
        DiCoDe(wide, wide_lm).save_pretrained(made)


def grow(module: nn.Module, narrower: Mapping[str, Tensor], names: Collection[str]) -> None:
    """Fill a module from one of narrower tokens: zeros beside the tensors of these names, all others as they are."""
    grown = dict(narrower)
    for name in grown.keys() & set(names):
        grown[name] = narrower[name].new_zeros(module.get_parameter(name).shape)
        grown[name][tuple(slice(size) for size in narrower[name].shape)] = narrower[name]
    load_state(module, grown, "the narrower model")
