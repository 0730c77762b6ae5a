"""`dicode data …`: index, cache, stream, blocks, verify, check, encode, export and sheet."""

import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from dicode.cli import common
from dicode.config import DEFAULT_MODEL, Range, Seed, Share, Side, UpTo1000
from dicode.stopwatch import Progress, Stopwatch, tracked

MOST_COUNTED = 125  # exit codes from 126 on mean other things to a shell
ValidationBy = Annotated[
    str | None,
    arg(
        metavar="KEY=VALUE",
        help="validation clips, where lines have KEY, such as lab=f147f077; elsewhere every 15th video",
    ),
]
Bits = Annotated[int, Range(0, 64)]


@dataclass(frozen=True)
class Index:
    """Read every file of data sets to its end; list the bad ones, and exit with their count (at most 125)."""

    folders: common.Folders
    validation_by: ValidationBy = None


@dataclass(frozen=True)
class Cache:
    """Keep all frames of data sets, with their times, in shards to train from; exits with the count of bad files.

    The same command continues. Equal files and options give equal bytes, for any number of workers. Folders and output
    may be URLs of object stores: s3://bucket/folder.
    """

    folders: common.Folders
    output: common.Output  # folder to write, such as cache/sprites
    size: Side = 64  # side of the frames in pixels, scaled to cover it and cropped at the centre
    max_fps: UpTo1000 = 12.5  # frame rate above which frames are left out; what stays is no lower than this
    loops: bool = False  # clips that repeat without a seam
    scenes: common.Seconds | None = None  # cut videos where the scene changes; shortest scene to keep, in seconds
    validation_by: ValidationBy = None
    dedupe: Bits | None = None  # leave out copies; largest distance of perceptual hashes, of 64 bits; 4 is usual
    files_per_shard: Annotated[int, Range(1, 65536)] = 64  # files a shard; a worker holds their frames in memory
    workers: Annotated[int, Range(1, 1024)] = 1  # processes
    ray: str | None = None  # Ray cluster to spread the work over: an address, auto, or local for one started here
    encode: Annotated[str | None, arg(metavar="MODEL")] = None  # model for latents and deep tokens, as `data encode`
    device: common.Device = "auto"


@dataclass(frozen=True)
class Stream:
    """Index the videos of tar archives, which a tokenizer's run then decodes while it trains, without a cache.

    Headers and first frames are read; exits with the count of bad files. Archives may be URLs: s3://bucket/folder.
    """

    folders: common.Folders
    output: common.Output  # folder of the index to write, such as cache/stream
    validation_by: ValidationBy = None
    workers: Annotated[int, Range(1, 1024)] = 1  # processes


@dataclass(frozen=True)
class Blocks:
    """Draw the world `blocks`: a training cache of coloured objects and what happens to them, in exact captions.

    The same command continues. Equal options give equal bytes, for any number of workers. Its validation sets hold
    what training never has; the events part of `dicode evaluate` scores videos by their scripts.
    """

    count: Annotated[int, Range(1, 10_000_000), arg(aliases=("-n",))]  # training scripts: videos of 2 to 10 seconds
    output: common.Output  # folder to write, such as cache/blocks
    seed: Seed = 0  # random seed
    validation: Annotated[int, Range(1, 100_000)] = 200  # scripts of every validation set; a tenth of `story`
    within: Share = 0.0  # share of training scripts with a quick event, inside one clip; their captions say so
    shots: Annotated[int, Range(0, 4)] = 1  # later clauses of a training script that are also clips of their own
    key_frames_only: bool = False  # training videos at 0.5 fps, for a language model without motion tokens
    workers: Annotated[int, Range(1, 1024)] = 1  # processes
    ray: str | None = None  # Ray cluster to spread the work over: an address, auto, or local for one started here


@dataclass(frozen=True)
class Verify:
    """Read all shards of a cache and compare their hashes with its index; exits with the count of bad ones."""

    cache: common.CacheFolder


@dataclass(frozen=True)
class Check:
    """Measure the clips of a cache, and recommend settings: lengths, captions, motion, first stages."""

    cache: common.CacheFolder
    json: common.ResultFile = None


