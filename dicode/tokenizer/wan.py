"""Wan 2.1 (Wan team, arXiv 2503.20314) behind the tokenizer's interfaces: its transformer and its video autoencoder.

Deep tokens take the path that its image-to-video models have for an image's features: keys and values of their own in
every block, beside those of the text, which is always the null prompt.
"""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.embeddings import TimestepEmbedding
from einops import rearrange
from torch import Tensor, nn

from dicode.shapes import ClipLatents
from dicode.tokenizer.config import FirstStageConfig, TokenizerConfig
from dicode.tokenizer.denoiser import UNTIL_SHARE, ClipConditioning

TEXT_ROWS = 512  # of the null prompt; diffusers counts them off the end, without complaint for any other number
WAVES = 256  # sines and cosines of a time
PATCH = (1, 2, 2)  # latents that are one position of the transformer
IMAGE_PATH = ("image_embedder", "add_k_proj", "add_v_proj", "norm_added_k")  # in names of what deep tokens add


def transformer(config: TokenizerConfig) -> WanTransformer3DModel:
    """The transformer of these sizes, with the image path, random weights."""
    sizes, tokens = config.denoiser, config.tokens_per_keyframe
    return WanTransformer3DModel(
        patch_size=PATCH,
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.width // sizes.heads,
        in_channels=config.first_stage.latent_channels,
        out_channels=config.first_stage.latent_channels,
        text_dim=sizes.text_width,
        freq_dim=WAVES,
        ffn_dim=sizes.feed_forward or 4 * sizes.width,
        num_layers=sizes.depth,
        image_dim=config.token_width,
        added_kv_proj_dim=sizes.width,
        pos_embed_seq_len=2 * tokens + config.motion_tokens + config.motion_tokens % 2,
    )


class Wan(nn.Module):
    """Latents of a clip, time and deep tokens → velocity; full attention over all positions of the clip.

    The frame that the clip before ended on is given as the first latent, clean: its positions have time 0.
    """

    null_text: Tensor

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config, sizes = config, config.denoiser
        if sizes.text_tokens != TEXT_ROWS:
            raise ValueError(
                f"text_tokens: expected {TEXT_ROWS}, which Wan's attention counts on, got {sizes.text_tokens}"
            )
        if sizes.context_frames > 1:
            raise ValueError(f"context_frames: expected 0 or 1, the first latent, got {sizes.context_frames}")
        if sizes.context_frames and not config.repeated_frames:
            raise ValueError("context_frames: Wan's is the clip's own first frame, which the clip before has to end on")
        if any(side % own for side, own in zip(config.latent_shape, PATCH[1:], strict=True)):
            raise ValueError(f"wan: expected an even number of latents a side, got {config.latent_shape}")
        self.transformer = transformer(config)
        places = self.transformer.condition_embedder.image_embedder.pos_embed
        nn.init.normal_(places, std=0.02)  # zero in diffusers: head and tail would look the same
        self.register_buffer("null_text", torch.zeros(1, TEXT_ROWS, sizes.text_width))
        if sizes.flow_map:
            self.transformer.condition_embedder.time_embedder = TwoTimes(sizes.width)

    def forward(
        self, noisy: ClipLatents, timestep: Tensor, conditioning: ClipConditioning, until: Tensor | None = None
    ) -> ClipLatents:
        """As `Hourglass.forward`."""
        b = len(noisy)
        x = noisy.to(self.transformer.dtype)
        times = [timestep, timestep if until is None else until][: 1 + self.config.denoiser.flow_map]
        if self.config.denoiser.context_frames:
            given = conditioning.context_mask.to(x)[:, None, None, None]
            first = torch.lerp(x[:, 0], conditioning.context[:, 0].to(x), given)
            x = torch.cat([first[:, None], x[:, 1:]], dim=1)
            times = [self.times_of_positions(time, conditioning.context_mask, x) for time in times]
        elif self.config.denoiser.flow_map:
            times = [time[:, None] for time in times]  # one for all positions
        timestep = torch.cat(times, dim=1) if self.config.denoiser.flow_map else times[0]
        tokens = rearrange(conditioning.tokens, "b two n d -> b (two n) d")
        if self.config.motion:
            motion = nn.functional.pad(conditioning.motion, (0, 0, 0, self.config.motion_tokens % 2))
            tokens = torch.cat([tokens, motion.to(tokens)], dim=1)
        halves = rearrange(tokens, "b (two n) d -> (b two) n d", two=2).to(x)  # joined again inside
        text = self.null_text.to(x).expand(b, -1, -1)
        y = self.transformer(rearrange(x, "b f c h w -> b c f h w"), timestep, text, halves, return_dict=False)[0]
        return rearrange(y, "b c f h w -> b f c h w").float()

    def times_of_positions(self, time: Tensor, context_mask: Tensor, x: ClipLatents) -> Tensor:
        """A time `b` for every position of the transformer, `b p`: 0 for those of a first latent that is given."""
        times = time[:, None].expand(x.shape[:2]).clone()
        times[:, 0] = times[:, 0] * (1 - context_mask.to(times))
        return times.repeat_interleave((x.shape[-2] // PATCH[1]) * (x.shape[-1] // PATCH[2]), dim=1)


class TwoTimes(TimestepEmbedding):
    """A flow map's embedding of times, in place of that of a transformer: where a jump begins, and where it ends.

    The transformer takes any number of times an item, so that those of both come in a row. `until` starts as a copy: a
    jump of no length has the embedding of its time alone, which a trained model has learnt.
    """

    def __init__(self, width: int):
        super().__init__(WAVES, width)
        own = self.state_dict()
        self.until = TimestepEmbedding(WAVES, width)
        self.until.load_state_dict(own)

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """Waves of times `b 2p w` → embeddings `b p width`."""
        begins, ends = sample.chunk(2, dim=1)
        return torch.lerp(super().forward(begins, condition), self.until(ends, condition), UNTIL_SHARE)


def begin_image_path(model: nn.Module) -> None:
    """Start what deep tokens add without effect, and keys as those of the text; `model` holds a trained transformer."""
    for block in model.blocks:  # type: ignore[union-attr]
        own: Any = block.attn2
        nn.init.zeros_(own.add_v_proj.weight)
        nn.init.zeros_(own.add_v_proj.bias)
        own.add_k_proj.load_state_dict(own.to_k.state_dict())
        own.norm_added_k.load_state_dict(own.norm_k.state_dict())


def autoencoder(config: FirstStageConfig) -> AutoencoderKLWan:
    """The video autoencoder of these sizes, random weights."""
    base = config.channels[0]
    if any(width % base for width in config.channels) or len(config.channels) < 2:
        raise ValueError(f"channels: expected multiples of the first, for 'wan', got {config.channels}")
    levels, patches = (
        len(config.channels) - 1,
        {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12},
    )
    return AutoencoderKLWan(
        **(patches if config.kind == "wan22" else {}),
        decoder_base_dim=config.decoder_width,
        base_dim=base,
        z_dim=config.latent_channels,
        dim_mult=[width // base for width in config.channels],
        num_res_blocks=config.encoder_blocks[0],
        temperal_downsample=[level >= levels - 2 for level in range(levels)],
        scale_factor_spatial=config.downsampling,  # only tiles ask for it
        latents_mean=[0.0] * config.latent_channels,
        latents_std=[1.0] * config.latent_channels,
    )
