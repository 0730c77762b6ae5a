"""Clips decoded from their own tokens, against the real ones and against baselines."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from numpy import ndarray
from PIL import Image

from dicode.evaluate.generation import motion_ratio
from dicode.evaluate.metrics import psnr_db, scores_of_pairs, scores_of_sets
from dicode.evaluate.samples import Samples
from dicode.evaluate.scores import Score
from dicode.features.metrics import Clips, bootstrap_interval, squared_error
from dicode.tokenizer.config import TokenizerConfig
from dicode.video.sheet import contact_sheet
from dicode.video.timed import Video


def evaluate_reconstruction(samples: Samples) -> tuple[dict[str, Any], Image.Image]:
    """Validation clips through tokens and back, beside five baselines."""
    seed, clips, captions = samples.seed, samples.clips, samples.captions
    candidates = reconstructions(samples)
    distances: dict[str, dict[str, Score]] = {}
    for network in samples.networks:
        real = samples.real_clips.features(network, samples.videos)
        features = {name: network.features(those) for name, those in candidates.items()}
        distances |= scores_of_sets(network, real, features, captions, seed)
    first_stage, through = {}, candidates["first_stage"]
    for source in sorted({video.source for video in samples.videos}):
        own = [i for i, video in enumerate(samples.videos) if video.source == source]
        first_stage[source] = psnr_score([clips[i] for i in own], [through[i] for i in own], seed)
    figures = {
        "psnr": {name: psnr_score(clips, those, seed) for name, those in candidates.items()},
        "first_stage_psnr": first_stage,
        "motion": motion_ratio(candidates["reconstruction"], clips, seed),
        "n": len(clips),
        **scores_of_pairs(clips, candidates, samples.extractor, seed),
        **distances,
        "token_rate": token_rate(samples.model.tokenizer.config),  # follows from the configuration: no interval
    }
    chosen = range(0, len(clips), max(1, len(clips) // 10))
    rows = [clip for i in chosen for clip in (clips[i], candidates["reconstruction"][i])]
    labels = [label for i in chosen for label in (f"real: {captions[i]}", "reconstruction")]
    return figures, contact_sheet(rows[:20], labels[:20])


@torch.no_grad()
def reconstructions(samples: Samples) -> dict[str, Sequence[Video]]:
    """Validation clips through their tokens, and five baselines."""
    tokenizer, config = samples.model.tokenizer, samples.model.tokenizer.config
    count, tail = config.clip_frames, config.tail_frame
    rendered, tokens = samples.reconstructed
    # head and tail key frame from their tokens alone, and every frame through the first stage alone
    keys = [tokenizer.frames_of(tokenizer.key_latents(pair)[:, None])[:, 0].cpu().numpy() for pair in tokens]
    pixels = (torch.from_numpy(clip).permute(0, 3, 1, 2).float() / 127.5 - 1 for clip in samples.clips)
    latents = (tokenizer.first_stage.encode_clips(images[None].to(tokenizer.device)) for images in pixels)
    return {
        "reconstruction": rendered,
        "hold_head": [hold_head(clip) for clip in samples.clips],
        "cross_fade": [cross_fade(clip[0], clip[tail], count, tail) for clip in samples.real],
        "hold_head_of_tokens": [np.repeat(pair[:1], count, axis=0) for pair in keys],
        "cross_fade_of_tokens": [cross_fade(pair[0], pair[1], count, tail) for pair in keys],
        "first_stage": [tokenizer.frames_of(of_clip)[0].cpu().numpy() for of_clip in latents],
    }


def hold_head(clip: Video) -> Video:
    """Baseline: the clip's first frame, the head key frame, repeated."""
    return np.repeat(clip[:1], len(clip), axis=0)


def cross_fade(
    head: UInt8[ndarray, "h w c"], tail: UInt8[ndarray, "h w c"], num_frames: int, tail_at: int | None = None
) -> Video:
    """Baseline: head key frame fading linearly into the tail key frame.

    The tail is the frame after the clip's last, at position `num_frames`; in the published arrangement it is the last
    one: give `tail_at=num_frames - 1`.
    """
    weights = np.minimum(np.arange(num_frames) / (tail_at or num_frames), 1.0)[:, None, None, None]
    return np.rint((1 - weights) * head + weights * tail).astype(np.uint8)


def psnr_score(real: Clips, candidates: Clips, seed: int = 0) -> dict[str, Any]:
    """PSNR in dB of clips against the real clips they reconstruct, in the same order; 95 % intervals over clips.

    `mean_db` is the mean over frames, each at most PSNR_CEILING_DB, then over clips; `of_mean_error_db` that of the
    mean squared error of all frames: hard clips weigh more.
    """
    errors = [squared_error(clip, candidate) for clip, candidate in zip(real, candidates, strict=True)]
    per_clip = np.array([psnr_db(error).mean() for error in errors])
    sums_and_counts = np.array([(error.sum(), len(error)) for error in errors])

    def of_mean_error(drawn: Float64[ndarray, "n 2"]) -> float:
        total, frames = drawn.sum(axis=0)
        return float(psnr_db(total / frames))

    return {
        "mean_db": float(per_clip.mean()),
        "interval_db": bootstrap_interval(np.mean, per_clip, seed=seed),
        "of_mean_error_db": of_mean_error(sums_and_counts),
        "of_mean_error_interval_db": bootstrap_interval(of_mean_error, sums_and_counts, seed=seed),
        "n": len(per_clip),
    }


def token_rate(config: TokenizerConfig) -> dict[str, float]:
    """Tokens, numbers and bits (as float16) for a second of video, and bits of uint8 RGB frames over these.

    In the long run, with one key frame a clip.
    """
    tokens = config.block_tokens / config.clip_s
    floats = tokens * config.token_width
    bits = 16 * floats
    return {
        "tokens": tokens,
        "floats": floats,
        "bits": bits,
        "compression": math.prod(config.frame_shape) * 3 * 8 * config.fps / bits,
    }
