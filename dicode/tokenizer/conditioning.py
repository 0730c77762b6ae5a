"""What a denoiser is conditioned on, in the form that every denoiser takes."""

from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor

from dicode.shapes import ClipLatents
from dicode.tokenizer.config import DenoiserConfig


@dataclass(frozen=True)
class ClipConditioning:
    """The denoiser's inputs beside noisy latents and time, a clip a batch entry."""

    tokens: Tensor  # b 2 n d: of the head and of the tail key frame; null tokens where dropped for guidance
    key_latents: Tensor  # b 2 c h w: the coarse latents of both, predicted from the tokens; zeros where dropped
    keys_mask: Tensor  # b: 1 where tokens and key latents are given, 0 where dropped
    context: Tensor  # b p c h w: the last p frames of the previous clip; zeros where absent
    context_mask: Tensor  # b: 1 where the context is given
    frame_stride: Tensor  # b: frames of the source video from one frame of the clip to the next, for `unet3d`

    def channels(self, noisy: ClipLatents, config: DenoiserConfig) -> Tensor:
        """`noisy` with key-frame latents, context and its mask as extra channels of every frame: `b f channels y x`."""
        f, h, w = noisy.shape[1], *noisy.shape[-2:]
        parts = [noisy]
        if config.uses_key_latents:
            parts.append(repeat(self.key_latents.to(noisy), "b two c h w -> b f (two c) h w", f=f))
        if config.context_frames:
            parts.append(repeat(self.context.to(noisy), "b p c h w -> b f (p c) h w", f=f))
            parts.append(repeat(self.context_mask.to(noisy), "b -> b f 1 h w", f=f, h=h, w=w))
        return torch.cat(parts, dim=2)


def input_channels(config: DenoiserConfig, latent_channels: int) -> int:
    """Channels of `ClipConditioning.channels`."""
    keys = 2 * latent_channels if config.uses_key_latents else 0
    context = config.context_frames * latent_channels + 1 if config.context_frames else 0
    return latent_channels + keys + context


def cross_faded(keys: Tensor, frames: int) -> ClipLatents:
    """The simplest clip between head and tail latents `b 2 c h w`: frame i is i/f of the tail, the rest is head."""
    share = torch.arange(frames).to(keys)[:, None, None, None] / frames
    return (1 - share) * keys[:, :1] + share * keys[:, 1:]
