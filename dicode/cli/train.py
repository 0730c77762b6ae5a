"""`dicode train`, `finetune` and `assemble`."""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, Suppress, arg

from dicode.cli import common
from dicode.config import FINETUNED_MODEL, BatchSize, Items, LearningRate, Positive, Range, Seed, Share, TrainingSteps
from dicode.stopwatch import Stopwatch

StoredOrInt8 = Annotated[
    common.Dtype | Literal["int8"], arg(help="type of the weights on disk; int8: of matrices, with a scale a row")
]
Parts = Annotated[tuple[Literal["denoiser", "lm"], ...], Items(1, 2)]


@dataclass(frozen=True)
class Train:
    """Train one run of a recipe; the same command continues it. FILE.py:RUN --help lists the flags of the run."""

    recipe: Annotated[Positional[str], arg(metavar="FILE.py:RUN")]  # function of that file which returns a run
    run_folder: Path | None = None  # folder of checkpoints and logs; default: runs/FILE-RUN
    minutes: common.Minutes | None = None  # time in minutes, in place of a number of steps
    run: Suppress[Any] = None  # the run that the function returned, changed by flags


@dataclass(frozen=True)
class TrainAll:
    """Train all stages of a recipe file in order and assemble the model; the same command continues.

    Finished stages are not trained again. One stage alone: FILE.py:RUN.
    """

    recipe: Annotated[Positional[str], arg(metavar="FILE.py")]  # file with STAGES, such as recipes/small.py
    output: common.OutputFolder
    cache: str | None = None  # folder written by `dicode data cache`; default: the recipe's
    minutes: common.Minutes | None = None  # time in minutes for all stages, in place of their steps
    first_stage: str | None = None  # bundled model or folder whose first stage is used, in place of training one
    runs: Path = Path("runs")  # folder of the run folders, FILE-STAGE each
    dtype: StoredOrInt8 = "float16"


@dataclass(frozen=True)
class Finetune:
    """Train a model on your own clips: low-rank adapters, merged into a new model. The same command continues it.

    Validation clips are those whose line has "validation": true, else every 15th of a folder, from the first on.
    """

    folders: common.Folders
    output: common.OutputFolder
    model: common.ModelName = FINETUNED_MODEL
    revision: common.Revision = None
    parts: Parts = ("denoiser", "lm")  # denoiser: how things look and move; lm: what captions mean
    steps: TrainingSteps = 500  # training steps of each part
    minutes: common.Minutes | None = None  # time in minutes for all parts, in place of steps
    rank: Annotated[int, Range(1, 4096)] = 16  # rank of the adapters; higher fits more, and needs more clips
    alpha: Positive = 16.0  # scale of the adapters, times 1/rank
    dropout: Share = 0.0  # dropout probability of the adapters, 0 to 1
    targets: tuple[str, ...] = ()  # layers to adapt, by the ends of their names; default: every layer
    lr: LearningRate = 1e-3  # learning rate
    batch_size: BatchSize = 16  # samples a step
    key_frames: Annotated[int, Range(2, 4096)] = 3  # key frames of a clip for the language model, one every two seconds
    loops: bool = False  # clips that repeat without a seam
    work_folder: Path | None = None  # folder of cache and runs; default: OUTPUT.work, which may be deleted afterwards
    seed: Seed = 0  # random seed
    device: common.Device = "auto"
    dtype: common.StoredDtype = "float16"
    json: common.ResultFile = None


@dataclass(frozen=True)
class Assemble:
    """Join the best weights of a tokenizer run and a language model run into one checkpoint folder."""

    tokenizer: Annotated[Positional[Path], arg(metavar="TOKENIZER")]  # runs/FILE-NAME/best of a tokenizer run
    lm: Annotated[Positional[Path], arg(metavar="LM")]  # runs/FILE-NAME/best of a language model run
    output: common.OutputFolder
    first_stage: Path | None = None  # later run of the same first stage, for its decoder
    last: bool = False  # the averaged weights that each run ended with, RUN/last, in place of the best
    dtype: StoredOrInt8 = "float16"
    write: common.Write = common.WRITE  # stored as the model's own sampling; default: the tokenizer's
    render: common.Render = common.RENDER


def train(command: Train, watch: Stopwatch) -> None:
    """Leaves with exit code 75 (`SystemExit`) where a signal stopped the run after a checkpoint."""
    from dicode import __version__
    from dicode.config import config_to_dict

    with common.needs_extra("train"):
        from dicode.train.distributed import Processes
        from dicode.train.stages import run_recipe
    file, _, name = command.recipe.rpartition(":")
    folder = command.run_folder or Path("runs") / f"{Path(file).stem}-{name}"
    recipe = {"recipe": command.recipe, "run": config_to_dict(command.run), "dicode": __version__}
    best = run_recipe(command.run, folder, recipe, Path(file), command.minutes)
    if Processes().first:
        print(f"{folder}/best: " + "  ".join(f"{name} {value:.4g}" for name, value in best.items()))