@dataclass(frozen=True)
class Encode:
    """Compute the latents and deep tokens of a cache now, which training would compute when it first needs them."""

    cache: common.CacheFolder
    model: common.ModelName = DEFAULT_MODEL
    device: common.Device = "auto"
    mirror: bool = False  # also the latents of mirror images, for a tokenizer's training with --mirror


@dataclass(frozen=True)
class Export:
    """Write a cache as WebDataset archives: a tar a shard, H.264 videos with .txt and .json beside them."""

    cache: common.CacheFolder
    output: common.Output  # folder to write


@dataclass(frozen=True)
class Sheet:
    """Draw a contact sheet of a data set or of a cache: random clips, one a row, with their captions."""

    folder: common.Folder  # a cache, or a folder with captions.jsonl, captions.csv, .tar archives, or .txt beside clips
    output: common.OutputPath = Path("sheet.png")  # image file to write
    count: Annotated[int, Range(1, 1000)] = 16  # clips
    seed: Seed = 0  # random seed for the choice of clips
    size: Side = 64  # side of a frame in pixels; a cache has its own
    columns: Annotated[int, Range(1, 1000)] = 8  # frames of a clip, evenly from first to last
    # clips of a cache whose lines have this, such as set=orders
    only: Annotated[str | None, arg(metavar="KEY=VALUE")] = None


def index(command: Index, watch: Stopwatch) -> int:
    """An index that cannot be read counts as one bad file."""
    from dicode.data.index import check_files, read_data, table
    from dicode.data.records import validation_split
    from dicode.files import place
    from dicode.video.read import VideoReadError

    total_bad, by = 0, _key_value(command.validation_by)
    common.check_folders(command.folders)
    for folder in command.folders:
        try:
            found = read_data(folder)
        except VideoReadError as error:
            print(f"bad: {error}")
            total_bad += 1
            continue
        checked, bad = check_files(tracked(found.records, f"reading {place(folder).name}", "clip"))
        for _, reason in bad:
            print(f"bad: {reason}")
        good = [record for record, _ in checked]
        captions, held_out = sum(bool(record.captions) for record in good), sum(validation_split(good, by))
        print(f"{folder}: {len(good)} clips, {captions} with captions, {held_out} for validation; {len(bad)} bad files")
        print(table([clip for _, clip in checked], [found], len(bad)))
        total_bad += len(bad)
    return min(total_bad, MOST_COUNTED)


def cache(command: Cache, watch: Stopwatch) -> int:
    """Bad files are listed and left out; a cache with nothing in it is an error."""
    from dicode.checkpoint import resolve
    from dicode.data.build import FULL, CacheOptions, build_cache
    from dicode.data.cache_folder import check_own
    from dicode.data.index import Clip, read_data, table
    from dicode.data.records import merged
    from dicode.files import place

    options = CacheOptions(**{field.name: getattr(command, field.name) for field in fields(CacheOptions)})
    validation_by = _key_value(command.validation_by)
    output = place(common.named(command.output))
    check_own(output)
    if command.encode is not None:
        resolve(command.encode)  # before long work
        if not isinstance(output, Path):
            raise ValueError(f"--encode: expected -o on this machine, got {output}; copy the cache, then encode it")
    common.check_folders(command.folders)
    found = [read_data(folder) for folder in command.folders]
    records = merged(record for each in found for record in each.records)
    kept = "finished shards are kept; the same command continues"
    try:
        with watch.stage("shards"):
            units = build_cache(records, output, options, command.workers, command.ray, validation_by)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(kept) from error
    except OSError as error:
        if error.errno in FULL:
            raise OSError(f"{output}: no space is left there; {kept} when there is some") from error
        raise
    bad = [file.reason for unit in units for file in unit.bad]
    for reason in bad:
        print(f"bad: {reason}", file=sys.stderr)
    videos = [entry.video for unit in units for entry in unit.entries if not entry.repeats]
    shards = [unit.shard for unit in units if unit.shard]
    copies = sum(len(unit.entries) for unit in units) - len(videos) if command.dedupe is not None else None
    files = f"{len(shards)} shard{'s' * (len(shards) != 1)}"
    print(
        f"{command.output}: {len(videos)} clips ({sum(video.validation for video in videos)} for validation), "
        f"{sum(shard.frames for shard in shards)} frames of {command.size}×{command.size}, cropped at the centre, "
        f"{sum(shard.bytes for shard in shards) / 1e6:.0f} MB in {files}; {len(bad)} bad files"
        + ("" if copies is None else f"; {copies} copies left out")
    )
    clips = [Clip(video.count, video.period_s, video.captions, loops=video.loops) for video in videos]
    print(table(clips, found, len(bad), copies))
    if command.encode is not None:
        encode(Encode(command.output, command.encode, command.device), watch)
    return min(len(bad), MOST_COUNTED)


