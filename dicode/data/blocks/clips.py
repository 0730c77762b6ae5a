"""`dicode data blocks`: scripts, drawn and written as a training cache by the machinery of `data cache`."""

import hashlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dicode.data.blocks.captions import captions, shots
from dicode.data.blocks.draw import Camera, look_of
from dicode.data.blocks.motion import poses_of
from dicode.data.blocks.plan import exchanged, script_of
from dicode.data.blocks.script import CLIP_FRAMES, FPS, SETS, Script
from dicode.data.build import Entry, ShardNote, finished_note, make_shards, write_cache
from dicode.data.cache import shard_name, write_shard
from dicode.data.cache_folder import check_own, stale_files
from dicode.data.columns import CachedVideo
from dicode.files import Place
from dicode.video.timed import Video

SOURCE = "blocks"
CAPTIONS = 6  # of a video, in other words
STORY_SHARE = 10  # one in so many validation scripts of a set: a minute each


@dataclass(frozen=True)
class BlocksOptions:
    """Which scripts there are; equal options give equal bytes."""

    count: int  # training scripts
    seed: int = 0
    validation: int = 200  # scripts of every other set; a tenth of `story`
    within: float = 0.0  # share of training scripts that are one quick jump, spin or rebound
    shots: int = 1  # later clauses of a training script that are clips of their own too, as shots of a storyboard
    key_frames_only: bool = False  # of training: all that a language model without motion tokens reads
    scripts_per_shard: int = 64

    def __post_init__(self) -> None:
        """Raises `ValueError` for options out of range."""
        if min(self.count, self.validation, self.scripts_per_shard) < 1 or self.shots < 0 or not 0 <= self.within <= 1:
            raise ValueError("blocks: expected scripts in training, validation and shards, and a share within 0…1")


@dataclass(frozen=True)
class SceneUnit:
    """The scripts that become one shard."""

    number: int
    name: str  # of SETS
    indices: range
    options: BlocksOptions
    output: Place

    @property
    def records(self) -> range:
        """What a shard is counted by."""
        return self.indices

    @property
    def every(self) -> int:
        """Frames from one that is drawn to the next."""
        return CLIP_FRAMES if self.options.key_frames_only and self.name == "training" else 1

    def inputs(self) -> str:
        """A digest of all that the shard depends on: the code that draws it too."""
        o = self.options
        facts = (self.name, self.indices.start, self.indices.stop, o.seed, o.within, o.shots, self.every)
        return hashlib.sha256(repr((*facts, _code())).encode()).hexdigest()


def build_blocks(options: BlocksOptions, output: Place, workers: int = 1, ray: str | None = None) -> list[ShardNote]:
    """Write the cache, going on from what an earlier run of the same left; see `build_cache`."""
    check_own(output)
    for old in stale_files(output):
        old.unlink()
    size = options.scripts_per_shard
    units: list[SceneUnit] = []
    for name in (*SETS[1:], SETS[0]):  # training last: shards of validation stay where they are when it grows
        count = options.count if name == "training" else options.validation
        count = max(1, count // STORY_SHARE) if name == "story" else count
        for first in range(0, count, size):
            units.append(SceneUnit(len(units), name, range(first, min(count, first + size)), options, output))
    notes = make_shards(units, workers, ray, make_scenes)
    write_cache(notes, output)
    return notes


def make_scenes(unit: SceneUnit) -> str:
    """The note of a unit as JSON: of the shard there, if these options give the same, or of a new one."""
    name, inputs = shard_name(unit.number), unit.inputs()
    if (text := finished_note(unit.output, unit.number, len(unit.indices), inputs)) is not None:
        return text
    entries: list[Entry] = []
    frames: list[Video] = []
    first, every = 0, unit.every
    for record, index in enumerate(unit.indices):
        script = script_of(unit.options.seed, unit.name, index, unit.options.within)
        frames.append(drawn(script, unit.options.seed, unit.name, index, every))
        videos = videos_of(script, unit.options, unit.name, index)
        for own in videos:
            begin, count = first + own.first // every, -(-own.count // every)
            entries.append(Entry(replace(own, first=begin, count=count), record=record))
        first += len(frames[-1])
    times_s = np.concatenate([np.arange(len(own)) * every / FPS for own in frames])
    shard = write_shard(unit.output, name, torch.from_numpy(np.concatenate(frames)), torch.from_numpy(times_s))
    return ShardNote(unit.number, inputs, shard, tuple(entries), ()).write(unit.output)


def drawn(script: Script, seed: int, name: str, index: int, every: int = 1) -> Video:
    """All frames of a script, 16 a clip, and the last key frame; or each one so many later than the last."""
    return camera_of(script, seed, name, index).video(poses_of(script), every)


def camera_of(script: Script, seed: int, name: str, index: int) -> Camera:
    """What draws a script."""
    return Camera(look_of(_random(seed, name, index, "look"), len(script.objects)))


def videos_of(script: Script, options: BlocksOptions, name: str, index: int) -> list[CachedVideo]:
    """The entries of a script, from frame 0 on: all of it, and in training some later clauses by themselves.

    These begin with what the clauses before have left, and their captions with "then" or the like: what a storyboard
    asks of a language model. That of `story` has the first shot for its caption, and all of them in `shots`.
    """
    random = _random(options.seed, name, index, "captions")
    texts = captions(script, random, CAPTIONS, held=name == "paraphrases")
    boards = [shots(script, random, held=name == "paraphrases") for _ in range(CAPTIONS)]
    extra: dict[str, Any] = {"set": name, "script": script.record()}
    if name == "story":
        texts = (boards[0][0],)
    if name != "training":
        extra["shots"] = boards[0]
    if name == "swaps":
        other = exchanged(script)
        assert other is not None
        extra |= {"swapped": other.record(), "swapped_caption": captions(other, random, 1)[0]}
    file = f"{name}/{index:06}"
    found = [_entry(file, texts, 0, script.frames, name != "training", extra)]
    later = range(1, len(script.clauses)) if name == "training" else range(0)
    chosen = sorted(random.permutation(later)[: options.shots].tolist()) if later else []
    for number in chosen:
        own = tuple(dict.fromkeys(board[number] for board in boards))
        start, clips = script.starts[number], script.clauses[number].clips
        found.append(_entry(file, own, start * CLIP_FRAMES, clips * CLIP_FRAMES + 1, False, {"set": "shots"}))
    return found


def _entry(
    file: str, texts: tuple[str, ...], first: int, count: int, validation: bool, extra: dict[str, Any]
) -> CachedVideo:
    return CachedVideo(SOURCE, file, texts, validation, False, first, count, count / FPS, first / FPS, extra)


def _random(seed: int, name: str, index: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, SETS.index(name), index, *purpose.encode()])


@cache
def _code() -> str:
    """A digest of the files that draw."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
