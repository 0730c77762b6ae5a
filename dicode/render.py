"""Prompts to video files: batches of videos, written clip by clip, with previews and contact sheets."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dicode.pipeline import DiCoDe, Given, Prompt, length_s
from dicode.seeds import SeedPlan
from dicode.shapes import FrameStack, KeyFrameTokens
from dicode.stopwatch import Progress, Stopwatch
from dicode.tokenizer.config import SamplingConfig, TokenizerConfig
from dicode.video.sheet import save_sheet
from dicode.video.timed import Video
from dicode.video.write import VideoWriter

LEAST_SIDE = 256  # pixels along a side of a file whose scale is left out: a 64×64 video is too small to watch
PREVIEW_STEPS = 2  # without guidance: a twelfth of the work of the bundled `sprites`


@dataclass(frozen=True)
class Job:
    """One video to write."""

    prompt: Prompt
    sample: int
    output: str
    sheet: Path | None = None
    keys: dict[str, Any] = field(default_factory=dict)  # further keys of the prompt's line, for the metadata

    @property
    def text(self) -> str:
        """The prompt in one line, a storyboard in its notation."""
        if isinstance(self.prompt, str):
            return self.prompt
        return " ".join(f"[{shot.seconds:g}s: {shot.prompt}]" for shot in self.prompt)


@dataclass(frozen=True)
class RenderOptions:
    """What all videos of a command have in common."""

    seconds: float | None
    seed: int | SeedPlan
    sampling: SamplingConfig
    request: dict[str, Any]  # further options, for the metadata
    origin: dict[str, str]  # model, weights and version, for the metadata
    writing: dict[str, Any]  # options of `VideoWriter`; scale None: to `LEAST_SIDE` pixels or more
    preview: bool = False
    timings: bool = False  # print the times of every clip
    list_files: bool = True  # print a line for every file

    def metadata(self, job: Job, length: float) -> dict[str, Any]:
        """All that is needed to write the video again. Files depend on the order of the keys."""
        return {
            "prompt": job.text,
            "seed": self.seed.seed if isinstance(self.seed, SeedPlan) else self.seed,
            "sample": job.sample,
            "seconds": length,
            **self.request,
            **({"keys": job.keys} if job.keys else {}),
            **asdict(self.sampling),
            **self.origin,
        }


def default_scale(config: TokenizerConfig) -> int:
    """How many times to enlarge frames along each side, for files of `LEAST_SIDE` pixels or more."""
    return -(-LEAST_SIDE // config.size)


def is_folder(output: str) -> bool:
    """Whether the name of an output is that of a folder."""
    return output.endswith("/") or not Path(output).suffix


def beside(output: str, word: str, between: str = ".") -> str:
    """The name of another output: out.mp4 → out.preview.mp4, frames/ and frames → frames.preview/."""
    if is_folder(output):
        return f"{output.rstrip('/')}{between}{word}/"
    path = Path(output)
    return str(path.with_name(f"{path.stem}{between}{word}{path.suffix}"))


def numbered_jobs(
    prompts: Sequence[tuple[Prompt, dict[str, Any]]], sample: int, output: str, sheet: Path | None
) -> list[Job]:
    """A job for each prompt and the further keys of its line: name/000.mp4 … in a folder, out-000.mp4 … beside it."""
    jobs = []
    for number, (prompt, keys) in enumerate(prompts):
        name = f"{number:03d}"
        video = f"{output.rstrip('/')}/{name}.mp4" if is_folder(output) else beside(output, name, "-")
        jobs.append(Job(prompt, sample + number, video, sheet and Path(beside(str(sheet), name, "-")), keys))
    return jobs


def render_jobs(
    model: DiCoDe, jobs: Sequence[Job], given: Given, options: RenderOptions, watch: Stopwatch, bar: Progress
) -> float:
    """Generate videos as one batch, and write each clip when it is decoded; returns their seconds, all equal.

    A preview, of `PREVIEW_STEPS` denoising steps, is written first and from the same key frames.
    """
    sampling, length = options.sampling, length_s([job.prompt for job in jobs], options.seconds)
    key_frames = watch.timed(
        "language model",
        model.write(
            [job.prompt for job in jobs],
            seconds=options.seconds,
            seed=options.seed,
            sample_indices=[job.sample for job in jobs],
            given=given,
            sampling=sampling,
        ),
    )
    if options.preview:
        kept = list(key_frames)
        previews = [replace(job, output=beside(job.output, "preview"), sheet=None) for job in jobs]
        quick = replace(options, sampling=replace(sampling, steps=PREVIEW_STEPS, decoder_guidance=1.0))
        _decode(model, previews, iter(kept), length, given, quick, watch, bar)
        key_frames = iter(kept)
    _decode(model, jobs, key_frames, length, given, options, watch, bar)
    return length


def _decode(
    model: DiCoDe,
    jobs: Sequence[Job],
    key_frames: Iterator[KeyFrameTokens],
    length: float,
    given: Given,
    options: RenderOptions,
    watch: Stopwatch,
    bar: Progress,
) -> None:
    config = model.tokenizer.config
    clips = model.render(
        key_frames,
        length,
        seed=options.seed,
        sample_indices=[job.sample for job in jobs],
        given=given,
        sampling=options.sampling,
    )
    writing = {**options.writing, "scale": options.writing["scale"] or default_scale(config)}
    rows: list[Video] = []  # of the contact sheet
    before = dict(watch.seconds)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(VideoWriter(job.output, config.fps, options.metadata(job, length), **writing))
            for job in jobs
        ]

        def after_clip(clip: FrameStack) -> None:
            nonlocal before
            rows.extend(clip.numpy() if jobs[0].sheet else ())
            if options.timings:
                bar.write(f"clip {(writers[0].num_frames - 1) // config.tail_frame}: {watch.text(before)}")
                before = dict(watch.seconds)

        try:
            write_clips(writers, clips, watch, bar, after_clip)
        except KeyboardInterrupt as interrupt:
            writer = writers[0]
            if not (writer.stream and writer.num_frames):
                raise
            writer.note(frames=writer.num_frames, stopped_early=True)
            raise KeyboardInterrupt(f"{jobs[0].output} ends after {writer.num_frames / config.fps:g} s") from interrupt
    if options.list_files:
        for writer in writers:
            print(summary(writer))
    if sheet := jobs[0].sheet:
        labels = [f"{i * config.clip_s:g} s" if i else jobs[0].text for i in range(len(rows))]
        save_sheet(sheet, rows, labels, scale=2)
        print(f"{sheet}: contact sheet, a row every {config.clip_s:g} s")


def write_clips(
    writers: Sequence[VideoWriter],
    clips: Iterator[FrameStack],
    watch: Stopwatch,
    bar: Progress,
    after_clip: Callable[[FrameStack], None] = lambda clip: None,
) -> None:
    """Write clips `b f h w c` as they come, entry i with writer i, and finish the files."""
    for clip in watch.timed("decode", clips):
        with watch.stage("write"):
            for writer, frames in zip(writers, clip.numpy(), strict=True):
                writer.write(frames)
        bar.update(clip.shape[0] * clip.shape[1])
        after_clip(clip)
    with watch.stage("write"):
        for writer in writers:
            writer.close()


def summary(writer: VideoWriter) -> str:
    """One line about a file that was written."""
    path, seconds = writer.path, writer.num_frames / writer.fps
    note = path / "metadata.json" if path.is_dir() else path.with_suffix(".json")
    return f"{path}: {seconds:g} s, {writer.num_frames} frames; prompt and options in {note}"


def speed(watch: Stopwatch, seconds: float) -> str:
    """What took how long, and the real-time factor without loading."""
    worked_s = sum(spent_s for name, spent_s in watch.seconds.items() if name != "load")
    factor = f"real-time factor {seconds / worked_s:.2f}: {seconds:g} s of video in {worked_s:.2f} s, once loaded"
    return f"{watch.text()}\n{factor}"
