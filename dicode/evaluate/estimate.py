"""How long an evaluation takes on this machine: what each part makes and measures, times what the first clips took."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, get_args

import torch

from dicode.evaluate.reference import first_clip
from dicode.evaluate.samples import Samples, generated_clips
from dicode.evaluate.scores import seen
from dicode.features.extract import Network
from dicode.tokenizer.config import Joins

TIMED = 2  # clips made at once to time them


class Work(NamedTuple):
    """What a part makes and measures, in clips; of units: what one of each takes, in seconds."""

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
    diverse: int,
    images: int,
    scored: int,
    repeats: int,
    long: int,
) -> dict[str, Work]:
    """The work of each part; validation clips that several parts make count in the first.

    `missing` real clips have no features yet, `diverse` and `long` are clips made of captions, `scored`
    clips of videos.
    """
    kinds = len(get_args(Joins))
    every = {
        "generation": Work(prompts + diverse, 0, missing + prompts + diverse + validation),
        "reconstruction": Work(0, 0, 6 * validation),  # itself and five baselines
        "instructions": Work(3 * images, 0, 4 * images),
        "scorer": Work(scored, scored, 0),
        "speed": Work(2 * (2 * repeats + 1), 0, 0, repeats),
        "long": Work(kinds * long + repeats * (long // 4), 0, kinds * long, 2 * repeats),
    }
    made: dict[str, Work] = {}
    shared = {"generated": ("generation",), "reconstructed": ("reconstruction",)}
    for part in parts:
        first = [kind for kind, users in shared.items() if part in users and not set(users) & made.keys()]
        more = Work(**dict.fromkeys(first, validation))
        made[part] = Work(*(a + b for a, b in zip(every[part], more, strict=True)))
    return made


def measured_units(made: Samples, networks: Mapping[str, Network], start_s: float) -> Work:
    """Make a clip or two of the first videos, and measure them; a process of its own takes `start_s` to begin."""
    model, prompts = made.model, ([caption for caption in made.captions if caption] or ["a clip"])[:TIMED]
    rows = (made.rows or made.training(TIMED))[:TIMED]
    config, cache = model.tokenizer.config, made.cache
    real = torch.stack([torch.from_numpy(first_clip(config, cache, cache.videos[row])) for row in rows])
    clip = made.bank.clips(rows[:1])
    every = [made.extractor, *networks.values()]
    return Work(
        timed(lambda: generated_clips(model, prompts, made.seed, **made.options)) / len(prompts),
        timed(lambda: [clip.cpu() for clip in model.tokenizer.decode(model.tokenizer.encode(real))]) / len(real),
        timed(lambda: [seen(network, clip) for network in every]),
        start_s,
    )


def timed(work: Callable[[], object]) -> float:
    """Seconds of the second of two calls; the first warms up."""
    work()
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s