def trainall(command: TrainAll, watch: Stopwatch) -> None:
    """As `train` and `assemble`; ends with the output of `dicode info`."""
    from dicode.checkpoint.saving import check_model_folder
    from dicode.cli.info import Info, info
    from dicode.files import check_parent

    with common.needs_extra("train"):
        from dicode.train.chain import Chain
        from dicode.train.distributed import Processes
    check_parent(command.output)
    check_model_folder(command.output)  # before hours of training
    chain = Chain(command.recipe, command.cache, command.runs, command.first_stage)
    chain.train(command.minutes)
    if Processes().first:
        chain.assemble(command.output, command.dtype)
        info(Info(str(command.output)), watch)


def finetune(command: Finetune, watch: Stopwatch) -> None:
    """Leaves with exit code 75 (`SystemExit`) where a signal stopped it after a checkpoint, as `dicode train` does."""
    import torch

    from dicode.checkpoint import model_name, resolve
    from dicode.checkpoint.saving import check_model_folder
    from dicode.cli.data import Cache, cache
    from dicode.data.cache import FrameCache
    from dicode.data.index import read_index
    from dicode.data.records import merged
    from dicode.device import peak_memory_mib, pick_device
    from dicode.files import check_folder
    from dicode.provenance import check_result, command_line, write_result
    from dicode.train import finetune as work_on
    from dicode.train.chain import assemble as join
    from dicode.train.runs import LoopConfig, LoRAConfig, OptimConfig

    check_result(command.json)
    check_folder(command.output)
    common.check_folders(command.folders)
    base = resolve(command.model, command.revision)
    work = command.work_folder or command.output.with_name(f"{command.output.name}.work")
    lora = LoRAConfig(command.rank, command.alpha, command.dropout, command.targets)
    optim = OptimConfig(steps=command.steps, batch_size=command.batch_size, lr=command.lr)
    loop = LoopConfig(seed=command.seed, device=command.device, tracker="none", optim=optim)  # as a bare install has
    runs: dict[str, Any] = work_on.finetune_runs(base, work / "cache", lora, loop, command.key_frames)
    check_model_folder(command.output)
    records = merged(record for folder in command.folders for record in read_index(folder))
    prompt = next((record.caption for record in records if record.caption), "")
    if "lm" in command.parts and not prompt:
        raise ValueError(f"none of {len(records)} clips has a caption to learn from; --parts denoiser needs none")
    work_on.claim_folder(work, command.output, base, records, command.loops)
    with watch.stage("cache"):
        size, folder = runs["denoiser"].model.size, str(work / "cache")
        cache(Cache(command.folders, folder, size=size, loops=command.loops), watch)
        videos = FrameCache.load(folder).videos
        held = work_on.check_split(folder, videos)
    trained = len(videos) - held
    figures: dict[str, Any] = {}
    for part in (part for part in runs if part in command.parts):
        share = work_on.SHARES[part] / sum(work_on.SHARES[other] for other in set(command.parts))
        minutes = None if command.minutes is None else command.minutes * share
        with watch.stage(part):
            figures[part] = work_on.train_part(part, runs[part], work / part, minutes)
    best_tokenizer, best_lm = (work / part / "best" if part in figures else base for part in ("denoiser", "lm"))
    card = work_on.model_card(command.output, base, prompt or "a prompt", command_line(), (trained, held), figures)
    with watch.stage("assemble"):
        join(best_tokenizer, best_lm, command.output, dtype=getattr(torch, command.dtype), card=card)
    if command.json is not None:
        values = {**figures, "clips": len(videos), "lora": lora, "seconds": watch.seconds}
        values |= {"processor_s": time.process_time(), "peak_memory_mib": peak_memory_mib()}
        name, device = f"{model_name(base)}: finetune", pick_device(command.device)
        write_result(command.json, name, values, held, command.seed, command_line(), device)
    print(
        f"{command.output}: {model_name(base)}, fine-tuned on {trained} clips; next:\n"
        f"  dicode generate {shlex.quote(prompt or 'a prompt')} --model {command.output}\n"
        f"  dicode evaluate {command.output} --cache {work / 'cache'} --quick --report report.html\n"
        f"then {work} may be deleted"
    )
    print(watch.text())


def assemble(command: Assemble, watch: Stopwatch) -> None:
    """Ends with the output of `dicode info`."""
    import torch

    from dicode.cli.info import Info, info
    from dicode.train.chain import assemble as join
    from dicode.train.chain import last_of

    dtype, options = getattr(torch, command.dtype), common.sampling_flags(command.write, command.render)
    folders = [last_of(path) if command.last else path for path in (command.tokenizer, command.lm)]
    later = last_of(command.first_stage) if command.last and command.first_stage else command.first_stage
    join(folders[0], folders[1], command.output, later, dtype, **options)
    info(Info(str(command.output)), watch)
