"""Single networks that others published: CompVis' and diffusers' autoencoders, OpenCLIP."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from dicode.checkpoint import load_state
from dicode.checkpoint.saving import model_folder
from dicode.config import CheckpointError
from dicode.convert.files import State, read_weights, write_tensors
from dicode.convert.names import open_clip_state, vae_state
from dicode.convert.official import (
    LATENT_SCALE,
    VAE,
    Report,
    drop_unused,
    fitted,
    read_clip,
    tower_sizes,
)
from dicode.files import read_json
from dicode.tokenizer.config import FirstStageConfig
from dicode.tokenizer.encoder import FirstStage

VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
VAE_UNUSED = {r"(loss\..*|model_ema\..*)": "the autoencoder's own training"}


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


def diffusers_first_stage(folder: Path) -> FirstStage:
    """A first stage from a diffusers folder of an AutoencoderKL or AutoencoderTiny (as Stable Diffusion's `vae/`).

    Latents are scaled by its `scaling_factor` and `shift_factor`. Raises `CheckpointError` for another class and for an
    architecture that `FirstStageConfig` cannot describe.
    """
    path = folder / "config.json"
    kind = read_json(path).get("_class_name")
    if kind not in ("AutoencoderKL", "AutoencoderTiny"):
        raise CheckpointError(f"{path}: expected AutoencoderKL or AutoencoderTiny, got {kind!r}")
    library = AutoencoderKL if kind == "AutoencoderKL" else AutoencoderTiny
    loaded = library.from_pretrained(folder, local_files_only=True)
    own = loaded.config
    if kind == "AutoencoderKL":
        channels, blocks = tuple(own.block_out_channels), (own.layers_per_block,)
        config = FirstStageConfig("kl", channels, own.latent_channels, blocks, blocks)
    else:
        channels, blocks = tuple(own.encoder_block_out_channels), tuple(own.num_encoder_blocks)
        config = FirstStageConfig("tiny", channels, own.latent_channels, blocks, tuple(own.num_decoder_blocks))
    stage = FirstStage(config)
    load_state(stage.autoencoder, loaded.state_dict(), str(folder))
    stage.latent_mean.fill_(own.get("shift_factor") or 0.0)
    stage.latent_deviation.fill_(1 / own.scaling_factor)
    return stage


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
