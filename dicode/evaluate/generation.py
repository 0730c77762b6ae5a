"""Does a generated clip show what its prompt says, and does it move?"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from PIL import Image

from dicode.evaluate.metrics import scores_of_sets
from dicode.evaluate.samples import MOST_VIDEOS, Samples, caption_of, generated_clips, one_clip_s, split_rows
from dicode.evaluate.scores import Score
from dicode.features.extract import Features, Network
from dicode.features.metrics import (
    Clips,
    Interval,
    bootstrap_interval,
    motion,
    percentile_rank,
    similarities,
)
from dicode.seeds import generator_for
from dicode.video.sheet import contact_sheet


@dataclass(frozen=True)
class TextControl:
    """Share of prompts (0…1) whose generated clip is nearest to a real clip that carries the prompt as its caption."""

    share: float
    interval: Interval  # 95 %, over prompts
    chance: float  # of a real clip drawn at random
    n: int
    references: int  # real clips compared with


@dataclass(frozen=True)
class TrueClipRank:
    """Mean percentile rank of the true clip among real clips, by similarity to the clip generated for its caption."""

    mean: float  # chance 50
    interval: Interval
    n: int


@dataclass(frozen=True)
class MotionRatio:
    """Mean absolute frame difference of generated over real clips, both in steps of 0…255."""

    ratio: float
    interval: Interval
    generated: float
    real: float
    n: int


def evaluate_generation(
    samples: Samples,
    count: int = 100,
    networks: Mapping[str, Network] | None = None,
    references: int = MOST_VIDEOS,
) -> tuple[dict[str, Any], Image.Image]:
    """Text control on up to `count` training captions, rank of the true clip on all validation captions, motion.

    Text control compares with the first clips of at most `references` training videos. `networks` measure beside
    EffLite0. Returns the figures and a contact sheet of the first sixteen prompts.
    """
    videos, seed = samples.cache.videos, samples.seed
    extractor, rows = samples.extractor, samples.training(references)
    reference_features = extractor.means(samples.real_clips.features(extractor, rows))
    captions = [caption_of(videos[row]) for row in rows]
    captioned = {caption for caption in captions if caption}
    prompts = draw_prompts(captioned, min(count, len(captioned)), seed)
    clips = generated_clips(samples.model, prompts, seed)
    control = text_control(extractor.means(extractor.features(clips)), prompts, reference_features, captions, seed)
    real = samples.real_clips.clips([rows[captions.index(prompt)] for prompt in prompts])
    validation_clips = list(samples.generated.values())
    generated = {network.name: network.features(validation_clips) for network in samples.networks(networks)}
    true_features = samples.real_clips.features(extractor, samples.rows)
    rank = percentile_of_true_clip(
        extractor.means(generated[extractor.name]), extractor.means(true_features)[samples.captioned], seed
    )
    figures = {
        "n": control.n,
        "text_control": asdict(control),
        "validation_percentile": asdict(rank),
        "motion": asdict(motion_ratio(clips, real, seed=seed)),
        **validation_scores(samples, samples.networks(networks), generated),
    }
    labels = prompts[:16] + [samples.captions[i] for i in samples.captioned][:8]
    return figures, contact_sheet(clips[:16] + validation_clips[:8], labels)


def validation_scores(
    samples: Samples, networks: Sequence[Network], generated: Mapping[str, Features]
) -> dict[str, dict[str, Score]]:
    """`SET_METRICS` of the validation captions' clips, and of as many real training clips: the bias of few clips."""
    rows = [samples.rows[i] for i in samples.captioned]
    captions = [samples.captions[i] for i in samples.captioned]
    training = split_rows(samples.cache, False, lasting_s=one_clip_s(samples.model))
    if len(rows) > len(training):
        raise ValueError(
            f"expected at least {len(rows)} training clips to compare as many validation clips with, "
            f"got {len(training)}"
        )
    order = torch.randperm(len(training), generator=generator_for(samples.seed, "real clips"))
    drawn = [training[i] for i in order[: len(rows)].tolist()]
    scores: dict[str, Any] = {}
    for network in networks:
        real, others = (samples.real_clips.features(network, those) for those in (rows, drawn))
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
) -> TextControl:
    """Find the real clip nearest to every generated one by mean features, and compare captions.

    Captions are compared without case and surplus spaces. Real clips must be read at the generated ones' size and rate.
    `seed` is the bootstrap's.
    """
    plain = [plain_caption(caption) for caption in reference_captions]
    carries = np.array([[plain_caption(prompt) == caption for caption in plain] for prompt in prompts])
    orphans = [prompt for prompt, row in zip(prompts, carries, strict=True) if not row.any()]
    if orphans:
        raise ValueError(f"no real clip carries {len(orphans)} of the prompts, the first being {orphans[0]!r}")
    hits = carries[np.arange(len(prompts)), similarities(features, reference_features).argmax(axis=1)]
    interval = bootstrap_interval(np.mean, hits, seed=seed)
    return TextControl(float(hits.mean()), interval, float(carries.mean()), len(prompts), len(plain))


def percentile_of_true_clip(
    features: Float[ndarray, "n width"], true_features: Float[ndarray, "n width"], seed: int = 0
) -> TrueClipRank:
    """Rank the true clip of every caption among all by similarity of mean features to the generated clip.

    Generated and true clips are in the same order. Other clips of the same caption (an emoji's skin tones) may rank
    before the true one: the stricter reading.
    """
    ranks = percentile_rank(similarities(features, true_features), np.arange(len(true_features)))
    return TrueClipRank(float(ranks.mean()), bootstrap_interval(np.mean, ranks, seed=seed), len(ranks))


def motion_ratio(generated: Clips, real: Clips, seed: int = 0) -> MotionRatio:
    """Compare how much generated and real clips move. Both must have one resolution and one frame rate.

    Resolution is checked; the rate is not in the arrays, so the caller answers for it.
    """
    generated, real = list(generated), list(real)
    sizes = {clip.shape[1:] for clip in (*generated, *real)}
    if len(sizes) > 1:
        raise ValueError(f"expected clips of one size, got {sorted(sizes)}: motion depends on resolution")
    moves, real_moves = np.array([motion(c) for c in generated]), np.array([motion(c) for c in real])
    if not real_moves.any():
        raise ValueError(f"the {len(real)} real clips are all still; there is no motion to compare with")
    return MotionRatio(
        ratio=float(moves.mean() / real_moves.mean()),
        interval=bootstrap_interval(lambda a, b: a.mean() / b.mean(), moves, real_moves, seed=seed),
        generated=float(moves.mean()),
        real=float(real_moves.mean()),
        n=len(moves),
    )


def plain_caption(caption: str) -> str:
    """A caption without case and surplus spaces, as captions are compared."""
    return " ".join(caption.casefold().split())
