"""Tokenizers that have a name."""

from dataclasses import replace

from dicode.tokenizer.config import (
    CodeConfig,
    DenoiserConfig,
    EncoderConfig,
    FirstStageConfig,
    MotionConfig,
    ResamplerConfig,
    SamplingConfig,
    TokenizerConfig,
)

TOKENIZERS: dict[str, TokenizerConfig] = {
    # drawn scenes: a lighter first stage
    "blocks": TokenizerConfig(
        first_stage=FirstStageConfig(
            channels=(56, 56, 56, 56), encoder_blocks=(0, 1, 2, 2), decoder_blocks=(2, 2, 1, 0)
        ),
        denoiser=DenoiserConfig(width=192, depth=3, fine_width=96, fine_blocks=2, predict_residual=True),
        token_width=8,
        code=CodeConfig(width=128, depth=3, heads=4),
        motion=MotionConfig(tokens=8, width=128, depth=3, heads=4),
    ),
    "sprites": TokenizerConfig(denoiser=DenoiserConfig(predict_residual=True)),
    # rooms need wider tokens (studies/widths)
    "world": TokenizerConfig(token_width=48, denoiser=DenoiserConfig(predict_residual=True)),
    # Published (arXiv 2412.04446): OpenCLIP ViT-H/14, DynamiCrafter-256's U-Net without image concatenation, SD's VAE
    "paper_tokenizer_256": TokenizerConfig(
        size=256,
        tail_frame=15,
        null_tokens="grey_image",
        token_width=1024,
        first_stage=FirstStageConfig("kl", (128, 256, 512, 512), 4, (2,), (2,)),
        resampler=ResamplerConfig(),
        denoiser=DenoiserConfig("unet3d", context_frames=0, depth=2, heads=5),
        objective="v_prediction",
        sampling=SamplingConfig(
            variance_scale=0.01, steps=50, decoder_guidance=7.5, guidance_rescale=0.7, eta=1.0, joins="independent"
        ),
    ),
}
# Not published: Wan2.1-T2V-1.3B as `dicode convert wan --image-encoder` writes it, with OpenCLIP ViT-H/14
TOKENIZERS["wan"] = TokenizerConfig(
    size=256,
    fps=16.0,
    clip_frames=33,
    tail_frame=32,
    null_tokens="grey_image",
    token_width=1024,
    first_stage=FirstStageConfig("wan", (96, 192, 384, 384), 16, (2,), (2,)),
    resampler=ResamplerConfig(),
    denoiser=DenoiserConfig(
        "wan", context_frames=1, depth=30, heads=12, width=1536, feed_forward=8960, text_width=4096, text_tokens=512,
        time_shift=3.0,
    ),
    sampling=SamplingConfig(steps=24, decoder_guidance=3.0),
)  # fmt: skip
TOKENIZERS["wan_siglip"] = replace(  # the same with google/siglip-so400m-patch14-384
    TOKENIZERS["wan"],
    resampler=ResamplerConfig(encoder=EncoderConfig(1152, 27, 16, size=384, kind="siglip", feed_forward=4304)),
)
TOKENIZERS["wan_480p"] = replace(TOKENIZERS["wan"], size=480, frame_width=832)
TOKENIZERS["paper_motion"] = replace(
    TOKENIZERS["paper_tokenizer_256"], motion=MotionConfig(tokens=16, width=1024, depth=4, heads=16)
)