def stream(command: Stream, watch: Stopwatch) -> int:
    """Bad files are listed and left out; an index with nothing in it is an error."""
    from dicode.data.archive_index import build_archive_index
    from dicode.data.cache_folder import check_own
    from dicode.data.columns import VALIDATION
    from dicode.data.index import Clip, read_data, table
    from dicode.data.records import merged
    from dicode.files import place

    output, validation_by = place(common.named(command.output)), _key_value(command.validation_by)
    if not isinstance(output, Path):
        raise ValueError(f"-o: expected a folder of this machine for an index, got {output}")
    check_own(output)
    common.check_folders(command.folders)
    found = [read_data(folder) for folder in command.folders]
    records = merged(record for each in found for record in each.records)
    made, bad = build_archive_index(records, output, command.workers, validation_by)
    for file in bad:
        print(f"bad: {file.reason}", file=sys.stderr)
    videos, (height, width) = made.columns, (made.columns.column(name) for name in ("height", "width"))
    print(
        f"{command.output}: {len(videos):,} clips ({len(videos.having(VALIDATION)):,} for validation) in "
        f"{len(made.archives):,} archives; {len(bad)} bad files"
    )
    sizes = (f"{w}×{h}" for h, w in zip(height.tolist(), width.tolist(), strict=True))
    clips = [Clip(v.count, v.period_s, v.captions, size) for v, size in zip(videos, sizes, strict=True)]
    print(table(clips, found, len(bad)))
    return min(len(bad), MOST_COUNTED)


def blocks(command: Blocks, watch: Stopwatch) -> None:
    """A line for each set: its videos and their length."""
    from collections import Counter

    from dicode.data.blocks.clips import BlocksOptions, build_blocks
    from dicode.files import place

    names = ("count", "seed", "validation", "within", "shots", "key_frames_only")
    options = BlocksOptions(**{name: getattr(command, name) for name in names})
    with watch.stage("shards"):
        notes = build_blocks(options, place(common.named(command.output)), command.workers, command.ray)
    videos = [entry.video for note in notes for entry in note.entries]
    counts, seconds = Counter[str](), Counter[str]()
    for video in videos:
        counts[video.extra["set"]] += 1
        seconds[video.extra["set"]] += round(video.period_s)
    frames, size = (sum(getattr(note.shard, key) for note in notes if note.shard) for key in ("frames", "bytes"))
    print(f"{command.output}: {len(videos):,} clips, {frames:,} frames, {size / 1e6:,.0f} MB in {len(notes)} shards")
    print("\n".join(f"  {name:<14}{counts[name]:>8,} clips {seconds[name]:>9,} s" for name in counts))
    print(watch.text())


def verify(command: Verify, watch: Stopwatch) -> int:
    """Every shard is read; exits with the count of those that differ from the index."""
    from dicode.data.cache import fault, read_cache_index
    from dicode.files import place

    folder = place(command.cache)
    shards, videos = read_cache_index(folder, hashes=True)
    found = (fault(folder, shard, hashes=True) for shard in tracked(shards, f"reading {folder.name}", "shard"))
    faults = [text for text in found if text]
    for text in faults:
        print(f"bad: {text}")
    print(f"{command.cache}: {len(shards)} shards, {len(videos)} clips; {len(faults)} bad shards")
    return min(len(faults), MOST_COUNTED)


def check(command: Check, watch: Stopwatch) -> None:
    """Findings, then recommendations."""
    from dicode.data.cache import FrameCache
    from dicode.data.check import check_cache
    from dicode.provenance import check_result, command_line, write_result

    check_result(command.json)
    findings = check_cache(FrameCache.load(command.cache))
    advice = [f"- {line}" for line in findings.advice()]
    print("\n".join([*findings.lines(), "\nWhat follows:", *advice]))
    if command.json is not None:
        name = f"{Path(command.cache).name}: check"
        write_result(command.json, name, asdict(findings), findings.clips, 0, command_line())
        print(f"{command.json}: the same, in numbers")


