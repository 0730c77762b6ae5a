"""What `dicode info` does; its flags are in `flags.py`."""

import ast
import dataclasses
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dicode.checkpoint import read_config, resolve
from dicode.cli.flags import Info
from dicode.config import CheckpointError, config_from_dict, nearest
from dicode.device import GPUS
from dicode.files import read_text
from dicode.lm.presets import SIZES, DeepLMConfig
from dicode.provenance import write_result
from dicode.sizing.count import Sizing, size_lm, size_tokenizer
from dicode.stopwatch import Stopwatch, duration
from dicode.tokenizer.config import TokenizerConfig
from dicode.tokenizer.presets import TOKENIZERS
from dicode.tokenizer.video_tokenizer import WEIGHTS
from dicode.train.recipe import load_run
from dicode.train.runs import LoopConfig

if TYPE_CHECKING:
    from dicode.sizing.plan import Plan  # needs what training needs

GIB, MIB = 2**30, 2**20


def info(command: Info, watch: Stopwatch) -> int:
    """Everything is counted from configurations; no weights are read and no network takes memory.

    Of a model, all in training is float32 but where activations are said to be bfloat16: see `TrainingBytes`. Of a
    recipe, all is as the training loop has it: see `plans.py`.
    """
    is_recipe = command.model.rpartition(":")[0].endswith(".py") or command.model.endswith(".py")
    batch_size = 1 if command.batch_size is None else command.batch_size
    gpus = command.gpus or ((1,) if is_recipe else (1, 8))
    if command.here and not is_recipe:
        raise ValueError(f"--here: measures the stages of a recipe file, such as recipes/small.py; got {command.model}")
    if command.here:
        values = _paces(command)
    else:
        values = _plans(command, gpus) if is_recipe else _sizes(command, gpus, batch_size)
    if command.json is not None:
        line, what = "dicode " + shlex.join(sys.argv[1:]), "plans" if is_recipe else "sizes"
        write_result(command.json, f"{Path(command.model).name}: {what}", values, 1, 0, line, "meta")
        print(f"\n{command.json}: the same, in bytes")
    return 0


def _sizes(command: Info, gpus: tuple[int, ...], batch_size: int) -> dict[str, Any]:
    """Print what the parts of a model take, and return it."""
    configs = _describe(command)
    values: dict[str, Any] = {"batch_size": batch_size}
    for part, config in configs.items():
        if isinstance(config, TokenizerConfig):
            sizing = size_tokenizer(config, batch_size)
            values["a_second_of_video"] = rates(config)
        else:
            sizing = size_lm(config, batch_size)
        training = {f"{n} GPU{'s' * (n > 1)}": sizing.training_bytes.on(n) for n in gpus}
        values[part] = {**dataclasses.asdict(sizing), "training_bytes": training}
        print(f"\n{part}")
        _print_sizing(sizing, training, batch_size)
    if "a_second_of_video" in values:
        _print_table("a second of video", values["a_second_of_video"], "{:,.1f}")
    return values


def _plans(command: Info, gpus: tuple[int, ...]) -> dict[str, Any]:
    """Print what it takes to train the runs of a recipe, and return it."""
    from dicode.sizing.plan import USABLE, Planner

    if command.gpu not in GPUS:
        raise ValueError(f"gpu: {command.gpu!r} is none of {', '.join(GPUS)}{nearest(command.gpu, list(GPUS))}")
    gpu = GPUS[command.gpu]
    assumed = {"memory_gib": gpu.memory_gib, "peak_flops": gpu.peak_flops, "mfu": command.mfu, "usable_memory": USABLE}
    values: dict[str, Any] = {"assumed": {"gpu": command.gpu, **assumed}}
    for name, run in _runs(command).items():
        planner = Planner(run)
        plans = {n: planner.plan(n, gpu, command.mfu) for n in gpus}
        values[name] = {f"{n} GPU{'s' * (n > 1)}": dataclasses.asdict(plan) for n, plan in plans.items()}
        print(f"\n{name}: {run.loop.optim.steps:,} steps with a batch of {run.loop.optim.batch_size}")
        _print_plans({f"{n} × {command.gpu}": plan for n, plan in plans.items()})
    print(f"\nAssumed: {command.mfu:.0%} of {gpu.peak_flops / 1e12:g} TFLOP/s; {USABLE:.0%} of {gpu.memory_gib:g} GiB")
    return values


