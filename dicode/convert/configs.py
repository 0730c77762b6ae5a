"""The public code's constructor arguments → our configurations, and what can be told from the weights alone."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dicode.config import CheckpointError
from dicode.lm.presets import SIZES, BodyConfig, DeepLMConfig, HeadConfig
from dicode.tokenizer.config import DenoiserConfig, FirstStageConfig, ResamplerConfig

CLIP_HEAD_WIDTH = {"vision": 80, "text": 64}  # of ViT-H/14: 16 heads in either tower


def denoiser_config(values: Mapping[str, Any], text_tokens: int = 77) -> DenoiserConfig:
    """DynamiCrafter's `UNetModel` as DiCoDe builds it. Raises `CheckpointError` for what ours cannot be."""
    multiples = values["channel_mult"]
    attended = [2**level for level in range(len(multiples) - 1)]
    fixed = {
        "transformer_depth": 1,
        "use_linear": True,
        "temporal_conv": True,
        "temporal_attention": True,
        "temporal_selfatt_only": True,
        "use_relative_position": False,
        "use_causal_attention": False,
        "addition_attention": True,
        "image_cross_attention": True,
        "fs_condition": True,
    }
    differing = [f"{name} {values[name]}, not {value}" for name, value in fixed.items() if values[name] != value]
    if sorted(values["attention_resolutions"]) != attended:
        differing.append(f"attention_resolutions {values['attention_resolutions']}, not {attended}")
    if differing:
        raise CheckpointError(f"no such U-Net can be built here: {'; '.join(differing)}")
    return DenoiserConfig(
        kind="unet3d",
        context_frames=0,
        uses_key_latents=False,
        depth=values["num_res_blocks"],
        heads=values["model_channels"] // values["num_head_channels"],
        channels=tuple(values["model_channels"] * multiple for multiple in multiples),
        text_width=values["context_dim"],
        text_tokens=text_tokens,
        frame_stride=values["default_fs"],
    )


def first_stage_config(values: Mapping[str, Any]) -> FirstStageConfig:
    """CompVis' `ddconfig` of a KL autoencoder."""
    blocks = (values["num_res_blocks"],)
    channels = tuple(values["ch"] * multiple for multiple in values["ch_mult"])
    return FirstStageConfig("kl", channels, values["z_channels"], blocks, blocks)


def first_stage_of(state: Mapping[str, Tensor]) -> FirstStageConfig:
    """The same, told from CompVis' weights."""
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.down."))
    blocks = (len({name.split(".")[4] for name in state if name.startswith("encoder.down.0.block.")}),)
    channels = tuple(len(state[f"encoder.down.{level}.block.0.conv1.weight"]) for level in range(levels))
    return FirstStageConfig("kl", channels, len(state["post_quant_conv.weight"]), blocks, blocks)


def resampler_config(values: Mapping[str, Any], features: int = 257) -> ResamplerConfig:
    """The public `Resampler`."""
    return ResamplerConfig(
        width=values["dim"],
        depth=values["depth"],
        heads=values["heads"],
        head_width=values["dim_head"],
        queries=values["num_queries"],
        feature_width=values["embedding_dim"],
        features=features,
        token_width=values["output_dim"],
        feedforward_factor=values["ff_mult"],
    )


def lm_config(values: Mapping[str, Any]) -> DeepLMConfig:
    """The public language model, from its GPT-2 configuration and its own arguments."""
    gpt2 = values["gpt2"]
    return DeepLMConfig(
        BodyConfig(
            "gpt2", width=gpt2["n_embd"], depth=gpt2["n_layer"], heads=gpt2["n_head"], dropout=gpt2["resid_pdrop"]
        ),
        head=HeadConfig(components=values["num_kernels"]),
        positions=gpt2["n_positions"],
        vocab_size=gpt2["vocab_size"],
        token_width=values["token_dim"],
        max_keyframes=values["max_length"] // values["tokens_per_frame"],
        text_length=values["text_length"],
        tokens_per_keyframe=values["tokens_per_frame"],
        pad_id=values["pad_id"],
        begin_id=values["boi_id"],
    )


def lm_size_of(state: Mapping[str, Tensor]) -> DeepLMConfig:
    """The named size that a public language model has, told from its state under our names."""
    width = state["backbone.body.wte.weight"].shape[1]
    depth = 1 + max(int(name.split(".")[3]) for name in state if name.startswith("backbone.body.h."))
    sizes = {name: size for name, size in SIZES.items() if size.body.kind == "gpt2"}
    for size in sizes.values():
        if (size.body.width, size.body.depth) == (width, depth):
            return size
    known = ", ".join(f"{name} {size.body.width}×{size.body.depth}" for name, size in sizes.items())
    raise CheckpointError(f"no known language model has width {width} and depth {depth}; known: {known}")
