"""All stages of a recipe file, each fed with those before it, to one checkpoint folder.

A recipe file that can be trained whole has `STAGES`: its runs in order, with the share of the time that each is worth;
and perhaps `SAMPLING`, how the model is then sampled.
"""

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from dicode import __version__
from dicode.checkpoint import load_weights, read_config, read_section, resolve
from dicode.checkpoint.saving import check_model_folder, model_folder
from dicode.config import CheckpointError, config_to_dict
from dicode.data.cache import FrameCache
from dicode.data.columns import CachedVideo
from dicode.files import read_json
from dicode.lm.deep_lm import DeepTokenLM
from dicode.pipeline import DiCoDe
from dicode.seeds import generator_for
from dicode.tokenizer.config import SamplingConfig, TokenizerConfig
from dicode.tokenizer.encoder import DECODER, FirstStage
from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS, VideoTokenizer
from dicode.train.checkpoint import STATE, checkpoints
from dicode.train.distributed import Processes
from dicode.train.linear_code import FIT, fit_of, fit_run
from dicode.train.loop import data_of
from dicode.train.run_log import records
from dicode.train.runs import FirstStageRun, LanguageRun, LinearCodeRun, TokenizerRun, stages_of
from dicode.train.stages import Pace, Run, measured_pace, read_plan, run_recipe, stage_of

LEAST_SHARE = 0.5  # of the time planned for a stage, where those before it took longer than planned
R = TypeVar("R", FirstStageRun, LinearCodeRun, TokenizerRun, LanguageRun)
NOISE_CLIPS, NOISE_FRAMES, NOISE_FPS = 48, 40, 8  # to measure on: enough for a batch, and little to encode


class Chain:
    """The stages of a recipe file, to be trained on one cache."""

    def __init__(self, file: str, cache: str | None, runs: Path, first_stage: str | None = None) -> None:
        """Read a recipe file; `cache` is where the clips lie (default: its own), `runs` the folder of run folders.

        `first_stage` is a model, bundled or a folder, whose first stage is taken as it is, in place of the stages that
        would train it. Raises `ValueError` where the stages do not give a whole model, or for another `SAMPLING`.
        """
        stages, shares, self.sampling = stages_of(file)
        if not all(any(isinstance(run, kind) for run in stages.values()) for kind in (TokenizerRun, LanguageRun)):
            raise ValueError(f"{file}: expected STAGES with a TokenizerRun and a LanguageRun")
        try:
            SamplingConfig().changed(**self.sampling)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: SAMPLING: {error}") from error
        self.file, self.first_stage, trained = file, first_stage, resolve(first_stage) if first_stage else None
        self.folders = {name: runs / f"{Path(file).stem}-{name}" for name in stages}
        self.stages: dict[str, Run | LinearCodeRun] = {}  # by name, in order
        best: dict[str, Path] = {}  # of the stages before
        for name, run in stages.items():
            if trained and isinstance(run, FirstStageRun) and not run.freeze_encoder:
                best[name] = trained
                continue
            run = wired(run if cache is None else replace(run, cache=cache), best)
            if trained and isinstance(run, LinearCodeRun | TokenizerRun):
                held = read_section(trained, "tokenizer", TokenizerConfig).first_stage
                run = replace(run, model=replace(run.model, first_stage=held))
            self.stages[name], best[name] = run, self.folders[name] / "best"
        self.shares = {name: shares[name] for name in self.stages}

    def train(self, minutes: float | None) -> None:
        """Train every stage that is not finished; `minutes` are for all of them together.

        Raises `ValueError` for one that is finished, but on weights of a stage that was then trained anew.
        """
        new: dict[str, str] = {}  # the best weights of stages trained now, and their names
        for number, (name, run) in enumerate(self.stages.items(), 1):
            folder = self.folders[name]
            if finished(folder, run):
                if stale := [new[v] for field in fields(run) if (v := str(getattr(run, field.name))) in new]:
                    raise ValueError(f"{folder}: trained on earlier weights of {stale[0]}; delete it to train it anew")
                print(f"{number} of {len(self.stages)}: {folder} is finished", flush=True)
                continue
            fits = isinstance(run, LinearCodeRun)
            given = None if minutes is None or fits else self.minutes_for(name, minutes)
            print(f"{number} of {len(self.stages)}: {folder}" + (f", {given:.3g} min" if given else ""), flush=True)
            recipe = {"recipe": f"{self.file}:{name}", "run": config_to_dict(run), "dicode": __version__}
            run_recipe(run, folder, recipe, Path(self.file), given)
            new[str(folder / "best")] = name

    def minutes_for(self, name: str, minutes: float) -> float:
        """Its share of what the stages before it have left over, or what it was given when it began."""
        if (plan := read_plan(self.folders[name])) is not None:
            return plan.minutes
        names = list(self.stages)
        at = names.index(name)
        left = minutes - sum(spent_minutes(self.folders[n]) for n in names[:at])
        share = self.shares[name] / sum(self.shares[n] for n in names[at:])
        return max(left * share, LEAST_SHARE * minutes * self.shares[name] / sum(self.shares.values()))

    def assemble(self, output: Path, dtype: str) -> None:
        """Join what the stages trained into one checkpoint folder."""
        runs = [(self.folders[name] / "best", run) for name, run in self.stages.items()]
        tokenizers = [folder for folder, run in runs if isinstance(run, TokenizerRun)]
        decoders = [folder for folder, run in runs if isinstance(run, FirstStageRun) and run.freeze_encoder]
        lms = [folder for folder, run in runs if isinstance(run, LanguageRun)]
        decoder = decoders[-1] if decoders else None
        assemble(tokenizers[-1], lms[-1], output, decoder, getattr(torch, dtype), **self.sampling)

    def paces(self, only: str | None = None) -> dict[str, Pace]:
        """How fast each stage goes here: a few steps at its real sizes, on noise, with random weights."""
        found: dict[str, Pace] = {}
        with tempfile.TemporaryDirectory() as place, Processes() as processes:
            size = next(run.model.size for run in self.stages.values() if isinstance(run, TokenizerRun))
            noise_cache(Path(place) / "cache", size)
            own = Chain(self.file, str(Path(place) / "cache"), Path(place), self.first_stage)
            for name, run in own.stages.items():
                if isinstance(run, LinearCodeRun):
                    fit_run(run, own.folders[name], {})
                    continue
                stage = stage_of(run)
                if only in (None, name):
                    found[name] = measured_pace(stage, run.loop, processes)
                if only == name:
                    break
                stage.module.eval()
                stage.export(own.folders[name] / "best")  # for the stages after it
        return found