def _paces(command: Info) -> dict[str, Any]:
    """Measure how long the stages of a recipe take on this machine, print it, and return it."""
    import torch

    from dicode.train.chain import Chain

    file, _, only = command.model.rpartition(":") if ":" in command.model else (command.model, "", "")
    chain = Chain.of(file, None, Path("runs"))
    if only and only not in chain.stages:
        raise ValueError(f"{file}: STAGES has no {only!r}{nearest(only, list(chain.stages))}")
    paces = chain.paces(only or None)
    rows: dict[str, dict[str, str]] = {}
    for name, pace in paces.items():
        loop = chain.stages[name].loop
        seconds = loop.optim.steps * pace.step_s + loop.optim.steps // loop.evaluate_every * pace.evaluation_s
        in_minute = 60 / pace.step_s
        rows[name] = {
            "steps": f"{loop.optim.steps:,}",
            "s a step": f"{pace.step_s:.3g}",
            "all steps": duration(seconds),
            "a minute": f"{in_minute:,.0f} steps",
        }
    print(f"\nOn this machine, {torch.get_num_threads()} threads; measured on drawn clips")
    _print_table("stage", rows, "{}")
    return {name: dataclasses.asdict(pace) for name, pace in paces.items()}


def _runs(command: Info) -> dict[str, Any]:
    """The runs of a recipe file, or the one named, changed by the flags that were given."""
    file, _, name = command.model.rpartition(":")
    runs = runs_of(command.model) if command.model.endswith(".py") else {name: load_run(f"{file}:{name}")}
    for name, run in runs.items():
        if not isinstance(getattr(run, "loop", None), LoopConfig):
            raise ValueError(f"{file or command.model}:{name}: expected a run to plan, got {type(run).__name__}")
        loop = run.loop
        changes = {"micro_batches": command.micro_batches, "strategy": command.strategy}
        if command.checkpoint_activations:
            changes["checkpoint_activations"] = True
        loop = dataclasses.replace(loop, **{key: value for key, value in changes.items() if value is not None})
        if command.batch_size is not None:
            loop = dataclasses.replace(loop, optim=dataclasses.replace(loop.optim, batch_size=command.batch_size))
        runs[name] = dataclasses.replace(run, loop=loop)
    return runs


def runs_of(file: str) -> dict[str, Any]:
    """All runs of a recipe file by their names, in its order: functions without parameters that return a …Run."""
    try:
        parts = ast.parse(read_text(Path(file)), file).body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{file}: not readable as Python ({error})") from error
    names = [
        part.name
        for part in parts
        if isinstance(part, ast.FunctionDef)
        and not part.args.args
        and part.returns is not None
        and ast.unparse(part.returns).strip("'").endswith("Run")
        and not part.name.startswith("_")
    ]
    if not names:
        raise ValueError(f"{file}: expected functions that return a run, as 'def lm() -> LanguageRun:', found none")
    return {name: load_run(f"{file}:{name}") for name in names}


def rates(config: TokenizerConfig) -> dict[str, dict[str, float]]:
    """Tokens, numbers and bits that stand for a second of video, as deep tokens, latents and pixels."""
    deep, latents = config.resampler, config.first_stage.latent_channels
    counts = {  # tokens a second, numbers a token, bits a number
        "deep tokens (float32)": (deep.queries / config.clip_s, deep.token_width, 32),
        "latents (float32)": (config.fps * config.latent_size**2, latents, 32),
        "pixels (uint8)": (config.fps * config.size**2, 3, 8),
    }
    return {
        name: {"tokens": tokens, "numbers": tokens * numbers, "bits": tokens * numbers * bits}
        for name, (tokens, numbers, bits) in counts.items()
    }


def _describe(command: Info) -> dict[str, TokenizerConfig | DeepLMConfig]:
    """Print what a checkpoint folder or a preset is; returns the configurations of its parts."""
    presets: dict[str, TokenizerConfig | DeepLMConfig] = {**SIZES, **TOKENIZERS}
    try:
        folder = resolve(command.model, command.revision)
    except CheckpointError as error:
        if command.model not in presets or command.revision is not None:
            close = nearest(command.model, list(presets))
            raise CheckpointError(f"{error}, or one of the presets {[*presets]}{close}") from error
        config = presets[command.model]
        print(f"{command.model}: a preset, without weights\n{_summary(config)}")
        return {"tokenizer" if isinstance(config, TokenizerConfig) else "language model": config}
    sections = read_config(folder)
    if not {"tokenizer", "lm"} & sections.keys():
        raise CheckpointError(f"{folder}/config.json: expected sections tokenizer and lm, got {sorted(sections)}")
    print(f"{folder}: {sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 1e6:.1f} MB")
    parts: dict[str, TokenizerConfig | DeepLMConfig] = {}
    # a language model's run keeps the configuration of the tokenizer that its tokens came from, not the tokenizer
    if "tokenizer" in sections and (folder / WEIGHTS).exists():
        parts["tokenizer"] = tokenizer = config_from_dict(TokenizerConfig, sections["tokenizer"], "tokenizer")
        print(_summary(tokenizer))
    if "lm" in sections:
        parts["language model"] = lm = config_from_dict(DeepLMConfig, sections["lm"], "lm")
        print(_summary(lm))
    if len(parts) == 2:
        print(f"up to {(lm.keyframe_limit - 1) * tokenizer.clip_s:g} s")
        print(
            "sampling: "
            + ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(tokenizer.sampling).items())
        )
    print(f"licence: {_licence(folder)}")
    return parts


