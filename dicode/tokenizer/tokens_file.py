"""Files of deep tokens: what `dicode tokenize` writes, and `dicode reconstruct` renders again."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from dicode.checkpoint import is_finite, read_tensors
from dicode.config import shortened
from dicode.shapes import DeepTokens
from dicode.tokenizer.config import TokenizerConfig


def tokens_file(
    tokens: DeepTokens, config: TokenizerConfig, frames: int, source: str, origin: Mapping[str, str]
) -> bytes:
    """The content of a file of one video's tokens `1 k n d`, for `dicode reconstruct`.

    `origin` is the `model_origin` of first stage and tokenizer, `frames` how many the video has.
    """
    note = {"source": source, "frames": str(frames), "fps": str(config.fps), **origin}
    return save({"tokens": tokens[0].cpu().contiguous()}, note)


def read_tokens(path: Path, config: TokenizerConfig, origin: Mapping[str, str]) -> tuple[DeepTokens, int, str]:
    """A file's tokens `1 k n d`, the video's frames and name. Raises `ValueError` for those of another model."""
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        note = file.metadata() or {}
    expected = (config.block_tokens, config.token_width)
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if list(found) != ["tokens"] or len(found["tokens"]) != 3 or found["tokens"][1:] != expected:
        raise ValueError(f"{path}: expected one tensor 'tokens' of k × {expected[0]} × {expected[1]}, got {found}")
    if note.get("weights", origin["weights"]) != origin["weights"]:
        raise ValueError(
            f"{path}: made by model {note.get('model')!r} with weights {note['weights']}; this is {origin['model']!r} "
            f"with weights {origin['weights']}: name the right one with --model"
        )
    if not (tensors["tokens"].is_floating_point() and is_finite(tensors["tokens"])):
        raise ValueError(f"{path}: expected tokens of finite floats, got {tensors['tokens'].dtype}, or NaN or infinity")
    tokens = tensors["tokens"][None].float()
    most = (tokens.shape[1] - 1) * config.tail_frame + max(1, config.repeated_frames)
    frames = note.get("frames", str(most))
    if not (frames.isdecimal() and len(frames) < 10 and 1 <= int(frames) <= most):
        about = f"{tokens.shape[1]} key frames, got {shortened(frames)}"
        raise ValueError(f"{path}: expected 1 to {most} frames of {about}")
    return tokens, int(frames), note.get("source", path.name)
