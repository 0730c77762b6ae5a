"""Small whole models with random weights, drawn here: 32×32 pixels, 4 tokens of 6, up to 16 s."""

from pathlib import Path
from typing import Any

CAPTIONS = ["a swirling ice vortex", "a red square moves right", "a blue circle moves down"]
KINDS = ("own", "published")  # hourglass and Llama on latents; U-Net and GPT-2 on CLIP and an autoencoder of kind `kl`


def write_tiny(folder: Path, kind: str = "own", **changes: Any) -> Path:
    """Write a checkpoint folder of this kind, with changes of its tokenizer's configuration, and return it."""
    import torch
    from test_tokenizer import DENOISERS, RESAMPLER, tiny_tokenizer

    from dicode.lm.config import BodyConfig, DeepLMConfig, HeadConfig
    from dicode.lm.deep_lm import DeepTokenLM
    from dicode.lm.text import TextTokenizer
    from dicode.pipeline import DiCoDe
    from dicode.tokenizer.config import FirstStageConfig, SamplingConfig

    if kind == "published":
        changes |= {
            "first_stage": FirstStageConfig("kl", (8, 8, 8), 5, (1,), (1,)),
            "resampler": RESAMPLER,
            "denoiser": DENOISERS["unet3d"],
        }
    tokenizer = tiny_tokenizer(sampling=SamplingConfig(steps=2, variance_scale=0.5), **changes)
    config = DeepLMConfig(
        BodyConfig("llama" if kind == "own" else "gpt2", width=24, depth=1, heads=2),
        head=HeadConfig("mixture" if kind == "own" else "flow", components=2, width=16, depth=1),
        positions=12 + 10 * (5 + tokenizer.config.motion_tokens),
        vocab_size=300,
        token_width=tokenizer.config.token_width,
        max_keyframes=9,
        text_length=12,
        tokens_per_keyframe=tokenizer.config.tokens_per_keyframe,
        motion_tokens=tokenizer.config.motion_tokens,
        end_frame_conditioning=True,
    )
    torch.manual_seed(1)
    lm = DeepTokenLM(config, TextTokenizer.train(CAPTIONS, 300))
    with torch.no_grad():
        for parameter in lm.parameters():  # so that every input matters
            parameter.add_(0.2 * torch.randn_like(parameter))
    DiCoDe(tokenizer, lm).save_pretrained(folder)
    return folder
