"""The first losses of every recipe at toy size, so that a change of what is computed shows itself.

    python tests/test_golden.py           # writes golden.json anew: for a change that is meant
    python tests/test_golden.py OTHER     # … writes another file, to compare

Everything of a recipe is kept but its sizes and its data.
"""

import dataclasses
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from fuzz.models import write_tiny
from test_tokenizer import RESAMPLER, tiny_config
from torch.nn.attention import sdpa_kernel
from toy_runs import runs, write_cache, write_prior

from dicode.lm.config import DeepLMConfig
from dicode.tokenizer.config import CodeConfig, DenoiserConfig, MotionConfig, TokenizerConfig
from dicode.train.checkpoint import TrainState
from dicode.train.distributed import Processes
from dicode.train.loop import Training, attention_on, draw_batches, train_step
from dicode.train.runs import FirstStageRun, TokenizerRun, load_run
from dicode.train.stages import Run, run_recipe, stage_of

RECIPES = Path(__file__).parents[1] / "recipes"
STUDIES = RECIPES.with_name("studies")
FILES = {
    "heads": STUDIES / "heads/__main__.py",
    "scale": STUDIES / "scale/scale.py",
    "scale_large": STUDIES / "scale/scale_large.py",
}
CODE = CodeConfig(width=16, depth=1, heads=2)
MOTION = MotionConfig(tokens=3, width=16, depth=1, heads=2)
GOLDEN = Path(__file__).with_name("golden.json")
STEPS = 6
NAMES = {
    "blocks": ("first_stage", "code", "motion", "denoiser", "first_stage_decoder", "lm", "lm_motion"),
    "sprites": ("first_stage", "first_stage_decoder", "denoiser", "flow_map", "lm"),
    "paper": (
        "paper_tokenizer_256", "gpt2_mini", "distilgpt2", "gpt2", "gpt2_medium", "gpt2_large", "llama_1b", "llama_3b",
        "paper_motion", "gpt2_motion",
    ),
    "small": ("first_stage", "denoiser", "lm"),
    "heads": ("run",),
    "world": ("first_stage", "first_stage_decoder", "denoiser", "flow_map", "lm", "lm_own"),
    "scale": ("llama_200k", "llama_19m"),  # at toy size others have the same, or differ in learning rate alone
    "scale_large": ("llama_1b",),
}  # fmt: skip
EVERY = [f"{file}:{name}" for file, names in NAMES.items() for name in names]


def toy(run: Run, root: Path) -> Run:
    """A recipe on drawn clips, in a model of a few thousand parameters."""
    optim = dataclasses.replace(
        run.loop.optim, steps=STEPS, batch_size=max(4, 2 * run.loop.micro_batches), warmup_steps=2, ema_decay=0.9
    )
    small = dataclasses.replace(
        run.loop, optim=optim, precision="float32", device="cpu", strategy="ddp", tracker="none", log_every=1,
        evaluate_every=STEPS, checkpoint_every=STEPS,
    )  # fmt: skip
    changes: dict[str, Any] = {"cache": str(root / "cache"), "loop": small}
    init = getattr(run, "init", None)
    if isinstance(run, FirstStageRun):
        changes |= {"model": tiny_config().first_stage, "init": init and str(root / "first_stage/best")}
        changes |= {"tokenizer": run.tokenizer and str(root / "linear_code/best")}
    elif isinstance(run, TokenizerRun):
        before = "linear_code/best" if run.model.resampler is None else "prior"
        if run.model.code or run.trains == "code":
            before = "first_stage/best" if run.trains == "code" else "coded"
        changes |= {
            "model": toy_tokenizer(run.model),
            "init_denoiser": None,
            "frame_strides": None,  # of a denoiser that is not the toy's
            "init": str(root / before),
        }
    else:
        tokenizer = "moving" if run.model.motion_tokens else "linear_code/best"
        changes |= {"tokenizer": str(root / tokenizer), "model": toy_lm(run.model), "init": None}
        changes |= {"longer": tuple(min(5, count) for count in run.longer)}
    return dataclasses.replace(run, **changes)


