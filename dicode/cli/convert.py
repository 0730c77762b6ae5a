"""`dicode convert …`: published weights to checkpoint folders."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from dicode.cli import common
from dicode.config import Range, Side
from dicode.stopwatch import Stopwatch

Tower = Annotated[Path | None, arg(help="OpenCLIP ViT-H/14, file or folder, where the checkpoint lacks a tower")]
Weights = Annotated[Positional[Path], arg(metavar="WEIGHTS")]


@dataclass(frozen=True)
class Official:
    """Convert the published DiCoDe weights into a checkpoint folder. Every tensor is used, or named with the reason."""

    output: common.OutputFolder
    tokenizer: Path | None = None  # models/pytorch_model.bin
    lm: Path | None = None  # models/gpt2_large.bin
    clip: Tower = None
    vocabulary: str = "openai-community/gpt2"  # GPT-2's: a folder with vocab.json and merges.txt, or an id on the Hub
    dtype: common.StoredDtype = "float16"


@dataclass(frozen=True)
class Dynamicrafter:
    """Convert DynamiCrafter into a checkpoint folder from which to train a tokenizer (recipes/paper.py)."""

    checkpoint: Annotated[Positional[Path], arg(metavar="CHECKPOINT")]  # model.ckpt
    output: common.OutputFolder
    clip: Tower = None
    objective: Literal["epsilon", "v_prediction"] | None = None  # training objective; default: by its betas
    dtype: common.StoredDtype = "float16"


@dataclass(frozen=True)
class Clip:
    """Convert OpenCLIP's weights into a folder of transformers, or those of transformers into a file of OpenCLIP."""

    weights: Weights  # file, or folder with one
    output: common.OutputFolder
    dtype: common.StoredDtype = "float32"


@dataclass(frozen=True)
class Vae:
    """Convert CompVis' autoencoder, alone or within a larger checkpoint, into a folder of diffusers."""

    weights: Weights  # torch or safetensors file
    output: common.OutputFolder
    dtype: common.StoredDtype = "float32"


@dataclass(frozen=True)
class Wan:
    """Convert a folder of Wan 2.1 or 2.2, as diffusers writes it, into a checkpoint to train a tokenizer from."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]  # with model_index.json, transformer/ and vae/
    output: common.OutputFolder
    null_text: Path | None = None  # safetensors file of the null prompt's 512 rows, in place of the text encoder
    text_encoder: Path | None = None  # folder of UMT5 and its tokenizer; default: those of FOLDER
    image_encoder: Annotated[
        Path | None,
        arg(help="tower of CLIP or SigLIP, file or folder, that deep tokens come from; default: latents of key frames"),
    ] = None
    size: Side = 256  # side of videos in pixels; their height with --frame-width
    frame_width: Side | None = None  # width of videos in pixels, where they are not square; needs an image encoder
    clip_frames: Annotated[int, Range(5, 257)] = 33  # frames of a clip of two seconds, with both key frames: 4 n + 1
    dtype: common.StoredDtype = "float16"


def official(command: Official, watch: Stopwatch) -> None:
    """Reports what became of every tensor, as all of these commands do."""
    from dicode.checkpoint.hub import downloaded
    from dicode.convert.official import convert_official
    from dicode.lm.text import TextTokenizer

    vocabulary = None
    if command.lm is not None:
        folder, files = Path(command.vocabulary), ("vocab.json", "merges.txt")
        vocabulary = TextTokenizer.gpt2(folder if folder.is_dir() else downloaded(command.vocabulary, files))
    named: dict[str, Any] = {"clip": command.clip, "vocabulary": vocabulary}
    _run(partial(convert_official, command.output, command.tokenizer, command.lm, **named), command, watch)


def dynamicrafter(command: Dynamicrafter, watch: Stopwatch) -> None:
    """Writes a checkpoint folder."""
    from dicode.convert.official import convert_dynamicrafter

    named: dict[str, Any] = {"clip": command.clip, "objective": command.objective}
    _run(partial(convert_dynamicrafter, command.checkpoint, command.output, **named), command, watch)


def clip(command: Clip, watch: Stopwatch) -> None:
    """The names in the file determine the direction."""
    from dicode.convert.priors import convert_clip

    _run(partial(convert_clip, command.weights, command.output), command, watch, own=())


def wan(command: Wan, watch: Stopwatch) -> None:
    """Writes a checkpoint folder."""
    from dicode.convert.wan import convert_wan

    names = ("null_text", "text_encoder", "image_encoder", "size", "frame_width", "clip_frames")
    named: dict[str, Any] = {name: getattr(command, name) for name in names}
    _run(partial(convert_wan, command.folder, command.output, **named), command, watch)


def vae(command: Vae, watch: Stopwatch) -> None:
    """`diffusers_first_stage` reads what it writes."""
    from dicode.convert.priors import convert_vae

    _run(partial(convert_vae, command.weights, command.output), command, watch, own=())


def _run(convert: Callable[..., Any], command: Any, watch: Stopwatch, own: tuple[str, ...] | None = None) -> None:
    """Convert and report; `own` are the names in the output that may be replaced, by default those of a model."""
    import torch

    from dicode.checkpoint import FILES
    from dicode.checkpoint.saving import check_model_folder

    check_model_folder(command.output, own=FILES if own is None else own)
    with watch.stage("convert"):
        report = convert(dtype=getattr(torch, command.dtype))
    print(f"{command.output}: {sum(report.used.values()):,} numbers\n{report.text()}\n{watch.text()}")
