"""Do the metrics rank cases whose order is known? Real > reconstruction > generation > shuffled frames > noise.

python studies/ranking sprites cache/sprites
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dicode.data.cache import FrameCache
from dicode.data.columns import spread_numbers
from dicode.evaluate.metrics import psnr_db, scores_of_pairs, scores_of_sets
from dicode.evaluate.samples import Samples
from dicode.evaluate.scores import Score, mean_score
from dicode.features.extract import EfficientNetLite0Features, Network, load_networks
from dicode.features.metrics import Interval, percentile_rank, similarities, squared_error
from dicode.pipeline import DiCoDe
from dicode.provenance import write_result
from dicode.seeds import generator_for
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
    "psnr_in_motion": ("higher", PAIRED),
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
}
RANKED_CLIPS = 48
NETWORKS = ("EffLite0", "TinyVT")


def main(name: str, cache: str) -> None:
    """Write results/NAME-ranking.json, of up to `RANKED_CLIPS` validation clips spread over the split.

    Distances of sets are to the real clips of these captions, so "real" is at 0, the end of the scale. Against as many
    other real clips the order of "real" and "reconstruction" is open: 505 and 481 of 32 clips (FVD-EffLite0).
    """
    samples = Samples(DiCoDe.from_pretrained(name), FrameCache.load(cache), folder=Path(cache))
    chosen = [samples.captioned[i] for i in spread_numbers(len(samples.captioned), RANKED_CLIPS)]
    sets = (samples.clips, samples.reconstructed[0], samples.generated)
    real, reconstruction, generation = ([clips[i] for i in chosen] for clips in sets)
    captions = [samples.captions[i] for i in chosen]
    metrics = rank_cases(known_cases(real, reconstruction, generation), captions, networks=load_networks(NETWORKS))
    for metric, row in metrics.items():
        print(f"{metric}: ranked {row['ranked']}, overlap {row['undecided']}")
    command = shlex.join(["python", *sys.argv])
    path = Path("results") / f"{Path(name).name}-ranking.json"
    write_result(path, f"{Path(name).name}: ranking", {"cases": CASES, "metrics": metrics}, len(chosen), 0, command)


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
    """For every metric of `CLAIMS`: which way is better, each case's score or "does not claim", whether it ranks them.

    `ranked` is whether the cases that the metric claims have values in the known order, None where it claims none;
    `undecided` lists neighbours whose intervals overlap. `networks` measure beside EffLite0.
    """
    extractor = extractor or EfficientNetLite0Features()
    features = {case: extractor.features(clips) for case, clips in cases.items()}
    means, true = {case: extractor.means(own) for case, own in features.items()}, np.arange(len(captions))
    real = cases["real"]
    scores: dict[str, Mapping[str, Score]] = {
        "PSNR": {case: psnr_of(real, clips, seed) for case, clips in cases.items()},
        **{metric: of_cases for metric, of_cases in scores_of_pairs(real, cases, extractor, seed).items() if of_cases},
        **scores_of_sets(extractor, features["real"], features, seed=seed),
        f"rank of the true clip-{extractor.name}": {
            case: mean_score(percentile_rank(similarities(those, means["real"]), true), seed)
            for case, those in means.items()
        },
    }
    for network in (networks or {}).values():
        features = {case: network.features(clips) for case, clips in cases.items()}
        scores |= scores_of_sets(network, features["real"], features, captions, seed)
    return {metric: claimed(metric, own) for metric, own in scores.items() if kind_of(metric) in CLAIMS}


def psnr_of(real: Sequence[Video], made: Sequence[Video], seed: int = 0) -> Score:
    """Mean PSNR in dB, a frame counting at most PSNR_CEILING_DB: "real" is equal to itself."""
    pairs = zip(real, made, strict=True)
    return mean_score([float(psnr_db(squared_error(*pair)).mean()) for pair in pairs], seed)


def kind_of(metric: str) -> str:
    """A metric's name without the network's, as in `CLAIMS`."""
    return metric if metric in CLAIMS else metric.split("-")[0]


def claimed(metric: str, scores: Mapping[str, Score]) -> dict[str, Any]:
    """What `rank_cases` gives for one metric, whose name up to the network's says what it claims."""
    better, groups = CLAIMS[kind_of(metric)]
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


if __name__ == "__main__":
    main(*sys.argv[1:])
