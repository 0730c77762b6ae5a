"""Parameter names of the public code → ours: renaming, tensor by tensor, so that a strict load checks all of it."""

import re
from collections.abc import Mapping

import torch
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


# OpenCLIP's tower → that of transformers; the image tower's names begin with `visual.`, the text tower's with nothing.
_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_CLIP_ENDS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # sic
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_CLIP_TRANSPOSED = ("visual.proj", "text_projection")
_CLIP_LAYER_NAME = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
_CLIP_PACKED_NAME = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def clip_state(published: Mapping[str, Tensor]) -> State:
    """OpenCLIP's model, or either tower of it → the state of transformers' `CLIPModel`, or of that part of it."""
    renamed: State = {}
    for name, value in published.items():
        if name in _CLIP_ENDS:
            renamed[_CLIP_ENDS[name]] = value.T if name in _CLIP_TRANSPOSED else value
        elif packed := _CLIP_PACKED_NAME.fullmatch(name):
            layer = f"{_tower(packed[1])}.encoder.layers.{packed[2]}.self_attn"
            for which, part in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{layer}.{which}_proj.{packed[3]}"] = part
        elif (found := _CLIP_LAYER_NAME.fullmatch(name)) and found[3] in _CLIP_LAYER:
            renamed[f"{_tower(found[1])}.encoder.layers.{found[2]}.{_CLIP_LAYER[found[3]]}.{found[4]}"] = value
        else:
            raise KeyError(name)
    return renamed


def _tower(visual: str | None) -> str:
    return "vision_model" if visual else "text_model"


def open_clip_state(ours: Mapping[str, Tensor]) -> State:
    """The way back: transformers' `CLIPModel`, or a part of it → OpenCLIP's names."""
    ends = {theirs: name for name, theirs in _CLIP_ENDS.items()}
    layers = {theirs: name for name, theirs in _CLIP_LAYER.items()}
    renamed: State = {}
    for name, value in ours.items():
        if name in ends:
            renamed[ends[name]] = value.T.contiguous() if ends[name] in _CLIP_TRANSPOSED else value
            continue
        found = re.fullmatch(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if found is None:
            raise KeyError(name)
        layer = f"{'visual.' if found[1] == 'vision' else ''}transformer.resblocks.{found[2]}"
        if found[3] in layers:
            renamed[f"{layer}.{layers[found[3]]}.{found[4]}"] = value
        elif found[3] == "self_attn.q_proj":
            parts = [ours[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            renamed[f"{layer}.attn.in_proj_{found[4]}"] = torch.cat(parts)
        elif found[3] not in ("self_attn.k_proj", "self_attn.v_proj"):
            raise KeyError(name)
    return renamed


def lm_state(published: Mapping[str, Tensor]) -> State:
    """The public language model, less what it does not use → the state of our `DeepTokenLM`."""
    renamed: State = {}
    for name, value in published.items():
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