def toy_tokenizer(model: TokenizerConfig) -> TokenizerConfig:
    """A tiny tokenizer whose denoiser is of the kind asked for, and predicts what that does."""
    tiny = tiny_config()
    denoiser: DenoiserConfig = tiny.denoiser
    if model.denoiser.kind == denoiser.kind:
        asked = {name: getattr(model.denoiser, name) for name in ("predict_residual", "flow_map", "fused_guidance")}
        denoiser = dataclasses.replace(denoiser, **asked)
    resampler = model.resampler and RESAMPLER
    own = {"denoiser": denoiser, "objective": model.objective, "resampler": resampler}
    return dataclasses.replace(tiny, **own, motion=model.motion and MOTION, code=model.code and CODE)


def toy_lm(model: DeepLMConfig) -> DeepLMConfig:
    """The same body, head and order, 32 wide."""
    few = 1 if model.body.key_value_heads else None
    return dataclasses.replace(
        model,
        body=dataclasses.replace(model.body, width=32, depth=2, heads=2, key_value_heads=few, feed_forward=48),
        head=dataclasses.replace(model.head, components=3, width=16),
        vocab_size=300,
        text_length=12,
        positions=60 if model.motion_tokens else 48,
        max_keyframes=6,
        token_width=6,
        tokens_per_keyframe=4,
        motion_tokens=MOTION.tokens if model.motion_tokens else 0,
    )


def write_models(root: Path) -> None:
    """What recipes begin with, beside what toy runs leave."""
    write_prior(root / "prior", objective="v_prediction")
    write_prior(root / "moving", motion=MOTION)
    write_tiny(root / "coded", motion=MOTION, code=CODE)


def curves(root: Path) -> dict[str, list[float]]:
    """The losses of each recipe's first steps, one process and one thread, in float32 throughout."""
    torch.set_num_threads(1)
    write_cache(root / "cache")
    write_models(root)
    for name in ("first_stage", "linear_code"):
        run_recipe(runs(root)[name], root / name, {})
    found = {}
    for name in EVERY:
        file, _, function = name.partition(":")
        run = toy(load_run(f"{FILES.get(file, RECIPES / f'{file}.py')}:{function}"), root)
        training = Training(stage_of(run), run.loop, Processes())
        found[name] = [line["loss"] for line in first_steps(training, STEPS)]
    return found


def first_steps(training: Training, count: int) -> list[dict[str, float]]:
    """What a run logs of its first steps; nothing is evaluated or kept."""
    state, lines, batches = TrainState(), [], draw_batches(training, 0)
    with sdpa_kernel(attention_on(training.device)):
        for _ in range(count):
            lines.append(cast(dict[str, float], train_step(training, state, next(batches))))
            state.step += 1
    return lines


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    pytest.importorskip("efficientnet_lite_pytorch")
    return curves(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", EVERY)
def test_losses_are_those_of_before(found: dict[str, list[float]], name: str) -> None:
    """Within a thousandth: other processors round differently, and Adam's first steps amplify it."""
    expected = json.loads(GOLDEN.read_text())[name]
    assert len(found[name]) == STEPS
    assert found[name] == pytest.approx(expected, rel=1e-3)


def test_every_recipe_has_a_curve() -> None:
    """A new function of a recipe file is listed here, unless it takes no steps."""
    for path in RECIPES.glob("*.py"):
        functions = {
            line[4:].partition("(")[0]
            for line in path.read_text().splitlines()
            if re.search(r"(?<!LinearCode)Run:", line)
        }
        public = {name for name in functions if name.isidentifier() and not name.startswith("_")}
        assert public == set(NAMES.get(path.stem, ())) or path.stem == "wan"  # whose networks tests/test_wan.py trains


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        Path(*sys.argv[1:2] or [GOLDEN]).write_text(json.dumps(curves(Path(place)), indent=1) + "\n")
    sys.exit()
