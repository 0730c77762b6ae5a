"""What `dicode data index`, `cache`, `verify`, `encode`, `export` and `sheet` do; their flags are in `flags.py`.

`index` and `sheet` need no torch: what does is imported by the commands that compute.
"""

import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from dicode.cli.flags import Cache, Check, Encode, Export, Index, Sheet, Verify
from dicode.config import missing_extra
from dicode.data.cache_folder import check_own
from dicode.data.index import check_files, read_data, read_index
from dicode.data.records import merged, validation_split
from dicode.data.summary import Clip, table
from dicode.files import check_file, check_parent, place, put_text
from dicode.stopwatch import Progress, Stopwatch, tracked
from dicode.video.read import DEFAULT_FPS, VideoReadError, read_video
from dicode.video.sheet import check_sheet, save_sheet
from dicode.video.timed import Video

MOST_COUNTED = 125  # exit codes from 126 on mean other things to a shell


def index(command: Index, watch: Stopwatch) -> int:
    """An index that cannot be read counts as one bad file."""
    total_bad, by = 0, _by(command.validation_by)
    for folder in _named(command.folders):
        try:
            found = read_data(folder)
        except VideoReadError as error:
            print(f"bad: {error}")
            total_bad += 1
            continue
        checked, bad = check_files(tracked(found.records, f"reading {place(folder).name}", "clip"))
        for file in bad:
            print(f"bad: {file.reason}")
        good = [record for record, _ in checked]
        captions, held_out = (sum(flags) for flags in ((bool(r.captions) for r in good), validation_split(good, by)))
        print(f"{folder}: {len(good)} clips, {captions} with captions, {held_out} for validation; {len(bad)} bad files")
        print(table([clip for _, clip in checked], [found], len(bad)))
        total_bad += len(bad)
    return min(total_bad, MOST_COUNTED)


def cache(command: Cache, watch: Stopwatch) -> int:
    """Bad files are listed and left out; a cache with nothing in it is an error."""
    from dicode.data.build import FULL, CacheOptions, build_cache

    options = CacheOptions(**{field.name: getattr(command, field.name) for field in fields(CacheOptions)})
    validation_by = _by(command.validation_by)
    if not command.output.strip():
        raise ValueError(f"-o: expected the name of a folder, got {command.output!r}")
    output = place(command.output)
    check_own(output)
    if command.encode is not None and not isinstance(output, Path):
        raise ValueError(f"--encode: expected -o on this machine, got {command.output}; copy the cache, then encode it")
    found = [read_data(folder) for folder in _named(command.folders)]
    encoder = None if command.encode is None else _encoder(command.encode, command.device, watch)
    records = merged(record for each in found for record in each.records)
    kept = "finished shards are kept; the same command continues"
    try:
        with watch.stage("shards"):
            made = build_cache(records, output, options, command.workers, command.ray, validation_by)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(kept) from error
    except OSError as error:
        if error.errno in FULL:
            raise OSError(f"{output}: no space is left there; {kept} when there is some") from error
        raise
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
    clips = [Clip(video.count, video.period_s, video.captions, loops=video.loops) for video in videos]
    print(table(clips, found, len(bad), copies if command.dedupe is not None else None))
    if encoder is not None:
        encoder(command.output)
    return min(len(bad), MOST_COUNTED)


def verify(command: Verify, watch: Stopwatch) -> int:
    """Every shard is read; exits with the count of those that are not what the index says."""
    from dicode.data.cache import fault, read_cache_index

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


def check(command: Check, watch: Stopwatch) -> int:
    """Findings, then what follows of them."""
    from dicode.data.cache import FrameCache
    from dicode.data.check import check_cache

    check_parent(command.json)
    check_file(command.json)
    findings = check_cache(FrameCache.load(command.cache))
    for line in findings.lines():
        print(line)
    print("\nWhat follows:")
    for line in findings.advice():
        print(f"- {line}")
    if command.json is not None:
        put_text(command.json, json.dumps(asdict(findings), indent=1) + "\n")
        print(f"{command.json}: the same, in numbers")
    return 0


def encode(command: Encode, watch: Stopwatch) -> int:
    """Written where training looks for them; what is there already is kept."""
    encoder = _encoder(command.model, command.device, watch, command.mirror)
    encoder(str(command.cache))
    print(watch.text())
    return 0


def _encoder(model: str, device: str, watch: Stopwatch, mirror: bool = False) -> Callable[[str], None]:
    """What computes latents and tokens of a cache; the model is loaded by then."""
    try:
        from dicode.checkpoint import resolve
        from dicode.data.cache import FrameCache
        from dicode.device import pick_device
        from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS, VideoTokenizer
        from dicode.train.lm import frame_tokens
        from dicode.train.tokenizer import first_stage_latents
    except ModuleNotFoundError as error:
        raise missing_extra(error, "train") from error
    with watch.stage("load"):
        source = resolve(model)
        tokenizer = VideoTokenizer.from_pretrained(source).to(pick_device(device))

    def of_cache(folder: str) -> None:
        frames = FrameCache.load(folder)
        with watch.stage("latents"):
            latents = first_stage_latents(tokenizer, frames, source / FIRST_STAGE_WEIGHTS, mirror=mirror)
        with watch.stage("tokens"):
            tokens = frame_tokens(tokenizer, frames, source)
        sides = "frames and mirror images" if mirror else "frames"
        each = f"{tokens.shape[1]}×{tokens.shape[2]}"
        print(f"{folder}: latents {tuple(latents.shape)} of {sides}, and {each} deep tokens of every key frame")

    return of_cache


def export(command: Export, watch: Stopwatch) -> int:
    """One archive a shard."""
    from dicode.data.archives import check_export, write_tars
    from dicode.data.cache import FrameCache

    output = place(command.output)
    check_export(output)
    cache = FrameCache.load(command.cache)
    archives = write_tars(cache, output)
    print(f"{command.output}: {len(cache.videos)} clips in {len(archives)} archives")
    return 0


def sheet(command: Sheet, watch: Stopwatch) -> int:
    """Bad files are listed and others take their place."""
    check_sheet(command.output)
    records = read_index(command.folder)
    order = random.Random(command.seed).sample(range(len(records)), len(records))
    clips: list[Video] = []
    labels: list[str] = []
    with Progress("reading", command.count, "clip") as progress:
        for record in (records[i] for i in order):
            if len(clips) == command.count:
                break
            try:
                with record.opened() as path:
                    video = read_video(path, DEFAULT_FPS, command.size, "pad", record.start_s, record.end_s)
                    clips.append(video.frames)
            except (VideoReadError, OSError) as error:
                print(f"bad: {error}", file=sys.stderr)
                continue
            labels.append(record.caption or record.path.name)
            progress.update()
    save_sheet(command.output, clips, labels)
    print(f"{command.output}: {len(clips)} of {len(records)} clips")
    return 0


def _by(text: str | None) -> tuple[str, str] | None:
    """KEY=VALUE of a flag."""
    if text is None:
        return None
    key, mark, value = text.partition("=")
    if not (key and mark and value):
        raise ValueError(f"--validation-by: expected KEY=VALUE such as lab=f147f077, got {text!r}")
    return key, value


def _named(folders: Sequence[str]) -> Sequence[str]:
    if not folders or not all(folder.strip() for folder in folders):  # '' would be the current folder
        raise ValueError(f"expected at least one folder of clips, got {' '.join(map(repr, folders)) or 'none'}")
    return folders
