"""The parts of an evaluation: how long each takes, what it measures, and networks whose figures mean nothing."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from PIL import Image

from dicode.evaluate.events import clips_of_scripts, evaluate_events
from dicode.evaluate.generation import evaluate_generation
from dicode.evaluate.instructions import IMAGES, evaluate_instructions
from dicode.evaluate.long import measure_long
from dicode.evaluate.own_scorer import clips_of_videos, evaluate_scorer
from dicode.evaluate.reconstruction import evaluate_reconstruction
from dicode.evaluate.samples import MOST_VIDEOS, Samples, first_clip, generated_clips, split_videos
from dicode.evaluate.scores import blindness
from dicode.evaluate.speed import evaluate_speed
from dicode.features.extract import TextNetwork
from dicode.features.scorer import Scorer
from dicode.stopwatch import duration
from dicode.tokenizer.config import Joins

ONE_NETWORK = (
    "Every figure named EffLite0, text control and the rank of the true clip are measured with one network, "
    "EfficientNet-lite0. Where the decoder was trained with the perceptual loss, as the bundled models were, earlier "
    "layers of the same network trained it: these figures favour it over models that were not."
)
RANKED_CLIPS = 48  # whose captions a network must rank better than chance
PROMPT = "a swirling ice vortex"  # of the videos whose seconds and memory are measured
TIMED = 2  # clips generated at once to time them


@dataclass(frozen=True)
class Limits:
    """How much is measured."""

    prompts: int = 100  # training captions, videos of each split for a scorer, scripts of each set of `blocks`
    validation: int | None = None  # clips; None: all
    references: int = MOST_VIDEOS  # training clips that text control searches
    repeats: int = 5  # of seconds and memory
    long_prompts: int = 8
    long_seconds: float = 60.0


QUICK = Limits(prompts=8, validation=8, references=24)


class Work(NamedTuple):
    """Clips that a part generates and measures; or, as units, seconds for each."""

    generated: float = 0
    reconstructed: float = 0
    measured: float = 0  # by all networks
    processes: float = 0  # of `dicode generate` started

    def seconds(self, units: "Work") -> float:
        """How long it takes."""
        return sum(count * unit for count, unit in zip(self, units, strict=True))


def estimated_time(samples: Samples, parts: Sequence[str], limits: Limits, start_s: float) -> str:
    """How long the parts will take, from what the first clips take; a process takes `start_s` to begin."""
    units = measured_units(samples, start_s)
    seconds = {part: work_of(part, samples, limits).seconds(units) for part in parts}
    each = ", ".join(f"{part} {duration(max(1.0, part_s))}" for part, part_s in seconds.items())
    return f"about {duration(max(1.0, sum(seconds.values())))} on this machine, by its first clips: {each}"


def work_of(part: str, samples: Samples, limits: Limits) -> Work:
    """The work of a part."""
    validation, config, repeats = len(samples.videos), samples.model.tokenizer.config, limits.repeats
    splits = [len(split_videos(samples.cache, held_out, captioned=True)) for held_out in (False, True)]
    if part == "generation":
        generated = min(limits.prompts, splits[0]) + validation
        missing = samples.real_clips.missing(samples.extractor, samples.training(limits.references))
        return Work(generated=generated, measured=missing + generated)
    if part == "reconstruction":
        return Work(reconstructed=validation, measured=6 * validation)  # itself and five baselines
    if part == "instructions":
        images = sum(min(IMAGES, count) for count in splits)
        return Work(generated=3 * images, measured=4 * images)
    if part == "scorer":
        scored = clips_of_videos(samples) * sum(min(limits.prompts, count) for count in splits)
        return Work(generated=scored, reconstructed=scored)
    if part == "events":
        scripted = clips_of_scripts(samples.cache, limits.prompts)
        return Work(generated=scripted, reconstructed=scripted)
    if part == "speed":
        return Work(generated=2 * (2 * repeats + 1), processes=repeats)
    clips = config.num_clips(samples.model.num_frames(limits.long_seconds))
    by_joins = len(get_args(Joins)) * limits.long_prompts * clips
    return Work(by_joins + repeats * (limits.long_prompts * clips // 4), 0, by_joins, 2 * repeats)


def measured_units(samples: Samples, start_s: float) -> Work:
    """Time a clip or two of the first videos; a process of its own takes `start_s` to begin."""
    model, prompts = samples.model, ([caption for caption in samples.captions if caption] or ["a clip"])[:TIMED]
    videos = (samples.videos or samples.training(TIMED))[:TIMED]
    real = torch.stack([torch.from_numpy(first_clip(model.tokenizer.config, samples.cache, v)) for v in videos])
    clip = list(samples.real_clips.clips(videos[:1]))
    return Work(
        timed(lambda: generated_clips(model, prompts, samples.seed)) / len(prompts),
        timed(lambda: [clip.cpu() for clip in model.tokenizer.decode(model.tokenizer.encode(real))]) / len(real),
        timed(lambda: [network.features(clip) for network in samples.networks]),
        start_s,
    )


def timed(work: Callable[[], object]) -> float:
    """Seconds of the second of two calls; the first warms up."""
    work()
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def blind_networks(samples: Samples) -> dict[str, str]:
    """Networks that rank the captions of this cache's real clips no better than chance, each with a sentence on it.

    Of validation clips, and of training clips where these are few.
    """
    videos = [*samples.videos, *samples.training(max(0, RANKED_CLIPS - len(samples.videos)))]
    captions = [video.caption for video in videos]
    reasons = {
        network.name: blindness(network, samples.real_clips.features(network, videos), captions, samples.seed)
        for network in samples.networks
        if isinstance(network, TextNetwork)
    }
    return {name: reason for name, reason in reasons.items() if reason}


def evaluate_part(
    part: str, samples: Samples, scorer: Scorer | None, limits: Limits, folder: Path
) -> tuple[dict[str, Any], Image.Image | None]:
    """The figures of a part, and its contact sheet if it has one; `folder` is the model's."""
    if part == "generation":
        return evaluate_generation(samples, limits.prompts, limits.references)
    if part == "reconstruction":
        return evaluate_reconstruction(samples)
    if part == "instructions":
        return evaluate_instructions(samples)
    if part == "speed":
        return evaluate_speed(samples.model, folder, PROMPT, limits.repeats), None
    if part == "long":
        return measure_long(samples, folder, limits.long_prompts, limits.long_seconds, limits.repeats)
    if part == "events":
        return evaluate_events(samples.model, samples.cache, samples.seed, limits.prompts)
    assert scorer is not None, part
    return evaluate_scorer(samples, scorer, limits.prompts)
