"""A model's sampling, chosen on training captions: settings tried, a table, the best written into config.json."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from json import dumps
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from dicode.checkpoint import CHECKPOINTS
from dicode.data.columns import CachedVideo
from dicode.evaluate.generation import draw_prompts
from dicode.evaluate.own_scorer import clips_of_videos, length_frames
from dicode.evaluate.samples import MOST_VIDEOS, Samples, generated_clips, split_videos
from dicode.evaluate.scores import blindness, mean_score
from dicode.features.metrics import motion, percentile_rank, similarities
from dicode.features.scorer import Scorer, agrees, truth_of
from dicode.features.tinyvt import TinyVT
from dicode.files import put_text, read_json
from dicode.pipeline import DiCoDe
from dicode.stopwatch import duration, tracked
from dicode.video.timed import Video

LEAST_PROMPTS = 8
Settings = dict[str, float]
Judge = Callable[[Sequence[Video]], Float64[ndarray, "n"]]  # percent, a number a clip


class Trial(NamedTuple):
    """One setting: the score of each prompt's clip, and motion of clips over that of real ones."""

    settings: Settings  # empty: as the model is stored
    scores: Float64[ndarray, "n"]
    motion: float


def tune(
    samples: Samples,
    scorer: Scorer | None,
    prompts: int,
    guidance: Sequence[float],
    variance_scale: Sequence[float],
    decoder_guidance: Sequence[float],
) -> tuple[Settings, dict[str, Any]]:
    """Try guidance × variance scale, then the decoder's guidance, each with the same prompts and noise.

    Returns what `decided` does; `prompts` is the number of training captions.
    """
    model, chosen = samples.model, training_videos(samples, prompts)
    measured_by, judge, clips = judged_by(samples, chosen, scorer)
    print(f"{measured_by}; {len(chosen)} training captions, {len(chosen)} clips a setting")
    cache, count, fps = samples.cache, length_frames(samples, clips), model.tokenizer.config.fps
    real = [cache.frames[cache.clip_rows(video, 0.0, count, fps)].numpy() for video in chosen]
    real_motion = float(np.mean([motion(video) for video in real])) or 1.0
    captions = [video.caption for video in chosen]

    def trial_of(settings: Settings) -> Trial:
        began_s = time.monotonic()
        videos = generated_clips(model, captions, samples.seed, count / fps, **settings)
        trial = Trial(settings, judge(videos), float(np.mean([motion(video) for video in videos])) / real_motion)
        took = duration(time.monotonic() - began_s)
        print(f"{named(settings) or 'as stored'}: {trial.scores.mean():.1f}, in {took}", flush=True)
        return trial

    grid = grid_of(model, guidance, variance_scale)
    others = [value for value in decoder_guidance if value != model.sampling.decoder_guidance]
    print(f"{len(grid) + 1 + len(others)} settings", flush=True)
    trials = [trial_of(settings) for settings in ({}, *grid)]
    best = max(trials, key=lambda trial: trial.scores.mean()).settings
    trials += [trial_of({**best, "decoder_guidance": value}) for value in others]
    return decided(trials, judge(real), measured_by)


def target_of(folder: Path, output: Path | None) -> Path:
    """Where the choice is written: the model's own folder, or a new one. Raises `ValueError` where that must not be."""
    if output is None:
        if folder.resolve().is_relative_to(CHECKPOINTS.resolve()) or "snapshots" in folder.resolve().parts:
            raise ValueError(f"{folder}: a bundled or downloaded model is not changed in place; name a folder with -o")
        return folder
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: expected a new folder for the tuned model, got one that holds something")
    return output


def training_videos(samples: Samples, count: int) -> list[CachedVideo]:
    """A training video of each of `count` different captions, drawn by the seed."""
    videos = list(split_videos(samples.cache, False, captioned=True, most=MOST_VIDEOS))
    by_caption = {caption: video for video in reversed(videos) if (caption := video.caption)}
    if len(by_caption) < LEAST_PROMPTS:
        raise ValueError(
            f"expected {LEAST_PROMPTS} different captions or more among the training clips, got {len(by_caption)}"
        )
    return [by_caption[p] for p in draw_prompts(by_caption, min(count, len(by_caption)), samples.seed)]


def judged_by(samples: Samples, videos: Sequence[CachedVideo], scorer: Scorer | None) -> tuple[str, Judge, int]:
    """The score's description, the function that scores clips, and the number of clips in a video.

    Without a scorer TinyVT scores, where it ranks these captions' real clips above chance, or else EffLite0.
    """
    captions = [video.caption for video in videos]
    if scorer is not None:
        score = f"score: share of keys that {scorer.spec} finds, %"
        return score, scored_by(scorer, videos), clips_of_videos(samples)
    network, own = TinyVT.from_pretrained().to(samples.model.tokenizer.device), np.arange(len(captions))
    reason = blindness(network, samples.real_clips.features(network, videos), captions, samples.seed)
    if reason is None:

        def by_caption(clips: Sequence[Video]) -> Float64[ndarray, "n"]:
            return percentile_rank(network.similarities(network.features(clips).vectors, captions), own)

        return "score: percentile rank of the right caption among all, by TinyVT (chance 50)", by_caption, 1
    print(reason)
    extractor = samples.extractor
    reference_features = extractor.means(samples.real_clips.features(extractor, videos))

    def by_clip(clips: Sequence[Video]) -> Float64[ndarray, "n"]:
        return percentile_rank(similarities(extractor.means(extractor.features(clips)), reference_features), own)

    return "score: percentile rank of the true clip among all, by EffLite0 (chance 50)", by_clip, 1


