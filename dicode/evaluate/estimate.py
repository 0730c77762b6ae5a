"""How long an evaluation takes on this machine: clips generated and measured, times the seconds of the first clips."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, get_args

import torch

from dicode.evaluate.reference import first_clip
from dicode.evaluate.samples import Samples, generated_clips
from dicode.features.extract import Network
from dicode.tokenizer.config import Joins

TIMED = 2  # clips generated at once to time them


class Work(NamedTuple):
    """Clips that a part generates and measures; or, as units, seconds for each."""

    generated: float = 0
    reconstructed: float = 0
    measured: float = 0  # by all networks
    processes: float = 0  # of `dicode generate` started

    def seconds(self, units: "Work") -> float:
        """How long it takes."""
        return sum(count * unit for count, unit in zip(self, units, strict=True))


def work_of(
    parts: Sequence[str],
    validation: int,
    missing: int,
    prompts: int,
    images: int,
    scored: int,
    repeats: int,
    long: int,
    events: int,
) -> dict[str, Work]:
    """The work of each part: `missing` real clips have no features, `scored`, `long`, `events` are clips of videos."""
    kinds = len(get_args(Joins))
    work = {
        "generation": Work(prompts + validation, 0, missing + prompts + validation),
        "reconstruction": Work(0, validation, 6 * validation),  # itself and five baselines
        "instructions": Work(3 * images, 0, 4 * images),
        "scorer": Work(scored, scored, 0),
        "events": Work(events, events, 0),
        "speed": Work(2 * (2 * repeats + 1), 0, 0, repeats),
        "long": Work(kinds * long + repeats * (long // 4), 0, kinds * long, 2 * repeats),
    }
    return {part: work[part] for part in parts}


def measured_units(samples: Samples, networks: Mapping[str, Network], start_s: float) -> Work:
    """Time a clip or two of the first videos; a process of its own takes `start_s` to begin."""
    model, prompts = samples.model, ([caption for caption in samples.captions if caption] or ["a clip"])[:TIMED]
    rows = (samples.rows or samples.training(TIMED))[:TIMED]
    config, cache = model.tokenizer.config, samples.cache
    real = torch.stack([torch.from_numpy(first_clip(config, cache, cache.videos[row])) for row in rows])
    clip = samples.real_clips.clips(rows[:1])
    return Work(
        timed(lambda: generated_clips(model, prompts, samples.seed)) / len(prompts),
        timed(lambda: [clip.cpu() for clip in model.tokenizer.decode(model.tokenizer.encode(real))]) / len(real),
        timed(lambda: [network.features(clip) for network in samples.networks(networks)]),
        start_s,
    )


def timed(work: Callable[[], object]) -> float:
    """Seconds of the second of two calls; the first warms up."""
    work()
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s
