"""Everything measured of a model's clips, from one command: text control, motion, reconstruction."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray

from dicode.evaluate.diversity import captions_with_variants, diversity
from dicode.evaluate.generation import draw_prompts, motion_ratio, percentile_of_true_clip, text_control
from dicode.evaluate.quality import dynamic_share, ssim, token_rate
from dicode.evaluate.reconstruction import cross_fade, hold_head, psnr_in_motion, psnr_score
from dicode.evaluate.samples import MOST_VIDEOS, Samples, caption_of, generated_clips, one_clip_s, split_rows
from dicode.evaluate.scores import (
    Score,
    Seen,
    alignment_scores,
    cosines,
    mean_score,
    scores_of_sets,
    seen,
    seen_by_efflite,
)
from dicode.features.extract import ClipFeatures, EfficientNetLite0Features, Network, features_of_clips
from dicode.features.metrics import mean_pair_distance
from dicode.features.networks import Clip
from dicode.features.perceptual import FeatureMaps, perceptual_distance
from dicode.features.tinyvt import TinyVT
from dicode.pipeline import DiCoDe
from dicode.seeds import generator_for
from dicode.shapes import KeyFrameTokens
from dicode.video.sheet import contact_sheet
from dicode.video.timed import Video

DIVERSE_CAPTIONS, DIVERSE_SAMPLES = 12, 3  # captions with several real variants, and clips generated of each
PERCEPTUAL = f"perceptual-{EfficientNetLite0Features.name}"  # not LPIPS: another network, without learned weights


def evaluate_generation(
    made: Samples,
    count: int = 100,
    networks: Mapping[str, Network] | None = None,
    bank: int = MOST_VIDEOS,
    diverse: int = DIVERSE_CAPTIONS,
) -> tuple[dict[str, Any], Any]:
    """Text control on up to `count` training captions, rank of the true clip on all validation captions, motion.

    Text control looks among the first clips of at most `bank` training videos. Diversity is of `diverse` captions that
    several of them have. Distances are of the validation captions' clips to the real ones of these captions, beside as
    many real training clips: what the small number of clips and the split alone give. `networks` measure beside
    EffLite0, by what they were asked for with. Returns the figures and a contact sheet of the first sixteen prompts.
    """
    model, videos, seed, options = made.model, made.cache.videos, made.seed, made.options
    extractor, rows = made.extractor, made.training(bank)
    features = made.bank.features(extractor, rows)
    captions = [caption_of(videos[row]) for row in rows]
    captioned = {caption for caption in captions if caption}
    prompts = draw_prompts(captioned, min(count, len(captioned)), seed)
    clips = generated_clips(model, prompts, seed, **options)
    control = text_control(features_of_clips(extractor, clips).mean, prompts, features.mean, captions, seed=seed)
    real = made.bank.clips([rows[captions.index(prompt)] for prompt in prompts])
    held_clips, held_captions = list(made.generated.values()), [made.captions[i] for i in made.captioned]
    held_features = features_of_clips(extractor, held_clips)
    of_held = made.bank.features(extractor, made.rows)
    rank = percentile_of_true_clip(held_features.mean, rows_of(of_held, made.captioned).mean, seed=seed)
    figures = {
        "n": control.n,
        "text_control": asdict(control),
        "validation_percentile": asdict(rank),
        "motion": asdict(motion_ratio(clips, real, seed=seed)),
        "dynamic_share": asdict(dynamic_share(clips, real, seed=seed)),
        "diversity": caption_diversity(model, extractor, captions, features.mean, seed, diverse, **options),
        **caption_distances(made, held_clips, held_features, networks or {}),
    }
    return figures, contact_sheet(clips[:16] + held_clips[:8], prompts[:16] + held_captions[:8])


def caption_distances(
    made: Samples, held_clips: Sequence[Video], held_features: ClipFeatures, networks: Mapping[str, Network]
) -> dict[str, dict[str, Score]]:
    """Scores of the validation captions' clips as a set, and of as many real training clips, against the real ones."""
    bank, seed, extractor = made.bank, made.seed, made.extractor
    rows = [made.rows[i] for i in made.captioned]
    captions = [made.captions[i] for i in made.captioned]
    other = drawn_rows(split_rows(made.cache, False, lasting_s=one_clip_s(made.model)), len(rows), seed)
    real, others = (bank.seen(extractor, those) for those in (rows, other))
    sets = {"generated": seen_by_efflite(extractor, held_features), "real training clips": others}
    scores = scores_of_sets(extractor.name, real, sets, seed)
    for spec, network in networks.items():
        real, sets = bank.seen(network, rows), {"generated": seen(network, held_clips)}
        scores |= text_scores(spec, network, {**sets, "real": real}, captions, seed)
        scores |= scores_of_sets(network.name, real, {**sets, "real training clips": bank.seen(network, other)}, seed)
    return scores


def caption_diversity(
    model: DiCoDe,
    extractor: EfficientNetLite0Features,
    captions: Sequence[str],
    features: Float64[ndarray, "n width"],
    seed: int,
    count: int = DIVERSE_CAPTIONS,
    **options: Any,
) -> dict[str, Any] | None:
    """How far apart a caption's samples are beside its real variants, by mean features; None where it has none.

    That is: where no caption has four real clips that differ. `features` are of the real clips of `captions`.
    """
    variants = captions_with_variants(captions)
    variants = {caption: own for caption, own in variants.items() if mean_pair_distance(features[own]) > 0}
    if not variants or not count:
        return None
    drawn = draw_prompts(variants, min(count, len(variants)), seed)
    clips = generated_clips(model, [c for c in drawn for _ in range(DIVERSE_SAMPLES)], seed + 2, **options)
    made = features_of_clips(extractor, clips).mean.reshape(len(drawn), DIVERSE_SAMPLES, -1)
    return asdict(diversity(list(made), [features[variants[caption]] for caption in drawn], seed=seed))


