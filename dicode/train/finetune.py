"""Fine-tuning by low-rank adapters, of the denoiser and of the language model.

clips ─► WORK/cache ─► adapters: WORK/denoiser, WORK/lm ─► merged: WORK/…/best ─► one checkpoint folder
"""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from dicode import __version__
from dicode.checkpoint import content_hash, model_name, read_section
from dicode.config import config_to_dict
from dicode.data.columns import CachedVideo
from dicode.data.records import VALIDATION_EVERY, ClipRecord
from dicode.files import put_text, read_json, state_of
from dicode.lm.config import DeepLMConfig
from dicode.tokenizer.config import TokenizerConfig
from dicode.train.loop import NonFiniteLossError
from dicode.train.run_log import records
from dicode.train.runs import LanguageRun, LoopConfig, LoRAConfig, TokenizerRun
from dicode.train.stages import Run, run_recipe

Figures = dict[str, dict[str, float]]  # "before" and "after": validation metrics
NOTE = "finetune.json"  # of a working folder: model and clips that it was begun with
SHARES = {"denoiser": 0.8, "lm": 0.2}  # of the time, as equal numbers of steps of the bundled models' parts take it
END_FRAME_PROB = 0.2  # where the model has end-frame conditioning: often enough not to forget it
CARD = """---
{metadata}---

# {name}

`{base}`, fine-tuned on {trained} clips with low-rank adapters, which are merged into its weights: an ordinary
checkpoint of `dicode` {version}.

    dicode generate {prompt} --model {name}

Command:

    {command}

| | before | after |
|---|---|---|
{table}

Losses: lower is better. `written rank`: percentile rank of the true key frame by its distance to the one generated from
the caption (100 best, 50 chance); `caption rank`: that of a clip's own caption by likelihood. Measured on {held}
validation clips, except `training loss`, `written share` and half of `written rank`. `dicode evaluate` measures more.

First stage and deep tokens are those of `{base}`; what its first stage cannot reconstruct, this model
cannot generate. The licences of `{base}` and of the clips apply.
"""


