"""ComfyUI nodes (V3): text, storyboards and images to video, clips made again, videos to deep tokens and back.

ComfyUI's images are float32 `f h w c` in 0…1, at the model's own resolution.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, get_type_hints

import folder_paths
import numpy as np
import torch
from comfy.utils import ProgressBar
from comfy_api.latest import ComfyExtension, InputImpl, Types, io

from dicode.checkpoint import model_origin, resolve
from dicode.device import pick_device
from dicode.pipeline import DiCoDe, Given, length_s, trimmed
from dicode.seeds import SeedPlan
from dicode.storyboard import parse_storyboard
from dicode.tokenizer.config import SamplingConfig
from dicode.tokenizer.tokens_file import read_tokens, tokens_file
from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS, WEIGHTS
from dicode.video.images import fitted

CATEGORY = "dicode"
SAMPLING = {name: hint for name, hint in get_type_hints(SamplingConfig).items() if name != "joins"}
EXAMPLE = "[2s: a blue cube falls from above] [2s: then the blue cube turns green]"
# ComfyUI runs nodes in torch's inference mode, in which frames may differ by rounding from those of `dicode generate`.
ordinary = torch.inference_mode(mode=False)
Model, Tokens = io.Custom("DICODE_MODEL"), io.Custom("DICODE_TOKENS")


@dataclass(frozen=True)
class Loaded:
    """A model, the folder that it is from, and the sampling that nodes have set."""

    model: DiCoDe
    folder: Path
    sampling: SamplingConfig


@dataclass(frozen=True)
class Request:
    """What a video was generated from."""

    prompt: str
    seconds: float | None  # None: a storyboard's own
    seed: int | SeedPlan
    given: Given | None = None  # images that it begins or ends with


@dataclass(frozen=True)
class Written:
    """A video as deep tokens `1 k n d`, and what it was generated from; None for an encoded video."""

    tokens: torch.Tensor
    frames: int
    request: Request | None = None


@ordinary
def generated(loaded: Loaded, request: Request) -> io.NodeOutput:
    """Frames, video and tokens of a request."""
    model, prompt = loaded.model, parse_storyboard(request.prompt) or request.prompt
    draws: dict[str, Any] = {"seed": request.seed, "given": request.given, "sampling": loaded.sampling}
    length, kept = length_s([prompt], request.seconds), list[torch.Tensor]()
    key_frames = keeping(model.write([prompt], seconds=request.seconds, **draws), kept)
    images = gathered(loaded, model.render(key_frames, length, **draws), model.num_frames(length))
    written = Written(torch.stack(kept, dim=1), len(images), request)
    return io.NodeOutput(images, video_of(loaded, images), written)


def keeping(key_frames: Iterator[torch.Tensor], kept: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same tokens `1 n d`, each appended to a list as it is written."""
    for tokens in key_frames:
        kept.append(tokens.float().cpu())
        yield tokens


def gathered(loaded: Loaded, clips: Iterator[torch.Tensor], frames: int) -> torch.Tensor:
    """Clips uint8 `1 f h w c` as ComfyUI's images; its progress bar also ends the work where it is cancelled."""
    bar, images = ProgressBar(loaded.model.tokenizer.config.num_clips(frames)), []
    for clip in clips:
        images.append(clip[0].float() / 255)
        bar.update(1)
    return torch.cat(images)


def video_of(loaded: Loaded, images: torch.Tensor) -> Any:
    """ComfyUI's video of these images, at the model's rate."""
    rate = Fraction(loaded.model.tokenizer.config.fps)
    return InputImpl.VideoFromComponents(Types.VideoComponents(images=images, frame_rate=rate))


def frames_of(loaded: Loaded, images: torch.Tensor) -> np.ndarray:
    """ComfyUI's images, cropped to the model's square: uint8 `f h w c`."""
    pixels = (255 * images[..., :3].clamp(0, 1)).round().byte().cpu().numpy()
    return np.stack([fitted(Path("image"), frame, loaded.model.tokenizer.config.size, "crop") for frame in pixels])


def inputs(prompt: str, *others: io.Input) -> list[io.Input]:
    """Inputs of a node that generates: the model, the prompt with this default, these and a seed."""
    return [
        Model.Input("model"),
        io.String.Input("prompt", default=prompt, multiline=True),
        *others,
        io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=True),
    ]


def seconds() -> io.Input:
    """The input for the length of a video."""
    return io.Float.Input("seconds", default=4.0, min=0.125, max=600.0, step=0.125)


def outputs() -> list[io.Output]:
    """Outputs of a node that generates; without ids, which earlier versions compare with those of inputs."""
    names = ((io.Image, "images"), (io.Video, "video"), (Tokens, "tokens"))
    return [kind.Output(display_name=name) for kind, name in names]