def evaluate_reconstruction(made: Samples, networks: Mapping[str, Network] | None = None) -> tuple[dict[str, Any], Any]:
    """Validation clips through tokens and back, beside two baselines: of the real key frames, and of their tokens.

    `networks` measure beside EffLite0, by what they were asked for with.
    """
    model, seed, videos, clips, captions = made.model, made.seed, made.videos, made.clips, made.captions
    candidates = reconstructions(made)
    distances: dict[str, dict[str, Score]] = {}
    for spec, network in {made.extractor.name: made.extractor, **(networks or {})}.items():
        real_seen = made.bank.seen(network, made.rows)
        made_seen = {name: seen(network, those) for name, those in candidates.items()}
        distances |= scores_of_sets(network.name, real_seen, made_seen, seed)
        distances |= text_scores(spec, network, {**made_seen, "real": real_seen}, captions, seed)
    psnr = {name: asdict(psnr_score(clips, those, seed=seed)) for name, those in candidates.items()}
    inside = {name: psnr_in_motion(clips, those, seed) for name, those in candidates.items()}
    first_stage, through = {}, candidates["first_stage"]
    for source in sorted({v.source for v in videos}):
        own = [i for i, v in enumerate(videos) if v.source == source]
        first_stage[source] = asdict(psnr_score([clips[i] for i in own], [through[i] for i in own], seed=seed))
    pairs = {name: frame_scores(clips, those, seed, made.extractor) for name, those in candidates.items()}
    figures = {
        "psnr": psnr,
        "psnr_in_motion": inside if all(inside.values()) else None,
        "first_stage_psnr": first_stage,
        "motion": asdict(motion_ratio(candidates["reconstruction"], clips, seed=seed)),
        "n": len(clips),
        **{metric: {name: own[metric] for name, own in pairs.items()} for metric in ("SSIM", PERCEPTUAL)},
        **distances,
        "token_rate": asdict(token_rate(model.tokenizer.config)),  # follows from the configuration: no interval
    }
    shown = range(0, len(clips), max(1, len(clips) // 10))
    rows = [clip for i in shown for clip in (clips[i], candidates["reconstruction"][i])]
    labels = [label for i in shown for label in (f"real: {captions[i]}", "reconstruction")]
    return figures, contact_sheet(rows[:20], labels[:20])


def reconstructions(made: Samples) -> dict[str, list[Video]]:
    """Validation clips through their tokens, and five baselines."""
    model, config = made.model, made.model.tokenizer.config
    rendered, tokens = made.reconstructed
    keys = [key_frames_of(model, pair) for pair in tokens]  # head and tail, as the key-frame head shows them
    count, tail = config.clip_frames, config.tail_frame
    return {
        "reconstruction": rendered,
        "hold_head": [hold_head(clip) for clip in made.clips],
        "cross_fade": [cross_fade(clip[0], clip[tail], count, tail) for clip in made.real],
        # the same baselines from what the tokens hold, and every frame through the first stage: what it costs alone
        "hold_head_of_tokens": [np.repeat(pair[:1], count, axis=0) for pair in keys],
        "cross_fade_of_tokens": [cross_fade(pair[0], pair[1], count, tail) for pair in keys],
        "first_stage": [through_first_stage(model, clip) for clip in made.clips],
    }


@torch.no_grad()
def frame_scores(
    real: Sequence[Video], made: Sequence[Video], seed: int, network: EfficientNetLite0Features
) -> dict[str, Score]:
    """SSIM and perceptual distance of clips to the real ones, in the same order, of two frames a clip.

    The frames are those at a quarter and three quarters of a clip: SSIM of all takes a second of processor time.
    """
    feature_maps = FeatureMaps(network)
    values: dict[str, list[float]] = {"SSIM": [], PERCEPTUAL: []}
    for clip, candidate in zip(real, made, strict=True):
        at = [len(clip) // 4, 3 * len(clip) // 4]
        pixels, target = (
            torch.from_numpy(those[at]).permute(0, 3, 1, 2).float().to(network.device) / 127.5 - 1
            for those in (candidate, clip)
        )
        values["SSIM"].append(float(ssim(clip[at], candidate[at]).mean()))
        values[PERCEPTUAL].append(float(perceptual_distance(feature_maps(pixels), feature_maps(target))))
    return {metric: mean_score(own, seed) for metric, own in values.items()}


def drawn_rows(rows: Sequence[int], count: int, seed: int) -> list[int]:
    """`count` different ones of these."""
    if count > len(rows):
        raise ValueError(
            f"expected at least {count} training clips to compare as many validation clips with, got {len(rows)}"
        )
    return [rows[i] for i in torch.randperm(len(rows), generator=generator_for(seed, "real clips"))[:count].tolist()]


def rows_of(features: ClipFeatures, rows: Sequence[int] | ndarray) -> ClipFeatures:
    """The features of some clips."""
    return ClipFeatures(features.mean[rows], features.difference[rows])


def text_scores(
    spec: str, network: Network, sets: Mapping[str, Seen], captions: Sequence[str], seed: int
) -> dict[str, dict[str, Score]]:
    """How well sets of clips fit their captions, by a network that reads; nothing by another."""
    if isinstance(network, TinyVT):
        return alignment_scores(network, sets, captions, seed)
    if not isinstance(network, Clip):
        return {}
    told = {name: cosines(network, own, captions) for name, own in sets.items()}
    return {clipsim_name(spec): {name: mean_score(np.diagonal(own), seed) for name, own in told.items()}}


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
