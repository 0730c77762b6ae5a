"""A learned code of key frames, where a linear one would need many numbers: objects that may lie anywhere."""

import math

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dicode.shapes import ImageLatents, KeyFrameTokens
from dicode.tokenizer.config import TokenizerConfig
from dicode.tokenizer.denoiser import grid_positions, transformer


class LearnedCode(nn.Module):
    """First-stage latents ⇄ deep tokens, one a cell of a square grid over the image, by a transformer each way.

    Trained by squared error with noise on the tokens (`TokenizerRun.trains`), so that near tokens are like images. It
    has the methods of `LinearCode`. Raises `ValueError` where the tokens are no square grid over the latents, and for
    heads that do not divide the width.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        assert config.code is not None
        self.side = math.isqrt(config.tokens_per_keyframe)
        self.patch = config.latent_size // max(1, self.side)
        if self.side**2 != config.tokens_per_keyframe or config.latent_size % self.side:
            found = f"{config.tokens_per_keyframe} tokens, {config.latent_size}×{config.latent_size} latents"
            raise ValueError(f"code: expected tokens in a square grid that divides the latents, got {found}")
        if config.code.width % config.code.heads:
            raise ValueError(f"code: {config.code.heads} heads do not divide a width of {config.code.width}")
        cell = config.first_stage.latent_channels * self.patch**2
        self.encode = CellTransformer(config, cell, config.token_width)
        self.decode = CellTransformer(config, config.token_width, cell)
        self.norm = nn.LayerNorm(config.token_width, elementwise_affine=False)

    def tokens(self, latents: ImageLatents) -> KeyFrameTokens:
        """Latents `b c h w` → tokens `b n d`, each of mean 0 and variance 1."""
        cells = rearrange(latents, "b c (h i) (w j) -> b (h w) (i j c)", h=self.side, w=self.side)
        return self.norm(self.encode(cells)).float()

    def latents(self, tokens: KeyFrameTokens) -> ImageLatents:
        """Tokens `b n d` → latents `b c h w`."""
        sizes = {"h": self.side, "i": self.patch, "j": self.patch}
        return rearrange(self.decode(tokens), "b (h w) (i j c) -> b c (h i) (w j)", **sizes).float()


class CellTransformer(nn.Module):
    """From one vector a cell to another, by attention over all cells."""

    def __init__(self, config: TokenizerConfig, read: int, written: int):
        super().__init__()
        assert config.code is not None
        width = config.code.width
        self.read = nn.Linear(read, width)
        self.positions = nn.Parameter(grid_positions(config.tokens_per_keyframe, width))
        self.blocks = transformer(width, config.code.depth, config.code.heads)
        self.write = nn.Linear(width, written)

    def forward(self, cells: Float[Tensor, "b n numbers"]) -> Tensor:
        """Vectors `b n read` → `b n written`."""
        return self.write(self.blocks(self.read(cells.to(self.read.weight.dtype)) + self.positions))
