"""`dicode info`: parameters, FLOPs, memory and training plans, counted from configurations."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from dicode.cli import common
from dicode.config import DEFAULT_MODEL, CheckpointError, Count, Items, Range, nearest
from dicode.lm.config import DeepLMConfig
from dicode.lm.presets import SIZES
from dicode.stopwatch import Stopwatch, duration
from dicode.tokenizer.config import TokenizerConfig
from dicode.tokenizer.presets import TOKENIZERS

GIB, MIB = 2**30, 2**20
Rows = Mapping[str, Mapping[str, Any]]  # of a table: values by column
Configs = dict[str, TokenizerConfig | DeepLMConfig]  # by part of a model


@dataclass(frozen=True)
class Info:
    """Show the requirements of a model, preset or recipe: parameters, FLOPs, memory; tokens and bits a second of video.

    For a recipe (recipes/paper.py:gpt2, or all of recipes/paper.py) it plans the training, as the recipe is or as the
    flags change it.
    """

    # bundled model, checkpoint folder, id on the Hub, preset, FILE.py:RUN or FILE.py
    model: common.Model = DEFAULT_MODEL
    revision: common.Revision = None
    here: bool = False  # measured time of each stage on this machine, for a recipe file with STAGES
    gpus: Annotated[tuple[Count, ...], Items(1, 64)] | None = None  # numbers of GPUs; default: 1, for models 1 and 8
    batch_size: Count | None = None  # samples a GPU, default 1; for a recipe samples a step, default the recipe's
    gpu: str = "a100-80gb"  # kind of GPU, for recipes
    mfu: Annotated[float, Range(0, 1, above=True)] = 0.4  # assumed share of its peak FLOP/s, 0 to 1, for recipes
    strategy: Literal["ddp", "fsdp"] | None = None  # all weights on each GPU, or a share; default: the recipe's
    micro_batches: Count | None = None  # micro-batches of a batch; default: the recipe's
    json: common.ResultFile = None


def info(command: Info, watch: Stopwatch) -> None:
    """Everything is counted from configurations; no weights are read and no network takes memory.

    Training is that of the training loop: see `sizing/plan.py`.
    """
    is_recipe = bool(re.search(r"\.py(:[^:]*)?$", command.model))
    gpus = command.gpus or ((1,) if is_recipe else (1, 8))
    if command.here and not is_recipe:
        raise ValueError(f"--here: measures the stages of a recipe file, such as recipes/small.py; got {command.model}")
    if command.json is not None:
        from dicode.provenance import check_result

        check_result(command.json)
    if command.here:
        values = _paces(command.model)
    elif is_recipe:
        values = _plans(command, gpus)
    else:
        values = _sizes(command, gpus)
    if command.json is not None:
        from dicode.provenance import command_line, write_result

        name = f"{Path(command.model).name}: {'plans' if is_recipe else 'sizes'}"
        write_result(command.json, name, values, 1, 0, command_line(), "meta")
        print(f"\n{command.json}: the same, in bytes")


def _sizes(command: Info, gpus: tuple[int, ...]) -> dict[str, Any]:
    """Print and return the requirements of a model's parts."""
    from dicode.sizing.count import size_lm, size_tokenizer
    from dicode.sizing.plan import training_needs

    batch_size = command.batch_size or 1
    values: dict[str, Any] = {"batch_size": batch_size}
    described = _described(command)
    for part, config in described.items():
        flops, needs = training_needs(config, batch_size, gpus)
        training = {f"{n} GPU{'s' * (n > 1)}": held for n, held in needs.items()}
        if isinstance(config, TokenizerConfig):
            sizing: dict[str, Any] = size_tokenizer(config)
            sample, values["a_second_of_video"] = "clip", _rates(config)
        else:
            sizing, sample = size_lm(config), "sequence"
        sizing["flops"][f"{sample} trained on"] = flops
        values[part] = {**sizing, "training_bytes": training}
        print(f"\n{part}")
        _print_table("parameters", {name: {"count": n} for name, n in _with_sum(sizing["parameters"]).items()}, "{:,}")
        _print_table("FLOPs, one sample", {name: {"10⁹": n / 1e9} for name, n in sizing["flops"].items()}, "{:,.3f}")
        held = _with_sum(sizing["inference_bytes"])
        _print_bytes("to use it, one sample", {name: {"float32": n, "bfloat16": n // 2} for name, n in held.items()})
        if "bytes_a_token" in sizing:
            read = {"weights and key/value cache": {"bfloat16": sizing["bytes_a_token"]}}
            _print_bytes("read for a deep token", read)
        _print_bytes(f"on a GPU to train it, batch of {batch_size}", _transposed(training))
    if isinstance(tokenizer := described.get("tokenizer"), TokenizerConfig):
        values["generation_bytes"] = flags = _generation(tokenizer, described.get("language model"))
        title = (
            "to generate with it, a video at a time" if len(described) > 1 else "to decode with it, a clip at a time"
        )
        _print_bytes(f"on a device {title}", flags)
    if "a_second_of_video" in values:
        _print_table("a second of video", values["a_second_of_video"], "{:,.1f}")
    return values


def _generation(tokenizer: TokenizerConfig, lm: Any) -> dict[str, dict[str, int]]:
    """Bytes on a device by flags of `dicode generate` and type of the weights."""
    import torch

    from dicode.sizing.generation import generation_bytes

    columns = {name: generation_bytes(tokenizer, lm, getattr(torch, name)) for name in ("float32", "bfloat16")}
    return _transposed(columns)


def _plans(command: Info, gpus: tuple[int, ...]) -> dict[str, Any]:
    """Print and return what it takes to train the runs of a recipe."""
    from dicode.device import GPUS
    from dicode.sizing.plan import USABLE, Planner

    if command.gpu not in GPUS:
        raise ValueError(f"gpu: {command.gpu!r} is none of {', '.join(GPUS)}{nearest(command.gpu, list(GPUS))}")
    gpu = GPUS[command.gpu]
    assumed = {"memory_gib": gpu.memory_gib, "peak_flops": gpu.peak_flops, "mfu": command.mfu, "usable_memory": USABLE}
    values: dict[str, Any] = {"assumed": {"gpu": command.gpu, **assumed}}
    for name, run in _runs(command).items():
        planner = Planner(run)
        plans = {n: planner.plan(n, gpu, command.mfu) for n in gpus}
        values[name] = {f"{n} GPU{'s' * (n > 1)}": plan for n, plan in plans.items()}
        print(f"\n{name}: {run.loop.optim.steps:,} steps with a batch of {run.loop.optim.batch_size}")
        by_column = {f"{n} × {command.gpu}": plan for n, plan in plans.items()}
        counts = {c: {name: plan[name] for name in ("trained", "frozen")} for c, plan in by_column.items()}
        _print_table("parameters", _transposed(counts), "{:,}")
        _print_bytes("on each GPU", _transposed({column: _memory(plan) for column, plan in by_column.items()}))
        _print_table("a step", _transposed({column: _step(plan) for column, plan in by_column.items()}), "{}")
    print(f"\nAssumed: {command.mfu:.0%} of {gpu.peak_flops / 1e12:g} TFLOP/s; {USABLE:.0%} of {gpu.memory_gib:g} GiB")
    return values


def _memory(plan: Mapping[str, Any]) -> dict[str, int]:
    """Bytes on each GPU: each part, their sum, and activations kept or recomputed."""
    return {
        **_with_sum(plan["bytes_held"]),
        **{f"activations, if {how}": count for how, count in plan["activations"].items()},
        "in validation, before activations": plan["validation_bytes"],
    }


def _step(plan: Mapping[str, Any]) -> dict[str, str]:
    """A step of a plan, in words."""
    return {
        "strategy": plan["strategy"],
        "micro-batches of a batch": f"{plan['micro_batches']}",
        "activations": "recomputed" if plan["recomputes"] else "kept",
        "fits": "yes" if plan["fits"] else "no",
        "fewest micro-batches that fit": f"{plan['fewest_micro_batches'] or 'none do'}",
        "TFLOP": f"{plan['step_flops'] / 1e12:,.1f}",
        "TFLOP with what is computed twice": f"{plan['computed_flops'] / 1e12:,.1f}",
        "seconds": f"{plan['step_s']:,.3f}",
        "steps a day": f"{86_400 / plan['step_s']:,.0f}",
        "days": f"{plan['days']:.2g}",
        "samples a second": f"{plan['batch_size'] / plan['step_s']:,.3g}",
        **{
            f"days for {count:,} samples": f"{count / plan['batch_size'] * plan['step_s'] / 86_400:.2g}"
            for count in (100_000, 1_000_000)
        },
    }


def _paces(recipe: str) -> dict[str, Any]:
    """Measure how long the stages of a recipe take on this machine; print and return it."""
    import torch

    from dicode.train.chain import Chain
    from dicode.train.runs import LinearCodeRun

    file, _, only = recipe.rpartition(":") if ":" in recipe else (recipe, "", "")
    chain = Chain(file, None, Path("runs"))
    runs = {name: run for name, run in chain.stages.items() if not isinstance(run, LinearCodeRun)}
    if only and only not in runs:
        raise ValueError(f"{file}: STAGES has no {only!r} that takes steps{nearest(only, list(runs))}")
    paces = chain.paces(only or None)
    rows: dict[str, dict[str, str]] = {}
    for name, pace in paces.items():
        loop = runs[name].loop
        seconds = loop.optim.steps * pace.step_s + loop.optim.steps // loop.evaluate_every * pace.evaluation_s
        rows[name] = {
            "steps": f"{loop.optim.steps:,}",
            "s a step": f"{pace.step_s:.3g}",
            "all steps": duration(seconds),
            "a minute": f"{60 / pace.step_s:,.0f} steps",
        }
    print(f"\nOn this machine, {torch.get_num_threads()} threads; measured on drawn clips")
    _print_table("stage", rows, "{}")
    return {name: asdict(pace) for name, pace in paces.items()}


def _runs(command: Info) -> dict[str, Any]:
    """The runs of a recipe file, or the one named, changed by the flags that were given."""
    from dicode.train.runs import LoopConfig, load_run, runs_of

    file, _, name = command.model.rpartition(":")
    runs = runs_of(command.model) if command.model.endswith(".py") else {name: load_run(f"{file}:{name}")}
    for name, run in runs.items():
        if not isinstance(getattr(run, "loop", None), LoopConfig):
            raise ValueError(f"{file or command.model}:{name}: expected a run to plan, got {type(run).__name__}")
        changes = {"micro_batches": command.micro_batches, "strategy": command.strategy}
        loop = replace(run.loop, **{key: value for key, value in changes.items() if value is not None})
        if command.batch_size is not None:
            loop = replace(loop, optim=replace(loop.optim, batch_size=command.batch_size))
        runs[name] = replace(run, loop=loop)
    return runs


def _rates(config: TokenizerConfig) -> dict[str, dict[str, float]]:
    """Tokens, numbers and bits of a second of video, as deep tokens, latents and pixels."""
    latents, latents_s = config.first_stage.latent_channels, config.fps / config.first_stage.frames_a_latent
    counts = {  # tokens a second, numbers a token, bits a number
        "deep tokens (float32)": (config.block_tokens / config.clip_s, config.token_width, 32),
        "latents (float32)": (latents_s * math.prod(config.latent_shape), latents, 32),
        "pixels (uint8)": (config.fps * math.prod(config.frame_shape), 3, 8),
    }
    return {
        name: {"tokens": tokens, "numbers": tokens * numbers, "bits": tokens * numbers * bits}
        for name, (tokens, numbers, bits) in counts.items()
    }


def _described(command: Info) -> Configs:
    """Print a line or two about a checkpoint folder or a preset; returns the configurations of its parts."""
    from dicode.checkpoint import read_config, read_section, resolve
    from dicode.tokenizer.video_tokenizer import WEIGHTS

    presets: Configs = {**SIZES, **TOKENIZERS}
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
    parts: Configs = {}
    # a language model's run keeps the configuration of the tokenizer that its tokens came from, not the tokenizer
    if "tokenizer" in sections and (folder / WEIGHTS).exists():
        parts["tokenizer"] = tokenizer = read_section(folder, "tokenizer", TokenizerConfig)
    if "lm" in sections:
        parts["language model"] = lm = read_section(folder, "lm", DeepLMConfig)
    print("\n".join(_summary(config) for config in parts.values()))
    if len(parts) == 2:
        print(f"up to {(lm.keyframe_limit - 1) * tokenizer.clip_s:g} s")
        print("sampling: " + ", ".join(f"{name} {value}" for name, value in asdict(tokenizer.sampling).items()))
    print(f"licence: {_licence(folder)}")
    return parts


def _summary(config: TokenizerConfig | DeepLMConfig) -> str:
    if isinstance(config, TokenizerConfig):
        clips = f"clips of {config.clip_frames} frames, a key frame every {config.clip_s:g} s"
        height, width = config.frame_shape
        return f"{width}×{height} pixels, {config.fps:g} fps, {clips}"
    motion = f" + {config.motion_tokens}" if config.motion_tokens else ""
    count = f"{config.keyframe_limit} key frames of {config.tokens_per_keyframe}{motion}"
    tokens = f"{count} tokens × {config.token_width} numbers"
    body = config.body
    return f"{body.kind}: {body.depth} layers × {body.width}, {config.text_length} text tokens, {tokens}"


def _licence(folder: Path) -> str:
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("license:")), "see the model card")


def _with_sum(counts: Mapping[str, int]) -> dict[str, int]:
    return {**counts, "together": sum(counts.values())}


def _transposed(columns: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows by name of what is given by column; a number that a column lacks is 0."""
    longest = max(columns.values(), key=len)  # a single GPU has less to hold
    return {row.replace("_", " "): {name: values.get(row, 0) for name, values in columns.items()} for row in longest}


def _print_bytes(title: str, rows: Rows) -> None:
    most = max(count for row in rows.values() for count in row.values())
    unit, size = ("GiB", GIB) if most >= GIB else ("MiB", MIB)
    scaled = {name: {column: count / size for column, count in row.items()} for name, row in rows.items()}
    _print_table(f"{unit} {title}", scaled, "{:,.2f}")


def _print_table(title: str, rows: Rows, form: str) -> None:
    columns = next(iter(rows.values()))
    print(f"\n{title:<42}" + "".join(f"{column:>15}" for column in columns))
    for name, row in rows.items():
        print(f"  {name:<40}" + "".join(f"{form.format(value).removesuffix('.0'):>15}" for value in row.values()))