def encode(command: Encode, watch: Stopwatch) -> None:
    """Written where training looks for them; what is there already is kept."""
    from dicode.checkpoint import resolve
    from dicode.data.cache import FrameCache
    from dicode.device import pick_device

    with common.needs_extra("train"):
        from dicode.tokenizer.video_tokenizer import VideoTokenizer
        from dicode.train.cached import first_stage_latents, frame_tokens
    tokenizer = VideoTokenizer.from_pretrained(resolve(command.model)).to(pick_device(command.device))
    frames = FrameCache.load(command.cache)
    with watch.stage("latents"):
        latents = first_stage_latents(tokenizer, frames, mirror=command.mirror)
    with watch.stage("tokens"):
        tokens = frame_tokens(tokenizer, frames)
    sides = "frames and mirror images" if command.mirror else "frames"
    shape = f"{tokens.shape[1]}×{tokens.shape[2]}"
    print(f"{command.cache}: latents {tuple(latents.shape)} of {sides}, and {shape} deep tokens of every key frame")
    print(watch.text())


def export(command: Export, watch: Stopwatch) -> None:
    """One archive a shard."""
    from dicode.data.archives import check_export, write_tars
    from dicode.data.cache import FrameCache
    from dicode.files import place

    output = place(common.named(command.output))
    check_export(output)
    frames = FrameCache.load(command.cache)
    print(f"{command.output}: {len(frames.videos)} clips in {len(write_tars(frames, output))} archives")


def sheet(command: Sheet, watch: Stopwatch) -> None:
    """Bad files are listed and others take their place."""
    from dicode.data.cache_folder import INDEX
    from dicode.data.index import read_index
    from dicode.files import place
    from dicode.video.read import DEFAULT_FPS, VideoReadError, read_video
    from dicode.video.sheet import check_sheet, save_sheet

    check_sheet(command.output)
    if (place(command.folder) / INDEX).is_file():
        _sheet_of_cache(command)
        return
    if command.only is not None:
        raise ValueError(f"--only: expected a cache, got {command.folder}")
    records = read_index(command.folder)
    clips: list[Any] = []
    labels: list[str] = []
    with Progress("reading", command.count, "clip") as progress:
        for record in random.Random(command.seed).sample(records, len(records)):
            if len(clips) == command.count:
                break
            try:
                with record.opened() as path:
                    video = read_video(path, DEFAULT_FPS, command.size, "pad", record.start_s, record.end_s)
            except (VideoReadError, OSError) as error:
                print(f"bad: {error}", file=sys.stderr)
                continue
            clips.append(video.frames)
            labels.append(record.caption or record.path.name)
            progress.update()
    if not clips:
        raise VideoReadError(f"{command.folder}: none of {len(records)} clips can be read, for the reasons above")
    save_sheet(command.output, clips, labels, command.columns)
    print(f"{command.output}: {len(clips)} of {len(records)} clips")


def _sheet_of_cache(command: Sheet) -> None:
    """All of a cache's clips can be read."""
    from dicode.data.cache import FrameCache
    from dicode.video.sheet import save_sheet

    cache, only = FrameCache.load(command.folder), _key_value(command.only, "--only")
    numbers: Sequence[int] = range(len(cache.videos))
    if only is not None:
        numbers = [i for i in numbers if str(cache.videos[i].extra.get(only[0])) == only[1]]
        if not numbers:
            raise ValueError(f"--only {command.only}: no clip of {command.folder} has that")
    chosen = random.Random(command.seed).sample(numbers, min(command.count, len(numbers)))
    videos = [cache.videos[i] for i in chosen]
    clips = [cache.frames[video.first : video.first + video.count].numpy() for video in videos]
    save_sheet(command.output, clips, [(*video.captions, video.file)[0] for video in videos], command.columns)
    print(f"{command.output}: {len(clips)} of {len(numbers)} clips")


def _key_value(text: str | None, flag: str = "--validation-by") -> tuple[str, str] | None:
    """KEY=VALUE of a flag."""
    key, _, value = (text or "").partition("=")
    if text is not None and not (key and value):
        raise ValueError(f"{flag}: expected KEY=VALUE such as lab=f147f077, got {text!r}")
    return (key, value) if text is not None else None
