"""Memory that a device needs to generate a video, with everything on it and with less: see `dicode.memory`."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from dicode.lm.config import DeepLMConfig
from dicode.lm.deep_lm import DeepTokenLM
from dicode.memory import to_int8, to_int8_tokenizer
from dicode.sizing.count import cost, size_lm, weight_bytes
from dicode.tokenizer.config import TokenizerConfig
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.speed import FLOAT32

ALL, OFFLOAD, TILING, INT8 = "all on it", "--offload", "--offload --vae-tiling", "--offload --vae-tiling --int8"


REST = "the rest, which stays"


class Part(NamedTuple):
    """Bytes of what takes its turn on a device under `--offload`."""

    weights: int
    activations: int  # the most at one time, for one clip


def generation_parts(
    config: TokenizerConfig,
    lm: DeepLMConfig | None,
    dtype: torch.dtype,
    *,
    vae_tiling: bool = False,
    int8: bool = False,
) -> dict[str, Part]:
    """Weights and activations of each part for one video, in `dtype`, counted on tensors without content."""
    guided = 1 if config.sampling.decoder_guidance == 1.0 else 2  # as in `size_tokenizer`
    with torch.device("meta"):
        model = VideoTokenizer(config).eval().requires_grad_(False)
        key_frame = torch.empty(1, 3, *config.frame_shape)
        clip = torch.empty(1, config.latent_frames, config.first_stage.latent_channels, *config.latent_shape)
        pair = torch.empty(guided, 2, config.block_tokens, config.token_width)
        if int8:
            to_int8_tokenizer(model, dtype)
        else:
            for own in model.parameters():
                own.data = own.data.to(dtype)
        if vae_tiling:
            model.first_stage.enable_tiling()

        def peak(work: Callable[[], object]) -> int:
            return cost(work).peak_bytes

        condition, times = model.conditioning(pair), torch.empty(guided)
        noisy = clip.expand(guided, *clip.shape[1:])
        ends = (times,) if config.denoiser.flow_map else ()
        denoiser = peak(lambda: model.denoiser(noisy, times, condition, *ends))
        stage = max(peak(lambda: model.frames_of(clip)), peak(lambda: model.first_stage.encode(key_frame)))
        parts = {
            "first stage": Part(weight_bytes(model.first_stage), stage),
            "denoiser": Part(weight_bytes(model.denoiser), denoiser),
        }
        if config.resampler is not None:
            tower = peak(lambda: model.encoder(key_frame))
            parts["image encoder"] = Part(weight_bytes(model.encoder), tower)
        others = weight_bytes(model) - sum(part.weights for part in parts.values())
    if lm is not None:
        parts["language model"] = _lm_part(lm, dtype, int8)
    parts[REST] = Part(others, 0)
    return parts


def generation_bytes(config: TokenizerConfig, lm: DeepLMConfig | None, dtype: torch.dtype) -> dict[str, int]:
    """Bytes on a device by the flags of `dicode generate`, those of tiles only where a model's first stage has them."""
    parts = generation_parts(config, lm, dtype)
    together = sum(part.weights for part in parts.values()) + max(part.activations for part in parts.values())
    found = {ALL: together, OFFLOAD: in_turns(parts)}
    if config.first_stage.frames_a_latent > 1:
        found[TILING] = in_turns(generation_parts(config, lm, dtype, vae_tiling=True))
        found[INT8] = in_turns(generation_parts(config, lm, dtype, vae_tiling=True, int8=True))
    return found


def in_turns(parts: dict[str, Part]) -> int:
    """Bytes on a device where parts take turns."""
    return parts[REST].weights + max(sum(part) for name, part in parts.items() if name != REST)


def _lm_part(config: DeepLMConfig, dtype: torch.dtype, int8: bool) -> Part:
    held = size_lm(config)["inference_bytes"]  # in float32
    with torch.device("meta"):
        model = DeepTokenLM(config).eval()
    if int8:
        to_int8(model, dtype)
    weights = sum(t.nbytes if int8 else t.numel() * dtype.itemsize for t in model.parameters())
    return Part(weights, (held["key/value cache"] + held["activations"]) * dtype.itemsize // FLOAT32)
