"""How many motion tokens, or a key frame every second instead, at equal compute: what their clips keep.

    python studies/motion_tokens recipes/blocks.py cache/blocks MODEL results/motion-tokens-blocks.json

MODEL (a checkpoint or a run's best/) gives first stage and code of key frames; denoisers, and what has to do with
motion tokens, start from random weights and are trained together, else as the recipe's run `denoiser`. Of a cache of
`dicode data blocks` events are counted too, and language models are trained, whose videos are compared with their
scripts. The same command continues; measured runs are not trained again.
"""

import argparse
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dicode.checkpoint import read_section
from dicode.checkpoint.saving import write_config
from dicode.config.user_code import load_file
from dicode.data.cache import FrameCache
from dicode.evaluate.events import Scripted, scripted_of
from dicode.evaluate.metrics import PAIR_METRICS, scores_of_sets
from dicode.evaluate.reconstruction import cross_fade, hold_head
from dicode.evaluate.samples import split_videos
from dicode.features.events.score import score
from dicode.features.extract import EfficientNetLite0Features
from dicode.features.metrics import bootstrap_interval
from dicode.features.tinyvt import TinyVT
from dicode.files import put_text, read_json
from dicode.pipeline import DiCoDe
from dicode.provenance import write_result
from dicode.sizing.plan import Planner
from dicode.stopwatch import tracked
from dicode.tokenizer.config import MotionConfig, TokenizerConfig
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.loop import train
from dicode.train.runs import TokenizerRun, load_run
from dicode.train.tokenizer import TokenizerTraining
from dicode.video.timed import Video

language_models = load_file(Path(__file__).parents[1] / "blocks/language_models.py", "study", "blocks")

STEPS = 1000
CLIPS = 200  # validation clips
SCRIPTS = 24  # of each set
SETS = ("seen", "combinations", "orders", "within")
AT_ONCE = 20
DENOISING_STEPS = 4  # of every arrangement; bundled `blocks` renders expected clips, which without motion tokens fade
MOTION = {"none": 0, "4": 4, "8": 8, "16": 16}  # tokens a clip
HALVED = "key frames twice as often"
NAMES = [*MOTION, HALVED]
METRICS = ("psnr_in_motion", *(name for name in PAIR_METRICS if name.endswith("in the moving box")))


