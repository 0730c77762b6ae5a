"""What `dicode generate` does: one video, or one a line of a file; its flags are in `flags.py`."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dicode.checkpoint import resolve
from dicode.cli.flags import Generate
from dicode.cli.tokenize import asked_sampling, origin, to_watch, written
from dicode.data.prompts import Asked, read_prompts, write_captions
from dicode.device import peak_memory_mib, pick_device
from dicode.files import check_parent, printable
from dicode.pipeline import DiCoDe, Given, Prompt, length_s
from dicode.seeds import SeedPlan
from dicode.shapes import KeyFrameTokens
from dicode.stopwatch import Progress, Stopwatch
from dicode.storyboard import parse_storyboard, read_storyboard
from dicode.tokenizer.config import SamplingConfig
from dicode.video.read import read_video
from dicode.video.sheet import check_sheet, save_sheet
from dicode.video.timed import Video
from dicode.video.write import VideoWriter, check_output

AT_ONCE = 8  # prompts
LIST = "captions.jsonl"
OWN = re.compile(r"\d{3,}(\.preview)?\.(mp4|json)|captions\.jsonl")  # files of a folder of videos
PREVIEW_STEPS = 2  # and no guidance: a twelfth of the work of the model in the box


@dataclasses.dataclass(frozen=True)
class Job:
    """One video to write."""

    prompt: Prompt
    seed: int | SeedPlan
    sample: int
    output: str
    sheet: Path | None
    keys: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the prompt's line


def generate(command: Generate, watch: Stopwatch) -> int:
    """Clips are written as they come; the file appears when the last one has, or from the first on (`--stream`)."""
    jobs, in_folder = jobs_of(command), command.prompts is not None and is_folder(command.output)
    if in_folder:
        check_folder(Path(command.output))
    for job in jobs:
        check_sheet(job.sheet)
        for output in (job.output, *([beside(job.output, "preview")] if command.preview else [])):
            check_output(output, scale=command.scale or 1, stream=command.stream, lossless=command.lossless)
    with watch.stage("load"):
        folder = resolve(command.model, command.revision)
        device, dtype = str(pick_device(command.device)), getattr(torch, command.dtype)
        model = DiCoDe.from_pretrained(folder, device=device, dtype=dtype)
        given = given_of(command, model)
    made_by = origin(folder, *folder.glob("*.safetensors"))
    settings = model.sampling.changed(**asked_sampling(command))
    alone = command.preview or command.stream or command.timings or command.sheet or given != Given()
    if in_folder and not alone and all(isinstance(job.prompt, str) for job in jobs):
        return _render_all(command, jobs, model, settings, made_by, watch)
    for job in jobs:
        key_frames = _key_frames(command, job, model, given, settings, watch)
        if command.preview:
            kept = list(key_frames)
            preview = dataclasses.replace(job, output=beside(job.output, "preview"), sheet=None)
            quick = dataclasses.replace(settings, steps=PREVIEW_STEPS, decoder_guidance=1.0)
            _render(command, preview, model, iter(kept), given, quick, made_by, watch)
            key_frames = iter(kept)
        _render(command, job, model, key_frames, given, settings, made_by, watch)
        if in_folder:
            _list(command, jobs[: jobs.index(job) + 1])
    if command.timings and (peak_mib := peak_memory_mib()):
        print(f"peak memory {peak_mib:.0f} MiB")
    return 0


def jobs_of(command: Generate) -> list[Job]:
    """The videos that are asked for. Raises `ValueError` unless exactly one of prompt, storyboard and file is given."""
    sources = (command.prompt, command.storyboard, command.prompts)
    if sum(source is not None for source in sources) != 1:
        raise ValueError("expected one of PROMPT, --storyboard FILE and --prompts FILE")
    seed = seed_of(command)
    if command.prompts is None:
        prompt: Prompt = read_storyboard(command.storyboard) if command.storyboard else str(command.prompt)
        if isinstance(prompt, str):
            prompt = parse_storyboard(prompt) or prompt
        return [Job(prompt, seed, command.sample, command.output, command.sheet)]
    asked, folder = read_prompts(command.prompts), is_folder(command.output)

    def name(output: str, number: int) -> str:
        return f"{output.rstrip('/')}/{number:03d}.mp4" if folder else beside(output, f"{number:03d}", "-")

    return [
        Job(
            parse_storyboard(prompt) or prompt,
            seed,
            command.sample + number,
            name(command.output, number),
            command.sheet and Path(beside(str(command.sheet), f"{number:03d}", "-")),
            keys,
        )
        for number, (prompt, keys) in enumerate(asked)
    ]


def is_folder(output: str) -> bool:
    """Whether the name of an output is that of a folder."""
    return output.endswith("/") or not Path(output).suffix


def check_folder(folder: Path) -> None:
    """Make the folder for videos of many prompts. Raises `FileExistsError` for one that holds other files than ours."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file; expected a folder for the videos, or a name ending in .mp4")
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if foreign := [name for name in held if not OWN.fullmatch(name)]:
        raise FileExistsError(f"{folder}: holds {foreign[0]!r}, no video of an earlier run; name another folder")
    check_parent(folder)
    folder.mkdir(exist_ok=True)


def given_of(command: Generate, model: DiCoDe) -> Given:
    """What the images and the video that were named say about the new one."""
    config = model.tokenizer.config

    def frames(path: Path | None) -> Video | None:
        return None if path is None else read_video(path, config.fps, config.size).frames

    image, last_image = frames(command.image), frames(command.last_image)
    return model.given(
        image=None if image is None else image[:1],
        last_image=None if last_image is None else last_image[:1],
        continued=frames(command.continue_from),
        loop=command.loop,
    )


