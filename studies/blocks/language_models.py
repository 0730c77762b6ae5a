"""Language models of `blocks` by what their videos show: sizes on equal data, heads and orders at equal FLOPs.

    python studies/blocks/language_models.py MODEL cache/blocks cache/other_seed results/blocks-language-models.json

The tokenizer of MODEL renders all videos. Scripts are the validation ones of the second cache, of another seed. Each
run is trained with strong noise on its inputs, then with little, as the recipe is. The same command continues;
measured runs are not trained again.
"""

import argparse
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dicode.data.cache import FrameCache
from dicode.evaluate.events import CLIPS_AT_ONCE, Scripted, generated, scripted_of
from dicode.features.events.score import score
from dicode.files import put_text, read_json
from dicode.lm.config import BodyConfig, HeadName, Order
from dicode.lm.deep_lm import DeepTokenLM
from dicode.pipeline import DiCoDe
from dicode.provenance import write_result
from dicode.sizing.count import count_parameters
from dicode.sizing.plan import Planner
from dicode.stopwatch import tracked
from dicode.tokenizer.config import TokenizerConfig
from dicode.train.lm import LanguageTraining
from dicode.train.loop import train
from dicode.train.runs import LanguageRun, load_run

RECIPE = Path(__file__).parents[2] / "recipes/blocks.py"
STEPS = 1000  # of 64 samples
SHARP_SHARE = 0.3  # of the steps, the last ones, with little noise
RECIPE_CLIP_S = 2.0
SETS = ("seen", "combinations", "orders")
MIXTURE = {
    "guidance": 1.5,
    "variance_scale": 0.01,
}  # sampling of a mixture, as in studies/heads; a flow's is the model's
# width, depth and heads of the transformer; the flow head grows with it
SIZES = {"0.1 M": (36, 3, 1), "0.3 M": (64, 4, 2), "1 M": (112, 5, 4), "3 M": (192, 6, 6), "10 M": (320, 8, 10)}
BASE = "1 M"  # whose head and order are changed
ARRANGEMENTS: dict[str, tuple[HeadName, Order]] = {
    "flow, token by token": ("flow", "token"),
    "mixture, token by token (published)": ("mixture", "token"),
    "flow, whole key frames": ("flow", "keyframe"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Train and measure all sizes, then the arrangements that are not among them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("scripts", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--count", type=int, default=24, help="scripts of each set")
    parser.add_argument("--only", nargs="+", choices=[*SIZES, *ARRANGEMENTS], help="these alone")
    parser.add_argument("--work-folder", type=Path, default=Path("runs/blocks-language-models"))
    asked = parser.parse_args(argv)
    model, scripts = DiCoDe.from_pretrained(asked.model), FrameCache.load(asked.scripts)
    chosen = [one for one in scripted_of(scripts, asked.count) if one.name in SETS]
    config, values = model.tokenizer.config, dict[str, Any]()
    base = Planner(run_of(config, BASE)).step_flops()
    for seed in range(asked.seeds):
        for name in asked.only or [*SIZES, *[*ARRANGEMENTS][1:]]:
            size = name if name in SIZES else BASE
            run = run_of(config, size, *ARRANGEMENTS.get(name, ("flow", "token")))
            flops = Planner(run).step_flops()
            steps = asked.steps if name in SIZES else round(asked.steps * base / flops)
            run = replace(run, cache=str(asked.cache), tokenizer=str(asked.model))
            run = replace(run, loop=replace(run.loop, seed=seed, tracker="none"))
            folder = asked.work_folder / f"{name.replace(' ', '-').replace(',', '')}-{steps}-{seed}"
            if not (kept := folder / "figures.json").exists():
                lm, losses = trained(run, steps, folder)
                figures = {"parameters": count_parameters(lm), "steps": steps, "flops": round(flops) * steps, **losses}
                changed = MIXTURE if lm.config.head.kind == "mixture" else {}
                model.tokenizer.config = replace(config, sampling=config.sampling.changed(**changed))
                put_text(kept, json.dumps(figures | followed(DiCoDe(model.tokenizer, lm), chosen, seed), indent=1))
            values.setdefault(name, {})[str(seed)] = read_json(kept)
            print(folder.name, json.dumps(values[name][str(seed)]), flush=True)
    command = shlex.join(["python", *sys.argv])
    write_result(asked.output, "language models of blocks", values, len(chosen), 0, command)


def run_of(tokens: TokenizerConfig, size: str, head: HeadName = "flow", order: Order = "token") -> LanguageRun:
    """The recipe's run of such tokens, with a transformer of this size, and this head and order; videos as long."""
    run = load_run(f"{RECIPE}:lm")
    assert isinstance(run, LanguageRun)
    width, depth, heads = SIZES[size]
    clips = round((run.key_frames - 1) * RECIPE_CLIP_S / tokens.clip_s)
    model = replace(
        run.model,
        body=BodyConfig("llama", width=width, depth=depth, heads=heads, feed_forward=2 * width),
        head=replace(run.model.head, kind=head, width=width * 3 // 4),
        order=order,
        motion_tokens=tokens.motion_tokens,
        token_width=tokens.token_width,
        positions=run.model.text_length + (tokens.block_tokens + 1) * run.model.max_keyframes,
    )
    return replace(run, model=model, key_frames=clips + 1)


def trained(run: LanguageRun, steps: int, folder: Path) -> tuple[DeepTokenLM, dict[str, float]]:
    """The language model after so many steps of 64 samples, and its figures on validation clips."""
    sharp = round(steps * SHARP_SHARE)
    metrics: dict[str, float] = {}
    for part, own_steps, noise in (("noisy", steps - sharp, run.model.input_noise), ("sharp", sharp, 0.3)):
        optim = replace(run.loop.optim, steps=own_steps, decay_fraction=0.1 if part == "noisy" else 0.8, ema_decay=0.99)
        loop = replace(run.loop, optim=optim, evaluate_every=own_steps, checkpoint_every=100)
        init = None if part == "noisy" else str(folder / "noisy/best")
        own = replace(run, init=init, model=replace(run.model, input_noise=noise), loop=loop)
        metrics = train(LanguageTraining(own), loop, folder / part, {"name": f"{folder.name} {part}"})
    names = ("validation_loss", "training_loss", "caption_rank")
    return DeepTokenLM.from_pretrained(folder / "sharp/best"), {name: metrics[name] for name in names}


def followed(model: DiCoDe, scripts: Sequence[Scripted], seed: int) -> dict[str, dict[str, float]]:
    """Of the clauses and videos of each set, which are right; `order` is Kendall's tau, −1 to 1."""
    groups: dict[tuple[str, int], list[Scripted]] = defaultdict(list)
    for one in scripts:
        groups[one.name, one.script.clips].append(one)
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (name, clips), those in tracked([*groups.items()], "videos of a set and length"):
        at_once = max(1, CLIPS_AT_ONCE // clips)
        for start in range(0, len(those), at_once):
            part = those[start : start + at_once]
            prompts, indices = [one.prompt for one in part], range(start, start + len(part))
            videos = generated(model, prompts, clips, seed, indices)
            found[name] += [score(video, one.script) for video, one in zip(videos, part, strict=True)]
    return {name: shares(own) for name, own in found.items()}


def shares(scores: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of all clauses, of videos, and of pairs of clauses."""
    clauses = [clause for own in scores for clause in own["clauses"]]
    figures = {key: float(np.mean([clause[key] for clause in clauses])) for key in ("colour", "shape", "event", "all")}
    orders = [own["order"] for own in scores if own["order"] is not None]
    return figures | {
        "video": float(np.mean([own["exact"] for own in scores])),
        "order": float(np.mean(orders)) if orders else 0.0,
    }


if __name__ == "__main__":
    main()
