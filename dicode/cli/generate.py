"""`dicode generate`: one video from a prompt, or one from each line of a file."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from dicode.cli import common
from dicode.config import DEFAULT_MODEL, Count, Seed, Unicode, Whole
from dicode.stopwatch import Progress, Stopwatch
from dicode.tokenizer.config import TokenizerConfig

BATCH = 8  # videos
LIST = "captions.jsonl"
OWN = re.compile(r"\d{3,}(\.preview)?\.(mp4|json)")  # files of a folder of videos, beside their list
LEAST_SIDE = 256  # pixels along a side of a file whose scale is left out: a 64×64 video is too small to watch
PREVIEW_STEPS = 2  # at most, without guidance: a twelfth of the work of the bundled `sprites`


@dataclass(frozen=True)
class Generate:
    """Generate a video from a prompt. Sampling options default to the model's own; `dicode info` lists them.

    A storyboard changes the prompt over time: "[4s: a spark] [4s: it grows into a fireball]".
    """

    prompt: Annotated[Positional[Annotated[str, Unicode] | None], arg(metavar="PROMPT")] = None  # content of the video
    seconds: common.Seconds | None = None  # length in seconds; default: 4, or that of the storyboard
    seed: Seed = 0  # random seed; equal seeds, prompts and options give equal files
    sample: Seed = 0  # number of the sample; each is another video of the same seed
    storyboard: Path | None = None  # YAML file in place of the prompt: a list of {seconds: 4, prompt: a spark}
    # file in place of the prompt: a prompt a line, or captions.jsonl, .csv, .json; for out-000.mp4 … or name/000.mp4 …
    prompts: Path | None = None
    image: Path | None = None  # image file for the first frame
    last_image: Path | None = None  # image file for the frame that the video ends on
    loop: bool = False  # end on the first frame
    continue_from: Path | None = None  # video to continue; the new one begins on its last frame
    reroll_from: Whole | None = None  # first clip, from 0, to take another seed; those before it stay
    reroll_seed: Seed | None = None  # seed for --reroll-from; default: the next one
    reroll_clips: Count | None = None  # clips that take it; default: all that follow
    write: common.Write = common.WRITE
    render: common.Render = common.RENDER
    model: common.ModelName = DEFAULT_MODEL
    revision: common.Revision = None
    output: common.Output = "out.mp4"  # .mp4, .webm, .gif, or a folder name/ for PNG frames or, with --prompts, videos
    scale: common.Enlarged = None
    lossless: bool = False  # lossless .mp4 or .webm, to measure or train on; not every player shows it
    stream: bool = False  # file that can be watched from the first clip on; stopping early keeps what is there
    preview: bool = False  # also out.preview.mp4, written first with fewer denoising steps
    sheet: Path | None = None  # image file for a contact sheet, one row a clip
    device: common.Device = "auto"
    dtype: common.WeightsDtype = "float32"
    memory: common.Memory = common.MEMORY
    timings: bool = False  # also print the times of every clip, and the peak memory


@dataclass(frozen=True)
class Job:
    """One video to write."""

    prompt: Any  # a text, or the shots of a storyboard
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
class Shared:
    """What all videos of a command have in common."""

    command: Generate
    model: Any  # `DiCoDe`
    draws: dict[str, Any]  # seed, sampling (`SamplingConfig`) and conditions (`Given`), as options of the model
    request: dict[str, Any]  # further options, for the metadata
    origin: dict[str, str]  # model, weights and version, for the metadata
    watch: Stopwatch
    bar: Progress

    def metadata(self, job: Job, length: float) -> dict[str, Any]:
        """All that is needed to write the video again. Files depend on the order of the keys."""
        return {
            "prompt": job.text,
            "seed": self.command.seed,
            "sample": job.sample,
            "seconds": length,
            **self.request,
            **({"keys": job.keys} if job.keys else {}),
            **asdict(self.draws["sampling"]),
            **self.origin,
        }


def generate(command: Generate, watch: Stopwatch) -> None:
    """Write clips as they come; the file appears with the last one, or with the first one (`--stream`)."""
    jobs = _jobs(command)
    from dicode.files import check_apart
    from dicode.video.write import check_output

    in_folder = _in_folder(command)
    if in_folder:
        check_apart(Path(command.output) / LIST, command.prompts)
        _make_folder(Path(command.output))
    for job in jobs:
        if job.sheet:
            from dicode.video.sheet import check_sheet

            check_sheet(job.sheet)
        for output in (job.output, beside(job.output, "preview"))[: 2 if command.preview else 1]:
            check_output(output, scale=command.scale or 1, stream=command.stream, lossless=command.lossless)
    files = {name: getattr(command, name) for name in ("image", "last_image", "continue_from")}
    files = {name: path for name, path in files.items() if path is not None}
    read = (command.storyboard, command.prompts, *files.values())
    for job in jobs:
        for name in (job.output, beside(job.output, "preview"), job.sheet):
            check_apart(name or "", *read)
    model, folder = common.load_model(command)
    from dicode.pipeline import length_s

    alone = command.preview or command.stream or command.timings or command.sheet or command.loop or files
    batched = in_folder and not alone and all(isinstance(job.prompt, str) for job in jobs)
    size, seconds = BATCH if batched else 1, 0.0
    num_frames = sum(model.num_frames(length_s([job.prompt], command.seconds)) for job in jobs)
    bar = Progress("rendering", num_frames * (2 if command.preview else 1), "frame")
    shared = _shared(command, model, folder, files, watch, bar)
    with bar:
        for first in range(0, len(jobs), size):
            batch = jobs[first : first + size]
            seconds += len(batch) * _write_batch(shared, batch)
            if in_folder:
                _write_list(Path(command.output), jobs[: first + size])
    if in_folder:
        print(f"{command.output}: {len(jobs)} videos, {seconds:g} s; prompts in {LIST}")
    print(speed(watch, seconds))
    if command.timings:
        from dicode.device import peak_memory_mib

        if peak_mib := peak_memory_mib():
            print(f"peak memory {peak_mib:.0f} MiB")


def _jobs(command: Generate) -> list[Job]:
    """A job for the prompt; or for each line of a file: name/000.mp4 … in a folder, out-000.mp4 … beside it.

    Raises `ValueError` unless exactly one of prompt, storyboard and file is given.
    """
    sources = (command.prompt, command.storyboard, command.prompts)
    if sum(source is not None for source in sources) != 1:
        raise ValueError("expected one of PROMPT, --storyboard FILE and --prompts FILE")
    for name in ("reroll_seed", "reroll_clips"):
        if command.reroll_from is None and getattr(command, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: needs --reroll-from, the first clip with another seed")
    from dicode.storyboard import parse_storyboard, read_storyboard

    if command.prompts is None:
        text = str(command.prompt)
        prompt = read_storyboard(command.storyboard) if command.storyboard else parse_storyboard(text) or text
        return [Job(prompt, command.sample, command.output, command.sheet)]
    from dicode.data.prompts import read_prompts

    jobs, output = [], command.output
    for number, (text, keys) in enumerate(read_prompts(command.prompts)):
        name = f"{number:03d}"
        video = f"{output.rstrip('/')}/{name}.mp4" if is_folder(output) else beside(output, name, "-")
        sheet = command.sheet and Path(beside(str(command.sheet), name, "-"))
        jobs.append(Job(parse_storyboard(text) or text, command.sample + number, video, sheet, keys))
    return jobs


def _in_folder(command: Generate) -> bool:
    """Whether the output is a folder of videos with a list of their prompts."""
    return command.prompts is not None and is_folder(command.output)


def is_folder(output: str) -> bool:
    """Whether the name of an output is that of a folder."""
    return output.endswith("/") or not Path(output).suffix


def beside(output: str, word: str, between: str = ".") -> str:
    """The name of another output: out.mp4 → out.preview.mp4, frames/ and frames → frames.preview/."""
    if is_folder(output):
        return f"{output.rstrip('/')}{between}{word}/"
    path = Path(output)
    return str(path.with_name(f"{path.stem}{between}{word}{path.suffix}"))


def _make_folder(folder: Path) -> None:
    """Make the folder for videos of many prompts. Raises `FileExistsError` for one that holds other files than ours."""
    from dicode.files import UNFINISHED, check_parent
    from dicode.video.write import is_own_note

    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file; expected a folder for the videos, or a name ending in .mp4")
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    own = {name for name in held if OWN.fullmatch(name) and is_own_note((folder / name).with_suffix(".json"))}
    own |= {LIST} if own else set()
    if foreign := [name for name in held if not (name in own or UNFINISHED.fullmatch(name))]:
        raise FileExistsError(f"{folder}: holds {foreign[0]!r}, no video of an earlier run; name another folder")
    check_parent(folder)
    folder.mkdir(exist_ok=True)


def _write_list(folder: Path, jobs: Sequence[Job]) -> None:
    from dicode.data.prompts import write_captions

    write_captions(folder / LIST, [Path(job.output).name for job in jobs], [(job.text, job.keys) for job in jobs])


def _shared(
    command: Generate, model: Any, folder: Path, files: dict[str, Path], watch: Stopwatch, bar: Progress
) -> Shared:
    """Read the images and the video that new ones begin or end with; collect what goes into the metadata."""
    from dicode.checkpoint import model_origin
    from dicode.files import printable
    from dicode.seeds import SeedPlan

    config, frames = model.tokenizer.config, {}
    if files:
        from dicode.video.read import read_video

        frames = {name: read_video(path, config.fps, config.frame_shape).frames for name, path in files.items()}
    stills = {name: frames[name][:1] if name in frames else None for name in ("image", "last_image")}
    seed: int | SeedPlan = command.seed
    request: dict[str, Any] = {name: printable(path.name) for name, path in files.items()}
    if command.loop:
        request["loop"] = True
    if command.dtype != "float32":
        request["dtype"] = command.dtype
    request |= common.memory_notes(command.memory)
    if command.reroll_from is not None:
        other = command.seed + 1 if command.reroll_seed is None else command.reroll_seed
        seed = SeedPlan(command.seed, command.reroll_from, other, command.reroll_clips)
        request |= {"reroll_from": command.reroll_from, "reroll_seed": other}
        request |= {} if command.reroll_clips is None else {"reroll_clips": command.reroll_clips}
    draws = {
        "seed": seed,
        "given": model.given(**stills, continued=frames.get("continue_from"), loop=command.loop),
        "sampling": model.sampling.changed(**common.sampling_flags(command.write, command.render)),
    }
    return Shared(command, model, draws, request, model_origin(folder, *folder.glob("*.safetensors")), watch, bar)


def _write_batch(shared: Shared, jobs: Sequence[Job]) -> float:
    """Generate videos as one batch, and write each clip when it is decoded; returns their seconds, all equal.

    A preview, of `PREVIEW_STEPS` denoising steps, is written first and from the same key frames.
    """
    from dicode.pipeline import length_s

    prompts, samples, seconds = [job.prompt for job in jobs], [job.sample for job in jobs], shared.command.seconds
    key_frames = shared.model.write(prompts, seconds=seconds, sample_indices=samples, **shared.draws)
    key_frames, length = shared.watch.timed("language model", key_frames), length_s(prompts, seconds)
    if shared.command.preview:
        kept = list(key_frames)
        previews = [replace(job, output=beside(job.output, "preview"), sheet=None) for job in jobs]
        own = shared.draws["sampling"]
        quick = own.changed(steps=min(own.steps, PREVIEW_STEPS), decoder_guidance=1.0)
        _decode(replace(shared, draws={**shared.draws, "sampling": quick}), previews, iter(kept), length)
        key_frames = iter(kept)
    _decode(shared, jobs, key_frames, length)
    return length


def _decode(shared: Shared, jobs: Sequence[Job], key_frames: Iterator[Any], length: float) -> None:
    from dicode.video.write import VideoWriter

    command, watch, bar, config = shared.command, shared.watch, shared.bar, shared.model.tokenizer.config
    clips = shared.model.render(key_frames, length, sample_indices=[job.sample for job in jobs], **shared.draws)
    scale = command.scale or default_scale(config)
    writing: dict[str, Any] = {"scale": scale, "stream": command.stream, "lossless": command.lossless}
    rows: list[Any] = []  # of the contact sheet
    before = dict(watch.seconds)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(VideoWriter(job.output, config.fps, shared.metadata(job, length), **writing))
            for job in jobs
        ]

        def after_clip(clip: Any) -> None:
            nonlocal before
            rows.extend(clip.numpy() if jobs[0].sheet else ())
            if command.timings:
                bar.write(f"clip {config.num_clips(writers[0].num_frames) - 1}: {watch.text(before)}")
                before = dict(watch.seconds)

        try:
            write_clips(writers, clips, watch, bar, after_clip)
        except KeyboardInterrupt as interrupt:
            writer = writers[0]
            if not (writer.stream and writer.num_frames):
                raise
            writer.note(frames=writer.num_frames, stopped_early=True)
            raise KeyboardInterrupt(f"{jobs[0].output} ends after {writer.num_frames / config.fps:g} s") from interrupt
    if not _in_folder(command):
        for writer in writers:
            print(summary(writer))
    if sheet := jobs[0].sheet:
        from dicode.video.sheet import save_sheet

        labels = [f"{i * config.clip_s:g} s" if i else jobs[0].text for i in range(len(rows))]
        save_sheet(sheet, rows, labels, scale=2)
        print(f"{sheet}: contact sheet, a row every {config.clip_s:g} s")


def default_scale(config: TokenizerConfig) -> int:
    """How many times to enlarge frames along each side, for files of `LEAST_SIDE` pixels or more."""
    return -(-LEAST_SIDE // config.size)


def write_clips(
    writers: Sequence[Any],
    clips: Iterator[Any],
    watch: Stopwatch,
    bar: Progress,
    after_clip: Callable[[Any], None] = lambda clip: None,
) -> None:
    """Write clips `b f h w c` as they come, entry i with `VideoWriter` i, and finish the files."""
    for clip in watch.timed("decode", clips):
        with watch.stage("write"):
            for writer, frames in zip(writers, clip.numpy(), strict=True):
                writer.write(frames)
        bar.update(clip.shape[0] * clip.shape[1])
        after_clip(clip)
    with watch.stage("write"):
        for writer in writers:
            writer.close()


def summary(writer: Any) -> str:
    """One line about a file that was written."""
    path, seconds = writer.path, writer.num_frames / writer.fps
    note = path / "metadata.json" if path.is_dir() else path.with_suffix(".json")
    return f"{path}: {seconds:g} s, {writer.num_frames} frames; prompt and options in {note}"


def speed(watch: Stopwatch, seconds: float) -> str:
    """What took how long, and the real-time factor without loading."""
    worked_s = sum(spent_s for name, spent_s in watch.seconds.items() if name != "load")
    factor = f"real-time factor {seconds / worked_s:.2f}: {seconds:g} s of video in {worked_s:.2f} s, once loaded"
    return f"{watch.text()}\n{factor}"