def wired(run: R, best: Mapping[str, Path]) -> R:
    """The run with the `best` of a stage before it in place of each field that names it.

    Names are runs/STAGE/best or runs/FILE-STAGE/best, of whatever file: a recipe that was copied has another name.
    """
    changes: dict[str, Any] = {
        field.name: str(folder)
        for field in fields(run)
        for name, folder in best.items()
        if re.fullmatch(rf"runs/(.+-)?{re.escape(name)}/best", str(getattr(run, field.name)))
    }
    return replace(run, **changes)


def finished(folder: Path, run: Run | LinearCodeRun) -> bool:
    """Whether a run folder holds all steps of this run, or its fit, on the data that its cache holds now."""
    if isinstance(run, LinearCodeRun):
        return fit_of(folder, run) is not None
    state, plan = last_state(folder), read_plan(folder)
    if not state or not (folder / "best").is_dir():
        return False
    asked = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["recipe"]["run"]
    same = asked == config_to_dict(run) and [data_of(run)] == [
        session.get("data") for session in records(folder / "sessions.jsonl")[-1:]
    ]
    steps = run.loop.optim.steps if plan is None else plan.steps
    return same and state["step"] >= steps and state["evaluated"] == state["step"]


def last_state(folder: Path) -> dict[str, Any]:
    """The state of a run's newest checkpoint; empty without one, or where it is damaged, which training mends."""
    try:
        return json.loads((checkpoints(folder)[-1] / STATE).read_text(encoding="utf-8"))
    except (IndexError, OSError, ValueError):
        return {}


def spent_minutes(folder: Path) -> float:
    """How long a run took so far, from its latents to its last checkpoint."""
    if (folder / FIT).is_file():
        return read_json(folder / FIT)["fitted_s"] / 60
    plan = read_plan(folder)
    return (last_state(folder).get("trained_s", 0.0) + (plan.prepared_s if plan else 0.0)) / 60


def noise_cache(folder: Path, size: int) -> None:
    """A cache of clips of noise, every sixth for validation, to measure the speed on."""
    count, period_s = NOISE_FRAMES, NOISE_FRAMES / NOISE_FPS
    videos = [
        CachedVideo("noise", f"{i}.mp4", (f"clip {i}",), i % 6 == 0, False, i * count, count, period_s)
        for i in range(NOISE_CLIPS)
    ]
    shape = (NOISE_CLIPS * count, size, size, 3)
    frames = torch.randint(256, shape, dtype=torch.uint8, generator=generator_for(0, "noise"))
    times_s = torch.arange(count, dtype=torch.float64).repeat(NOISE_CLIPS) / NOISE_FPS
    FrameCache(tuple(videos), frames, times_s).save(folder)


def assemble(
    tokenizer: Path,
    lm: Path,
    output: Path,
    first_stage: Path | None = None,
    dtype: torch.dtype = torch.float16,
    card: str | None = None,
    **options: object,
) -> DiCoDe:
    """Join a tokenizer run's and a language model run's weights; returns the model as loaded back from `output`.

    `first_stage` names a later run of the same first stage, of which only the decoder may differ. float16 keeps three
    more bits than bfloat16, and weights fit it. The tokenizer's sampling is kept but for `options`, fields of
    `SamplingConfig`; `card` is its README.md. Raises `CheckpointError` where the deep tokens would change, or the
    language model was trained on others.
    """
    check_model_folder(output)  # before any work
    parts = VideoTokenizer.from_pretrained(tokenizer)
    if (trained_on := read_config(lm).get("deep_tokens")) != parts.token_hash():
        raise CheckpointError(
            f"{lm} was trained on the deep tokens {trained_on}, {tokenizer} encodes {parts.token_hash()}"
        )
    if first_stage is not None:
        later = FirstStage(parts.config.first_stage)
        load_weights(later, first_stage / FIRST_STAGE_WEIGHTS)
        for name, value in parts.first_stage.state_dict().items():
            if not name.startswith(DECODER) and not torch.equal(value, later.state_dict()[name]):
                raise CheckpointError(f"{first_stage}: {name} differs from {tokenizer}; the deep tokens would change")
        parts.first_stage.load_state_dict(later.state_dict())
    parts.config = replace(parts.config, sampling=parts.config.sampling.changed(**options))
    whole = DiCoDe(parts, DeepTokenLM.from_pretrained(lm))
    with model_folder(output) as folder:
        whole.save_pretrained(folder, dtype)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
    return DiCoDe.from_pretrained(output)


def last_of(best: Path) -> Path:
    """RUN/last, the averaged weights of a run's last evaluation, for RUN/best. Raises `CheckpointError` without one."""
    last = best.with_name("last")
    if best.name != "best" or not last.is_dir():
        raise CheckpointError(f"--last: expected RUN/best with RUN/last beside it, got {best}")
    return last
