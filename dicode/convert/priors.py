"""Models that others published, to start from: DynamiCrafter, CompVis' autoencoders, OpenCLIP."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from dicode.checkpoint import model_folder, write_config
from dicode.config import CheckpointError
from dicode.convert.files import State, read_weights, taken, without_prefix, write_tensors
from dicode.convert.names import open_clip_state, vae_state
from dicode.convert.official import (
    EXACT,
    LATENT_SCALE,
    RESAMPLER,
    TOKENIZER_PARTS,
    UNET,
    VAE,
    Report,
    drop_unused,
    fitted,
    joined,
    read_clip,
    tokenizer_sections,
    tower_sizes,
    write_card,
)
from dicode.tokenizer.config import FirstStageConfig, TokenizerConfig
from dicode.tokenizer.first_stage import FirstStage
from dicode.tokenizer.presets import TOKENIZERS
from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS, WEIGHTS

Objective = Literal["epsilon", "v_prediction"]
VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
VAE_UNUSED = {r"(loss\..*|model_ema\..*)": "the autoencoder's own training"}


def convert_dynamicrafter(
    path: Path,
    output: Path,
    *,
    clip: Path | None = None,
    config: TokenizerConfig | None = None,
    objective: Objective | None = None,
    dtype: torch.dtype = torch.float32,
) -> Report:
    """DynamiCrafter's checkpoint → a folder from which to train a tokenizer of the published arrangement.

    The U-Net keeps its objective and schedule: `objective`, or by the file's betas. Its first convolution loses the
    half for latents of a given image; of its resampler's 16 queries for each of 16 frames those of the first stay.
    """
    config, report = config or TOKENIZERS["paper_tokenizer_256"], Report()
    state = without_prefix(read_weights(path), TOKENIZER_PARTS, str(path))
    public = {part: taken(state, part) for part in TOKENIZER_PARTS}
    objective = objective or objective_of(state, path)
    sampling = config.sampling if objective == "v_prediction" else config.sampling.changed(guidance_rescale=0.0)
    config = replace(config, objective=objective, sampling=sampling)
    if state.pop("scale_arr", None) is not None:
        report.leave("its latents shrink with the time step (dynamic rescale), ours do not", ["scale_arr"])
    drop_unused(state, str(path), report)
    unet, resampler = public[UNET], public[RESAMPLER]
    first, channels = "input_blocks.0.0.weight", config.first_stage.latent_channels
    if first not in unet or "latents" not in resampler:
        raise CheckpointError(f"{path}: expected DynamiCrafter's {UNET}{first} and {RESAMPLER}latents")
    if unet[first].shape[1] > channels:
        report.leave("reads the latents of a given image", [f"{UNET}{first}, input channels from {channels}"])
        unet[first] = unet[first][:, :channels]
    queries = config.resampler.queries
    if resampler["latents"].shape[1] > queries:
        report.leave("queries of later frames", [f"{RESAMPLER}latents, from {queries}"])
        resampler["latents"] = resampler["latents"][:, :queries]
    for name in [name for name in unet if name.endswith("attn2.to_k_ip.weight")]:
        unet.setdefault(name.replace("to_k_ip.weight", "alpha"), torch.zeros(()))  # scale 1 there; tanh(0) + 1 here
    first_stage, parts = joined(public, config, clip, str(path), report)
    with model_folder(output) as folder:
        write_tensors(folder / FIRST_STAGE_WEIGHTS, first_stage, dtype, EXACT)
        write_tensors(folder / WEIGHTS, parts, dtype, EXACT)
        write_config(folder, tokenizer_sections(config, first_stage, parts, dtype))
        write_card(folder, output, [path.name], report)
    return report


def objective_of(state: State, path: Path) -> Objective:
    """DynamiCrafter-256 predicts epsilon on the plain schedule; 512 and 1024 predict v on one of zero terminal SNR.

    The latter's last beta is 1 (Lin et al. 2024, algorithm 1), the former's 0.012.
    """
    if "betas" not in state:
        raise CheckpointError(
            f"{path}: expected 'betas', which determine the objective; name --objective epsilon for "
            "DynamiCrafter-256, v_prediction for 512 and 1024"
        )
    return "v_prediction" if float(state["betas"][-1]) > 0.999 else "epsilon"


def convert_vae(path: Path, output: Path, dtype: torch.dtype = torch.float32) -> Report:
    """CompVis' KL autoencoder, alone or within a larger checkpoint → a diffusers folder (`AutoencoderKL`)."""
    state, report = read_weights(path), Report()
    if within := {name: value for name, value in state.items() if VAE in name}:
        report.leave("other parts of the file", [name for name in state if name not in within])
        state = {name[name.index(VAE) + len(VAE) :]: value for name, value in within.items()}
    drop_unused({n: t for n, t in state.items() if not n.startswith(VAE_PARTS)}, str(path), report, VAE_UNUSED)
    state = {name: value for name, value in state.items() if name.startswith(VAE_PARTS)}
    if "post_quant_conv.weight" not in state:
        raise CheckpointError(f"{path}: expected CompVis' names, such as {VAE}encoder.conv_in.weight")
    config = first_stage_of(state)
    with torch.device("meta"):
        autoencoder = FirstStage(config).autoencoder
    renamed = fitted(vae_state(state, len(config.channels)), autoencoder, str(path))
    settings = {"_class_name": AutoencoderKL.__name__, **autoencoder.config, "scaling_factor": LATENT_SCALE}
    with model_folder(output, own=()) as folder:
        write_tensors(folder / "diffusion_pytorch_model.safetensors", renamed, dtype)
        (folder / "config.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")
    report.use("autoencoder", renamed)
    return report


