"""Networks of transformers and diffusers behind the tokenizer's interfaces; bundled models need none of them.

`ClipEncoder` and `UNet3D` are the published tokenizer's (arXiv 2412.04446, section 3.1); `SiglipEncoder` is another
image tower to compute deep tokens from.
"""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from dicode.shapes import ClipLatents, KeyFramePixels, PatchFeatures
from dicode.tokenizer.config import EncoderConfig, FirstStageConfig, Objective, TokenizerConfig
from dicode.tokenizer.denoiser import ClipConditioning, input_channels
from dicode.tokenizer.encoder import normal_start

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
DROPOUT = 0.1  # of residual blocks in training, as public; diffusers has it fixed in temporal convolutions alone


def kl_autoencoder(config: FirstStageConfig) -> AutoencoderKL:
    """Stable Diffusion's autoencoder, in these sizes, with random weights."""
    return AutoencoderKL(
        block_out_channels=config.channels,
        down_block_types=("DownEncoderBlock2D",) * len(config.channels),
        up_block_types=("UpDecoderBlock2D",) * len(config.channels),
        layers_per_block=config.encoder_blocks[0],
        latent_channels=config.latent_channels,
        norm_num_groups=min(32, config.channels[0]),
    )


def ddim_scheduler(objective: Objective) -> DDIMScheduler:
    """Published: `v_prediction` on zero terminal SNR, which agrees with the public sampler to 1e-5 relative."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=objective,
        rescale_betas_zero_snr=objective == "v_prediction",
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )


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
        normalised = ((resized(pixels, self.size) + 1) / 2 - self.mean) / self.deviation
        return self.tower(normalised).last_hidden_state


class SiglipEncoder(nn.Module):
    """A SigLIP image tower from transformers (Zhai et al. 2023, arXiv 2303.15343), without the head that pools."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.size = config.size
        self.tower = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=config.width,
                intermediate_size=config.feed_forward or config.width * 4,
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
                image_size=config.size,
                patch_size=config.patch,
                vision_use_head=False,
            )
        )
        self.requires_grad_(False)

    def forward(self, pixels: KeyFramePixels) -> PatchFeatures:
        """Pixels −1…1, as the tower takes them, of any size → its last hidden state (so400m at 384: `b 729 1152`)."""
        scaled = functional.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True).clamp(-1, 1)
        return self.tower(scaled).last_hidden_state


def image_encoder(config: EncoderConfig) -> ClipEncoder | SiglipEncoder:
    """The image tower of a configuration, with random weights, frozen."""
    return SiglipEncoder(config) if config.kind == "siglip" else ClipEncoder(config)


def resized(pixels: KeyFramePixels, size: int) -> Float[Tensor, "b c size size"]:
    """Bicubic, after a Gaussian where pixels get fewer, as `kornia.geometry.resize(…, antialias=True)` does it.

    torch's own antialiasing differs by 2.3 % of the values where 256 pixels become 224.
    """
    for dim in (-2, -1):
        if (factor := pixels.shape[dim] / size) > 1:
            deviation = max((factor - 1) / 2, 0.001)
            half = int(max(4 * deviation, 3)) // 2
            kernel = (-torch.arange(-half, half + 1, device=pixels.device).square() / (2 * deviation**2)).softmax(0)
            padded = functional.pad(pixels, (0, 0, half, half) if dim == -2 else (half, half, 0, 0), mode="reflect")
            pixels = (padded.unfold(dim, 2 * half + 1, 1) * kernel.to(pixels)).sum(-1)
    return functional.interpolate(pixels, (size, size), mode="bicubic", align_corners=True)


