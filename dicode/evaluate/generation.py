"""Does a generated clip show what its prompt says, and does it move?"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from PIL import Image

from dicode.evaluate.metrics import scores_of_sets
from dicode.evaluate.samples import MOST_VIDEOS, Samples, generated_clips
from dicode.evaluate.scores import Score
from dicode.features.extract import Features
from dicode.features.metrics import Clips, bootstrap_interval, motion, percentile_rank, similarities
from dicode.seeds import generator_for
from dicode.video.sheet import contact_sheet


def evaluate_generation(
    samples: Samples, count: int = 100, references: int = MOST_VIDEOS
) -> tuple[dict[str, Any], Image.Image]:
    """Text control on up to `count` training captions, rank of the true clip on all validation captions, motion.

    Text control compares with the first clips of at most `references` training videos. Returns the figures and a
    contact sheet of the first sixteen prompts.
    """
    extractor, seed, training = samples.extractor, samples.seed, samples.training(references)
    reference_features = extractor.means(samples.real_clips.features(extractor, training))
    captions = [video.caption for video in training]
    captioned = {caption for caption in captions if caption}
    prompts = draw_prompts(captioned, min(count, len(captioned)), seed)
    clips = generated_clips(samples.model, prompts, seed)
    control = text_control(extractor.means(extractor.features(clips)), prompts, reference_features, captions, seed)
    real = samples.real_clips.clips(training[captions.index(prompt)] for prompt in prompts)
    validation_clips = list(samples.generated.values())
    generated = {network.name: network.features(validation_clips) for network in samples.networks}
    true_features = extractor.means(samples.real_clips.features(extractor, samples.videos))[samples.captioned]
    figures = {
        "n": control["n"],
        "text_control": control,
        "validation_percentile": true_clip_rank(extractor.means(generated[extractor.name]), true_features, seed),
        "motion": motion_ratio(clips, real, seed),
        **validation_scores(samples, generated),
    }
    labels = prompts[:16] + [samples.captions[i] for i in samples.captioned][:8]
    return figures, contact_sheet(clips[:16] + validation_clips[:8], labels)


def validation_scores(samples: Samples, generated: Mapping[str, Features]) -> dict[str, dict[str, Score]]:
    """`SET_METRICS` of the validation captions' clips, and of as many real training clips: the bias of few clips."""
    count, training = len(samples.captioned), samples.training()
    videos = [samples.videos[i] for i in samples.captioned]
    captions = [samples.captions[i] for i in samples.captioned]
    if count > len(training):
        raise ValueError(
            f"expected at least {count} training clips to compare as many validation clips with, got {len(training)}"
        )
    order = torch.randperm(len(training), generator=generator_for(samples.seed, "real clips"))
    drawn = [training[i] for i in order[:count].tolist()]
    scores: dict[str, Any] = {}
    for network in samples.networks:
        real, others = (samples.real_clips.features(network, those) for those in (videos, drawn))
        own = scores_of_sets(network, real, {"generated": generated[network.name]}, captions, samples.seed)
        of_training = scores_of_sets(network, real, {"real training clips": others}, seed=samples.seed)
        scores |= {metric: score | of_training.get(metric, {}) for metric, score in own.items()}
    return scores


def draw_prompts(captions: Iterable[str], count: int, seed: int) -> list[str]:
    """`count` distinct captions; depends on the set of captions and the seed, not on the order they are listed in."""
    distinct = sorted(set(captions))
    if not 1 <= count <= len(distinct):
        raise ValueError(f"expected 1 to the {len(distinct)} distinct captions, got a count of {count}")
    order = torch.randperm(len(distinct), generator=generator_for(seed, "prompts"))
    return [distinct[i] for i in order[:count].tolist()]


def text_control(
    features: Float[ndarray, "q width"],
    prompts: Sequence[str],
    reference_features: Float[ndarray, "n width"],
    reference_captions: Sequence[str],
    seed: int = 0,
) -> dict[str, Any]:
    """Share (0…1) of prompts whose generated clip is nearest, by mean features, to a real one that has this caption.

    Captions are compared without case and surplus spaces. Real clips must be read at the generated ones' size and rate.
    `interval` is 95 % over prompts, drawn by `seed`; `chance` is the share of a real clip drawn at random, and
    `references` the number of real clips.
    """
    plain = [plain_caption(caption) for caption in reference_captions]
    carries = np.array([[plain_caption(prompt) == caption for caption in plain] for prompt in prompts])
    orphans = [prompt for prompt, row in zip(prompts, carries, strict=True) if not row.any()]
    if orphans:
        raise ValueError(f"no real clip carries {len(orphans)} of the prompts, the first being {orphans[0]!r}")
    hits = carries[np.arange(len(prompts)), similarities(features, reference_features).argmax(axis=1)]
    return {
        "share": float(hits.mean()),
        "interval": bootstrap_interval(np.mean, hits, seed=seed),
        "chance": float(carries.mean()),
        "n": len(prompts),
        "references": len(plain),
    }


def true_clip_rank(
    features: Float[ndarray, "n width"], true_features: Float[ndarray, "n width"], seed: int = 0
) -> dict[str, Any]:
    """Mean percentile rank of the true clip among all by similarity to the clip generated for its caption; chance 50.

    Generated and true clips are in the same order. Other clips of the same caption (an emoji's skin tones) may rank
    before the true one: the stricter reading. `interval` is 95 % over captions.
    """
    ranks = percentile_rank(similarities(features, true_features), np.arange(len(true_features)))
    interval = bootstrap_interval(np.mean, ranks, seed=seed)
    return {"mean": float(ranks.mean()), "interval": interval, "n": len(ranks)}


def motion_ratio(generated: Clips, real: Clips, seed: int = 0) -> dict[str, Any]:
    """Motion of generated clips over that of real ones, with a 95 % interval, and both in steps of 0…255.

    All must have one resolution, which is checked, and one frame rate, which is not in the arrays.
    """
    generated, real = list(generated), list(real)
    sizes = {clip.shape[1:] for clip in (*generated, *real)}
    if len(sizes) > 1:
        raise ValueError(f"expected clips of one size, got {sorted(sizes)}: motion depends on resolution")
    moves, real_moves = np.array([motion(c) for c in generated]), np.array([motion(c) for c in real])
    if not real_moves.any():
        raise ValueError(f"the {len(real)} real clips are all still; there is no motion to compare with")
    return {
        "ratio": float(moves.mean() / real_moves.mean()),
        "interval": bootstrap_interval(lambda a, b: a.mean() / b.mean(), moves, real_moves, seed=seed),
        "generated": float(moves.mean()),
        "real": float(real_moves.mean()),
        "n": len(moves),
    }


def plain_caption(caption: str) -> str:
    """A caption without case and surplus spaces, as captions are compared."""
    return " ".join(caption.casefold().split())
