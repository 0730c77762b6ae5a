"""What others published to start from: DynamiCrafter, CompVis' autoencoders, OpenCLIP."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL
from transformers import CLIPConfig, CLIPModel

from dicode.checkpoint import model_folder, write_config
from dicode.config import CheckpointError
from dicode.convert.configs import CLIP_HEAD_WIDTH, first_stage_of
from dicode.convert.files import State, read_weights, taken, without_prefix, write_tensors
from dicode.convert.names import open_clip_state, vae_state
from dicode.convert.official import (
    EXACT,
    IMAGE_TOWER,
    LATENT_SCALE,
    RESAMPLER,
    TEXT_TOWER,
    TOKENIZER_PARTS,
    UNET,
    VAE,
    Report,
    drop_unused,
    fitted,
    is_transformers_clip,
    joined,
    read_clip,
    tokenizer_sections,
    towers,
    write_card,
)
from dicode.tokenizer.config import TokenizerConfig
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

    What its U-Net predicts, and on which schedule, stays as it is: `objective`, or what the file's betas tell.

    Its U-Net reads the latents of a given image beside the noisy ones: that half of the first convolution is left out.
    Its resampler has 16 queries for each of 16 frames; ours begins as those of the first frame.
    """
    config, report = config or TOKENIZERS["paper_tokenizer_256"], Report()
    state = without_prefix(read_weights(path), TOKENIZER_PARTS, str(path))
    unet, vae, resampler = (taken(state, part) for part in (UNET, VAE, RESAMPLER))
    image, text = towers(taken(state, IMAGE_TOWER), taken(state, TEXT_TOWER), clip, str(path), report)
    objective = objective or objective_of(state, path)
    sampling = config.sampling if objective == "v_prediction" else config.sampling.changed(guidance_rescale=0.0)
    config = replace(config, objective=objective, sampling=sampling)
    if "scale_arr" in state:
        report.leave("its latents shrink with the time step (dynamic rescale), ours do not", ["scale_arr"])
        del state["scale_arr"]
    drop_unused(state, str(path), report)
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
    missing_scale = [name.replace("to_k_ip.weight", "alpha") for name in unet if name.endswith("attn2.to_k_ip.weight")]
    for name in missing_scale:
        unet.setdefault(name, torch.zeros(()))  # a fixed scale of 1 there; tanh(0) + 1 here
    first_stage, parts = joined(unet, vae, resampler, image, text, config, str(path), report)
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
            f"{path}: expected 'betas', which tell what the U-Net predicts; name --objective epsilon for "
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
    renamed = vae_state(state, len(config.channels))
    with torch.device("meta"):
        autoencoder = FirstStage(config).autoencoder
    renamed = fitted(renamed, autoencoder, str(path))
    settings = {**dict(autoencoder.config), "scaling_factor": LATENT_SCALE}
    text = json.dumps({"_class_name": AutoencoderKL.__name__, **settings}, indent=2, default=str)
    with model_folder(output, own=()) as folder:
        write_tensors(folder / "diffusion_pytorch_model.safetensors", renamed, dtype)
        (folder / "config.json").write_text(text + "\n")
    report.use("autoencoder", renamed)
    return report


def convert_clip(path: Path, output: Path, dtype: torch.dtype = torch.float32) -> Report:
    """OpenCLIP's file → a transformers folder (`CLIPModel`); transformers' file or folder → OpenCLIP's file."""
    state, report = read_clip(path), Report()
    if is_transformers_clip(read_weights(path)):
        back = open_clip_state(state)
        with model_folder(output, own=()) as folder:
            write_tensors(folder / "open_clip_model.safetensors", back, dtype)
        report.use("OpenCLIP model", back)
        return report
    config = clip_config_of(state)
    with torch.device("meta"):
        state = fitted(state, CLIPModel(config), str(path))
    with model_folder(output, own=()) as folder:
        write_tensors(folder / "model.safetensors", state, dtype)
        config.save_pretrained(folder)
    report.use("CLIP model", state)
    return report


def clip_config_of(state: State) -> CLIPConfig:
    """Sizes of both towers, told from their weights; heads are as wide as those of ViT-H/14."""
    towers = {}
    for tower in ("vision", "text"):
        layers = [name for name in state if name.startswith(f"{tower}_model.encoder.layers.")]
        width = len(state[f"{tower}_model.encoder.layers.0.layer_norm1.weight"])
        towers[tower] = {
            "hidden_size": width,
            "intermediate_size": len(state[f"{tower}_model.encoder.layers.0.mlp.fc1.bias"]),
            "num_hidden_layers": 1 + max(int(name.split(".")[3]) for name in layers),
            "num_attention_heads": max(1, width // CLIP_HEAD_WIDTH[tower]),
            "hidden_act": "gelu",
        }
    kernel = state["vision_model.embeddings.patch_embedding.weight"]
    side = round((len(state["vision_model.embeddings.position_embedding.weight"]) - 1) ** 0.5)
    towers["vision"] |= {"patch_size": kernel.shape[-1], "image_size": side * kernel.shape[-1]}
    words, places = (state[f"text_model.embeddings.{kind}_embedding.weight"] for kind in ("token", "position"))
    towers["text"] |= {"vocab_size": len(words), "max_position_embeddings": len(places)}
    return CLIPConfig(
        vision_config=towers["vision"],
        text_config=towers["text"],
        projection_dim=len(state["text_projection.weight"]),
    )