def beside(output: str, word: str, between: str = ".") -> str:
    """The name of another output: out.mp4 → out.preview.mp4, frames/ and frames → frames.preview/."""
    if is_folder(output):
        return f"{output.rstrip('/')}{between}{word}/"
    path = Path(output)
    return str(path.with_name(f"{path.stem}{between}{word}{path.suffix}"))


def seed_of(command: Generate) -> int | SeedPlan:
    """One seed, or the plan of a re-roll."""
    if command.reroll_from is None:
        if command.reroll_seed is not None:
            raise ValueError("--reroll-seed: needs --reroll-from, the first clip to take it")
        return command.seed
    other = command.seed + 1 if command.reroll_seed is None else command.reroll_seed
    return SeedPlan(command.seed, command.reroll_from, other)


def _key_frames(
    command: Generate, job: Job, model: DiCoDe, given: Given, settings: SamplingConfig, watch: Stopwatch
) -> Iterator[KeyFrameTokens]:
    """Written when the decoder asks for them: their time is told from the decoder's."""
    key_frames = model.write(
        [job.prompt],
        seconds=command.seconds,
        seed=job.seed,
        sample_indices=[job.sample],
        given=given,
        **dataclasses.asdict(settings),
    )
    return watch.timed("language model", key_frames)


def _render(
    command: Generate,
    job: Job,
    model: DiCoDe,
    key_frames: Iterator[KeyFrameTokens],
    given: Given,
    settings: SamplingConfig,
    made_by: dict[str, str],
    watch: Stopwatch,
) -> None:
    """Decode and write one video, and its contact sheet."""
    length, config = length_s([job.prompt], command.seconds), model.tokenizer.config
    options = dataclasses.asdict(settings)
    clips = model.render(key_frames, length, seed=job.seed, sample_indices=[job.sample], given=given, **options)
    metadata = {**_asked(command, job, length), **options, **made_by}
    num_frames = model.num_frames(length)
    rows: list[Video] = []
    scale = command.scale or to_watch(config.size)
    with written(
        job.output, config.fps, metadata, scale, num_frames, watch, command.stream, command.lossless
    ) as (writer, bar):  # fmt: skip
        before = dict(watch.seconds)
        try:
            for clip in watch.timed("decode", clips):
                rows += [clip[0].numpy()] if job.sheet else []
                with watch.stage("write"):
                    writer.write(clip[0].numpy())
                bar.update(clip.shape[1])
                if command.timings:
                    bar.write(f"clip {(writer.num_frames - 1) // config.tail_frame}: {watch.text(before)}")
                    before = dict(watch.seconds)
        except KeyboardInterrupt as interrupt:
            if not (command.stream and writer.num_frames):
                raise
            writer.note(frames=writer.num_frames, stopped_early=True)
            raise KeyboardInterrupt(f"{job.output} ends after {writer.num_frames / config.fps:g} s") from interrupt
    if job.sheet:
        labels = [f"{i * config.clip_s:g} s" if i else _text(job.prompt) for i in range(len(rows))]
        save_sheet(job.sheet, rows, labels, scale=2)
        print(f"{job.sheet}: contact sheet, a row every {config.clip_s:g} s")


def _render_all(
    command: Generate,
    jobs: list[Job],
    model: DiCoDe,
    settings: SamplingConfig,
    made_by: dict[str, str],
    watch: Stopwatch,
) -> int:
    """Several prompts at a time, into one folder with a list of its videos."""
    length, config = length_s([job.prompt for job in jobs], command.seconds), model.tokenizer.config
    options, scale = dataclasses.asdict(settings), command.scale or to_watch(config.size)
    with Progress("rendering", len(jobs), "video") as bar:
        for first in range(0, len(jobs), AT_ONCE):
            batch = jobs[first : first + AT_ONCE]
            clips = model.generate_batch(
                [job.prompt for job in batch],
                seconds=command.seconds,
                seed=batch[0].seed,
                sample_indices=[job.sample for job in batch],
                **options,
            )
            with ExitStack() as stack:
                writers = [
                    stack.enter_context(
                        VideoWriter(
                            job.output,
                            config.fps,
                            {**_asked(command, job, length), **options, **made_by},
                            scale=scale,
                            lossless=command.lossless,
                        )
                    )
                    for job in batch
                ]
                for clip in clips:
                    for writer, frames in zip(writers, clip.numpy(), strict=True):
                        writer.write(frames)
            _list(command, jobs[: first + len(batch)])
            bar.update(len(batch))
    print(f"{command.output}: {len(jobs)} videos of {length:g} s; prompts in {LIST}\n{watch.text()}")
    return 0


def _list(command: Generate, made: list[Job]) -> None:
    """Write the list of the videos that there are so far."""
    asked = [Asked(_text(job.prompt), job.keys) for job in made]
    write_captions(Path(command.output) / LIST, [Path(job.output).name for job in made], asked)


def _asked(command: Generate, job: Job, length: float) -> dict[str, Any]:
    """What a file's metadata tells of the command, beside the sampling options."""
    named = {name: getattr(command, name) for name in ("image", "last_image", "continue_from")}
    return {
        "prompt": _text(job.prompt),
        "seed": command.seed,
        "sample": job.sample,
        "seconds": length,
        **{name: printable(path.name) for name, path in named.items() if path is not None},
        **({"loop": True} if command.loop else {}),
        **({} if command.dtype == "float32" else {"dtype": command.dtype}),
        **({} if isinstance(job.seed, int) else dataclasses.asdict(job.seed)),
        **({"keys": job.keys} if job.keys else {}),
    }


def _text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return " ".join(f"[{shot.seconds:g}s: {shot.prompt}]" for shot in prompt)
