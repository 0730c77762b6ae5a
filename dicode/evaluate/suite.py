"""The parts of an evaluation: how long each takes, what it measures, and its values for a result file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dicode.evaluate.estimate import measured_units, work_of
from dicode.evaluate.events import clips_of_scripts, evaluate_events
from dicode.evaluate.generation import evaluate_generation
from dicode.evaluate.instructions import IMAGES, evaluate_instructions
from dicode.evaluate.long import measure_long
from dicode.evaluate.own_scorer import clips_of_videos, evaluate_scorer
from dicode.evaluate.reconstruction import evaluate_reconstruction
from dicode.evaluate.samples import MOST_VIDEOS, Samples, caption_of, split_rows
from dicode.evaluate.scores import blindness, marked_blind, measured_with
from dicode.evaluate.speed import evaluate_speed
from dicode.features.extract import Network
from dicode.features.scorer import Scorer
from dicode.stopwatch import duration

ONE_NETWORK = (
    "Every figure named EffLite0, text control and the rank of the true clip are measured with one network, "
    "EfficientNet-lite0. Where the decoder was trained with the perceptual loss, as the bundled models were, earlier "
    "layers of the same network trained it: these figures favour it over models that were not."
)
RANKED_CLIPS = 48  # whose captions a network must rank better than chance
PROMPT = "a swirling ice vortex"  # of the videos whose seconds and memory are measured


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


def estimated_time(
    samples: Samples, networks: Mapping[str, Network], parts: Sequence[str], limits: Limits, start_s: float
) -> str:
    """How long the parts will take, from what the first clips take; a process takes `start_s` to begin."""
    units = measured_units(samples, networks, start_s)
    splits = [len(split_rows(samples.cache, validation, captioned=True)) for validation in (False, True)]
    num_frames = samples.model.num_frames(limits.long_seconds)
    work = work_of(
        parts,
        validation=len(samples.rows),
        missing=samples.real_clips.missing(samples.extractor, samples.training(limits.references)),
        prompts=min(limits.prompts, splits[0]),
        images=sum(min(IMAGES, count) for count in splits),
        scored=clips_of_videos(samples) * sum(min(limits.prompts, count) for count in splits),
        repeats=limits.repeats,
        long=limits.long_prompts * samples.model.tokenizer.config.num_clips(num_frames),
        events=clips_of_scripts(samples.cache, limits.prompts) if "events" in parts else 0,
    )
    seconds = {part: clips.seconds(units) for part, clips in work.items()}
    each = ", ".join(f"{part} {duration(max(1.0, part_s))}" for part, part_s in seconds.items())
    return f"about {duration(max(1.0, sum(seconds.values())))} on this machine, by its first clips: {each}"


def blind_networks(samples: Samples, networks: Mapping[str, Network]) -> dict[str, str]:
    """Networks that rank the captions of this cache's real clips no better than chance, each with a sentence on it.

    Of validation clips, and of training clips where these are few.
    """
    rows = samples.rows + samples.training(max(0, RANKED_CLIPS - len(samples.rows)))
    captions = [caption_of(samples.cache.videos[row]) for row in rows]
    reasons = {
        network.name: blindness(network, samples.real_clips.features(network, rows), captions, samples.seed)
        for network in networks.values()
    }
    return {name: reason for name, reason in reasons.items() if reason}


def evaluate_part(
    part: str,
    samples: Samples,
    networks: Mapping[str, Network],
    scorer: Scorer | None,
    limits: Limits,
    folder: Path,
) -> tuple[dict[str, Any], Image.Image | None]:
    """The figures of a part, and its contact sheet if it has one; `folder` is the model's."""
    model, cache, seed = samples.model, samples.cache, samples.seed
    if part == "generation":
        return evaluate_generation(samples, limits.prompts, networks, limits.references)
    if part == "reconstruction":
        return evaluate_reconstruction(samples, networks)
    if part == "instructions":
        return evaluate_instructions(model, cache, seed)
    if part == "speed":
        return evaluate_speed(model, folder, PROMPT, repeats=limits.repeats), None
    if part == "long":
        return measure_long(model, cache, folder, limits.long_prompts, seed, limits.long_seconds, limits.repeats)
    if part == "events":
        return evaluate_events(model, cache, seed, limits.prompts)
    assert scorer is not None, part
    return evaluate_scorer(samples, scorer, limits.prompts)


def with_blindness(figures: Mapping[str, Any], blind: Mapping[str, str]) -> dict[str, Any]:
    """The figures, with the blind networks that measured any of them under the key `blind`."""
    metrics = [*figures, *figures.get("metrics", {})]
    own = {name: reason for name, reason in blind.items() if any(measured_with(metric, name) for metric in metrics)}
    return marked_blind(figures, own) | ({"blind": own} if own else {})
