"""`dicode generate`: one video from a prompt, or one from each line of a file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from dicode.cli import common
from dicode.config import Seed, Unicode, Whole
from dicode.stopwatch import Progress, Stopwatch

BATCH = 8  # videos
LIST = "captions.jsonl"
OWN = re.compile(r"\d{3,}(\.preview)?\.(mp4|json)|captions\.jsonl")  # files of a folder of videos


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
    write: common.Write = common.WRITE
    render: common.Render = common.RENDER
    model: common.ModelName = "sprites"
    revision: common.Revision = None
    output: common.Output = "out.mp4"  # .mp4, .webm, .gif, or a folder name/ for PNG frames or, with --prompts, videos
    scale: common.Enlarged = None
    lossless: bool = False  # lossless .mp4 or .webm, to measure or train on; not every player shows it
    stream: bool = False  # file that can be watched from the first clip on; stopping early keeps what is there
    preview: bool = False  # also out.preview.mp4, written first with fewer denoising steps
    sheet: Path | None = None  # image file for a contact sheet, one row a clip
    device: common.Device = "auto"
    dtype: common.WeightsDtype = "float32"
    timings: bool = False  # also print the times of every clip, and the peak memory


def generate(command: Generate, watch: Stopwatch) -> None:
    """Write clips as they come; the file appears with the last one, or with the first one (`--stream`)."""
    prompts = _prompts(command)
    from dicode.data.prompts import write_captions
    from dicode.device import peak_memory_mib
    from dicode.pipeline import Given, length_s
    from dicode.render import Job, beside, is_folder, numbered_jobs, render_jobs, speed
    from dicode.video.sheet import check_sheet
    from dicode.video.write import check_output

    jobs = [Job(prompts[0][0], command.sample, command.output, command.sheet)]
    if command.prompts is not None:
        jobs = numbered_jobs(prompts, command.sample, command.output, command.sheet)
    in_folder = command.prompts is not None and is_folder(command.output)
    if in_folder:
        _make_folder(Path(command.output))
    for job in jobs:
        check_sheet(job.sheet)
        for output in (job.output, beside(job.output, "preview"))[: 2 if command.preview else 1]:
            check_output(output, scale=command.scale or 1, stream=command.stream, lossless=command.lossless)
    model, given, options = _loaded(command, list_files=not in_folder)
    alone = command.preview or command.stream or command.timings or command.sheet or given != Given()
    batched = in_folder and not alone and all(isinstance(job.prompt, str) for job in jobs)
    size, seconds = BATCH if batched else 1, 0.0
    num_frames = sum(model.num_frames(length_s([job.prompt], command.seconds)) for job in jobs)
    with Progress("rendering", num_frames * (2 if command.preview else 1), "frame") as bar:
        for first in range(0, len(jobs), size):
            batch = jobs[first : first + size]
            seconds += len(batch) * render_jobs(model, batch, given, options, watch, bar)
            if in_folder:
                done = jobs[: first + size]
                captions = [(job.text, job.keys) for job in done]
                write_captions(Path(command.output) / LIST, [Path(job.output).name for job in done], captions)
    if in_folder:
        print(f"{command.output}: {len(jobs)} videos, {seconds:g} s; prompts in {LIST}")
    print(speed(watch, seconds))
    if command.timings and (peak_mib := peak_memory_mib()):
        print(f"peak memory {peak_mib:.0f} MiB")


def _prompts(command: Generate) -> list[tuple[Any, dict[str, Any]]]:
    """Texts or storyboards, and what else their lines hold.

    Raises `ValueError` unless exactly one of prompt, storyboard and file is given.
    """
    sources = (command.prompt, command.storyboard, command.prompts)
    if sum(source is not None for source in sources) != 1:
        raise ValueError("expected one of PROMPT, --storyboard FILE and --prompts FILE")
    if command.reroll_from is None and command.reroll_seed is not None:
        raise ValueError("--reroll-seed: needs --reroll-from, the first clip to take it")
    from dicode.data.prompts import read_prompts
    from dicode.storyboard import parse_storyboard, read_storyboard

    if command.storyboard is not None:
        return [(read_storyboard(command.storyboard), {})]
    texts: Sequence[tuple[str, dict[str, Any]]] = [(str(command.prompt), {})]
    if command.prompts is not None:
        texts = read_prompts(command.prompts)
    return [(parse_storyboard(text) or text, keys) for text, keys in texts]


def _make_folder(folder: Path) -> None:
    """Make the folder for videos of many prompts. Raises `FileExistsError` for one that holds other files than ours."""
    from dicode.files import check_parent

    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file; expected a folder for the videos, or a name ending in .mp4")
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if foreign := [name for name in held if not OWN.fullmatch(name)]:
        raise FileExistsError(f"{folder}: holds {foreign[0]!r}, no video of an earlier run; name another folder")
    check_parent(folder)
    folder.mkdir(exist_ok=True)


def _loaded(command: Generate, list_files: bool) -> tuple[Any, Any, Any]:
    """The model, what the new videos are given of others (`Given`), and their `RenderOptions`."""
    from dicode.files import printable
    from dicode.provenance import model_origin
    from dicode.render import RenderOptions
    from dicode.seeds import SeedPlan
    from dicode.video.read import read_video

    seed: int | SeedPlan = command.seed
    request: dict[str, Any] = {}
    if command.reroll_from is not None:
        other = command.seed + 1 if command.reroll_seed is None else command.reroll_seed
        seed = SeedPlan(command.seed, command.reroll_from, other)
        request = {"reroll_from": command.reroll_from, "reroll_seed": other}
    model, folder = common.load_model(command)
    config = model.tokenizer.config
    named = {name: getattr(command, name) for name in ("image", "last_image", "continue_from")}
    files = {name: path for name, path in named.items() if path is not None}
    frames = {name: read_video(path, config.fps, config.size).frames for name, path in files.items()}
    stills = {name: frames[name][:1] if name in frames else None for name in ("image", "last_image")}
    given = model.given(**stills, continued=frames.get("continue_from"), loop=command.loop)
    request = {
        **{name: printable(path.name) for name, path in files.items()},
        **({"loop": True} if command.loop else {}),
        **({} if command.dtype == "float32" else {"dtype": command.dtype}),
        **request,
    }
    options = RenderOptions(
        command.seconds,
        seed,
        model.sampling.changed(**common.sampling_flags(command.write, command.render)),
        request,
        model_origin(folder, *folder.glob("*.safetensors")),
        {"scale": command.scale, "stream": command.stream, "lossless": command.lossless},
        command.preview,
        command.timings,
        list_files,
    )
    return model, given, options
