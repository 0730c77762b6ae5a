"""Image encoders: a key frame → the resampler's input features."""

import math

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from dicode.shapes import ImageLatents, KeyFramePixels, PatchFeatures
from dicode.tokenizer.config import EncoderConfig, TokenizerConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def build_encoder(config: EncoderConfig) -> nn.Module:
    """The encoder of a configuration, with random weights."""
    return PatchEncoder(config) if config.kind == "patch" else ClipEncoder(config)


class PatchEncoder(nn.Module):
    """A small vision transformer on the first-stage latents of a key frame."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.patches = nn.Conv2d(config.channels, config.width, config.patch, config.patch)
        self.positions = nn.Parameter(grid_positions((config.size // config.patch) ** 2, config.width))
        self.blocks = transformer(config.width, config.depth, config.heads)

    def forward(self, latents: ImageLatents) -> PatchFeatures:
        """Latents `b c h w` → features `b p width`."""
        patches = self.patches(latents.to(self.positions.dtype))
        return self.blocks(patches.flatten(2).transpose(1, 2) + self.positions)


class ClipEncoder(nn.Module):
    """A CLIP image tower from transformers, with its own preprocessing on tensors."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.size = config.size
        self.tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=config.width,
                intermediate_size=config.width * 4,
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
                image_size=config.size,
                patch_size=config.patch,
                hidden_act="gelu",
            )
        )
        self.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(CLIP_DEVIATION)[:, None, None], persistent=False)

    def forward(self, pixels: KeyFramePixels) -> PatchFeatures:
        """Pixels −1…1 of any size → the tower's last hidden state, class token first (ViT-H/14: `b 257 1280`)."""
        # kornia's resize: its antialiasing leaves 256 → 224 as plain bicubic; torch's differs by 2.3 % there
        resized = functional.interpolate(pixels, (self.size, self.size), mode="bicubic", align_corners=True)
        normalised = ((resized + 1) / 2 - self.mean) / self.deviation
        return self.tower(normalised).last_hidden_state


def grid_positions(count: int, width: int) -> Tensor:
    """Starting values for `count` learned positions: a square grid's sine embedding, all grids over the same area.

    Small normal values (the usual start) cost the key-frame head a few hundred steps before it found where things are.
    """
    side = round(count**0.5)
    if side * side != count or width % 4:
        return torch.randn(count, width) * 0.02
    return get_2d_sincos_pos_embed(width, side, base_size=8, output_type="pt").float().view(count, width)


def transformer(width: int, depth: int, heads: int) -> nn.TransformerEncoder:
    """A pre-norm transformer stack from torch, normalised at its end; no dropout."""
    layer = nn.TransformerEncoderLayer(
        width, heads, width * 4, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)


class KeyFrameHead(nn.Module):
    """Deep tokens → a coarse first-stage latent of their key frame, learned by plain regression.

    Each position starts from the token of its cell, the tokens taken as a coarse square grid; attention does the rest.
    The denoiser gets it as extra channels, and only detail and motion are left to it (the public code has such a path,
    `image_cat_proj`, unused there).
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        n, d, width = config.resampler.queries, config.resampler.token_width, config.key_head_width
        self.size = config.latent_size
        self.tokens = nn.Linear(d, width)
        self.cell = nn.Linear(d, width * (self.size**2 // n))
        self.queries = nn.Parameter(grid_positions(self.size**2, width))
        self.places = nn.Parameter(grid_positions(n, width))
        self.blocks = transformer(width, config.key_head_depth, heads=3)
        self.out = nn.Linear(width, config.first_stage.latent_channels)

    def forward(self, tokens: Tensor) -> ImageLatents:
        """Tokens `b n d` → latents `b c h w`."""
        h = math.isqrt(tokens.shape[1])
        i = self.size // h
        tokens = tokens.to(self.queries.dtype)
        queries = self.queries + rearrange(self.cell(tokens), "b (h w) (i j c) -> b (h i w j) c", h=h, w=h, i=i, j=i)
        hidden = self.blocks(torch.cat([queries, self.tokens(tokens) + self.places], dim=1))
        latents = self.out(hidden[:, : self.size**2])
        return latents.transpose(1, 2).unflatten(2, (self.size, self.size)).float()
