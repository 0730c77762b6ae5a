"""Checkpoints as the authors published them, at toy size: the reference weights, with small CLIP towers beside them."""

import json
import lzma
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file
from torch import Tensor, nn

from dicode.lm.config import BodyConfig, DeepLMConfig, HeadConfig
from dicode.tokenizer.config import (
    DenoiserConfig,
    EncoderConfig,
    FirstStageConfig,
    ResamplerConfig,
    SamplingConfig,
    TokenizerConfig,
)

REFERENCE = Path(os.environ.get("DICODE_REFERENCE", Path(__file__).parent / "reference"))
TEXT_LENGTH, TEXT_DEPTH, IMAGE_HEADS = 7, 3, 2


def values_of(name: str) -> dict[str, Any]:
    return json.loads((REFERENCE / f"{name}.json").read_text())


def weights_of(name: str) -> dict[str, Tensor]:
    """Large ones are compressed here, bit for bit the reference's."""
    packed = REFERENCE / f"{name}.weights.safetensors.xz"
    if packed.is_file():
        return load(lzma.decompress(packed.read_bytes()))
    return load_file(REFERENCE / f"{name}.weights.safetensors")


def vectors_of(name: str) -> dict[str, Tensor]:
    return load_file(REFERENCE / f"{name}.io.safetensors")


def reference_lm_config() -> DeepLMConfig:
    values = values_of("lm")
    gpt2, tokens = values["gpt2"], values["tokens_per_frame"]
    return DeepLMConfig(
        BodyConfig("gpt2", gpt2["n_embd"], gpt2["n_layer"], gpt2["n_head"], dropout=gpt2["resid_pdrop"]),
        head=HeadConfig(components=values["num_kernels"]), positions=gpt2["n_positions"],
        vocab_size=gpt2["vocab_size"], token_width=values["token_dim"], max_keyframes=values["max_length"] // tokens,
        text_length=values["text_length"], tokens_per_keyframe=tokens, pad_id=values["pad_id"],
        begin_id=values["boi_id"],
    )  # fmt: skip


def reference_resampler_config() -> ResamplerConfig:
    values = values_of("resampler")
    encoder = EncoderConfig(values["embedding_dim"], 2, IMAGE_HEADS, size=28)
    return ResamplerConfig(
        width=values["dim"], depth=values["depth"], heads=values["heads"], head_width=values["dim_head"],
        feedforward_factor=values["ff_mult"], encoder=encoder,
    )  # fmt: skip


def reference_denoiser_config(text_tokens: int) -> DenoiserConfig:
    values = values_of("unet")
    width = values["model_channels"]
    return DenoiserConfig(
        kind="unet3d", context_frames=0, depth=values["num_res_blocks"],
        heads=width // values["num_head_channels"], channels=tuple(width * m for m in values["channel_mult"]),
        text_width=values["context_dim"], text_tokens=text_tokens, frame_stride=values["default_fs"],
    )  # fmt: skip


def reference_first_stage_config() -> FirstStageConfig:
    values = values_of("vae")["ddconfig"]
    blocks, channels = (values["num_res_blocks"],), tuple(values["ch"] * multiple for multiple in values["ch_mult"])
    return FirstStageConfig("kl", channels, values["z_channels"], blocks, blocks)


def reference_config(text_tokens: int = TEXT_LENGTH) -> TokenizerConfig:
    """A tokenizer of the published arrangement out of the reference parts."""
    resampler, ddim = values_of("resampler"), values_of("ddim")
    return TokenizerConfig(
        size=32,
        clip_frames=4,
        tail_frame=3,
        null_tokens="grey_image",
        first_stage=reference_first_stage_config(),
        tokens_per_keyframe=resampler["num_queries"],
        token_width=resampler["output_dim"],
        resampler=reference_resampler_config(),
        denoiser=reference_denoiser_config(text_tokens),
        objective="v_prediction",
        sampling=SamplingConfig(
            steps=4,
            decoder_guidance=ddim["guidance_scale"],
            guidance_rescale=ddim["guidance_rescale"],
            eta=ddim["eta"],
            joins="independent",
        ),
    )


def assert_near(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """By the norm of the difference, against that expected: single values differ more between processors."""
    assert actual.shape == expected.shape
    difference = ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
    assert difference < relative, difference


def published_tokenizer() -> dict[str, Tensor]:
    """What `models/pytorch_model.bin` holds, under its names."""
    torch.manual_seed(0)
    clip = OpenClip(image_width=values_of("resampler")["embedding_dim"], text_width=values_of("unet")["context_dim"])
    image = {f"embedder.model.visual.{name}": value for name, value in clip.visual.state_dict().items()}
    text = {n: t for n, t in clip.state_dict().items() if not n.startswith("visual.")}
    return {
        **{f"model.diffusion_model.{name}": value for name, value in weights_of("unet").items()},
        **{f"first_stage_model.{name}": value for name, value in weights_of("vae").items()},
        **{f"image_proj_model.{name}": value for name, value in weights_of("resampler").items()},
        **image,
        **{f"cond_stage_model.model.{name}": value.clone() for name, value in text.items()},
        "cond_stage_model.model.attn_mask": torch.zeros(TEXT_LENGTH, TEXT_LENGTH),
        "embedder.model.logit_scale": torch.ones(()),
        "embedder.model.ln_final.weight": torch.ones(3),
        "betas": torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
        "sqrt_one_minus_alphas_cumprod": torch.zeros(10),
    }


class Block(nn.Module):
    """OpenCLIP's residual block, under its names."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = [
            ("c_fc", nn.Linear(width, 4 * width)),
            ("gelu", nn.GELU()),
            ("c_proj", nn.Linear(4 * width, width)),
        ]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, width: int, heads: int, depth: int):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(depth))


class ImageTower(nn.Module):
    def __init__(self, width: int, heads: int, depth: int, joint: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 14, 14, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(5, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Blocks(width, heads, depth)
        self.proj = nn.Parameter(torch.randn(width, joint))

    def forward(self, pixels: Tensor) -> Tensor:
        """Tokens after the last block, the class token first."""
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        classes = self.class_embedding.expand(len(pixels), 1, -1)
        x = self.ln_pre(torch.cat([classes, patches], dim=1) + self.positional_embedding)
        for block in self.transformer.resblocks:
            x = block(x)
        return x


class OpenClip(nn.Module):
    """OpenCLIP's model at toy size, written with torch's own attention: independent of transformers."""

    def __init__(self, image_width: int, text_width: int, joint: int = 6):
        super().__init__()
        self.visual = ImageTower(image_width, IMAGE_HEADS, 2, joint)
        self.token_embedding = nn.Embedding(49_408, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(TEXT_LENGTH, text_width))
        self.transformer = Blocks(text_width, 1, TEXT_DEPTH)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, joint))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        nn.init.normal_(self.ln_final.weight)  # else the last norm could be forgotten unnoticed

    def text_features(self, ids: Tensor, layers: int = TEXT_DEPTH) -> Tensor:
        """After the first `layers` blocks and the last norm."""
        x = self.token_embedding(ids) + self.positional_embedding
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        for block in self.transformer.resblocks[:layers]:
            x = block(x, mask)
        return self.ln_final(x)