class LoadModel(io.ComfyNode):
    """A bundled model, a checkpoint folder, or a Hub id."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """As ComfyUI shows it."""
        tooltip = "blocks, sprites or world; a checkpoint folder; or owner/name on the Hugging Face Hub"
        return io.Schema(
            node_id="DiCoDeLoadModel",
            display_name="DiCoDe: load model",
            category=CATEGORY,
            inputs=[
                io.String.Input("name", default="blocks", tooltip=tooltip),
                io.Combo.Input("device", options=["auto", "cpu", "cuda", "mps"], default="auto"),
            ],
            outputs=[Model.Output(display_name="model")],
        )

    @classmethod
    @ordinary
    def execute(cls, name: str, device: str) -> io.NodeOutput:
        """Nothing is downloaded but what a Hub id names."""
        folder = resolve(name)
        model = DiCoDe.from_pretrained(folder, device=str(pick_device(device)))
        return io.NodeOutput(Loaded(model, folder, model.sampling))


class SetSampling(io.ComfyNode):
    """Changes one sampling option of a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """As ComfyUI shows it."""
        return io.Schema(
            node_id="DiCoDeSetSampling",
            display_name="DiCoDe: set a sampling option",
            category=CATEGORY,
            description="Options that are not set are the model's own. Chain several nodes to set several options.",
            inputs=[
                Model.Input("model"),
                io.Combo.Input("option", options=list(SAMPLING), default="guidance"),
                io.Float.Input("value", default=3.0, min=0.0, max=1000.0, step=0.01),
            ],
            outputs=[Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model: Loaded, option: str, value: float) -> io.NodeOutput:
        """Raises `ValueError` for a value out of range, and for a fraction where an option counts something."""
        counts = SAMPLING[option] in (int, int | None)
        if counts and not value.is_integer():
            raise ValueError(f"{option}: expected a whole number, got {value:g}")
        changed = model.sampling.changed(**{option: int(value) if counts else value})
        return io.NodeOutput(replace(model, sampling=changed))


class TextToVideo(io.ComfyNode):
    """A prompt to a video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """As ComfyUI shows it."""
        return io.Schema(
            node_id="DiCoDeTextToVideo",
            display_name="DiCoDe: text to video",
            category=CATEGORY,
            inputs=inputs("a red ball rolls in from the left, then it jumps", seconds()),
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, model: Loaded, prompt: str, seconds: float, seed: int) -> io.NodeOutput:
        """The same inputs give the same video."""
        return generated(model, Request(prompt, seconds, seed))


class Storyboard(io.ComfyNode):
    """A prompt that changes over time."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """As ComfyUI shows it."""
        return io.Schema(
            node_id="DiCoDeStoryboard",
            display_name="DiCoDe: storyboard",
            category=CATEGORY,
            description=f"Shots of whole clips (two seconds in the bundled models), such as {EXAMPLE}",
            inputs=inputs(EXAMPLE),
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, model: Loaded, prompt: str, seed: int) -> io.NodeOutput:
        """Raises `ValueError` for a prompt without shots."""
        if parse_storyboard(prompt) is None:
            raise ValueError(f"expected shots with their seconds, such as {EXAMPLE!r}, got {prompt!r}")
        return generated(model, Request(prompt, None, seed))


class ImageToVideo(io.ComfyNode):
    """A first image, a last one, or a loop."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """As ComfyUI shows it."""
        return io.Schema(
            node_id="DiCoDeImageToVideo",
            display_name="DiCoDe: image to video",
            category=CATEGORY,
            description="The image is the first frame. A last image or a loop more than one clip away needs a model "
            "with end-frame conditioning: sprites and world.",
            inputs=[
                *inputs("then it jumps", io.Image.Input("image"), seconds(), io.Boolean.Input("loop", default=False)),
                io.Image.Input("last_image", optional=True),
            ],
            outputs=outputs(),
        )

    @classmethod
    @ordinary
    def execute(
        cls,
        model: Loaded,
        prompt: str,
        image: torch.Tensor,
        seconds: float,
        loop: bool,
        seed: int,
        last_image: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        """Of a batch of images the first is taken, of last images the last."""
        last = None if last_image is None else frames_of(model, last_image[-1:])
        given = model.model.given(image=frames_of(model, image[:1]), last_image=last, loop=loop)
        return generated(model, Request(prompt, seconds, seed, given))


class Reroll(io.ComfyNode):
    """The same video with another seed from a clip on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """As ComfyUI shows it."""
        return io.Schema(
            node_id="DiCoDeReroll",
            display_name="DiCoDe: reroll clips",
            category=CATEGORY,
            description="Clips before `from_clip` stay as they are. Clips after the rerolled ones change too, less.",
            inputs=[
                Model.Input("model"),
                Tokens.Input("tokens", tooltip="of a node that generates, with the same model"),
                io.Int.Input("from_clip", default=1, min=0, max=100_000, tooltip="counted from 0"),
                io.Int.Input("clips", default=0, min=0, max=100_000, tooltip="0: all that follow"),
                io.Int.Input("seed", default=1, min=0, max=2**63 - 1, control_after_generate=True),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, model: Loaded, tokens: Written, from_clip: int, clips: int, seed: int) -> io.NodeOutput:
        """Raises `ValueError` for the tokens of an encoded video, or of one that was rerolled."""
        request = tokens.request
        if request is None or not isinstance(request.seed, int):
            raise ValueError("expected the tokens of a node that generates, not of encode, load or reroll")
        plan = SeedPlan(request.seed, from_clip, seed, clips or None)
        return generated(model, replace(request, seed=plan))


class EncodeVideo(io.ComfyNode):
    """A video to deep tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """As ComfyUI shows it."""
        return io.Schema(
            node_id="DiCoDeEncodeVideo",
            display_name="DiCoDe: video to tokens",
            category=CATEGORY,
            inputs=[Model.Input("model"), io.Video.Input("video")],
            outputs=[Tokens.Output(display_name="tokens")],
        )

    @classmethod
    @ordinary
    def execute(cls, model: Loaded, video: Any) -> io.NodeOutput:
        """Frames at the model's rate, cropped to its square. Raises `ValueError` for fewer than two."""
        parts, fps = video.get_components(), model.model.tokenizer.config.fps
        step = float(parts.frame_rate) / fps
        shown = [int(number * step) for number in range(round(len(parts.images) / step))]
        frames = torch.from_numpy(frames_of(model, parts.images[shown]))
        tokens = model.model.tokenizer.encode(frames[None]).float().cpu()
        most = (tokens.shape[1] - 1) * model.model.tokenizer.config.tail_frame  # a last key frame is not rendered
        return io.NodeOutput(Written(tokens, min(len(frames), most)))


class DecodeTokens(io.ComfyNode):
    """Deep tokens to a video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """As ComfyUI shows it."""
        return io.Schema(
            node_id="DiCoDeDecodeTokens",
            display_name="DiCoDe: tokens to video",
            category=CATEGORY,
            inputs=[
                Model.Input("model"),
                Tokens.Input("tokens"),
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=True),
            ],
            outputs=outputs()[:2],
        )

    @classmethod
    @ordinary
    def execute(cls, model: Loaded, tokens: Written, seed: int) -> io.NodeOutput:
        """Another seed renders another video of the same plan."""
        clips = model.model.tokenizer.decode(tokens.tokens, seed=seed, sampling=model.sampling)
        images = gathered(model, trimmed(clips, tokens.frames), tokens.frames)
        return io.NodeOutput(images, video_of(model, images))


class SaveTokens(io.ComfyNode):
    """Deep tokens to a file that `dicode reconstruct` reads."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """As ComfyUI shows it."""
        return io.Schema(
            node_id="DiCoDeSaveTokens",
            display_name="DiCoDe: save tokens",
            category=CATEGORY,
            inputs=[
                Model.Input("model"),
                Tokens.Input("tokens"),
                io.String.Input("filename_prefix", default="dicode/tokens"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Loaded, tokens: Written, filename_prefix: str) -> io.NodeOutput:
        """In ComfyUI's output folder, with a number."""
        folder, name, counter, *_ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        path = Path(folder) / f"{name}_{counter:05}_.safetensors"
        config = model.model.tokenizer.config
        path.write_bytes(tokens_file(tokens.tokens, config, tokens.frames, path.name, origin_of(model)))
        return io.NodeOutput()


class LoadTokens(io.ComfyNode):
    """Deep tokens of a file of `dicode tokenize`, or of the node that saves them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """As ComfyUI shows it."""
        tooltip = "a path in ComfyUI's output folder, or an absolute one"
        return io.Schema(
            node_id="DiCoDeLoadTokens",
            display_name="DiCoDe: load tokens",
            category=CATEGORY,
            inputs=[
                Model.Input("model"),
                io.String.Input("file", default="dicode/tokens_00001_.safetensors", tooltip=tooltip),
            ],
            outputs=[Tokens.Output(display_name="tokens")],
        )

    @classmethod
    def execute(cls, model: Loaded, file: str) -> io.NodeOutput:
        """Raises `ValueError` for tokens of another model."""
        path = Path(folder_paths.get_output_directory()) / file
        tokens, frames, _ = read_tokens(path, model.model.tokenizer.config, origin_of(model))
        return io.NodeOutput(Written(tokens, frames))

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: object) -> float:
        """So that a file that has changed is read again."""
        return os.path.getmtime(Path(folder_paths.get_output_directory()) / file)


def origin_of(loaded: Loaded) -> dict[str, str]:
    """Name and weights of the model, as files of tokens note them."""
    return model_origin(loaded.folder, loaded.folder / FIRST_STAGE_WEIGHTS, loaded.folder / WEIGHTS)


class Extension(ComfyExtension):
    """All nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """In the order of a workflow."""
        return [LoadModel, SetSampling, TextToVideo, Storyboard, ImageToVideo, Reroll, EncodeVideo, DecodeTokens,
                SaveTokens, LoadTokens]  # fmt: skip


async def comfy_entrypoint() -> Extension:
    """What ComfyUI calls."""
    return Extension()
