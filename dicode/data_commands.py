"""What `dicode data index`, `cache`, `encode` and `sheet` do; their flags are in `cli.py`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy import ndarray
from tqdm import tqdm

from dicode.cli import Cache, Encode, Index, Sheet, missing_extra
from dicode.commands import PROGRESS_AFTER_S, check_parent
from dicode.hub import resolve
from dicode.seeds import generator_for
from dicode.shapes import Video
from dicode.stopwatch import Stopwatch
from dicode.tokenizer.video_tokenizer import FIRST_STAGE_WEIGHTS, VideoTokenizer
from dicode.video.clips import ClipRecord, check_files, is_validation, read_index
from dicode.video.io import VideoReadError, native_frames, read_video
from dicode.video.shards import CachedVideo, FrameCache, thin
from dicode.video.sheet import save_sheet

MOST_COUNTED = 125  # exit codes from 126 on mean other things to a shell
T = TypeVar("T")


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
        good, bad = check_files(bar(records, folder.name))
        for file in bad:
            print(f"bad: {file.reason}")
        captions = sum(bool(record.caption) for record in good)
        held_out = sum(is_validation(record) for record in good)
        print(f"{folder}: {len(good)} clips, {captions} with captions, {held_out} for validation; {len(bad)} bad files")
        total_bad += len(bad)
    return min(total_bad, MOST_COUNTED)


def cache(command: Cache, watch: Stopwatch) -> int:
    """Bad files are listed and left out; without a single good one nothing is written."""
    videos: list[CachedVideo] = []
    frames: list[Video] = []
    times_s: list[ndarray] = []
    num_bad = num_frames = 0
    for folder in _named(command.folders):
        for record in bar(read_index(folder), folder.name):
            try:
                shown, starts_s, period_s = native_frames(record.path, command.size)
            except (VideoReadError, OSError) as error:
                print(f"bad: {error}", file=sys.stderr)
                num_bad += 1
                continue
            kept = thin(starts_s.tolist(), command.max_fps)
            videos.append(_entry(record, folder, num_frames, len(kept), period_s, command.loops))
            num_frames += len(kept)
            frames.append(shown[kept])
            times_s.append(starts_s[kept])
    if not videos:
        raise VideoReadError(f"{', '.join(map(str, command.folders))}: none of {num_bad} files can be read")
    pixels, times = (torch.from_numpy(np.concatenate(parts)) for parts in (frames, times_s))
    FrameCache(tuple(videos), pixels, times).save(command.output)
    held_out = sum(video.validation for video in videos)
    print(
        f"{command.output}: {len(videos)} clips ({held_out} for validation), {num_frames} frames of "
        f"{command.size}×{command.size}, {pixels.numel() / 1e6:.0f} MB; {num_bad} bad files"
    )
    return min(num_bad, MOST_COUNTED)


def encode(command: Encode, watch: Stopwatch) -> int:
    """Written where training looks for them; what is there already is kept."""
    try:
        from dicode.train.clips import first_stage_latents
        from dicode.train.language import frame_tokens
    except ModuleNotFoundError as error:
        raise missing_extra(error, "train") from error
    source = resolve(command.model)
    with watch.stage("load"):
        tokenizer, frames = VideoTokenizer.from_pretrained(source), FrameCache.load(command.cache)
    with watch.stage("latents"):
        latents = first_stage_latents(tokenizer, frames, command.cache, source / FIRST_STAGE_WEIGHTS)
    with watch.stage("tokens"):
        tokens = frame_tokens(tokenizer, frames, command.cache, source)
    print(f"{command.cache}: latents {tuple(latents.shape)} of frames and mirror images, tokens {tuple(tokens.shape)}")
    print(watch.text())
    return 0


def sheet(command: Sheet, watch: Stopwatch) -> int:
    """Bad files are listed and others take their place."""
    check_parent(command.output)
    records = read_index(command.folder)
    order = torch.randperm(len(records), generator=generator_for(command.seed, "sheet")).tolist()
    clips: list[Video] = []
    labels: list[str] = []
    with tqdm(total=command.count, unit="clip", delay=PROGRESS_AFTER_S, disable=None, leave=False) as shown:
        for record in (records[i] for i in order):
            if len(clips) == command.count:
                break
            try:
                clips.append(read_video(record.path, size=command.size, fit="pad").frames)
            except (VideoReadError, OSError) as error:
                print(f"bad: {error}", file=sys.stderr)
                continue
            labels.append(record.caption or record.path.name)
            shown.update()
    save_sheet(command.output, clips, labels)
    print(f"{command.output}: {len(clips)} of {len(records)} clips")
    return 0


def bar(items: Sequence[T], name: str) -> "tqdm[Any]":
    """The items with a progress bar, for what takes longer than two seconds."""
    return tqdm(items, desc=name, unit="clip", delay=PROGRESS_AFTER_S, disable=None, leave=False)


def _named(folders: Sequence[Path]) -> Sequence[Path]:
    if not folders:
        raise ValueError("expected at least one folder of clips, got none")
    return folders


def _entry(record: ClipRecord, folder: Path, first: int, count: int, period_s: float, loops: bool) -> CachedVideo:
    return CachedVideo(
        source=folder.resolve().name,
        file=record.path.relative_to(record.folder).as_posix(),
        captions=record.captions,
        validation=is_validation(record),
        loops=loops,
        first=first,
        count=count,
        period_s=period_s,
    )
