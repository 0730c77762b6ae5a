"""What `dicode data index`, `cache`, `verify`, `encode`, `export` and `sheet` do; their flags are in `flags.py`."""

import sys
from collections.abc import Sequence
from dataclasses import fields

import torch

from dicode.data.build import CacheOptions, build_cache
from dicode.data.index import check_files, is_validation, read_index
from dicode.data.tars import write_tars
from dicode.extras import missing_extra
from dicode.files import place
from dicode.flags import Cache, Encode, Export, Index, Sheet, Verify
from dicode.hub import resolve
from dicode.progress import Progress, tracked
from dicode.seeds import generator_for
from dicode.shapes import Video
from dicode.stopwatch import Stopwatch
from dicode.video.io import VideoReadError, read_video
from dicode.video.shards import FrameCache, fault, read_cache_index
from dicode.video.sheet import check_sheet, save_sheet

MOST_COUNTED = 125  # exit codes from 126 on mean other things to a shell


def index(command: Index, watch: Stopwatch) -> int:
    """An index that cannot be read counts as one bad file."""
    total_bad = 0
    for folder in _named(command.folders):
        try:
            records = read_index(folder)
        except VideoReadError as error:
            print(f"bad: {error}")
            total_bad += 1
            continue
        good, bad = check_files(tracked(records, f"reading {place(folder).name}", "clip"))
        for file in bad:
            print(f"bad: {file.reason}")
        captions = sum(bool(record.caption) for record in good)
        held_out = sum(is_validation(record) for record in good)
        print(f"{folder}: {len(good)} clips, {captions} with captions, {held_out} for validation; {len(bad)} bad files")
        total_bad += len(bad)
    return min(total_bad, MOST_COUNTED)


def cache(command: Cache, watch: Stopwatch) -> int:
    """Bad files are listed and left out; a cache with nothing in it is an error."""
    options = CacheOptions(**{field.name: getattr(command, field.name) for field in fields(CacheOptions)})
    records = [record for folder in _named(command.folders) for record in read_index(folder)]
    output = place(command.output)
    try:
        with watch.stage("shards"):
            made = build_cache(records, output, options, command.workers, command.ray)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("finished shards are kept; the same command continues") from error
    bad = [file for unit in made for file in unit.bad]
    for file in bad:
        print(f"bad: {file.reason}", file=sys.stderr)
    videos = [entry.video for unit in made for entry in unit.entries if not entry.repeats]
    copies = sum(bool(entry.repeats) for unit in made for entry in unit.entries)
    shards = [unit.shard for unit in made if unit.shard]
    print(
        f"{command.output}: {len(videos)} clips ({sum(video.validation for video in videos)} for validation), "
        f"{sum(shard.frames for shard in shards)} frames of {command.size}×{command.size}, "
        f"{sum(shard.bytes for shard in shards) / 1e6:.0f} MB in {len(shards)} shards; {len(bad)} bad files"
        + (f"; {copies} copies left out" if command.dedupe is not None else "")
    )
    return min(len(bad), MOST_COUNTED)


def verify(command: Verify, watch: Stopwatch) -> int:
    """Every shard is read; exits with the count of those that are not what the index says."""
    folder = place(command.cache)
    shards, videos = read_cache_index(folder, hashes=True)
    faults = [
        said
        for shard in tracked(shards, f"reading {folder.name}", "shard")
        if (said := fault(folder, shard, hashes=True))
    ]
    for said in faults:
        print(f"bad: {said}")
    print(f"{command.cache}: {len(shards)} shards, {len(videos)} clips; {len(faults)} bad shards")
    return min(len(faults), MOST_COUNTED)


def encode(command: Encode, watch: Stopwatch) -> int:
    """Written where training looks for them; what is there already is kept."""
    try:
        from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS, VideoTokenizer
        from dicode.train.clips import first_stage_latents
        from dicode.train.language import frame_tokens
    except ModuleNotFoundError as error:
        raise missing_extra(error, "train") from error
    source = resolve(command.model)
    with watch.stage("load"):
        tokenizer, frames = VideoTokenizer.from_pretrained(source), FrameCache.load(command.cache)
    with watch.stage("latents"):
        latents = first_stage_latents(tokenizer, frames, source / FIRST_STAGE_WEIGHTS)
    with watch.stage("tokens"):
        tokens = frame_tokens(tokenizer, frames, source)
    print(f"{command.cache}: latents {tuple(latents.shape)} of frames and mirror images, tokens {tuple(tokens.shape)}")
    print(watch.text())
    return 0


def export(command: Export, watch: Stopwatch) -> int:
    """One archive a shard."""
    cache = FrameCache.load(command.cache)
    archives = write_tars(cache, place(command.output))
    print(f"{command.output}: {len(cache.videos)} clips in {len(archives)} archives")
    return 0


def sheet(command: Sheet, watch: Stopwatch) -> int:
    """Bad files are listed and others take their place."""
    check_sheet(command.output)
    records = read_index(command.folder)
    order = torch.randperm(len(records), generator=generator_for(command.seed, "sheet")).tolist()
    clips: list[Video] = []
    labels: list[str] = []
    with Progress("reading", command.count, "clip") as progress:
        for record in (records[i] for i in order):
            if len(clips) == command.count:
                break
            try:
                with record.opened() as path:
                    clips.append(read_video(path, size=command.size, fit="pad").frames)
            except (VideoReadError, OSError) as error:
                print(f"bad: {error}", file=sys.stderr)
                continue
            labels.append(record.caption or record.path.name)
            progress.update()
    save_sheet(command.output, clips, labels)
    print(f"{command.output}: {len(clips)} of {len(records)} clips")
    return 0


def _named(folders: Sequence[str]) -> Sequence[str]:
    if not folders:
        raise ValueError("expected at least one folder of clips, got none")
    return folders
