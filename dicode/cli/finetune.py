"""What `dicode finetune` does; its flags are in `flags.py`.

clips ─► WORK/cache ─► adapters: WORK/denoiser, WORK/lm ─► merged: WORK/…/best ─► one checkpoint folder
"""

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dicode import __version__
from dicode.checkpoint import check_model_folder, content_hash, model_name, read_config, resolve
from dicode.cli.data import cache as make_cache
from dicode.cli.flags import Cache, Finetune
from dicode.config import CheckpointError, config_from_dict, config_to_dict, missing_extra
from dicode.data.cache import CachedVideo, FrameCache
from dicode.data.index import read_index
from dicode.data.records import VALIDATION_EVERY, ClipRecord, merged
from dicode.device import peak_memory_mib, pick_device
from dicode.files import check_file, put_text, state_of
from dicode.lm.presets import DeepLMConfig
from dicode.stopwatch import Stopwatch
from dicode.tokenizer.config import TokenizerConfig
from dicode.train.runs import LanguageRun, LoopConfig, LoRAConfig, OptimConfig, TokenizerRun

try:
    from dicode.provenance import write_result
    from dicode.train.assemble import assemble
    from dicode.train.loop import NonFiniteLossError, data_of, train
    from dicode.train.pace import planned
    from dicode.train.parallel import Processes
    from dicode.train.run_log import claimed
    from dicode.train.stages import stage_of
except ModuleNotFoundError as error:
    raise missing_extra(error, "train") from error

Run = TokenizerRun | LanguageRun
Figures = dict[str, dict[str, float]]  # "before" and "after": validation metrics
NOTE = "finetune.json"  # of a working folder: what it was begun with
SHARES = {"denoiser": 0.8, "lm": 0.2}  # of the time, as of equal numbers of steps of the box's parts
GOAL_SHARE = 0.2  # of steps with a goal, where the model reads goals: enough not to forget them
CARD = """---
library_name: dicode
pipeline_tag: text-to-video
---

# {name}

`{base}`, fine-tuned on {trained} clips with low-rank adapters, which are merged into its weights: an ordinary
checkpoint of `dicode` {version}.

    dicode generate {prompt} --model {name}

It was made by

    {command}

| | before | after |
|---|---|---|
{table}

Losses: lower is better. `written rank`: how near the key frame written of a caption comes to the true one (100 best, 50
chance); `caption rank`: how well a clip's own caption explains it. All on {held} clips that were not trained on, but
`training loss`, `written share` and half of `written rank`. `dicode evaluate` measures more.

Encoder, first stage and token statistics are those of `{base}`, so what its first stage cannot show is not shown here
either. The licence of `{base}` applies, and those of the clips.
"""


def finetune(command: Finetune, watch: Stopwatch) -> int:
    """Leaves with exit code 75 (`SystemExit`) where a signal stopped it after a checkpoint, as `dicode train` does."""
    parts = [part for part in ("denoiser", "lm") if part in command.parts]
    if not parts or min(command.steps, command.rank) < 1:
        found = f"{command.parts}, {command.steps} and {command.rank}"
        raise ValueError(f"expected parts to train, and steps and a rank of 1 or more, got {found}")
    check_file(command.json)
    base = resolve(command.model, command.revision)
    work = command.work_folder or command.output.with_name(f"{command.output.name}.work")
    denoiser, lm = _runs(command, base, work)
    runs: dict[str, Run] = {"denoiser": denoiser, "lm": lm}
    records = _records(command, base, work)
    with watch.stage("cache"):
        videos = _cached(command, work / "cache", denoiser.model.size, watch)
    figures: dict[str, Figures] = {}
    shares = {part: SHARES[part] / sum(SHARES[p] for p in parts) for part in parts}
    for part in parts:
        minutes = None if command.minutes is None else command.minutes * shares[part]
        with watch.stage(part):
            try:
                figures[part] = _train(runs[part], work / part, minutes)
            except NonFiniteLossError as error:
                print(f"dicode: {part}: {error}; try a lower --lr", file=sys.stderr)
                return 1
    folders = [work / part / "best" if part in parts else base for part in ("denoiser", "lm")]
    line, held = "dicode " + shlex.join(sys.argv[1:]), sum(video.validation for video in videos)
    card = CARD.format(
        name=command.output.name,
        base=model_name(base),
        version=__version__,
        prompt=shlex.quote(next((r.caption for r in records if r.caption), "a prompt")),
        command=line,
        trained=len(videos) - held,
        held=held,
        table="\n".join(_rows(figures)),
    )
    with watch.stage("assemble"):
        assemble(folders[0], folders[1], command.output, dtype=getattr(torch, command.dtype), card=card)
    if command.json is not None:
        values = {**figures, "clips": len(videos), "lora": lm.lora, "seconds": watch.seconds}
        values |= {"processor_s": time.process_time(), "peak_memory_mib": peak_memory_mib()}
        name, device = f"{model_name(base)}: finetune", pick_device(command.device)
        write_result(command.json, name, values, held, command.seed, line, device)
    print(f"{command.output}: {model_name(base)}, fine-tuned on {len(videos) - held} clips; {work} may be deleted")
    print(watch.text())
    return 0


