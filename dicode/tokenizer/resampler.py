"""The resampler: a variable set of image features → a fixed number of deep tokens.

The Perceiver resampler of the published tokenizer (arXiv 2412.04446, section 3.1; Alayrac et al. 2022, Flamingo,
section 3.1.1), with the parameter names of the public weights.
"""

import math
from typing import cast

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from dicode.shapes import KeyFrameTokens, PatchFeatures
from dicode.tokenizer.config import ResamplerConfig


class Resampler(nn.Module):
    """Learned queries attend `depth` times to the features and to themselves."""

    def __init__(self, config: ResamplerConfig):
        super().__init__()
        self.config = config
        self.latents = nn.Parameter(torch.randn(1, config.queries, config.width) / config.width**0.5)
        self.proj_in = nn.Linear(config.feature_width, config.width)
        if config.grid_queries:
            self.cell = nn.Linear(config.width * (config.features // config.queries), config.width)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(config), feed_forward(config.width, config.feedforward_factor)])
            for _ in range(config.depth)
        )
        self.proj_out = nn.Linear(config.width, config.token_width)
        self.norm_out = nn.LayerNorm(config.token_width)

    def forward(self, features: PatchFeatures) -> KeyFrameTokens:
        """Features `b p width` of one key frame → its deep tokens `b n d`."""
        queries: Tensor = repeat(self.latents, "1 n width -> b n width", b=len(features))
        features = self.proj_in(features)
        if self.config.grid_queries:
            queries = queries + self.cells(features)
        for layer in self.layers:
            attention, feedforward = cast(nn.ModuleList, layer)
            queries = queries + attention(features, queries)
            queries = queries + feedforward(queries)
        return self.norm_out(self.proj_out(queries))

    def cells(self, features: PatchFeatures) -> KeyFrameTokens:
        """The features under each query, where the queries are a coarser square grid than the features."""
        side, coarse = math.isqrt(features.shape[1]), math.isqrt(self.config.queries)
        cells = rearrange(
            features, "b (h i w j) width -> b (h w) (i j width)", h=coarse, w=coarse, i=side // coarse, j=side // coarse
        )
        return self.cell(cells)


class PerceiverAttention(nn.Module):
    """Queries attend to features and queries together; no biases, both sides normalised."""

    def __init__(self, config: ResamplerConfig):
        super().__init__()
        inner = config.heads * config.head_width
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.to_q = nn.Linear(config.width, inner, bias=False)
        self.to_kv = nn.Linear(config.width, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, config.width, bias=False)

    def forward(self, features: Tensor, queries: Tensor) -> Tensor:
        queries = self.norm2(queries)
        source = torch.cat([self.norm1(features), queries], dim=1)
        q, k, v = (
            rearrange(x, "b p (heads e) -> b heads p e", heads=self.heads)
            for x in (self.to_q(queries), *self.to_kv(source).chunk(2, dim=-1))
        )
        return self.to_out(rearrange(functional.scaled_dot_product_attention(q, k, v), "b heads n e -> b n (heads e)"))


def feed_forward(width: int, factor: int) -> nn.Sequential:
    """Pre-normed two-layer network without biases, indices as in the public weights."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, width * factor, bias=False),
        nn.GELU(),
        nn.Linear(width * factor, width, bias=False),
    )
