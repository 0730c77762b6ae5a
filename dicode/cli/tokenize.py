"""`dicode tokenize` and `dicode reconstruct`: videos to deep tokens, and back."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dicode.cli import common
from dicode.config import DEFAULT_MODEL, Seed
from dicode.stopwatch import Progress, Stopwatch

SUFFIX = ".safetensors"  # of a file of tokens


@dataclass(frozen=True)
class Tokenize:
    """Encode a video into deep tokens: a tensor `tokens`, float32 k × n × d for k key frames of n tokens.

    Motion tokens, where a model has them, are the last of the key frame that ends their clip.
    """

    input: common.Input  # video, animated image, or folder of frames
    output: common.Output = "tokens.safetensors"  # .safetensors file to write
    model: common.ModelName = DEFAULT_MODEL
    revision: common.Revision = None
    device: common.Device = "auto"


@dataclass(frozen=True)
class Reconstruct:
    """Encode a video into deep tokens and decode them, or decode tokens that `dicode tokenize` saved.

    Of 16·N + 1 frames the last is only the last clip's tail key frame: 16·N come back.
    """

    input: common.Input  # video, animated image, folder of frames, or tokens.safetensors
    output: common.Output = "out.mp4"  # .mp4, .webm, .gif, or a folder name/ for PNG frames
    side_by_side: bool = False  # the input at the left, its reconstruction at the right
    seed: Seed = 0  # random seed of the decoder
    render: common.Render = common.RENDER
    model: common.ModelName = DEFAULT_MODEL
    revision: common.Revision = None
    scale: common.Enlarged = None
    device: common.Device = "auto"
    dtype: common.WeightsDtype = "float32"
    memory: common.Memory = common.MEMORY


def tokenize(command: Tokenize, watch: Stopwatch) -> None:
    """The file's metadata names source, frames, fps and model."""
    from dicode.files import check_file, check_parent, put
    from dicode.tokenizer.tokens_file import tokens_file

    output = Path(command.output)
    if output.suffix != SUFFIX:
        raise ValueError(f"{output}: expected a name ending in {SUFFIX}")
    check_parent(output)
    check_file(output, _is_tokens)
    tokenizer, origin = _loaded(command, None)
    frames, tokens, source = _encoded(tokenizer, command.input, watch)
    fps = tokenizer.config.fps
    data = tokens_file(tokens, tokenizer.config, len(frames), source, origin)
    put(output, lambda partial: partial.write_bytes(data))
    k, n, d = tokens.shape[1:]
    print(f"{output}: {k} key frames × {n} tokens × {d} numbers for {len(frames)} frames at {fps:g} fps")
    print(watch.text())


def reconstruct(command: Reconstruct, watch: Stopwatch) -> None:
    """A video and its saved tokens give the same file."""
    import torch

    from dicode.cli.generate import default_scale, speed, summary, write_clips
    from dicode.files import check_apart
    from dicode.pipeline import trimmed
    from dicode.tokenizer.tokens_file import read_tokens
    from dicode.video.write import VideoWriter, check_output

    is_saved = Path(command.input).suffix == SUFFIX
    if is_saved and command.side_by_side:
        raise ValueError(f"--side-by-side: {command.input} holds tokens, not the video to show beside them")
    check_output(command.output, scale=command.scale or 1)
    check_apart(command.output, Path(command.input))
    tokenizer, origin = _loaded(command, getattr(torch, command.dtype))
    config, frames = tokenizer.config, None
    if is_saved:
        tokens, num_frames, source = read_tokens(Path(command.input), config, origin)
    else:
        frames, tokens, source = _encoded(tokenizer, command.input, watch)
        num_frames = len(frames)
    flags = asdict(command.render)
    sampling = config.sampling.changed(**flags)
    metadata = {
        "source": source,
        "seed": command.seed,
        **{name: getattr(sampling, name) for name in flags},
        **({} if command.dtype == "float32" else {"dtype": command.dtype}),
        **common.memory_notes(command.memory),
        **origin,
    }
    clips = trimmed(tokenizer.decode(tokens, seed=command.seed, sampling=sampling), num_frames)
    if command.side_by_side:
        clips = _beside(frames, clips)
    scale = command.scale or default_scale(config)
    with (
        VideoWriter(command.output, config.fps, metadata, scale=scale) as writer,
        Progress("rendering", num_frames, "frame") as bar,
    ):
        write_clips([writer], clips, watch, bar)
    print(f"{summary(writer)}\n{speed(watch, writer.num_frames / config.fps)}")


def _beside(frames: Any, clips: Any) -> Any:
    """The frames of a video `f h w c`, with its reconstructed clips `1 f h w c` at their right."""
    import torch

    first = 0
    for clip in clips:
        original = torch.from_numpy(frames[None, first : first + clip.shape[1]])
        yield torch.cat([original, clip], dim=3)
        first += clip.shape[1]


def _loaded(command: Tokenize | Reconstruct, dtype: Any) -> tuple[Any, dict[str, str]]:
    """The tokenizer, and its name and hash (`model_origin`)."""
    from dicode.checkpoint import model_origin, resolve
    from dicode.device import pick_device
    from dicode.memory import load_tokenizer, offload
    from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS, WEIGHTS

    folder, device = resolve(command.model, command.revision), pick_device(command.device)
    memory: common.MemoryFlags = getattr(command, "memory", common.MEMORY)
    tokenizer = load_tokenizer(folder, str(device), dtype, **asdict(memory))
    if memory.offload:
        offload(tokenizer, None, device)
    return tokenizer, model_origin(folder, folder / FIRST_STAGE_WEIGHTS, folder / WEIGHTS)


def _encoded(tokenizer: Any, path: str, watch: Stopwatch) -> tuple[Any, Any, str]:
    """The frames of a video, their tokens `1 k n d`, and the name of its file."""
    import torch

    from dicode.files import printable
    from dicode.video.read import read_video

    config = tokenizer.config
    with watch.stage("encode"):
        frames = read_video(path, config.fps, config.frame_shape, min_frames=2).frames
        return frames, tokenizer.encode(torch.from_numpy(frames)[None]).float(), printable(Path(path).name)


def _is_tokens(path: Path) -> bool:
    """Whether a file is one of `dicode tokenize`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys()) == ["tokens"]
    except (SafetensorError, OSError):
        return False
