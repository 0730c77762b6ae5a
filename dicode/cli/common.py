"""Flag types that several commands share. Importing a command's file imports neither torch nor numpy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from dicode.config import Factor, Guidance, Range, Share, Steps, StepsOrNone, Whole, missing_extra
from dicode.tokenizer.config import Joins

Seconds = Annotated[float, Range(0, 86_400, above=True)]
Days = Annotated[float, Range(0, 36_500, above=True)]
Minutes = Annotated[float, Range(0, 1_000_000, above=True)]
Scaling = Annotated[int, Range(1, 64)]
Enlarged = Annotated[
    Scaling | None, arg(help="enlargement of every pixel along each side, 1 to 64; default: to 256 pixels or more")
]
Dtype = Literal["float16", "bfloat16", "float32"]

Output = Annotated[str, arg(aliases=("-o",))]  # text, not a Path: the slash at the end of "frames/" makes it a folder
OutputPath = Annotated[Path, arg(aliases=("-o",))]
OutputFolder = Annotated[Path, arg(aliases=("-o",), help="checkpoint folder to write")]
# text, since a Path would take one slash off s3://…
Folder = Annotated[Positional[str], arg(metavar="FOLDER")]
Folders = Annotated[
    Positional[tuple[str, ...]],
    arg(
        metavar="FOLDER …", help="folders with captions.jsonl, captions.csv, .tar archives, or a .txt beside each clip"
    ),
]
Input = Annotated[Positional[str], arg(metavar="INPUT")]
CacheFolder = Annotated[Positional[str], arg(metavar="CACHE", help="folder written by `dicode data cache`")]
Model = Annotated[Positional[str], arg(metavar="MODEL")]
ModelName = Annotated[str, arg(help="bundled model, checkpoint folder, or owner/name on the Hub")]
Revision = Annotated[str | None, arg(help="branch, tag or commit of a model on the Hub; default: main")]
Device = Annotated[str, arg(help="cpu, cuda, mps, or auto for the fastest of them")]
ResultFile = Annotated[Path | None, arg(metavar="FILE", help="JSON file for the figures")]
WeightsDtype = Annotated[Dtype, arg(help="type of the weights in memory; bfloat16 is faster where supported")]
StoredDtype = Annotated[Dtype, arg(help="type of the weights on disk")]


@dataclass(frozen=True)
class WriteFlags:
    """Sampling of the language model; default: the model's own, listed by `dicode info`."""

    guidance: Guidance | None = None  # guidance scale, 0 to 1000; above 1 follows the prompt more closely
    variance_scale: Factor | None = None  # variance scale of the next tokens' distribution; 0 takes its mean
    first_variance_scale: Factor | None = None  # variance scale of the first key frame; lower follows the prompt better
    temperature: Factor | None = None  # temperature of the choice of a mixture component; 0 takes the likeliest
    flow_steps: Steps | None = None  # integration steps of a flow head
    context_key_frames: Whole | None = None  # last key frames to condition on, for videos of any length; 0: all


@dataclass(frozen=True)
class RenderFlags:
    """Sampling of the decoder; default: the model's own, listed by `dicode info`."""

    steps: StepsOrNone | None = None  # denoising steps a clip; 0: the clip expected from key frames and motion
    decoder_guidance: Guidance | None = None  # guidance scale; above 1 follows the tokens more closely
    decoder_temperature: Factor | None = None  # noise scale; below 1 clips are more coherent and move less
    guidance_rescale: Share | None = None  # strength of contrast correction for guided predictions, 0 to 1
    eta: Share | None = None  # DDIM's noise, 0 to 1, for models with its schedule
    motion_scale: Factor | None = None  # scale of the difference between frames; key frames stay as they are
    dead_band: Factor | None = None  # grey levels, 0 to 255, up to which changes of a pixel are left out as flicker
    joins: Joins | None = None  # chained: the previous clip's end as context; parallel: blended clips of one batch
    motion_tokens: Whole | None = None  # most motion tokens of a clip to write and to render from; default: all


@dataclass(frozen=True)
class MemoryFlags:
    """Less memory on the device."""

    offload: bool = False  # keep first stage, image encoder, denoiser and language model on the CPU until they compute
    vae_tiling: bool = False  # encode and decode frames above 256 pixels a side in tiles, for a first stage of Wan
    int8: bool = False  # keep matrices of denoiser, image encoder and language model 8-bit; they compute in --dtype


Write = Annotated[WriteFlags, arg(name="")]
Render = Annotated[RenderFlags, arg(name="")]
Memory = Annotated[MemoryFlags, arg(name="")]
WRITE, RENDER, MEMORY = WriteFlags(), RenderFlags(), MemoryFlags()  # nothing given


def sampling_flags(write: WriteFlags, render: RenderFlags) -> dict[str, Any]:
    """The fields of `SamplingConfig`, None where a flag was left out."""
    return {**asdict(write), **asdict(render)}


def memory_notes(memory: MemoryFlags) -> dict[str, bool]:
    """The flags that change a video, for its metadata."""
    return {name: True for name in ("vae_tiling", "int8") if getattr(memory, name)}


def load_model(command: Any) -> tuple[Any, Path]:
    """The `DiCoDe` that a command's flags name, on its device and in its dtype, and the model's folder."""
    import torch

    from dicode.checkpoint import resolve
    from dicode.device import pick_device
    from dicode.pipeline import DiCoDe

    folder, device = resolve(command.model, getattr(command, "revision", None)), str(pick_device(command.device))
    flags = asdict(getattr(command, "memory", MEMORY))
    return DiCoDe.from_pretrained(folder, device, dtype=getattr(torch, command.dtype), **flags), folder


def named(output: str) -> str:
    """The name of an output folder. Raises `ValueError` for an empty one, which would be the current folder."""
    if not output.strip():
        raise ValueError(f"-o: expected the name of a folder, got {output!r}")
    return output


def check_folders(folders: Sequence[str]) -> None:
    """Raise `ValueError` without folders of clips; an empty name would be the current folder."""
    if not folders or not all(folder.strip() for folder in folders):
        raise ValueError(f"expected at least one folder of clips, got {' '.join(map(repr, folders)) or 'none'}")


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Imports in here that fail raise an `ImportError` naming the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing_extra(error, name) from error
