"""Deep tokens of one video in a file: a tensor `tokens`, float32 k × n × d, and its origin as metadata."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save

from dicode.checkpoint import read_tensors
from dicode.files import put
from dicode.shapes import DeepTokens
from dicode.tokenizer.config import TokenizerConfig

SUFFIX = ".safetensors"


class VideoTokens(NamedTuple):
    """The tokens of a video."""

    tokens: DeepTokens  # `1 k n d`
    num_frames: int  # of the video
    source: str  # name of the video's file


def write_tokens(path: Path, video: VideoTokens, fps: float, origin: Mapping[str, str]) -> None:
    """Write a token file; `origin` (`model_origin`) names the model."""
    note = {"source": video.source, "frames": str(video.num_frames), "fps": str(fps), **origin}
    data = save({"tokens": video.tokens[0].cpu()}, note)
    put(path, lambda partial: partial.write_bytes(data))


def read_tokens(path: Path, config: TokenizerConfig, origin: Mapping[str, str]) -> VideoTokens:
    """Read a token file. Raises `ValueError` for tokens of another shape, or of a model with other weights."""
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        note = file.metadata() or {}
    expected = (config.resampler.queries, config.resampler.token_width)
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if list(found) != ["tokens"] or len(found["tokens"]) != 3 or found["tokens"][1:] != expected:
        raise ValueError(f"{path}: expected one tensor 'tokens' of k × {expected[0]} × {expected[1]}, got {found}")
    if note.get("weights", origin["weights"]) != origin["weights"]:
        raise ValueError(
            f"{path}: made by model {note.get('model')!r} with weights {note['weights']}; this is {origin['model']!r} "
            f"with weights {origin['weights']}: name the right one with --model"
        )
    tokens = tensors["tokens"][None].float()
    num_frames = int(note.get("frames", (tokens.shape[1] - 1) * config.tail_frame + config.repeated_frames))
    return VideoTokens(tokens, num_frames, note.get("source", path.name))
