"""A job's files, written clip by clip: the video as it grows, then what is made of it in the end.

FOLDER/jobs/ID/image.*  last_image.*            what the client sent
FOLDER/jobs/ID/CLAIM/video.mp4  video.json      the video, which can be watched while it grows; its metadata
FOLDER/jobs/ID/CLAIM/plan.safetensors           the deep tokens of its key frames
FOLDER/jobs/ID/CLAIM/keyframes.png  thumbnail.jpg
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from dicode.checkpoint import model_origin
from dicode.files import put
from dicode.pipeline import DiCoDe, Given
from dicode.seeds import SeedPlan
from dicode.serve.request import Model, VideoRequest, numbers
from dicode.shapes import DeepTokens, KeyFrameTokens
from dicode.video.read import read_video
from dicode.video.timed import Picture
from dicode.video.write import VideoWriter

VIDEO, PLAN, KEY_FRAMES, THUMBNAIL = "video.mp4", "plan.safetensors", "keyframes.png", "thumbnail.jpg"
LEAST_SIDE = 256  # pixels of a video whose size is left open
SHOWN_SIDE = 128  # pixels of a key frame in the picture of all
Report = Callable[[float, str, dict[str, Any]], None]  # progress 0…1, kind of event, its data


def render(model: DiCoDe, known: Model, request: VideoRequest, job_folder: Path, folder: Path, report: Report) -> None:
    """Write all files of a job into a new folder; `report` is called before the first clip and after every one.

    What it raises ends the job.
    """
    folder.mkdir(parents=True)
    config, seed = model.tokenizer.config, seed_of(request)
    sampling = model.sampling.changed(**numbers(request.sampling))
    given = given_of(model, request, job_folder)
    prompt = request.storyboard or request.prompt
    seconds = None if request.shots else request.seconds
    draws: dict[str, Any] = {"seed": seed, "sampling": sampling, "given": given}
    kept: list[KeyFrameTokens] = []
    total = config.num_clips(model.num_frames(request.length_s))
    metadata = {
        "prompt": request.prompt or " ".join(f"[{own.seconds:g}s: {own.prompt}]" for own in request.shots or ()),
        **request.model_dump(exclude_none=True, exclude={"prompt", "model"}),
        **asdict(sampling),
        **model_origin(known.folder, *known.folder.glob("*.safetensors")),
    }
    key_frames = keeping(model.write([prompt], seconds=seconds, **draws), kept)
    clips = model.render(key_frames, request.length_s, **draws)
    scale = known.scale(request.size, LEAST_SIDE)
    report(0.0, "rendering", {"clips": total, "fps": config.fps, "clip_s": config.clip_s})
    with VideoWriter(folder / VIDEO, config.fps, metadata, scale=scale, stream=True) as writer:
        for number, clip in enumerate(clips, 1):
            began_s = time.monotonic()
            frames = clip[0].numpy()
            writer.write(frames)
            if number == 1:
                save_picture(folder / THUMBNAIL, enlarged(frames[0], scale))
            save_picture(folder / KEY_FRAMES, key_picture(model, torch.stack(kept, dim=1)))
            report(number / (total + 1), "clip", {"number": number, "of": total, "write_s": time.monotonic() - began_s})
    save_plan(folder / PLAN, torch.stack(kept, dim=1), metadata)


def seed_of(request: VideoRequest) -> int | SeedPlan:
    """The seed of every clip."""
    if request.reroll_from is None:
        return request.seed
    other = request.seed + 1 if request.reroll_seed is None else request.reroll_seed
    return SeedPlan(request.seed, request.reroll_from, other)


def given_of(model: DiCoDe, request: VideoRequest, job_folder: Path) -> Given:
    """The images that a video begins and ends with, or the video that it goes on from."""
    config, found = model.tokenizer.config, {}
    for name in ("image", "last_image", "continued"):
        for path in job_folder.glob(f"{name}.*"):
            frames = read_video(path, config.fps, config.size).frames
            found[name] = frames if name == "continued" else frames[:1]
    return model.given(**found, loop=request.loop)


def keeping(key_frames: Iterator[KeyFrameTokens], kept: list[KeyFrameTokens]) -> Iterator[KeyFrameTokens]:
    """The same key frames, each appended to a list as it comes."""
    for tokens in key_frames:
        kept.append(tokens.float().cpu())
        yield tokens


@torch.no_grad()
def key_picture(model: DiCoDe, tokens: DeepTokens) -> Picture:
    """Key frames `1 k n d` side by side, one frame `h (k w) c`; grey where tokens alone give no picture."""
    config = model.tokenizer.config
    if not config.has_key_latents:
        return np.full((config.size, config.size * tokens.shape[1], 3), 128, np.uint8)
    latents = model.tokenizer.key_latents(tokens[0].to(model.tokenizer.device))
    frames = model.tokenizer.frames_of(latents[:, None])[:, 0].cpu().numpy()
    return np.concatenate([enlarged(frame, -(-SHOWN_SIDE // config.size)) for frame in frames], axis=1)


def enlarged(frame: Picture, scale: int) -> Picture:
    """Every pixel as a square."""
    return frame.repeat(scale, axis=0).repeat(scale, axis=1)


def save_picture(path: Path, frame: Picture) -> None:
    """Write an image file, whole or not at all."""
    kind = Image.registered_extensions()[path.suffix]
    put(path, lambda partial: Image.fromarray(frame).save(partial, kind))


def save_plan(path: Path, tokens: DeepTokens, metadata: dict[str, Any]) -> None:
    """Deep tokens as `dicode tokenize` writes them, for `dicode reconstruct`."""
    own = {name: str(metadata[name]) for name in ("model", "weights", "dicode")}
    put(path, lambda partial: save_file({"tokens": tokens[0].contiguous()}, partial, own))
