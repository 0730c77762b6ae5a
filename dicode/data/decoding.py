"""Clips of archived videos, decoded by worker processes ahead of the training that asks for them."""

import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dicode.data.archive_index import AGAIN, ArchivedVideos
from dicode.data.columns import Videos
from dicode.files import UnreachableError, fetched, place
from dicode.video.read import VideoReadError, frames_at
from dicode.video.timed import Video

AHEAD = 2  # batches that a worker begins before they are asked for
MOST_SHORT_S = 0.1  # by which a video may end before its header says: some round, or count the sound's end


class ArchivedClip(NamedTuple):
    """A clip of an archived video: where it lies, and how it is to be decoded."""

    archive: str
    span: tuple[int, int]  # offset and length in bytes
    file: str
    start_s: float  # of the video within the file …
    end_s: float  # … and its end there
    first_s: float  # of the clip in the video; before it begins its first frame is held, after its end the last
    frames: int
    fps: float
    size: tuple[int, int]  # height, width
    mirrored: bool
    stride: int  # frame stride that it stands for
    has_context: bool  # whether something was recorded before it

    @property
    def name(self) -> str:
        """The archive, and the video's name in it."""
        name = place(self.archive).name
        return f"{self.archive}/{self.file.partition(f'{name}/')[2] or self.file}"


class DecodedClip(NamedTuple):
    """The frames of the first of some clips that can be decoded, which clip that is, and what is wrong with others."""

    frames: Video
    clip: ArchivedClip
    faults: dict[str, str]  # by the names of the videos before it


@dataclass(frozen=True)
class ClipSpan:
    """A part of a video: its first moment in seconds, which may lie before the beginning, rate and frame stride."""

    first_s: float
    frames: int
    fps: float
    stride: int
    has_context: bool


def archived_clip(
    shards: ArchivedVideos, videos: Videos, number: int, at: ClipSpan, size: tuple[int, int], mirrored: bool = False
) -> ArchivedClip:
    """The clip at this place of one of some videos."""
    row, video = int(videos.numbers(np.array([number]))[0]), videos[number]
    own = {name: int(videos.columns[name][row]) for name in ("archive", "offset", "length")}
    where = shards.archives[own["archive"]], (own["offset"], own["length"]), video.file
    span = video.start_s, video.start_s + video.period_s
    return ArchivedClip(*where, *span, at.first_s, at.frames, at.fps, size, mirrored, at.stride, at.has_context)


def decode(clip: ArchivedClip) -> Video:
    """The frames of a clip. Raises `VideoReadError` where the video is damaged, `OSError` where its archive is gone."""
    with fetched(place(clip.archive), clip.span, clip.file) as path:
        if path.stat().st_size != clip.span[1]:
            raise OSError(f"{clip.name}: its archive ends before it; {AGAIN}")
        moments_s = np.maximum(0.0, clip.first_s + np.arange(clip.frames) / clip.fps)
        try:
            frames, length_s = frames_at(path, moments_s, clip.size, clip.start_s, clip.end_s)
        except VideoReadError as error:
            raise VideoReadError(str(error).replace(str(path), clip.name)) from error
    missing_s = min(float(moments_s[-1]), clip.end_s - clip.start_s) - length_s
    if missing_s > MOST_SHORT_S:
        raise VideoReadError(f"{clip.name}: ends {missing_s:.3g} s before its header says")
    return np.ascontiguousarray(frames[:, :, ::-1] if clip.mirrored else frames)


class Decoder(Dataset[Any]):
    """Clips by themselves: any worker decodes any of them."""

    def __getitem__(self, candidates: Sequence[ArchivedClip]) -> DecodedClip | Exception:
        """The first of these that is undamaged, or the error to stop with; a worker that raised it would add to it."""
        faults: dict[str, str] = {}
        for clip in candidates:
            try:
                return DecodedClip(decode(clip), clip, faults)
            except VideoReadError as error:
                faults[clip.name] = str(error)
            except (OSError, UnreachableError) as error:
                return error
        reasons = "; ".join(faults.values())
        return VideoReadError(f"none of {len(candidates)} clips that may stand in for each other: {reasons}")


def collated(clips: Sequence[DecodedClip | Exception]) -> dict[str, Any] | Exception:
    """A batch: frames uint8 `b f h w c`, strides and contexts of its clips, and what stood in for damaged ones."""
    if error := next((clip for clip in clips if isinstance(clip, Exception)), None):
        return error
    return _joined(cast(Sequence[DecodedClip], clips))


def _joined(clips: Sequence[DecodedClip]) -> dict[str, Any]:
    return {
        "frames": torch.from_numpy(np.stack([clip.frames for clip in clips])),
        "has_context": torch.tensor([clip.clip.has_context for clip in clips]),
        "frame_stride": torch.tensor([clip.clip.stride for clip in clips], dtype=torch.float32),
        "replaced": torch.tensor(float(sum(bool(clip.faults) for clip in clips))),
        "faults": {name: fault for clip in clips for name, fault in clip.faults.items()},
    }


def decoded_batches(
    batches: Iterable[Sequence[Sequence[ArchivedClip]]], workers: int = 0, pinned: bool = False
) -> Iterator[dict[str, Tensor]]:
    """These batches in their order, each of clips with those that may stand in for them; without workers in here.

    Damaged videos are named on the terminal, each once. `pinned` memory is copied to a GPU while that computes. Raises
    `VideoReadError` where none of a clip and its stand-ins can be decoded, and `OSError` or `UnreachableError` where an
    archive cannot be read.
    """
    own: dict[str, Any] = {}
    if workers:  # spawned: a fork of a process with threads, or with a GPU, may stop for ever
        own = {"multiprocessing_context": "spawn", "worker_init_fn": _prepare_worker, "prefetch_factor": AHEAD}
    loader: DataLoader[Any] = DataLoader(
        Decoder(),
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collated,
        pin_memory=pinned,
        generator=torch.Generator(),  # else it draws from the global one
        **own,
    )
    named: set[str] = set()
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        for name, fault in batch.pop("faults").items():
            if name not in named:
                print(f"damaged, another clip stands in: {fault}", flush=True)
                named.add(name)
        yield batch


def _prepare_worker(number: int) -> None:
    """Ctrl-C, and the first SIGTERM, which may reach a whole group of processes, are for the one that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