def _summary(config: TokenizerConfig | DeepLMConfig) -> str:
    if isinstance(config, TokenizerConfig):
        clips = f"clips of {config.clip_frames} frames, a key frame every {config.clip_s:g} s"
        return f"{config.size}×{config.size} pixels, {config.fps:g} fps, {clips}"
    tokens = f"{config.keyframe_limit} key frames of {config.tokens_per_keyframe} tokens × {config.token_width} numbers"
    body = config.body
    return f"{body.kind}: {body.depth} layers × {body.width}, {config.text_length} text tokens, {tokens}"


def _print_sizing(sizing: Sizing, training: dict[str, dict[str, int]], batch_size: int) -> None:
    parameters = {**sizing.parameters, "together": sum(sizing.parameters.values())}
    _print_table("parameters", {name: {"count": count} for name, count in parameters.items()}, "{:,}")
    _print_table("FLOPs, one sample", {name: {"10⁹": count / 1e9} for name, count in sizing.flops.items()}, "{:,.3f}")
    held = {**sizing.inference_bytes, "together": sum(sizing.inference_bytes.values())}
    _print_bytes("to use it, one sample", {n: {"float32": c, "bfloat16": c // 2} for n, c in held.items()})
    if sizing.bytes_a_token is not None:
        read = {"weights and key/value cache": {"bfloat16": sizing.bytes_a_token}}
        _print_bytes("read for a deep token", read)
    names = next(iter(training.values()))
    rows = {name.replace("_", " "): {column: held[name] for column, held in training.items()} for name in names}
    _print_bytes(f"on a GPU to train it, batch of {batch_size}", rows)
    print("  bfloat16: all activations; autocast adds copies of the weights, 2 bytes a number, and keeps some float32")


def _print_plans(plans: Mapping[str, "Plan"]) -> None:
    """Tables of one run, a column for each number of GPUs."""
    parameters = {"trained": "trained", "frozen": "frozen"}
    counts = {row: {column: getattr(plan, name) for column, plan in plans.items()} for row, name in parameters.items()}
    _print_table("parameters", counts, "{:,}")
    memory = {column: plan.memory() for column, plan in plans.items()}
    rows = max(memory.values(), key=len)  # a single GPU has less to hold
    _print_bytes("on each GPU", {row: {column: memory[column].get(row, 0) for column in plans} for row in rows})
    tell = {
        "strategy": lambda plan: plan.strategy,
        "micro-batches of a batch": lambda plan: f"{plan.micro_batches}",
        "activations": lambda plan: "recomputed" if plan.recomputes else "kept",
        "fits": lambda plan: "yes" if plan.fits else "no",
        "fewest micro-batches that fit": lambda plan: f"{plan.fewest_micro_batches or 'none do'}",
        "TFLOP": lambda plan: f"{plan.step_flops / 1e12:,.1f}",
        "TFLOP with what is computed twice": lambda plan: f"{plan.computed_flops / 1e12:,.1f}",
        "seconds": lambda plan: f"{plan.step_s:,.3f}",
        "steps a day": lambda plan: f"{86_400 / plan.step_s:,.0f}",
        "days": lambda plan: f"{plan.days:.2g}",
    }
    steps = {row: {column: told(plan) for column, plan in plans.items()} for row, told in tell.items()}
    _print_table("a step", steps, "{}")


def _print_bytes(title: str, rows: Mapping[str, Mapping[str, int]]) -> None:
    most = max(count for row in rows.values() for count in row.values())
    unit, size = ("GiB", GIB) if most >= GIB else ("MiB", MIB)
    scaled = {name: {column: count / size for column, count in row.items()} for name, row in rows.items()}
    _print_table(f"{unit} {title}", scaled, "{:,.2f}")


def _print_table(title: str, rows: Mapping[str, Mapping[str, int | float | str]], form: str) -> None:
    columns = next(iter(rows.values()))
    print(f"\n{title:<42}" + "".join(f"{column:>15}" for column in columns))
    for name, row in rows.items():
        print(f"  {name:<40}" + "".join(f"{form.format(value).removesuffix('.0'):>15}" for value in row.values()))


def _licence(folder: Path) -> str:
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("license:")), "see the model card")