def finetune_runs(
    base: Path, cache: Path, lora: LoRAConfig, loop: LoopConfig, key_frames: int
) -> dict[str, TokenizerRun | LanguageRun]:
    """The run of each part, in order, with this seed, device, batch size and learning rate for so many steps.

    Each is evaluated before its first step and after its last: the best of several would be early weights where few
    clips tell no difference. Raises `CheckpointError` for a folder that lacks one of the parts.
    """
    tokenizer, lm = read_section(base, "tokenizer", TokenizerConfig), read_section(base, "lm", DeepLMConfig)
    steps = loop.optim.steps
    optim = replace(loop.optim, warmup_steps=min(20, steps // 5), decay_fraction=0.5, weight_decay=0.0, ema_decay=0.98)
    loop = replace(loop, evaluate_every=steps, checkpoint_every=100, optim=optim)
    denoiser_run = TokenizerRun(
        str(cache), init=str(base), model=tokenizer, lora=lora, loop=replace(loop, best="-denoising_loss"),
    )  # fmt: skip
    lm_run = LanguageRun(
        str(cache), tokenizer=str(base), init=str(base), model=lm, lora=lora, longer=(), longer_share=(),
        # the share of captions met, by which runs are compared otherwise, is 0 for long where captions say little
        loop=replace(loop, best="-validation_loss"),
        key_frames=min(key_frames, lm.most_keyframes(lm.end_frame_conditioning)),
        end_frame_prob=END_FRAME_PROB if lm.end_frame_conditioning else 0.0,
    )  # fmt: skip
    return {"denoiser": denoiser_run, "lm": lm_run}


def claim_folder(work: Path, output: Path, base: Path, records: Sequence[ClipRecord], loops: bool) -> None:
    """Note the model and the clips in the working folder.

    Raises `ValueError` where a part was begun with others, or where an output or a folder would be overwritten that
    this command did not write.
    """
    clips = hashlib.sha256()
    for r in records:
        facts = (str(r.path), r.captions, r.start_s, r.end_s, r.validation, r.inside and r.inside.span)
        clips.update(json.dumps([*facts, state_of(r.inside.archive if r.inside else r.path)]).encode())
    found = {"model": content_hash(*base.glob("*.safetensors")), "loops": loops, "clips": clips.hexdigest()}
    note, begun = work / NOTE, found
    if note.is_file():
        begun = read_json(note)
    elif (output / "config.json").exists():
        raise ValueError(f"{output}: a model is there already, and {work} did not make it; name another -o")
    elif work.exists() and (not work.is_dir() or any(work.iterdir())):
        raise ValueError(f"{work}: expected a folder of this command's, or none; name another --work-folder")
    begun_parts = [str(work / part) for part in SHARES if (work / part / "sessions.jsonl").exists()]
    differing = ", ".join(name for name, value in found.items() if begun.get(name) != value)
    if differing and begun_parts:
        raise ValueError(
            f"{work} was begun with other {differing} (files, captions or splits): delete {' and '.join(begun_parts)}"
            " to train anew, or name another --work-folder"
        )
    put_text(note, json.dumps(found))


def check_split(cache: str, videos: Sequence[CachedVideo]) -> int:
    """The number of validation videos. Raises `ValueError` unless there are videos to train on, too."""
    held = sum(video.validation for video in videos)
    if not 0 < held < len(videos):
        raise ValueError(
            f"{cache}: expected clips to train on and to validate with, got {len(videos) - held} and {held}; for"
            f" validation is what says so in its line, else every {VALIDATION_EVERY}th video of a folder that can be"
            ' read, from the first on. Add clips, or "validation" to lines, and give the same command again'
        )
    return held


def train_part(part: str, run: Run, folder: Path, minutes: float | None) -> Figures:
    """Train one part, or continue; returns its validation metrics as the base model and as trained."""
    try:
        after = run_recipe(run, folder, {"recipe": "dicode finetune", "run": config_to_dict(run)}, None, minutes)
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{part}: {error}; try a lower --lr") from error
    first = (line for line in records(folder / "log.jsonl") if line["kind"] == "validation" and line["step"] == 0)
    return {"before": {k: v for k, v in next(first, {}).items() if k not in ("kind", "step")}, "after": after}


def model_card(
    output: Path, base: Path, prompt: str, command: str, counts: tuple[int, int], figures: Mapping[str, Figures]
) -> str:
    """The README.md of a fine-tuned model, with metadata for the Hub; `counts` are of training and validation clips."""
    table = [
        f"| {part}: {name.replace('_', ' ')} | {value:.4g} | {both['after'][name]:.4g} |"
        for part, both in figures.items()
        for name, value in both["before"].items()
    ]
    hub_id, _, commit = model_name(base).partition("@")
    measured = [
        {
            "type": name.replace("_", "-"),
            "name": f"{part}: {name.replace('_', ' ')}",
            "value": float(f"{both['after'][name]:.4g}"),
        }
        for part, both in figures.items()
        for name in both["before"]
    ]
    data = {"type": output.name, "name": f"{counts[1]} validation clips of its own data"}
    result = {"task": {"type": "text-to-video"}, "dataset": data, "metrics": measured}
    metadata = {
        "library_name": "dicode",
        "pipeline_tag": "text-to-video",
        **({"base_model": hub_id} if commit else {}),  # bundled models and folders have no id on the Hub
        "tags": ["text-to-video", "dicode", "lora"],
        "model-index": [{"name": output.name, "results": [result]}],
    }
    return CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        name=output.name,
        base=model_name(base),
        version=__version__,
        prompt=shlex.quote(prompt),
        command=command,
        trained=counts[0],
        held=counts[1],
        table="\n".join(table),
    )
