"""Motion tokens: what happens in a clip between its two key frames (docs/motion-tokens.md)."""

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from dicode.shapes import ClipLatents, MotionTokens
from dicode.tokenizer.config import TokenizerConfig
from dicode.tokenizer.denoiser import cross_faded, grid_positions, transformer
from dicode.tokenizer.encoder import normal_start


class MotionEncoder(nn.Module):
    """A temporal resampler: learned queries among the latents of all frames of a clip, in blocks of 2×2×2.

    Beside each latent stands its difference from the cross-fade of the two key frames. Both of these pass as latents
    of the video, whether or not tokens give key frames back: the tokens encode what key frames do not.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        assert config.motion is not None
        self.config, width = config, config.motion.width
        side, moments = config.latent_size // 2, config.clip_frames // 2
        self.read = nn.Linear(16 * config.first_stage.latent_channels, width)
        self.positions = nn.Parameter(grid_positions(side**2, width).repeat(moments, 1))
        self.moments = nn.Parameter(normal_start(moments, 1, width, deviation=1.0))
        self.queries = nn.Parameter(normal_start(config.motion.tokens, width, deviation=1.0))
        self.blocks = transformer(width, config.motion.depth, config.motion.heads)
        self.write = nn.Linear(width, config.token_width)
        self.norm = nn.LayerNorm(config.token_width, elementwise_affine=False)  # the variance of a key frame's tokens

    def forward(self, clips: ClipLatents, keys: Float[Tensor, "b two z y x"]) -> MotionTokens:
        """Latents of clips `b f c h w` and of their head and tail key frames `b 2 c h w` → `b m d`."""
        fade = torch.cat([cross_faded(keys, self.config.tail_frame), keys[:, 1:]], dim=1)[:, : clips.shape[1]]
        both = torch.cat([clips, clips - fade], dim=2).to(self.read.weight.dtype)
        coarse = self.read(rearrange(both, "b (f i) c (h j) (w k) -> b f (h w) (i j k c)", i=2, j=2, k=2))
        places = rearrange(self.positions, "(f p) c -> f p c", f=len(self.moments)) + self.moments
        queries = repeat(self.queries, "m c -> b m c", b=len(clips))
        sequence = torch.cat([rearrange(coarse + places, "b f p c -> b (f p) c"), queries], dim=1)
        return self.norm(self.write(self.blocks(sequence)[:, -queries.shape[1] :])).float()


class MotionDecoder(nn.Module):
    """What is expected of a clip: the cross-fade of its key latents, and what motion tokens add to it.

    A transformer over a clip in blocks of 2×2×2, all of which begin as the key latents at their place, and over the
    motion tokens. Trained by squared error, which reaches the motion tokens in far fewer steps than the denoiser's
    loss does (docs/log.md).
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        assert config.motion is not None
        self.frames, width = config.clip_frames, config.motion.width
        side, moments = config.latent_size // 2, config.clip_frames // 2
        self.read = nn.Linear(8 * config.first_stage.latent_channels, width)
        self.positions = nn.Parameter(grid_positions(side**2, width))
        self.moments = nn.Parameter(normal_start(moments, 1, width, deviation=1.0))
        self.motion = nn.Linear(config.token_width, width)
        self.places = nn.Parameter(normal_start(config.motion.tokens, width, deviation=1.0))
        self.blocks = transformer(width, config.motion.depth, config.motion.heads)
        self.write = nn.Linear(width, 8 * config.first_stage.latent_channels)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def forward(self, keys: Float[Tensor, "b two z y x"], motion: MotionTokens) -> ClipLatents:
        """Latents of head and tail key frames `b 2 c h w` and motion tokens `b m d` → latents of clips, float32."""
        both = rearrange(keys, "b two c (h j) (w k) -> b (h w) (two j k c)", j=2, k=2)
        places = self.read(both.to(self.read.weight.dtype)) + self.positions
        coarse = rearrange(places[:, None] + self.moments, "b f p c -> b (f p) c")
        tokens = self.motion(motion.to(self.motion.weight.dtype)) + self.places
        added = self.write(self.blocks(torch.cat([coarse, tokens], dim=1))[:, : coarse.shape[1]])
        f, h = len(self.moments), keys.shape[-2] // 2
        added = rearrange(added, "b (f h w) (i j k c) -> b (f i) c (h j) (w k)", f=f, h=h, i=2, j=2, k=2)
        return cross_faded(keys, self.frames) + added.float()


def limited(motion: Tensor, most: Tensor | int | None) -> Tensor:
    """Motion tokens `b m d` with zeros after the first `most` (one number, or `b`): as if the others were not there."""
    if most is None:
        return motion
    most = torch.as_tensor(most, device=motion.device).reshape(-1, 1, 1)
    return motion * (torch.arange(motion.shape[1], device=motion.device)[:, None] < most)
