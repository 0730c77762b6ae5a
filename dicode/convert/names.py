"""Parameter names of the public code → ours: renaming, tensor by tensor, so that a strict load checks all of it."""

import re
from collections.abc import Mapping

from torch import Tensor

State = dict[str, Tensor]

# Within a block of DynamiCrafter's U-Net; the rest of these modules' names is the same in diffusers.
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_ENDS = {
    "time_embed.0": "time_embedding.time_embedding.linear_1",
    "time_embed.2": "time_embedding.time_embedding.linear_2",
    "fps_embedding.0": "time_embedding.stride_embedding.linear_1",
    "fps_embedding.2": "time_embedding.stride_embedding.linear_2",
    "framestride_embed.0": "time_embedding.stride_embedding.linear_1",
    "framestride_embed.2": "time_embedding.stride_embedding.linear_2",
    "init_attn.0": "transformer_in",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MIDDLE = ("resnets.0", "attentions.0", "temp_attentions.0", "resnets.1")


def unet_state(published: Mapping[str, Tensor], levels: int, layers: int) -> State:
    """DynamiCrafter's U-Net, as DiCoDe's with deep-token attention → the state of our `UNet3D` less `null_text`.

    `levels` is the number of resolutions, `layers` that of residual layers a level going down. Raises `KeyError` with
    the name of a tensor that no such network has.
    """
    return {f"unet.{_unet_name(name, levels, layers)}": _squeezed(name, value) for name, value in published.items()}


def _unet_name(name: str, levels: int, layers: int) -> str:
    for start, ours in _UNET_ENDS.items():
        if name.startswith(f"{start}."):
            return ours + name.removeprefix(start)
    side, _, rest = name.partition(".")
    if side == "middle_block":
        part, _, rest = rest.partition(".")
        return "mid_block." + _within(_MIDDLE[int(part)], rest)
    if side not in ("input_blocks", "output_blocks"):
        raise KeyError(name)
    block, part, rest = rest.split(".", 2)
    if side == "input_blocks":  # after conv_in each level has its layers, then, but for the coarsest, a downsampling
        level, layer = divmod(int(block) - 1, layers + 1)
        where = f"down_blocks.{level}"
        if rest.startswith("op."):
            return f"{where}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    else:  # each level has one layer more than down; the last of them also holds the upsampling
        level, layer = divmod(int(block), layers + 1)
        where = f"up_blocks.{level}"
        if rest.startswith("conv."):
            return f"{where}.upsamplers.0.{rest}"
    if level >= levels:
        raise KeyError(name)
    kind = ("resnets", "attentions", "temp_attentions")[int(part)]
    return f"{where}." + _within(f"{kind}.{layer}", rest)


def _within(module: str, rest: str) -> str:
    if module.startswith("resnets"):
        if rest.startswith("temopral_conv."):  # sic
            return module.replace("resnets", "temp_convs") + "." + rest.removeprefix("temopral_conv.")
        for start, ours in _RESNET.items():
            if rest.startswith(f"{start}."):
                return f"{module}.{ours}{rest.removeprefix(start)}"
        raise KeyError(rest)
    rest = re.sub(r"attn2\.(to_[kv])_ip\.", r"attn2.processor.\1.", rest).replace(
        "attn2.alpha", "attn2.processor.alpha"
    )
    return f"{module}.{rest}"


def _squeezed(name: str, value: Tensor) -> Tensor:
    """The first temporal attention projects with convolutions of width 1, diffusers with matrices: the same numbers."""
    return value.squeeze(-1) if re.fullmatch(r"init_attn\.0\.proj_(in|out)\.weight", name) else value


def vae_state(published: Mapping[str, Tensor], levels: int) -> State:
    """CompVis' KL autoencoder → the state of diffusers' `AutoencoderKL`."""
    return {_vae_name(name, levels): _as_matrix(name, value) for name, value in published.items()}


def _vae_name(name: str, levels: int) -> str:
    name = name.replace("encoder.norm_out", "encoder.conv_norm_out").replace(
        "decoder.norm_out", "decoder.conv_norm_out"
    )
    name = name.replace(".nin_shortcut.", ".conv_shortcut.")
    name = re.sub(r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets.", name)
    name = re.sub(r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0.", name)
    # CompVis counts the decoder's levels from the finest
    name = re.sub(r"\.up\.(\d+)\.block\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.resnets.", name)
    name = re.sub(r"\.up\.(\d+)\.upsample\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.upsamplers.0.", name)
    name = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
    if ".mid.attn_1." not in name:
        return name
    name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.").replace(".norm.", ".group_norm.")
    return re.sub(r"\.(q|k|v)\.", r".to_\1.", name).replace(".proj_out.", ".to_out.0.")


def _as_matrix(name: str, value: Tensor) -> Tensor:
    """Attention projections are 1×1 convolutions at CompVis, matrices in diffusers."""
    return value[..., 0, 0] if re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", name) else value


def lm_state(published: Mapping[str, Tensor]) -> State:
    """The public language model (`llm_agent.` taken off) → the state of our `DeepTokenLM`.

    GPT-2's `lm_head` is tied to its text embedding and never used here; the resampler's second copy belongs to the
    tokenizer, which is where its reader has to compare it.
    """
    renamed: State = {}
    for name, value in published.items():
        if name == "llm.lm_head.weight" or name.startswith("pre_input_resampler."):
            continue
        for theirs, ours in _LM.items():
            name = name.replace(theirs, ours)
        renamed[name] = value.flatten(0, 1) if value.ndim == 3 else value
    return renamed


_LM = {
    "llm.transformer.": "backbone.body.",
    "input_resampler.": "embedding.mlp.",
    "output_resampler.": "head.mlp.",
    "video_pos_token.frame_token": "embedding.keyframe",
    "video_pos_token.pos_token": "embedding.place",
}