def _records(command: Finetune, base: Path, work: Path) -> list[ClipRecord]:
    """The clips that are asked for; the working folder notes their files, and the model that is to learn them.

    Raises `ValueError` where a part was begun with others, where an output would be overwritten that it did not make,
    or where there are no captions for a language model.
    """
    if not command.folders or not all(folder.strip() for folder in command.folders):
        raise ValueError(f"expected at least one folder of clips, got {' '.join(map(repr, command.folders)) or 'none'}")
    check_model_folder(command.output)
    records = merged(record for folder in command.folders for record in read_index(folder))
    if "lm" in command.parts and not any(record.captions for record in records):
        raise ValueError(f"none of {len(records)} clips has a caption to learn from; --parts denoiser needs none")
    clips = hashlib.sha256()
    for r in records:
        facts = (str(r.path), r.captions, r.start_s, r.end_s, r.validation, r.inside and r.inside.span)
        clips.update(json.dumps([*facts, state_of(r.inside.archive if r.inside else r.path)]).encode())
    asked = {"model": content_hash(*base.glob("*.safetensors")), "loops": command.loops, "clips": clips.hexdigest()}
    note = work / NOTE
    if not note.is_file():
        if (command.output / "config.json").exists():
            raise ValueError(f"{command.output}: a model is there already, and {work} did not make it; name another -o")
        if work.exists() and (not work.is_dir() or any(work.iterdir())):
            raise ValueError(f"{work}: expected a folder of this command's, or none; name another --work-folder")
    begun = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else asked
    begun_parts = [part for part in ("denoiser", "lm") if (work / part).exists()]
    differing = ", ".join(name for name, value in asked.items() if begun.get(name) != value)
    if differing and begun_parts:
        at = " and ".join(str(work / part) for part in begun_parts)
        raise ValueError(
            f"{work} was begun with other {differing} (files, captions or splits): delete {at} to train anew,"
            " or name another --work-folder"
        )
    put_text(note, json.dumps(asked))
    return records


def _cached(command: Finetune, folder: Path, size: int, watch: Stopwatch) -> Sequence[CachedVideo]:
    """The videos of the clips' cache; what of it is there and of the same files stays."""
    make_cache(Cache(command.folders, str(folder), size=size, loops=command.loops), watch)
    videos = FrameCache.load(folder).videos
    held = sum(video.validation for video in videos)
    if not 0 < held < len(videos):
        raise ValueError(
            f"{folder}: expected clips to train on and to validate with, got {len(videos) - held} and {held}; for"
            f" validation is what says so in its line, else every {VALIDATION_EVERY}th video of a folder that can be"
            ' read, from the first on. Add clips, or "validation" to lines, and give the same command again'
        )
    return videos


def _runs(command: Finetune, base: Path, work: Path) -> tuple[TokenizerRun, LanguageRun]:
    """What to train of either part."""
    where, sections = f"{base}/config.json", read_config(base)
    if missing := [name for name in ("tokenizer", "lm") if name not in sections]:
        raise CheckpointError(f"{where}: expected a whole model, found no section {' or '.join(missing)}")
    tokenizer = config_from_dict(TokenizerConfig, sections["tokenizer"], f"{where}: tokenizer")
    lm = config_from_dict(DeepLMConfig, sections["lm"], f"{where}: lm")
    cache, model, steps = str(work / "cache"), str(base), command.steps
    lora = LoRAConfig(command.rank, command.alpha, command.dropout, command.targets)
    optim = OptimConfig(
        steps=steps, batch_size=command.batch_size, lr=command.lr, warmup_steps=min(20, steps // 5), decay_fraction=0.5,
        weight_decay=0.0, ema_decay=0.98,
    )  # fmt: skip
    # evaluated once, at the end: the best of several would be early weights where few clips tell no difference
    loop = LoopConfig(seed=command.seed, device=command.device, evaluate_every=steps, checkpoint_every=100, optim=optim)
    denoiser_run = TokenizerRun(
        cache, first_stage=model, init=model, freeze_key_frames=True, images_per_step=0, model=tokenizer, lora=lora,
        loop=loop,
    )  # fmt: skip
    lm_run = LanguageRun(
        cache, tokenizer=model, init=model, model=lm, lora=lora, loop=loop, longer=(), longer_share=(),
        key_frames=min(command.key_frames, lm.most_keyframes(lm.end_frame_conditioning)),
        end_frame_prob=GOAL_SHARE if lm.end_frame_conditioning else 0.0,
    )  # fmt: skip
    return denoiser_run, lm_run


def _train(run: Run, folder: Path, minutes: float | None) -> Figures:
    """Train one part, or continue; returns its validation metrics as the base model and as trained."""
    began_s, stage = time.monotonic(), stage_of(run)
    if isinstance(run, LanguageRun):
        stage.best = "-validation_loss"  # its own, the share of captions met, is 0 for long where captions say little
    first = folder / "before.json"
    if not first.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        stage.module.to(pick_device(run.loop.device)).eval()
        with torch.no_grad():
            before = stage.validate()[0]  # adapters do nothing yet
        put_text(first, json.dumps(before))
    recipe = {"recipe": "dicode finetune", "run": config_to_dict(run)}
    with Processes() as processes, claimed(folder, data_of(run), run.loop, processes):
        loop = planned(stage, run.loop, folder, minutes, began_s, processes)
        best = train(stage, replace(loop, evaluate_every=loop.optim.steps), folder, recipe)
    return {"before": json.loads(first.read_text()), "after": best}


def _rows(figures: dict[str, Figures]) -> list[str]:
    return [
        f"| {part}: {name.replace('_', ' ')} | {value:.4g} | {both['after'][name]:.4g} |"
        for part, both in figures.items()
        for name, value in both["before"].items()
        if not name.startswith("key_frame")  # which nothing here changes
    ]
