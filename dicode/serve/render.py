"""A job rendered: its files, written clip by clip."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dicode.checkpoint import model_origin
from dicode.files import put
from dicode.pipeline import DiCoDe, Given, trimmed
from dicode.seeds import SeedPlan
from dicode.serve.names import KEY_FRAMES, LEAST_SIDE, MOST_RECONSTRUCTED_S, PLAN, SOURCE, THUMBNAIL, VIDEO
from dicode.serve.request import Model, RequestError, VideoRequest, numbers
from dicode.shapes import KeyFrameTokens
from dicode.tokenizer.config import SamplingConfig, TokenizerConfig
from dicode.tokenizer.tokens_file import tokens_file
from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS, WEIGHTS
from dicode.video.read import VideoReadError, read_video
from dicode.video.timed import Picture, Video
from dicode.video.write import VideoWriter

SHOWN_SIDE = 128  # pixels of a key frame in the picture of all
AHEAD_S = 2.0  # of a live video that is not watched yet, below which the next clip is rendered
LIVE_CONTEXT = 4  # key frames that a live video goes on from, where the model sets no number
Report = Callable[[float, str, dict[str, Any]], None]  # progress 0…1, kind of event ("": none), its data


@dataclass(frozen=True)
class Work:
    """A job to render: what was asked for, where its files are, and what to report to."""

    model: DiCoDe
    known: Model
    request: VideoRequest
    job_folder: Path
    folder: Path
    report: Report

    @property
    def sampling(self) -> SamplingConfig:
        """The model's own, with what the request changes."""
        return self.model.sampling.changed(**numbers(self.request.sampling))

    def metadata(self) -> dict[str, Any]:
        """Of the video, to make it again."""
        shots = " ".join(f"[{own.seconds:g}s: {own.prompt}]" for own in self.request.shots or ())
        return {
            "prompt": self.request.prompt or shots,
            **self.request.model_dump(exclude_none=True, exclude={"prompt", "model", "given"}),
            **asdict(self.sampling),
            **model_origin(self.known.folder, *self.known.folder.glob("*.safetensors")),
        }

    def writer(self, name: str = VIDEO) -> VideoWriter:
        """Of a video, which can be watched while it grows."""
        scale, fps = self.known.scale(self.request.size, LEAST_SIDE), self.model.tokenizer.config.fps
        return VideoWriter(self.folder / name, fps, self.metadata(), scale=scale, stream=True)

    def write_clips(self, writer: VideoWriter, clips: Iterator[Video], total: int, kept: list[KeyFrameTokens]) -> None:
        """Write clips and pictures of the key frames `kept` as they come, and report; then the plan."""
        model, pictures = self.model, list[Picture]()
        for number, clip in enumerate(clips, 1):
            writer.write(clip)
            if number == 1:
                save_picture(self.folder / THUMBNAIL, enlarged(clip[len(clip) // 2], writer.scale))
            pictures += [key_picture(model, tokens) for tokens in kept[len(pictures) :]]
            save_picture(self.folder / KEY_FRAMES, np.concatenate(pictures, axis=1))
            self.report(number / (total + 1), "clip", {"number": number, "of": total})
        origin = model_origin(self.known.folder, self.known.folder / FIRST_STAGE_WEIGHTS, self.known.folder / WEIGHTS)
        data = tokens_file(torch.stack(kept, dim=1), model.tokenizer.config, writer.num_frames, VIDEO, origin)
        put(self.folder / PLAN, lambda partial: partial.write_bytes(data))


def render(work: Work) -> None:
    """Write all files of a job into a new folder; reports before the first clip and after every one.

    What it raises ends the job.
    """
    work.folder.mkdir(parents=True)
    model, request, config = work.model, work.request, work.model.tokenizer.config
    given = given_of(model, request, work.job_folder)
    draws: dict[str, Any] = {"seed": seed_of(request), "sampling": work.sampling, "given": given}
    kept: list[KeyFrameTokens] = []
    total = config.num_clips(model.num_frames(request.length_s))
    prompt, seconds = request.storyboard or request.prompt, None if request.shots else request.seconds
    key_frames = keeping(model.write([prompt], seconds=seconds, **draws), kept)
    clips = model.render(key_frames, request.length_s, **draws)
    work.report(0.0, "rendering", {"clips": total, "fps": config.fps, "clip_s": config.clip_s})
    with work.writer() as writer:
        work.write_clips(writer, (clip[0].numpy() for clip in clips), total, kept)


def reconstruct(work: Work) -> float:
    """Write a given video from its own deep tokens, and beside it as the model sees it; returns its seconds.

    Of a long one the first `MOST_RECONSTRUCTED_S` are taken. What it raises ends the job.
    """
    work.folder.mkdir(parents=True)
    model, config = work.model, work.model.tokenizer.config
    (path,) = work.job_folder.glob("source.*")
    frames = frames_of(path, config, "video", end_s=MOST_RECONSTRUCTED_S, min_frames=2)
    total = config.num_clips(len(frames))
    work.report(0.0, "rendering", {"clips": total, "fps": config.fps, "clip_s": config.clip_s})
    with work.writer(SOURCE) as writer:
        writer.write(frames)
    tokens = model.tokenizer.encode(torch.from_numpy(frames)[None])
    clips = model.tokenizer.decode(tokens, seed=work.request.seed, sampling=work.sampling)
    with work.writer() as writer:
        shown = (clip[0].numpy() for clip in trimmed(clips, len(frames)))
        work.write_clips(writer, shown, total, [*tokens.float().cpu().unbind(1)])
    return writer.num_frames / config.fps


def render_live(work: Work, directed: Callable[[], tuple[str, bool]], most_s: float) -> float:
    """A video that goes on, at most `AHEAD_S` and a clip before it can be watched, until `directed` ends it.

    Returns its seconds.

    `directed` gives the prompt for the next clip, and whether the last one was the end. A new prompt goes on from the
    last key frame alone, as a storyboard's shot does; memory does not grow.
    """
    work.folder.mkdir(parents=True)
    model, config, sampling = work.model, work.model.tokenizer.config, work.sampling
    given, prompt, written_s = given_of(model, work.request, work.job_folder), work.request.prompt, 0.0
    context = sampling.context_key_frames or min(LIVE_CONTEXT, model.lm.config.most_keyframes() - 1)
    work.report(0.0, "rendering", {"clips": None, "fps": config.fps, "clip_s": config.clip_s})
    began_s = time.monotonic()
    with work.writer() as writer:
        for number in count():
            asked, ends = directed()
            if ends or written_s >= most_s:
                break
            if asked != prompt and given.key_frames is not None:
                given = replace(given, key_frames=given.key_frames[:, -1:])
            prompt, kept = asked, list[KeyFrameTokens]()
            draws: dict[str, Any] = {"seed": (work.request.seed + number) % 2**62, "sampling": sampling, "given": given}
            key_frames = keeping(model.write([prompt], seconds=config.clip_s, **draws), kept)
            (clip,) = model.render(key_frames, config.clip_frames / config.fps, **draws)
            shown = clip[:, : config.tail_frame]  # the next clip begins with what is after that
            writer.write(shown[0].numpy())
            if number == 0:
                save_picture(work.folder / THUMBNAIL, enlarged(clip[0, clip.shape[1] // 2].numpy(), writer.scale))
            save_picture(work.folder / KEY_FRAMES, key_picture(model, kept[-1]))
            new = torch.stack(kept if given.key_frames is None else kept[1:], dim=1).to(model.tokenizer.device)
            before = new if given.key_frames is None else torch.cat([given.key_frames, new], dim=1)
            frames = config.denoiser.context_frames
            given = Given(before[:, -context:], clip[:, -frames:] if frames else None)
            written_s += shown.shape[1] / config.fps
            work.report(min(0.99, written_s / most_s), "clip", {"number": number + 1, "prompt": prompt})
            while written_s - (time.monotonic() - began_s) > AHEAD_S:
                time.sleep(0.05)
                work.report(min(0.99, written_s / most_s), "", {})
        if not writer.num_frames:
            raise RequestError("live: ended before its first clip")
    return written_s


def seed_of(request: VideoRequest) -> int | SeedPlan:
    """The seed of every clip."""
    if request.reroll_from is None:
        return request.seed
    other = request.seed + 1 if request.reroll_seed is None else request.reroll_seed
    return SeedPlan(request.seed, request.reroll_from, other, request.reroll_clips)


def given_of(model: DiCoDe, request: VideoRequest, job_folder: Path) -> Given:
    """The images that a video begins and ends with, or the video that it goes on from."""
    config, found = model.tokenizer.config, {}
    for name in ("image", "last_image", "continued"):
        for path in job_folder.glob(f"{name}.*"):
            frames = frames_of(path, config, name)
            found[name] = frames if name == "continued" else frames[:1]
    return model.given(**found, loop=request.loop)


def frames_of(path: Path, config: TokenizerConfig, name: str, **options: Any) -> Video:
    """A client's file at the model's size and rate. Raises `RequestError` that names its field, not the file."""
    try:
        return read_video(path, config.fps, config.frame_shape, **options).frames
    except VideoReadError as error:
        reason = str(error).removeprefix(f"{path}: ").replace(str(path), "the file")
        raise RequestError(f"{name}: {reason}", name) from error


def keeping(key_frames: Iterator[KeyFrameTokens], kept: list[KeyFrameTokens]) -> Iterator[KeyFrameTokens]:
    """The same key frames, each appended to a list as it comes."""
    for tokens in key_frames:
        kept.append(tokens.float().cpu())
        yield tokens


@torch.no_grad()
def key_picture(model: DiCoDe, tokens: KeyFrameTokens) -> Picture:
    """The picture of one key frame `1 n d`; grey where tokens alone give none."""
    config = model.tokenizer.config
    if not config.has_key_latents:
        return np.full((SHOWN_SIDE, SHOWN_SIDE, 3), 128, np.uint8)
    latents = model.tokenizer.key_latents(tokens.to(model.tokenizer.device))
    frame = model.tokenizer.frames_of(latents[:, None])[0, 0].cpu().numpy()
    return enlarged(frame, -(-SHOWN_SIDE // config.size))


def enlarged(frame: Picture, scale: int) -> Picture:
    """Every pixel as a square."""
    return frame.repeat(scale, axis=0).repeat(scale, axis=1)


def save_picture(path: Path, frame: Picture) -> None:
    """Write an image file, whole or not at all."""
    kind = Image.registered_extensions()[path.suffix]
    put(path, lambda partial: Image.fromarray(frame).save(partial, kind))
