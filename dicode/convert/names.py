"""Parameter names of the public code → ours. Unknown names stay: strict loads afterwards report them."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]

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
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_PARTS = ("resnets", "attentions", "temp_attentions")  # of a block, in the public order


def unet_state(published: Mapping[str, Tensor], layers: int) -> State:
    """DynamiCrafter's U-Net, with DiCoDe's deep-token attention → the state of our `UNet3D` less `null_text`.

    `layers` is the number of residual layers a level going down.
    """
    # The first temporal attention projects with convolutions of width 1 there, with matrices in diffusers.
    squeezed = re.compile(r"init_attn\.0\.proj_(in|out)\.weight")
    return {
        f"unet.{_unet_name(name, layers)}": value.squeeze(-1) if squeezed.fullmatch(name) else value
        for name, value in published.items()
    }


def _unet_name(name: str, layers: int) -> str:
    for start, ours in _UNET_ENDS.items():
        if name.startswith(f"{start}."):
            return ours + name.removeprefix(start)
    if middle := re.fullmatch(r"middle_block\.([0-3])\.(.+)", name):
        kind, layer = (*_PARTS, "resnets")[int(middle[1])], int(middle[1] == "3")
        return f"mid_block.{_within(kind, layer, middle[2])}"
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.([0-3])\.(.+)", name)
    if found is None:
        return name
    side, rest = ("down" if found[1] == "input" else "up"), found[4]
    # A level has its layers and a downsampling, going up one layer more and the upsampling within the last
    level, layer = divmod(int(found[2]) - (side == "down"), layers + 1)
    if rest.startswith(("op.", "conv.")):
        return f"{side}_blocks.{level}.{side}samplers.0.conv.{rest.partition('.')[2]}"
    return name if found[3] == "3" else f"{side}_blocks.{level}.{_within(_PARTS[int(found[3])], layer, rest)}"


def _within(kind: str, layer: int, rest: str) -> str:
    if kind != "resnets":
        rest = re.sub(r"attn2\.(to_[kv])_ip\.", r"attn2.processor.\1.", rest)
        return f"{kind}.{layer}.{rest.replace('attn2.alpha', 'attn2.processor.alpha')}"
    if rest.startswith("temopral_conv."):  # sic
        return f"temp_convs.{layer}.{rest.removeprefix('temopral_conv.')}"
    for start, ours in _RESNET.items():
        if rest.startswith(f"{start}."):
            rest = ours + rest.removeprefix(start)
    return f"{kind}.{layer}.{rest}"


def vae_state(published: Mapping[str, Tensor], levels: int) -> State:
    """CompVis' KL autoencoder → the state of diffusers' `AutoencoderKL`."""
    matrix = re.compile(r".*\.attn_1\.(q|k|v|proj_out)\.weight")  # 1×1 convolutions at CompVis
    return {
        _vae_name(name, levels): value[..., 0, 0] if matrix.fullmatch(name) else value
        for name, value in published.items()
    }


def _vae_name(name: str, levels: int) -> str:
    name = re.sub(r"(en|de)coder\.norm_out", r"\1coder.conv_norm_out", name)
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


# OpenCLIP → transformers; the image tower's names begin with `visual.`
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
_CLIP_LAYERS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
_CLIP_TRANSPOSED = ("visual.proj", "text_projection")


def clip_state(published: Mapping[str, Tensor]) -> State:
    """OpenCLIP's model, or either tower of it → the state of transformers' `CLIPModel`, or of that part of it."""
    renamed: State = {}
    for name, value in published.items():
        ours = _CLIP_ENDS.get(name) or _replaced(name, _CLIP_LAYERS)
        if "in_proj_" in ours:
            for which, part in zip("qkv", value.chunk(3), strict=True):
                renamed[ours.replace("in_proj_", f"{which}_proj.")] = part
        else:
            renamed[ours] = value.T if name in _CLIP_TRANSPOSED else value
    return renamed


def open_clip_state(ours: Mapping[str, Tensor]) -> State:
    """The way back: transformers' `CLIPModel`, or a part of it → OpenCLIP's names."""
    ends = {theirs: name for name, theirs in _CLIP_ENDS.items()}
    layers = {theirs: name for name, theirs in _CLIP_LAYERS.items()}
    renamed: State = {}
    for name, value in ours.items():
        theirs = ends.get(name) or _replaced(name, layers)
        if "q_proj." in theirs:
            parts = [ours[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            renamed[theirs.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif "k_proj." not in theirs and "v_proj." not in theirs:
            renamed[theirs] = value.T.contiguous() if theirs in _CLIP_TRANSPOSED else value
    return renamed


_LM = {
    "llm.transformer.": "backbone.body.",
    "input_resampler.": "embedding.mlp.",
    "output_resampler.": "head.mlp.",
    "video_pos_token.frame_token": "embedding.keyframe",
    "video_pos_token.pos_token": "embedding.place",
}


def lm_state(published: Mapping[str, Tensor]) -> State:
    """The public language model, less what it does not use → the state of our `DeepTokenLM`."""
    return {
        _replaced(name, _LM): value.flatten(0, 1) if value.ndim == 3 else value for name, value in published.items()
    }


def _replaced(name: str, pairs: Mapping[str, str]) -> str:
    for old, new in pairs.items():
        name = name.replace(old, new)
    return name
