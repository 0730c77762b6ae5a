"""Tokenizers that have a name."""

from dicode.tokenizer.config import (
    DenoiserConfig,
    EncoderConfig,
    FirstStageConfig,
    ResamplerConfig,
    SamplingConfig,
    TokenizerConfig,
)

TOKENIZERS: dict[str, TokenizerConfig] = {
    # drawn scenes: a lighter first stage; networks beside the linear code as small as those of `world`
    "blocks": TokenizerConfig(
        key_head_width=48,
        key_head_depth=1,
        linear_code=True,
        first_stage=FirstStageConfig(
            channels=(56, 56, 56, 56), encoder_blocks=(0, 1, 2, 2), decoder_blocks=(2, 2, 1, 0)
        ),
        encoder=EncoderConfig(width=48, depth=1),
        resampler=ResamplerConfig(width=48, depth=1, head_width=16, feature_width=48),
        denoiser=DenoiserConfig(width=256, depth=3, fine_width=96, fine_blocks=2, predict_residual=True),
    ),
    "sprites": TokenizerConfig(
        linear_code=True,
        encoder=EncoderConfig(depth=1),
        resampler=ResamplerConfig(depth=1),
        denoiser=DenoiserConfig(predict_residual=True),
    ),
    # rooms need wider tokens (studies/widths); small networks suffice beside the linear code (studies/tokens)
    "world": TokenizerConfig(
        key_head_width=48,
        key_head_depth=1,
        linear_code=True,
        encoder=EncoderConfig(width=48, depth=1),
        resampler=ResamplerConfig(width=48, depth=1, head_width=16, feature_width=48, token_width=48),
        denoiser=DenoiserConfig(predict_residual=True),
    ),
    # Published (arXiv 2412.04446): OpenCLIP ViT-H/14, DynamiCrafter-256's U-Net without image concatenation, SD's VAE
    "paper_tokenizer_256": TokenizerConfig(
        size=256,
        tail_frame=15,
        null_tokens="grey_image",
        first_stage=FirstStageConfig("kl", (128, 256, 512, 512), 4, (2,), (2,)),
        encoder=EncoderConfig("clip", width=1280, depth=32, heads=16, size=224, patch=14, channels=3),
        resampler=ResamplerConfig(1024, 4, 12, 64, 16, 1280, 257, 1024, grid_queries=False),
        denoiser=DenoiserConfig("unet3d", context_frames=0, uses_key_latents=False, depth=2, heads=5),
        objective="v_prediction",
        sampling=SamplingConfig(
            variance_scale=0.01, steps=50, decoder_guidance=7.5, guidance_rescale=0.7, eta=1.0, joins="independent"
        ),
    ),
}
