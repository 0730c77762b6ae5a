"""Everything measured of a model in the box, from one command: text control, motion, reconstruction, speed."""

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dicode.evaluate.features import ClipFeatures, EfficientNetLite0Features, features_of_clips
from dicode.evaluate.generation import draw_prompts, motion_ratio, percentile_of_true_clip, text_control
from dicode.evaluate.reconstruction import cross_fade, frechet_scores, hold_head, psnr_score
from dicode.generate import DiCoDe
from dicode.hub import kept_tensors
from dicode.shapes import KeyFrameTokens, Video
from dicode.video.shards import CachedVideo, FrameCache
from dicode.video.sheet import contact_sheet

BATCH = 10  # prompts generated together


def first_clip(model: DiCoDe, cache: FrameCache, video: CachedVideo) -> Video:
    """The real clip that starts where the video does, and its tail key frame: 17 frames at the model's rate."""
    config = model.tokenizer.config
    return cache.frames[cache.clip_rows(video, 0.0, config.clip_frames + 1, config.fps)].numpy()


def generated_clips(model: DiCoDe, prompts: Sequence[str], seed: int, **options: Any) -> list[Video]:
    """One 2-s clip a prompt; clip i is sample i of the seed, however they are batched."""
    clips: list[Video] = []
    for first in tqdm(range(0, len(prompts), BATCH), desc="generating", unit="batch", mininterval=5):
        part = list(prompts[first : first + BATCH])
        indices = list(range(first, first + len(part)))
        seconds = model.tokenizer.config.clip_s
        made = list(model.generate_batch(part, seconds=seconds, seed=seed, sample_indices=indices, **options))
        clips += list(torch.cat(made, dim=1).numpy())
    return clips


def bank_features(model: DiCoDe, cache: FrameCache, extractor: EfficientNetLite0Features, path: Path) -> ClipFeatures:
    """Features of the first clip of every cached video, kept at `path`."""

    def computed() -> dict[str, torch.Tensor]:
        clips = (first_clip(model, cache, v)[:-1] for v in tqdm(cache.videos, desc="real clips", mininterval=5))
        features = features_of_clips(extractor, clips)
        return {name: torch.from_numpy(value) for name, value in features._asdict().items()}

    return ClipFeatures(**{name: value.numpy() for name, value in kept_tensors(path, computed).items()})


def evaluate_generation(
    model: DiCoDe, cache: FrameCache, bank_path: Path, count: int = 100, seed: int = 0, **options: Any
) -> tuple[dict[str, Any], Any]:
    """Text control on `count` training captions, rank of the true clip on all validation captions, motion.

    Returns the figures and a contact sheet of the first sixteen prompts.
    """
    extractor = EfficientNetLite0Features()
    features = bank_features(model, cache, extractor, bank_path)
    chosen = np.array([v.validation for v in cache.videos])
    captions = [v.captions[0] if v.captions else "" for v in cache.videos]
    train_captions = [caption for caption, held in zip(captions, chosen, strict=True) if not held]
    prompts = draw_prompts([c for c in train_captions if c], count, seed)
    clips = generated_clips(model, prompts, seed, **options)
    control = text_control(
        features_of_clips(extractor, clips).mean, prompts, features.mean[~chosen], train_captions, seed=seed
    )
    train_videos = [video for video, held in zip(cache.videos, chosen, strict=True) if not held]
    real = [first_clip(model, cache, train_videos[train_captions.index(prompt)])[:-1] for prompt in prompts]
    held_out = [i for i in np.flatnonzero(chosen) if captions[i]]
    held_clips = generated_clips(model, [captions[i] for i in held_out], seed + 1, **options)
    rank = percentile_of_true_clip(features_of_clips(extractor, held_clips).mean, features.mean[held_out], seed=seed)
    figures = {
        "text_control": asdict(control),
        "validation_percentile": asdict(rank),
        "motion": asdict(motion_ratio(clips, real, seed=seed)),
    }
    return figures, contact_sheet(clips[:16] + held_clips[:8], prompts[:16] + [captions[i] for i in held_out[:8]])