def main(argv: Sequence[str] | None = None) -> None:
    """Train and measure every arrangement with every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help="without motion tokens; others get as many FLOPs")
    parser.add_argument("--language-steps", type=int, default=STEPS, help="as --steps; of a cache of blocks")
    parser.add_argument("--language-seeds", type=int, default=3, help="of the seeds, the first ones; of blocks")
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--scripts", type=int, default=SCRIPTS, help="of each set, of a cache of blocks")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="these alone")
    parser.add_argument("--work-folder", type=Path, default=Path("runs/motion-tokens"))
    parser.add_argument("--models", nargs="+", help="measure these checkpoints or best/ folders; nothing is trained")
    asked = parser.parse_args(argv)
    cache = FrameCache.load(asked.cache)
    base = load_run(f"{asked.recipe}:denoiser")
    assert isinstance(base, TokenizerRun)
    base = replace(base, cache=str(asked.cache), trains="all", loop=replace(base.loop, tracker="none"))
    command = shlex.join(["python", *sys.argv])
    if asked.models:
        chosen = [one for one in scripted_of(cache, asked.scripts) if one.name in SETS]
        tokenizers = {name: VideoTokenizer.from_pretrained(name) for name in asked.models}
        shown = {name: without_clips(measured(own, cache, asked.clips, chosen)) for name, own in tokenizers.items()}
        shown["baselines"] = baselines(cache, base.model, asked.clips)
        write_result(asked.output, "motion tokens of models", shown, asked.clips, 0, command)
        return
    held = read_section(asked.model, "tokenizer", TokenizerConfig)
    base = replace(base, model=replace(base.model, code=held.code, token_width=held.token_width))
    none = arranged(base.model, "none")
    flops = asked.steps * Planner(replace(base, model=none)).step_flops()
    language_flops = asked.language_steps * Planner(language_models.run_of(none, language_models.BASE)).step_flops()
    values: dict[str, Any] = {"baselines": baselines(cache, base.model, asked.clips)}
    for seed in asked.seeds:
        for name in asked.only:
            run = replace(base, model=arranged(base.model, name), loop=replace(base.loop, seed=seed))
            own_flops = Planner(run).step_flops()
            steps = round(flops / own_flops)
            folder = asked.work_folder / f"{name.replace(' ', '-')}-{steps}-{seed}"
            if not (kept := folder / "figures.json").exists():
                tokenizer = trained(run, steps, asked.model, folder)
                figures = {"steps": steps, "flops": round(own_flops * steps), **rates(run.model)}
                chosen = [one for one in scripted_of(cache, asked.scripts) if one.name in SETS]
                figures |= measured(tokenizer, cache, asked.clips, chosen)
                if chosen and seed in asked.seeds[: asked.language_seeds]:
                    figures["language model"] = language_figures(run, tokenizer, language_flops, chosen, folder)
                put_text(kept, json.dumps(figures))
            values.setdefault(name, {})[str(seed)] = read_json(kept)
            print(folder.name, json.dumps(without_clips(values[name][str(seed)])), flush=True)
    differences = {name: compared(values["none"], values[name]) for name in asked.only if "none" in values}
    shown = {name: own if name == "baselines" else {s: without_clips(of) for s, of in own.items()}
             for name, own in values.items()}  # fmt: skip
    write_result(asked.output, "motion tokens", shown | {"less than none": differences}, asked.clips, 0, command)


def arranged(model: TokenizerConfig, name: str) -> TokenizerConfig:
    """The recipe's tokenizer in one of the arrangements."""
    if name == HALVED:
        return replace(model, motion=None, clip_frames=model.clip_frames // 2, tail_frame=model.tail_frame // 2)
    if not MOTION[name]:
        return replace(model, motion=None)
    return replace(model, motion=replace(model.motion or MotionConfig(), tokens=MOTION[name]))


def rates(config: TokenizerConfig) -> dict[str, float]:
    """Tokens, numbers and bits (as float16) of a second."""
    tokens = config.block_tokens / config.clip_s
    numbers = tokens * config.token_width
    return {"tokens_per_s": tokens, "numbers_per_s": numbers, "bits_per_s": 16 * numbers}


def trained(run: TokenizerRun, steps: int, model: Path, folder: Path) -> VideoTokenizer:
    """A tokenizer whose denoiser, and motion encoder, had so many steps from random weights."""
    torch.manual_seed(run.loop.seed)
    start, begun = VideoTokenizer.from_pretrained(model), VideoTokenizer(run.model)
    begun.first_stage.load_state_dict(start.first_stage.state_dict())
    begun.code.load_state_dict(start.code.state_dict())
    write_config(folder / "start", {"tokenizer": begun.save_pretrained(folder / "start")})
    optim = replace(run.loop.optim, steps=steps, decay_fraction=0.4, ema_decay=0.995)
    loop = replace(run.loop, optim=optim, evaluate_every=steps, checkpoint_every=100)
    own = replace(run, init=str(folder / "start"), loop=loop)
    train(TokenizerTraining(own), loop, folder, {"name": folder.name})
    tokenizer = VideoTokenizer.from_pretrained(folder / "best")
    tokenizer.config = replace(tokenizer.config, sampling=start.config.sampling.changed(steps=DENOISING_STEPS))
    return tokenizer


def language_figures(
    run: TokenizerRun, tokenizer: VideoTokenizer, flops: float, chosen: Sequence[Scripted], folder: Path
) -> dict[str, Any]:
    """Losses of a language model of these tokens after so many FLOPs, and what of the scripts its videos show."""
    own = language_models.run_of(run.model, language_models.BASE)
    step_flops = Planner(own).step_flops()
    own = replace(own, cache=run.cache, tokenizer=str(folder / "best"))
    own = replace(own, loop=replace(own.loop, seed=run.loop.seed, tracker="none"))
    lm, losses = language_models.trained(own, round(flops / step_flops), folder / "language-model")
    followed = language_models.followed(DiCoDe(tokenizer, lm), chosen, run.loop.seed)
    return {"steps": round(flops / step_flops), **losses, **followed}


def real_clips(cache: FrameCache, config: TokenizerConfig, count: int, clip_s: float = 2.0) -> list[Video]:
    """The first two seconds of validation videos, and the frame after them."""
    frames = round(clip_s * config.fps)
    videos = split_videos(cache, True, lasting_s=clip_s, most=count)
    return [cache.frames[cache.clip_rows(video, 0.0, frames + 1, config.fps)].numpy() for video in videos]


def reconstructed(tokenizer: VideoTokenizer, real: Sequence[Video]) -> list[Video]:
    """Clips through tokens and back, without the last frame."""
    made: list[Video] = []
    for start in tracked(range(0, len(real), AT_ONCE), "reconstructing"):
        part = torch.from_numpy(np.stack(real[start : start + AT_ONCE]))
        decoded = tokenizer.decode(tokenizer.encode(part), sample_indices=list(range(start, start + len(part))))
        made += [*torch.cat([clip.cpu() for clip in decoded], dim=1)[:, : part.shape[1] - 1].numpy()]
    return made


def baselines(cache: FrameCache, config: TokenizerConfig, count: int) -> dict[str, Any]:
    """Hold and cross-fade of the real key frames, two seconds apart."""
    real = real_clips(cache, config, count)
    candidates = {
        "hold": [hold_head(clip[:-1]) for clip in real],
        "cross-fade": [cross_fade(clip[0], clip[-1], len(clip) - 1) for clip in real],
    }
    return {name: without_clips(of_clips(real, made)) for name, made in candidates.items()}


def of_clips(real: Sequence[Video], made: Sequence[Video]) -> dict[str, Any]:
    """Means, and values of every clip, of the pair metrics; distances of the sets."""
    extractor, values = EfficientNetLite0Features(), dict[str, Any]()
    for name in METRICS:
        found = [PAIR_METRICS[name].value(one[:-1], other, extractor) for one, other in zip(real, made, strict=True)]
        some = [value for value in found if value is not None]
        values[name] = {"value": float(np.mean(some)), "interval": bootstrap_interval(np.mean, np.array(some))}
        values[f"{name}, clips"] = found
    for network in (extractor, TinyVT.from_pretrained()):
        features = [network.features([*clips]) for clips in ([clip[:-1] for clip in real], made)]
        for metric, own in scores_of_sets(network, features[0], {"made": features[1]}).items():
            if metric.startswith(("FVD", "MMD")):
                values[metric] = asdict(own["made"])
    return values


def measured(tokenizer: VideoTokenizer, cache: FrameCache, clips: int, chosen: Sequence[Scripted]) -> dict[str, Any]:
    """Of validation clips, with all motion tokens, half and none of them; and events, where there are scripts."""
    real, config = real_clips(cache, tokenizer.config, clips), tokenizer.config
    figures: dict[str, Any] = of_clips(real, reconstructed(tokenizer, real))
    if chosen:
        figures["clauses_right"] = events(tokenizer, cache, chosen)
    fewer = {"half of them": config.motion_tokens // 2, "none of them": 0} if config.motion else {}
    for name, count in fewer.items():
        tokenizer.config = replace(config, sampling=config.sampling.changed(motion_tokens=count))
        part = without_clips(of_clips(real, reconstructed(tokenizer, real)))
        figures[name] = part | ({"clauses_right": events(tokenizer, cache, chosen)} if chosen else {})
        tokenizer.config = config
    return figures


def events(tokenizer: VideoTokenizer, cache: FrameCache, chosen: Sequence[Scripted]) -> dict[str, float]:
    """Share of clauses of each set that reconstructed videos show."""
    right: dict[str, list[bool]] = defaultdict(list)
    groups: dict[tuple[str, int], list[Scripted]] = defaultdict(list)
    for one in chosen:
        groups[one.name, one.script.clips].append(one)
    for (name, clips), those in tracked([*groups.items()], "videos of a set and length"):
        frames = round(clips * 2 * tokenizer.config.fps)
        real = [cache.frames[cache.clip_rows(o.video, 0.0, frames + 1, tokenizer.config.fps)].numpy() for o in those]
        for video, one in zip(reconstructed(tokenizer, real), those, strict=True):
            right[name] += [clause["all"] for clause in score(video, one.script)["clauses"]]
    return {name: float(np.mean(own)) for name, own in right.items()}


def compared(none: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """How much smaller the errors of the same clips are than without motion tokens, in shares; intervals over clips."""
    found = {}
    for name in METRICS[1:]:
        both = [
            np.array([own[seed][f"{name}, clips"] for seed in other], dtype=float).mean(axis=0) for own in (none, other)
        ]
        rows = np.stack(both, axis=1)
        rows = rows[np.isfinite(rows).all(axis=1)]

        def less(drawn: np.ndarray) -> float:
            return float(1 - drawn[:, 1].sum() / drawn[:, 0].sum())

        found[name] = {"value": less(rows), "interval": bootstrap_interval(less, rows), "n": len(rows)}
    return found


def without_clips(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures without the values of single clips."""
    return {name: value for name, value in figures.items() if not name.endswith(", clips")}


if __name__ == "__main__":
    main()