def scored_by(scorer: Scorer, videos: Sequence[CachedVideo]) -> Judge:
    """Percent of the keys of each video's caption line that the scorer finds."""
    truths = [truth_of(video) for video in videos]

    def share(clips: Sequence[Video]) -> Float64[ndarray, "n"]:
        shares = []
        for clip, truth in zip(tracked(clips, "scoring", "video"), truths, strict=True):
            found = scorer(clip)
            keys = found.keys() & truth.keys()
            if not keys:
                raise ValueError(f"{scorer.spec}: expected keys of the caption lines, got {', '.join(sorted(found))}")
            shares.append(100 * np.mean([agrees(found[key], truth[key]) for key in keys]))
        return np.array(shares)

    return share


def grid_of(model: DiCoDe, guidance: Sequence[float], variance_scale: Sequence[float]) -> list[Settings]:
    """Every pair of both but the stored one; a variance scale of the first key frame's own gets the same value."""
    first = model.sampling.first_variance_scale is not None
    pairs = product(guidance, variance_scale)
    grid = [{"guidance": g, "variance_scale": v} | ({"first_variance_scale": v} if first else {}) for g, v in pairs]
    return [settings for settings in grid if model.sampling.changed(**settings) != model.sampling]


def decided(trials: Sequence[Trial], real: Float64[ndarray, "n"], measured_by: str) -> tuple[Settings, dict[str, Any]]:
    """The settings to write, none where no trial is better than the stored ones beyond noise; and what is reported.

    Differences are of the same prompts and noise. Their intervals are Student's, widened for the number of settings
    (Bonferroni), since the best of many is better by chance too.
    """
    from scipy import stats

    stored = trials[0].scores
    quantile = float(stats.t.ppf(1 - 0.025 / max(1, len(trials) - 1), len(stored) - 1))
    rows: list[dict[str, Any]] = []
    for settings, scores, moves in trials:
        gain, half = float((scores - stored).mean()), quantile * float(stats.sem(scores - stored))
        gained = {"value": gain, "interval": (gain - half, gain + half)}
        rows.append({"settings": settings, "score": asdict(mean_score(scores)), "gain": gained, "motion": moves})
    best = max(rows, key=lambda row: row["score"]["value"])
    (low, high), setting = best["gain"]["interval"], named(best["settings"])
    gains, beyond = f"{best['gain']['value']:+.1f} ({low:+.1f} to {high:+.1f})", low > 0
    decision = "no difference beyond noise: the stored settings are best, and stay"
    if beyond:
        decision = f"chosen: {setting}; {gains} against the stored settings"
    elif setting:
        decision = (
            f"no difference beyond noise: the best ({setting}) gains {gains}; the stored settings stay. "
            "More --prompts show smaller differences"
        )
    chosen = best["settings"] if beyond else {}
    values = {"measured_by": measured_by, "decision": decision, "beyond_noise": beyond, "chosen": chosen}
    return chosen, {**values, "real": asdict(mean_score(real)), "trials": rows}


def named(settings: Settings) -> str:
    """Settings as words."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in settings.items())


def table(model: DiCoDe, values: Mapping[str, Any]) -> str:
    """A line a setting."""
    names = ("guidance", "variance_scale", "decoder_guidance")
    lines = ["  guidance  variance  decoder    score  95 %            gain  95 %, all settings  motion"]
    for row in values["trials"]:
        own = (row["settings"].get(name, getattr(model.sampling, name)) for name in names)
        (low, high), (least, most) = row["score"]["interval"], row["gain"]["interval"]
        gain = f"{row['gain']['value']:+9.1f}  {least:+.1f} to {most:+.1f}" if row["settings"] else "   stored"
        cells = "".join(f"{value:10g}" for value in own)
        lines.append(f"{cells}{row['score']['value']:9.1f}  {low:.1f} to {high:.1f} {gain:28}{row['motion']:8.2f}")
    return "\n".join([*lines, f"{'real clips':>30}{values['real']['value']:9.1f}"])


def write_choice(folder: Path, target: Path, chosen: Settings) -> None:
    """The model with these settings in `target`, which may be its own folder."""
    if target != folder:
        shutil.copytree(folder, target, dirs_exist_ok=True)
    config = read_json(target / "config.json")
    part = config["tokenizer"]
    part["sampling"] = {**part.get("sampling", {}), **chosen}
    put_text(target / "config.json", dumps(config, indent=2) + "\n")