def evaluate_reconstruction(
    model: DiCoDe, cache: FrameCache, bank_path: Path, seed: int = 0
) -> tuple[dict[str, Any], Any]:
    """Validation clips through tokens and back, beside two baselines: of the real key frames, and of their tokens."""
    extractor = EfficientNetLite0Features()
    videos = [v for v in cache.videos if v.validation]
    real = [first_clip(model, cache, v) for v in videos]
    made: list[Video] = []
    keys: list[Video] = []  # head and tail, as the key-frame head shows them
    for first in tqdm(range(0, len(real), BATCH), desc="reconstructing", unit="batch", mininterval=5):
        tokens = model.tokenizer.encode(torch.from_numpy(np.stack(real[first : first + BATCH])))
        indices = list(range(first, first + len(tokens)))
        made += list(next(model.tokenizer.decode(tokens, seed=seed, sample_indices=indices)).cpu().numpy())
        keys += [key_frames_of(model, pair) for pair in tokens]
    clips = [clip[:-1] for clip in real]
    candidates = {
        "reconstruction": made,
        "hold_head": [hold_head(clip) for clip in clips],
        "cross_fade": [cross_fade(clip[0], clip[-1], len(clip) - 1) for clip in real],
        # the same baselines from what the tokens hold, and every frame through the first stage: what it costs alone
        "hold_head_of_tokens": [np.repeat(pair[:1], len(clips[0]), axis=0) for pair in keys],
        "cross_fade_of_tokens": [cross_fade(pair[0], pair[1], len(clips[0])) for pair in keys],
        "first_stage": [through_first_stage(model, clip) for clip in clips],
    }
    features = bank_features(model, cache, extractor, bank_path)
    held = np.array([v.validation for v in cache.videos])
    bank = np.concatenate([features.mean[~held], features.difference[~held]], axis=1)
    scores = frechet_scores(
        features_of_clips(extractor, clips).joined(),
        {name: features_of_clips(extractor, those).joined() for name, those in candidates.items()},
        bank=bank,
    )
    psnr = {name: asdict(psnr_score(clips, those, seed=seed)) for name, those in candidates.items()}
    first_stage = {}
    for source in sorted({v.source for v in videos}):
        own = [i for i, v in enumerate(videos) if v.source == source]
        through = candidates["first_stage"]
        first_stage[source] = asdict(psnr_score([clips[i] for i in own], [through[i] for i in own], seed=seed))
    figures = {
        "frechet": scores,
        "psnr": psnr,
        "first_stage_psnr": first_stage,
        "motion": asdict(motion_ratio(made, clips, seed=seed)),
        "n": len(clips),
    }
    rows = [clip for i in range(0, len(clips), max(1, len(clips) // 10)) for clip in (clips[i], made[i])]
    return figures, contact_sheet(rows[:20])


@torch.no_grad()
def key_frames_of(model: DiCoDe, tokens: KeyFrameTokens) -> Video:
    """Key frames as the key-frame head alone shows them, without diffusion."""
    return model.tokenizer.frames_of(model.tokenizer.key_latents(tokens)[None])[0].cpu().numpy()


@torch.no_grad()
def through_first_stage(model: DiCoDe, clip: Video) -> Video:
    """A clip encoded and decoded by the first stage alone."""
    pixels = torch.from_numpy(clip).permute(0, 3, 1, 2).float().to(model.tokenizer.device) / 127.5 - 1
    return model.tokenizer.frames_of(model.tokenizer.first_stage.encode(pixels)[None])[0].cpu().numpy()


def evaluate_speed(model: DiCoDe, folder: Path, prompt: str, seconds: float = 4.0, repeats: int = 3) -> dict[str, Any]:
    """Seconds for one video: model loaded (median of `repeats` after a warm-up), and a whole process and its memory."""
    times = []
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        frames = sum(len(clip) for clip in model.generate(prompt, seconds=seconds, seed=repeat))
        times.append(time.perf_counter() - started)
    process_s, peak_memory_gib = whole_process(model, folder, prompt, seconds)
    return {
        "seconds_of_video": seconds,
        "frames": frames,
        "median_s": float(np.median(times[1:])),
        "first_s": times[0],
        "process_s": process_s,
        "peak_memory_gib": peak_memory_gib,
        "threads": torch.get_num_threads(),
    }


def whole_process(model: DiCoDe, folder: Path, prompt: str, seconds: float) -> tuple[float, float | None]:
    """Seconds and peak memory in GiB of `dicode generate`, from the model's `folder` to the file, on its device."""
    device = model.tokenizer.device.type
    command = ["generate", prompt, "--seconds", str(seconds), "--model", str(folder), "--device", device, "--timings"]
    with TemporaryDirectory() as scratch:
        started = time.perf_counter()
        argv = [sys.executable, "-m", "dicode", *command, "-o", f"{scratch}/out.mp4"]
        printed = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout
        process_s = time.perf_counter() - started
    memory = re.search(r"peak memory ([\d.]+) MiB", printed)  # unknown on Windows
    return process_s, float(memory[1]) / 2**10 if memory else None
