"""Everything measured of a model's clips, from one command: text control, motion, reconstruction."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from numpy import ndarray

from dicode.evaluate.clips import MadeClips, caption_of, first_clip, generated_clips
from dicode.evaluate.features import ClipFeatures, EfficientNetLite0Features, Network, features_of_clips
from dicode.evaluate.generation import draw_prompts, motion_ratio, percentile_of_true_clip, text_control
from dicode.evaluate.metrics import mean_pair_distance
from dicode.evaluate.networks import Clip, clip_similarity
from dicode.evaluate.perceptual import FeatureMaps, perceptual_distance
from dicode.evaluate.quality import dynamic_share, ssim, token_rate
from dicode.evaluate.reconstruction import cross_fade, hold_head, psnr_score
from dicode.evaluate.scores import (
    Score,
    Seen,
    alignment_scores,
    mean_score,
    scores_of_sets,
    seen,
    seen_by_efflite,
)
from dicode.evaluate.tokens import captions_with_variants, diversity
from dicode.evaluate.video_text import TinyVT
from dicode.generate import DiCoDe
from dicode.hub import kept_tensors
from dicode.progress import tracked
from dicode.seeds import generator_for
from dicode.shapes import KeyFrameTokens, Video
from dicode.video.shards import FrameCache
from dicode.video.sheet import contact_sheet

DIVERSE_CAPTIONS, DIVERSE_SAMPLES = 12, 3  # captions with several real variants, and clips generated of each
PERCEPTUAL = f"perceptual-{EfficientNetLite0Features.name}"  # not LPIPS: another network, without learned weights


def bank_features(model: DiCoDe, cache: FrameCache, extractor: EfficientNetLite0Features, path: Path) -> ClipFeatures:
    """Features of the first clip of every cached video, kept at `path`."""

    def computed() -> dict[str, torch.Tensor]:
        clips = (first_clip(model, cache, v)[:-1] for v in tracked(cache.videos, "features of real clips", "clip"))
        features = features_of_clips(extractor, clips)
        return {name: torch.from_numpy(value) for name, value in features._asdict().items()}

    return ClipFeatures(**{name: value.numpy() for name, value in kept_tensors(path, computed).items()})


def evaluate_generation(
    made: MadeClips, bank_path: Path, count: int = 100, networks: Mapping[str, Network] | None = None
) -> tuple[dict[str, Any], Any]:
    """Text control on `count` training captions, rank of the true clip on all validation captions, motion, diversity.

    Distances are of the validation captions' clips to the real ones of these captions, beside as many real training
    clips: what the small number of clips and the split alone give. `networks` measure beside EffLite0, by what they
    were asked for with. Returns the figures and a contact sheet of the first sixteen prompts.
    """
    model, cache, seed, options = made.model, made.cache, made.seed, made.options
    extractor = EfficientNetLite0Features(device=model.tokenizer.device)
    features = bank_features(model, cache, extractor, bank_path)
    chosen = np.array([v.validation for v in cache.videos])
    captions = [caption_of(video) for video in cache.videos]
    train_captions = [caption for caption, held in zip(captions, chosen, strict=True) if not held]
    prompts = draw_prompts([c for c in train_captions if c], count, seed)
    clips = generated_clips(model, prompts, seed, **options)
    control = text_control(
        features_of_clips(extractor, clips).mean, prompts, features.mean[~chosen], train_captions, seed=seed
    )
    train_videos = [video for video, held in zip(cache.videos, chosen, strict=True) if not held]
    real = [first_clip(model, cache, train_videos[train_captions.index(prompt)])[:-1] for prompt in prompts]
    held_out = np.flatnonzero(chosen)[made.captioned].tolist()
    held_clips = list(made.generated.values())
    held_captions = [captions[i] for i in held_out]
    held_features = features_of_clips(extractor, held_clips)
    rank = percentile_of_true_clip(held_features.mean, features.mean[held_out], seed=seed)
    distances = caption_distances(
        model, cache, extractor, features, held_out, held_clips, held_features, seed, networks or {}
    )
    figures = {
        "text_control": asdict(control),
        "validation_percentile": asdict(rank),
        "motion": asdict(motion_ratio(clips, real, seed=seed)),
        "dynamic_share": asdict(dynamic_share(clips, real, seed=seed)),
        "diversity": caption_diversity(model, extractor, train_captions, features.mean[~chosen], seed, **options),
        **distances,
    }
    return figures, contact_sheet(clips[:16] + held_clips[:8], prompts[:16] + held_captions[:8])


def caption_distances(
    model: DiCoDe,
    cache: FrameCache,
    extractor: EfficientNetLite0Features,
    features: ClipFeatures,
    held_out: Sequence[int],
    held_clips: Sequence[Video],
    held_features: ClipFeatures,
    seed: int,
    networks: Mapping[str, Network],
) -> dict[str, dict[str, Score]]:
    """Scores of the validation captions' clips as a set, and of as many real training clips, against the real ones.

    `features` are of the cache's first clips, `held_out` the validation videos that the generated clips belong to.
    """
    train = np.array([not video.validation for video in cache.videos])
    other = drawn_rows(train, len(held_out), seed)
    real, made, others = (
        seen_by_efflite(extractor, those)
        for those in (rows_of(features, held_out), held_features, rows_of(features, other))
    )
    scores = scores_of_sets(extractor.name, real, {"generated": made, "real training clips": others}, seed)
    if not networks:
        return scores
    held_real, other_real = (
        [first_clip(model, cache, cache.videos[i])[:-1] for i in rows] for rows in (held_out, other)
    )
    captions = [cache.videos[i].captions[0] for i in held_out]
    for spec, network in networks.items():
        sets = {"generated": seen(network, held_clips), "real training clips": seen(network, other_real)}
        real = seen(network, held_real)
        scores |= scores_of_sets(network.name, real, sets, seed)
        shown = {"generated": held_clips, "real": held_real}
        scores |= text_scores(spec, network, shown, {"generated": sets["generated"], "real": real}, captions, seed)
    return scores


def caption_diversity(
    model: DiCoDe,
    extractor: EfficientNetLite0Features,
    captions: Sequence[str],
    features: Float64[ndarray, "n width"],
    seed: int,
    **options: Any,
) -> dict[str, Any] | None:
    """How far apart a caption's samples are beside its real variants, by mean features; None where it has none.

    That is: where no caption has four real clips that differ. `features` are of the real clips of `captions`.
    """
    variants = captions_with_variants(captions)
    variants = {caption: own for caption, own in variants.items() if mean_pair_distance(features[own]) > 0}
    if not variants:
        return None
    drawn = draw_prompts(variants, min(DIVERSE_CAPTIONS, len(variants)), seed)
    clips = generated_clips(model, [c for c in drawn for _ in range(DIVERSE_SAMPLES)], seed + 2, **options)
    made = features_of_clips(extractor, clips).mean.reshape(len(drawn), DIVERSE_SAMPLES, -1)
    return asdict(diversity(list(made), [features[variants[caption]] for caption in drawn], seed=seed))


def evaluate_reconstruction(
    made: MadeClips, bank_path: Path, networks: Mapping[str, Network] | None = None
) -> tuple[dict[str, Any], Any]:
    """Validation clips through tokens and back, beside two baselines: of the real key frames, and of their tokens.

    `networks` measure beside EffLite0, by what they were asked for with.
    """
    model, cache, seed, videos, real = made.model, made.cache, made.seed, made.videos, made.real
    extractor = EfficientNetLite0Features(device=model.tokenizer.device)
    rendered, tokens = made.reconstructed
    keys = [key_frames_of(model, pair) for pair in tokens]  # head and tail, as the key-frame head shows them
    clips = [clip[:-1] for clip in real]
    candidates = {
        "reconstruction": rendered,
        "hold_head": [hold_head(clip) for clip in clips],
        "cross_fade": [cross_fade(clip[0], clip[-1], len(clip) - 1) for clip in real],
        # the same baselines from what the tokens hold, and every frame through the first stage: what it costs alone
        "hold_head_of_tokens": [np.repeat(pair[:1], len(clips[0]), axis=0) for pair in keys],
        "cross_fade_of_tokens": [cross_fade(pair[0], pair[1], len(clips[0])) for pair in keys],
        "first_stage": [through_first_stage(model, clip) for clip in clips],
    }
    features = bank_features(model, cache, extractor, bank_path)
    held = np.array([v.validation for v in cache.videos])
    real_features = rows_of(features, np.flatnonzero(held))
    made_features = {name: features_of_clips(extractor, those) for name, those in candidates.items()}
    made_seen = {name: seen_by_efflite(extractor, those) for name, those in made_features.items()}
    distances = scores_of_sets(extractor.name, seen_by_efflite(extractor, real_features), made_seen, seed)
    captions = made.captions
    for spec, network in (networks or {}).items():
        made_seen = {name: seen(network, those) for name, those in candidates.items()}
        real_seen = seen(network, clips)
        distances |= scores_of_sets(network.name, real_seen, made_seen, seed)
        told, told_seen = {"reconstruction": rendered, "real": clips}, {**made_seen, "real": real_seen}
        distances |= text_scores(spec, network, told, told_seen, captions, seed)
    psnr = {name: asdict(psnr_score(clips, those, seed=seed)) for name, those in candidates.items()}
    first_stage = {}
    for source in sorted({v.source for v in videos}):
        own = [i for i, v in enumerate(videos) if v.source == source]
        through = candidates["first_stage"]
        first_stage[source] = asdict(psnr_score([clips[i] for i in own], [through[i] for i in own], seed=seed))
    pairs = {name: frame_scores(clips, those, seed, model.tokenizer.device) for name, those in candidates.items()}
    figures = {
        "psnr": psnr,
        "first_stage_psnr": first_stage,
        "motion": asdict(motion_ratio(rendered, clips, seed=seed)),
        "n": len(clips),
        **{metric: {name: own[metric] for name, own in pairs.items()} for metric in ("SSIM", PERCEPTUAL)},
        **distances,
        "token_rate": asdict(token_rate(model.tokenizer.config)),  # follows from the configuration: no interval
    }
    shown = range(0, len(clips), max(1, len(clips) // 10))
    rows = [clip for i in shown for clip in (clips[i], rendered[i])]
    labels = [label for i in shown for label in (f"real: {captions[i]}", "reconstruction")]
    return figures, contact_sheet(rows[:20], labels[:20])


@torch.no_grad()
def frame_scores(
    real: Sequence[Video], made: Sequence[Video], seed: int, device: str | torch.device = "cpu"
) -> dict[str, Score]:
    """SSIM and perceptual distance of clips to the real ones, in the same order, of two frames a clip.

    The frames are those at a quarter and three quarters of a clip: SSIM of all takes a second of processor time.
    """
    feature_maps = FeatureMaps()
    values: dict[str, list[float]] = {"SSIM": [], PERCEPTUAL: []}
    for clip, candidate in zip(real, made, strict=True):
        at = [len(clip) // 4, 3 * len(clip) // 4]
        pixels, target = (
            torch.from_numpy(those[at]).permute(0, 3, 1, 2).float().to(device) / 127.5 - 1
            for those in (candidate, clip)
        )
        values["SSIM"].append(float(ssim(clip[at], candidate[at]).mean()))
        values[PERCEPTUAL].append(float(perceptual_distance(feature_maps(pixels), feature_maps(target))))
    return {metric: mean_score(own, seed) for metric, own in values.items()}


def drawn_rows(among: Bool[ndarray, "n"], count: int, seed: int) -> Int[ndarray, "count"]:
    """Positions of `count` different true entries."""
    rows = np.flatnonzero(among)
    if count > len(rows):
        raise ValueError(
            f"expected at least {count} training clips to compare as many validation clips with, got {len(rows)}"
        )
    return rows[torch.randperm(len(rows), generator=generator_for(seed, "real clips"))[:count].numpy()]


def rows_of(features: ClipFeatures, rows: Sequence[int] | ndarray) -> ClipFeatures:
    """The features of some clips."""
    return ClipFeatures(features.mean[rows], features.difference[rows])


def text_scores(
    spec: str,
    network: Network,
    clips: Mapping[str, Sequence[Video]],
    sets: Mapping[str, Seen],
    captions: Sequence[str],
    seed: int,
) -> dict[str, dict[str, Score]]:
    """How well sets of clips fit their captions, by a network that reads; nothing by another.

    `sets` are the clips as TinyVT sees them, of which there may be more.
    """
    if isinstance(network, TinyVT):
        return alignment_scores(network, sets, captions, seed)
    if not isinstance(network, Clip):
        return {}
    return {clipsim_name(spec): {name: clipsim_score(network, own, captions, seed) for name, own in clips.items()}}


def clipsim_score(network: Clip, clips: Sequence[Video], captions: Sequence[str], seed: int) -> Score:
    """Mean CLIPSIM of clips with their captions."""
    return mean_score([clip_similarity(network, *pair) for pair in zip(clips, captions, strict=True)], seed)


def clipsim_name(spec: str) -> str:
    """`CLIPSIM-clip-vit-base-patch32` of "CLIP=openai/clip-vit-base-patch32": which CLIP is part of the name."""
    return f"CLIPSIM-{Path(spec.partition('=')[2]).name}"


@torch.no_grad()
def key_frames_of(model: DiCoDe, tokens: KeyFrameTokens) -> Video:
    """Key frames as the key-frame head alone shows them, without diffusion."""
    return model.tokenizer.frames_of(model.tokenizer.key_latents(tokens)[None])[0].cpu().numpy()


@torch.no_grad()
def through_first_stage(model: DiCoDe, clip: Video) -> Video:
    """A clip encoded and decoded by the first stage alone."""
    pixels = torch.from_numpy(clip).permute(0, 3, 1, 2).float().to(model.tokenizer.device) / 127.5 - 1
    return model.tokenizer.frames_of(model.tokenizer.first_stage.encode(pixels)[None])[0].cpu().numpy()