class UNet3D(nn.Module):
    """Latents, time and deep tokens → prediction; every level but the coarsest attends."""

    null_text: Tensor

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config, sizes = config, config.denoiser
        levels = len(sizes.channels)
        self.unet = UNet3DConditionModel(
            in_channels=input_channels(config),
            out_channels=config.first_stage.latent_channels,
            block_out_channels=sizes.channels,
            down_block_types=("CrossAttnDownBlock3D",) * (levels - 1) + ("DownBlock3D",),
            up_block_types=("UpBlock3D",) + ("CrossAttnUpBlock3D",) * (levels - 1),
            layers_per_block=sizes.depth,
            norm_num_groups=min(32, sizes.channels[0]),
            cross_attention_dim=sizes.text_width,
            # diffusers takes this for the head width of every spatial and temporal attention but the first
            attention_head_dim=sizes.channels[0] // sizes.heads,
        )
        time_width = sizes.channels[0] * 4
        self.unet.time_embedding = TimeAndStride(self.unet.time_embedding, sizes.channels[0], time_width)
        for name, module in self.unet.named_modules():
            if isinstance(module, Attention) and name.endswith("attn2") and ".attentions." in f".{name}":
                module.set_processor(DeepTokenAttention(config.token_width, module.inner_dim))
            if isinstance(module, ResnetBlock2D):
                module.dropout.p = DROPOUT
        self.register_buffer("null_text", torch.zeros(1, sizes.text_tokens, sizes.text_width))
        if config.motion:  # to a frame's attention tokens are a set: which one it is, and which frame reads
            shape = config.clip_frames, config.motion_tokens, config.token_width
            self.motion_places = nn.Parameter(normal_start(*shape, deviation=0.5))

    def forward(self, noisy: ClipLatents, timestep: Tensor, conditioning: ClipConditioning) -> ClipLatents:
        """Noisy latents `b f c h w`, timestep `b` in 0…999 → prediction `b f c h w`, float32."""
        b, f = noisy.shape[:2]
        noisy = noisy.to(self.unet.dtype)
        halves = torch.arange(f, device=noisy.device) * 2 // f
        tokens = conditioning.tokens[:, halves]
        if self.config.motion:
            tokens = torch.cat([tokens, conditioning.motion[:, None] + self.motion_places], dim=2)
        frame_tokens = rearrange(tokens.to(noisy), "b f n d -> (b f) n d")
        sample = rearrange(conditioning.channels(noisy, self.config), "b f c h w -> b c f h w")
        prediction = self.unet(
            sample,
            timestep,
            self.null_text.to(noisy).expand(b, -1, -1),
            timestep_cond=conditioning.frame_stride.to(noisy.device),
            # diffusers hands this name to every attention without complaint; only `DeepTokenAttention` reads it
            cross_attention_kwargs={"ip_hidden_states": frame_tokens},
            return_dict=False,
        )[0]
        return rearrange(prediction, "b c f h w -> b f c h w").float()


class TimeAndStride(nn.Module):
    """The time embedding plus an embedding of the clip's frame stride, which arrives as `timestep_cond`."""

    def __init__(self, time_embedding: nn.Module, in_width: int, time_width: int):
        super().__init__()
        self.time_embedding = time_embedding
        self.stride_projection = Timesteps(in_width, True, 0)
        self.stride_embedding = TimestepEmbedding(in_width, time_width)
        # published: the stride starts without effect, so that a video prior keeps its behaviour
        nn.init.zeros_(self.stride_embedding.linear_2.weight)
        nn.init.zeros_(self.stride_embedding.linear_2.bias)

    def forward(self, time: Tensor, stride: Tensor) -> Tensor:
        return self.time_embedding(time) + self.stride_embedding(self.stride_projection(stride).to(time.dtype))


class DeepTokenAttention(nn.Module):
    """Attention processor: the layer's own attention to text, plus (tanh α + 1) times attention to deep tokens."""

    def __init__(self, token_width: int, inner_width: int):
        super().__init__()
        self.to_k = nn.Linear(token_width, inner_width, bias=False)
        self.to_v = nn.Linear(token_width, inner_width, bias=False)
        self.alpha = nn.Parameter(torch.zeros(()))

    def __call__(  # not `forward`: diffusers reads this signature to see which arguments a processor takes
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *,
        ip_hidden_states: Tensor,
    ) -> Tensor:
        """Positions `b p c`, text `b t c`, deep tokens `b n d` → `b p c`; called by diffusers."""
        query = attn.to_q(hidden_states)
        text = _attend(attn, query, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        tokens = _attend(attn, query, self.to_k(ip_hidden_states), self.to_v(ip_hidden_states))
        mixed = text + (torch.tanh(self.alpha) + 1) * tokens
        return attn.to_out[1](attn.to_out[0](mixed)) / attn.rescale_output_factor


def _attend(attn: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (rearrange(x, "b p (heads e) -> b heads p e", heads=attn.heads) for x in (query, key, value))
    return rearrange(functional.scaled_dot_product_attention(q, k, v), "b heads p e -> b p (heads e)")
