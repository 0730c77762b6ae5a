"""What `dicode tokenize` and `reconstruct` do; their flags are in `flags.py`."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from dicode import __version__
from dicode.checkpoint import content_hash, model_name, read_tensors, resolve
from dicode.cli.flags import Assemble, Generate, Reconstruct, Tokenize
from dicode.device import pick_device
from dicode.files import check_file, check_parent, printable, put
from dicode.pipeline import trimmed
from dicode.shapes import DeepTokens
from dicode.stopwatch import Progress, Stopwatch
from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS, WEIGHTS, VideoTokenizer
from dicode.video.read import read_video
from dicode.video.timed import Video
from dicode.video.write import VideoWriter, check_output

WATCHED = 256  # pixels along a side, at least, of a file that nobody gave a scale


TOKENS_SUFFIX = ".safetensors"


def tokenize(command: Tokenize, watch: Stopwatch) -> int:
    """The file's metadata says source, frames, fps and model."""
    output = Path(command.output)
    if output.suffix != TOKENS_SUFFIX:
        raise ValueError(f"{output}: expected a name ending in {TOKENS_SUFFIX}")
    check_parent(output)
    check_file(output)
    with watch.stage("load"):
        tokenizer, model = _load_tokenizer(command)
    with watch.stage("encode"):
        frames, tokens = _encode(tokenizer, command.input)
    fps = tokenizer.config.fps
    note = {"source": printable(Path(command.input).name), "frames": len(frames), "fps": fps, **model}
    data = save({"tokens": tokens[0].cpu()}, {name: str(value) for name, value in note.items()})
    put(output, lambda partial: partial.write_bytes(data))
    k, n, d = tokens.shape[1:]
    print(f"{output}: {k} key frames × {n} tokens × {d} numbers for {len(frames)} frames at {fps:g} fps")
    print(watch.text())
    return 0


def reconstruct(command: Reconstruct, watch: Stopwatch) -> int:
    """A video and its saved tokens give the same file."""
    is_saved = Path(command.input).suffix == TOKENS_SUFFIX
    if is_saved and command.side_by_side:
        raise ValueError(f"--side-by-side: {command.input} holds tokens, not the video to show beside them")
    check_output(command.output, scale=command.scale or 1)
    with watch.stage("load"):
        tokenizer, model = _load_tokenizer(command, getattr(torch, command.dtype))
    frames: Video | None = None
    with watch.stage("encode"):
        if is_saved:
            tokens, num_frames, source = _read_tokens(tokenizer, model, Path(command.input))
        else:
            frames, tokens = _encode(tokenizer, command.input)
            num_frames, source = len(frames), printable(Path(command.input).name)
    config = tokenizer.config
    asked = dataclasses.asdict(command.render)
    sampling = config.sampling.changed(**asked)
    stacks = tokenizer.decode(tokens, seed=command.seed, sampling=sampling)
    options = {
        "seed": command.seed,
        **{name: getattr(sampling, name) for name in asked},
        **({} if command.dtype == "float32" else {"dtype": command.dtype}),
    }
    metadata = {"source": source, **options, **model}
    scale = command.scale or to_watch(config.size)
    with written(command.output, config.fps, metadata, scale, num_frames, watch) as (writer, bar):
        for (clip,) in watch.timed("decode", trimmed(stacks, num_frames)):
            shown = clip.numpy()
            if frames is not None and command.side_by_side:
                original = frames[writer.num_frames : writer.num_frames + len(shown)]
                shown = np.concatenate([original, shown], axis=2)
            with watch.stage("write"):
                writer.write(shown)
            bar.update(len(shown))
    return 0


def origin(folder: Path, *weights: Path) -> dict[str, str]:
    """What made a file, for its metadata: model, its weights, and version."""
    return {"model": printable(model_name(folder)), "weights": content_hash(*weights), "dicode": __version__}


def to_watch(size: int) -> int:
    """How many times to enlarge frames of this side, to be watched: a 64×64 file would show a stamp, or a blur."""
    return -(-WATCHED // size)


@contextmanager
def written(
    path: str,
    fps: float,
    metadata: dict[str, Any],
    scale: int,
    num_frames: int,
    watch: Stopwatch,
    stream: bool = False,
    lossless: bool = False,
) -> Iterator[tuple[VideoWriter, Progress]]:
    """A writer and a progress bar; at the end says where the file lies and what took how long."""
    with (
        VideoWriter(path, fps, metadata, scale=scale, stream=stream, lossless=lossless) as writer,
        Progress("rendering", num_frames, "frame") as bar,
    ):
        yield writer, bar
        with watch.stage("write"):
            writer.close()
    video_s = writer.num_frames / fps
    worked_s = sum(seconds for name, seconds in watch.seconds.items() if name != "load")
    beside = writer.path / "metadata.json" if writer.path.is_dir() else writer.path.with_suffix(".json")
    print(f"{writer.path}: {video_s:g} s, {writer.num_frames} frames; prompt and options in {beside}")
    print(watch.text())
    print(f"real-time factor {video_s / worked_s:.2f}: {video_s:g} s of video in {worked_s:.2f} s, once loaded")


def asked_sampling(command: Generate | Assemble) -> dict[str, Any]:
    """The flags of `SamplingConfig`; None where one was left out."""
    return {**dataclasses.asdict(command.write), **dataclasses.asdict(command.render)}


def _load_tokenizer(
    command: Tokenize | Reconstruct, dtype: torch.dtype | None = None
) -> tuple[VideoTokenizer, dict[str, str]]:
    folder = resolve(command.model, command.revision)
    tokenizer = VideoTokenizer.from_pretrained(folder, dtype=dtype).to(pick_device(command.device))
    return tokenizer, origin(folder, folder / FIRST_STAGE_WEIGHTS, folder / WEIGHTS)


def _encode(tokenizer: VideoTokenizer, path: str) -> tuple[Video, DeepTokens]:
    frames = read_video(path, tokenizer.config.fps, tokenizer.config.size, min_frames=2).frames
    return frames, tokenizer.encode(torch.from_numpy(frames)[None]).float()


def _read_tokens(tokenizer: VideoTokenizer, model: dict[str, str], path: Path) -> tuple[DeepTokens, int, str]:
    """Tokens `1 k n d`, how many frames they stand for, and the name of the video they came from."""
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        note = file.metadata() or {}
    config = tokenizer.config
    expected = (config.resampler.queries, config.resampler.token_width)
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if list(found) != ["tokens"] or len(found["tokens"]) != 3 or found["tokens"][1:] != expected:
        raise ValueError(f"{path}: expected one tensor 'tokens' of k × {expected[0]} × {expected[1]}, got {found}")
    if note.get("weights", model["weights"]) != model["weights"]:
        raise ValueError(
            f"{path}: made by model {note.get('model')!r} with weights {note['weights']}; this is {model['model']!r} "
            f"with weights {model['weights']}: name the right one with --model"
        )
    tokens = tensors["tokens"][None].float()
    num_frames = int(note.get("frames", (tokens.shape[1] - 1) * config.tail_frame + config.repeated_frames))
    return tokens, num_frames, note.get("source", path.name)
