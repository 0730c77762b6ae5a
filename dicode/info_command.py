"""What `dicode info` does; its flags are in `cli.py`."""

import dataclasses
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dicode.cli import Info
from dicode.evaluate.report import write_result
from dicode.generate import GenerationConfig
from dicode.hub import CheckpointError, config_from_dict, nearest, read_config, resolve
from dicode.lm.sizes import SIZES, DeepLMConfig
from dicode.sizing import Sizing, size_lm, size_tokenizer
from dicode.stopwatch import Stopwatch
from dicode.tokenizer.sizes import TOKENIZERS
from dicode.tokenizer.video_tokenizer import TokenizerConfig

GIB, MIB = 2**30, 2**20


def info(command: Info, watch: Stopwatch) -> int:
    """Everything is counted from configurations; no weights are read and no network takes memory.

    In training all is float32, but where activations are said to be bfloat16: see `TrainingBytes`.
    """
    if command.batch_size < 1 or not command.gpus or min(command.gpus) < 1:
        raise ValueError(
            f"expected a batch size and GPUs of at least 1, got {command.batch_size} and {list(command.gpus)}"
        )
    configs = _describe(command)
    values: dict[str, Any] = {"batch_size": command.batch_size}
    for part, config in configs.items():
        if isinstance(config, TokenizerConfig):
            sizing = size_tokenizer(config, command.batch_size)
            values["a_second_of_video"] = rates(config)
        else:
            sizing = size_lm(config, command.batch_size)
        training = {f"{n} GPU{'s' * (n > 1)}": sizing.training_bytes.on(n) for n in command.gpus}
        values[part] = {**dataclasses.asdict(sizing), "training_bytes": training}
        print(f"\n{part}")
        _print_sizing(sizing, training, command.batch_size)
    if "a_second_of_video" in values:
        _print_table("a second of video", values["a_second_of_video"], "{:,.1f}")
    if command.json is not None:
        line = "dicode " + shlex.join(sys.argv[1:])
        write_result(command.json, f"{Path(command.model).name}: sizes", values, 1, 0, line, "meta")
        print(f"\n{command.json}: the same, in bytes")
    return 0


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
    if not {"tokenizer", "lm"} <= sections.keys():
        raise CheckpointError(f"{folder}/config.json: expected sections tokenizer and lm, got {sorted(sections)}")
    tokenizer = config_from_dict(TokenizerConfig, sections["tokenizer"], "tokenizer")
    lm = config_from_dict(DeepLMConfig, sections["lm"], "lm")
    defaults = config_from_dict(GenerationConfig, sections.get("generation", {}), "generation")
    print(f"{folder}: {sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 1e6:.1f} MB")
    print(f"{_summary(tokenizer)}, up to {(lm.keyframe_limit - 1) * tokenizer.clip_s:g} s\n{_summary(lm)}")
    print("sampling: " + ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(defaults).items()))
    print(f"licence: {_licence(folder)}")
    tokenizer = dataclasses.replace(tokenizer, steps=defaults.steps, guidance=defaults.decoder_guidance)
    return {"tokenizer": tokenizer, "language model": lm}


def _summary(config: TokenizerConfig | DeepLMConfig) -> str:
    if isinstance(config, TokenizerConfig):
        clips = f"clips of {config.clip_frames} frames, a key frame every {config.clip_s:g} s"
        return f"{config.size}×{config.size} pixels, {config.fps:g} fps, {clips}"
    tokens = f"{config.keyframe_limit} key frames of {config.tokens_per_keyframe} tokens × {config.token_width} numbers"
    return f"{config.body}: {config.depth} layers × {config.width}, reads {config.text_length} text tokens, {tokens}"


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


def _print_bytes(title: str, rows: Mapping[str, Mapping[str, int]]) -> None:
    most = max(count for row in rows.values() for count in row.values())
    unit, size = ("GiB", GIB) if most >= GIB else ("MiB", MIB)
    scaled = {name: {column: count / size for column, count in row.items()} for name, row in rows.items()}
    _print_table(f"{unit} {title}", scaled, "{:,.2f}")


def _print_table(title: str, rows: Mapping[str, Mapping[str, int | float]], form: str) -> None:
    columns = next(iter(rows.values()))
    print(f"\n{title:<42}" + "".join(f"{column:>15}" for column in columns))
    for name, row in rows.items():
        print(f"  {name:<40}" + "".join(f"{form.format(value).removesuffix('.0'):>15}" for value in row.values()))


def _licence(folder: Path) -> str:
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("license:")), "see the model card")
