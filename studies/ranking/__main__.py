"""Do the metrics rank cases whose order is known? Real > reconstruction > generation > shuffled frames > noise."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from PIL import Image

from dicode.evaluate.generation import percentile_of_true_clip
from dicode.evaluate.reconstruction import PSNR_CEILING_DB
from dicode.evaluate.samples import Samples, spread
from dicode.evaluate.scores import Score, mean_score, scores_of_sets, seen, seen_by_efflite
from dicode.evaluate.suite import (
    PERCEPTUAL,
    frame_scores,
    text_scores,
)
from dicode.features.extract import EfficientNetLite0Features, Network, features_of_clips
from dicode.features.metrics import Interval, psnr
from dicode.seeds import generator_for
from dicode.video.sheet import contact_sheet
from dicode.video.timed import Video

CASES = {
    "real": "validation clips as they are",
    "reconstruction": "the same clips through their tokens and back",
    "generation": "clips generated for their captions",
    "shuffled": "the generated clips, the frames of each in random order",
    "noise": "uniform noise in every pixel",
}
UNCLAIMED = "does not claim"
# Which way is better, and what a metric claims: groups of cases, each better than the next; in one it claims none.
PAIRED = (("real",), ("reconstruction",), ("noise",))  # a generated clip need not equal the real one of its caption
NO_TRUTH = (("real", "reconstruction", "generation"), ("noise",))  # sees no real clips: a made one may score higher
CLAIMS: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "PSNR": ("higher", PAIRED),
    "SSIM": ("higher", PAIRED),
    "perceptual": ("lower", PAIRED),
    "FVD": ("lower", (("real",), ("reconstruction",), ("generation",), ("shuffled",), ("noise",))),
    # the others see frames one by one, and so nothing of their order
    "FID": ("lower", (("real",), ("reconstruction",), ("generation",), ("noise",))),
    "IS": ("higher", NO_TRUTH),
    "CLIPSIM": ("higher", NO_TRUTH),
    "alignment": ("higher", NO_TRUTH),
    "caption rank": ("higher", NO_TRUTH),
    "rank of the true clip": ("higher", (("real", "reconstruction"), ("generation",), ("noise",))),  # 100 is the end
    "dynamic share": ("higher", ()),  # that clips move is no quality: noise moves most
}
RANKED_CLIPS = 48


def evaluate_ranking(
    made: Samples, networks: Mapping[str, Network] | None = None, count: int = RANKED_CLIPS
) -> tuple[dict[str, Any], Image.Image]:
    """Every metric of the five cases, on the first `count` validation clips spread over the split.

    Distances of sets are to the real clips of these captions, so that "real" is at 0 as it is at the end of PSNR's
    scale. Against other real clips, as many, nothing is told: of 32, FVD-EffLite0 had 505 for real clips and 481 for
    reconstructions, with intervals that overlap.
    """
    chosen = spread(made.captioned, count)
    captions = [made.captions[i] for i in chosen]
    real, reconstruction, generation = (
        [those[i] for i in chosen] for those in (made.clips, made.reconstructed[0], made.generated)
    )
    cases = known_cases(real, reconstruction, generation, made.seed)
    figures = {
        "cases": CASES,
        "metrics": rank_cases(cases, captions, made.seed, networks or {}, made.extractor),
        "n": len(chosen),
    }
    rows = [(clips[i], f"{case}: {captions[i]}") for i in range(min(3, len(captions))) for case, clips in cases.items()]
    return figures, contact_sheet([clip for clip, _ in rows], [label for _, label in rows])


def known_cases(
    real: Sequence[Video], reconstruction: Sequence[Video], generation: Sequence[Video], seed: int = 0
) -> dict[str, list[Video]]:
    """The five cases, best first, clip i of each belonging to real clip i. `seed` shuffles frames and draws noise."""
    shuffled, noise = [], []
    for i, clip in enumerate(generation):
        generator = generator_for(seed, "known case", i)
        shuffled.append(clip[torch.randperm(len(clip), generator=generator).numpy()])
        noise.append(torch.randint(256, clip.shape, generator=generator, dtype=torch.uint8).numpy())
    return dict(zip(CASES, (list(real), list(reconstruction), list(generation), shuffled, noise), strict=True))


def rank_cases(
    cases: Mapping[str, Sequence[Video]],
    captions: Sequence[str],
    seed: int = 0,
    networks: Mapping[str, Network] | None = None,
    extractor: EfficientNetLite0Features | None = None,
) -> dict[str, dict[str, Any]]:
    """For every metric: which way is better, the score of each case or "does not claim", and whether it ranks them.

    `ranked` is whether the cases that the metric claims have values in the known order, None where it claims none;
    `undecided` lists neighbours whose intervals overlap. `networks` measure beside EffLite0.
    """
    extractor = extractor or EfficientNetLite0Features()
    features = {case: features_of_clips(extractor, clips) for case, clips in cases.items()}
    real = cases["real"]
    by_case = {case: frame_scores(real, clips, seed, extractor) for case, clips in cases.items()}
    scores: dict[str, Mapping[str, Score]] = {
        "PSNR": {case: psnr_of(real, clips, seed) for case, clips in cases.items()},
        **{metric: {case: own[metric] for case, own in by_case.items()} for metric in ("SSIM", PERCEPTUAL)},
        **scores_of_sets(
            extractor.name,
            seen_by_efflite(extractor, features["real"]),
            {case: seen_by_efflite(extractor, own) for case, own in features.items()},
            seed,
        ),
        f"rank of the true clip-{extractor.name}": {
            case: mean_score(percentile_of_true_clip(own.mean, features["real"].mean).ranks, seed)
            for case, own in features.items()
        },
        "dynamic share": {},
    }
    for spec, network in (networks or {}).items():
        own = {case: seen(network, clips) for case, clips in cases.items()}
        scores |= scores_of_sets(network.name, own["real"], own, seed)
        scores |= text_scores(spec, network, own, captions, seed)
    return {metric: claimed(metric, own) for metric, own in scores.items()}


def psnr_of(real: Sequence[Video], made: Sequence[Video], seed: int = 0) -> Score:
    """Mean PSNR in dB, a frame counting at most PSNR_CEILING_DB as in `psnr_score`: "real" is equal to itself."""
    pairs = zip(real, made, strict=True)
    return mean_score([float(psnr(*pair).clip(max=PSNR_CEILING_DB).mean()) for pair in pairs], seed)


def claimed(metric: str, scores: Mapping[str, Score]) -> dict[str, Any]:
    """What `rank_cases` gives for one metric, whose name up to the network's says what it claims."""
    better, groups = CLAIMS[metric if metric in CLAIMS else metric.split("-")[0]]
    pairs = [(one, other) for group, worse in pairwise(groups) for one in group for other in worse]
    sign = 1 if better == "higher" else -1
    return {
        "better": better,
        "cases": {case: scores[case] if any(case in group for group in groups) else UNCLAIMED for case in CASES},
        "ranked": all(sign * (scores[a].value - scores[b].value) > 0 for a, b in pairs) if pairs else None,
        "undecided": [f"{a}, {b}" for a, b in pairs if not apart(scores[a].interval, scores[b].interval)],
    }


def apart(one: Interval | None, other: Interval | None) -> bool:
    """Whether two intervals are known and do not overlap."""
    return one is not None and other is not None and (one[1] < other[0] or other[1] < one[0])