def first_stage_of(state: Mapping[str, Tensor]) -> FirstStageConfig:
    """Sizes of CompVis' KL autoencoder by its weights."""
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.down."))
    blocks = (len({name.split(".")[4] for name in state if name.startswith("encoder.down.0.block.")}),)
    channels = tuple(len(state[f"encoder.down.{level}.block.0.conv1.weight"]) for level in range(levels))
    return FirstStageConfig("kl", channels, len(state["post_quant_conv.weight"]), blocks, blocks)


def convert_clip(path: Path, output: Path, dtype: torch.dtype = torch.float32) -> Report:
    """OpenCLIP's file → a transformers folder (`CLIPModel`); transformers' file or folder → OpenCLIP's file."""
    (state, from_open_clip), report = read_clip(path), Report()
    config = clip_config_of(state, path)
    with torch.device("meta"):
        state = fitted(state, CLIPModel(config), str(path))
    with model_folder(output, own=()) as folder:
        if from_open_clip:
            write_tensors(folder / "model.safetensors", state, dtype)
            config.save_pretrained(folder)
        else:
            write_tensors(folder / "open_clip_model.safetensors", open_clip_state(state), dtype)
    report.use("CLIP model", state)
    return report


def clip_config_of(state: State, path: Path) -> CLIPConfig:
    """Sizes of both towers by their weights."""
    if not {"vision_model.embeddings.patch_embedding.weight", "text_projection.weight"} <= state.keys():
        raise CheckpointError(f"{path}: expected a CLIP model under OpenCLIP's or transformers' names")
    vision, text = (tower_sizes(state, tower, f"{tower}_model.") for tower in ("vision", "text"))
    patch = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    side = round((len(state["vision_model.embeddings.position_embedding.weight"]) - 1) ** 0.5)
    vision |= {"patch_size": patch, "image_size": side * patch}
    words, places = (state[f"text_model.embeddings.{kind}_embedding.weight"] for kind in ("token", "position"))
    text |= {"vocab_size": len(words), "max_position_embeddings": len(places)}
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=len(state["text_projection.weight"]))
