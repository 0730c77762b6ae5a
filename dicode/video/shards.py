"""The training cache: every native frame of a data set once, with its time, so that any clip at any rate is a lookup.

cache/frames.safetensors   frames u8 `f h w c`, times_s f64 `f`
cache/index.json           one entry a video: captions, source, split, first frame, count, period
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dicode.hub import config_from_dict


@dataclass(frozen=True)
class CachedVideo:
    """One video of a cache: frames `first … first + count − 1`, which play for `period_s` seconds and may loop."""

    source: str
    file: str
    captions: tuple[str, ...]
    validation: bool
    loops: bool
    first: int
    count: int
    period_s: float


@dataclass(frozen=True)
class FrameCache:
    """All videos of a data set in memory."""

    videos: tuple[CachedVideo, ...]
    frames: Tensor  # uint8 f h w c
    times_s: Tensor  # float64 f, from the start of each video

    @classmethod
    def load(cls, folder: str | Path) -> "FrameCache":
        """Read a cache written by `save`."""
        folder = Path(folder)
        if not (folder / "index.json").is_file():
            raise FileNotFoundError(f"{folder}: no frame cache there; make it with `dicode data cache`")
        entries = json.loads((folder / "index.json").read_text())
        tensors = load_file(folder / "frames.safetensors")
        videos = tuple(config_from_dict(CachedVideo, entry, "index.json") for entry in entries)
        return cls(videos, tensors["frames"], tensors["times_s"])

    def save(self, folder: str | Path) -> None:
        """Write frames and index; an interrupted write leaves no index and so no cache.

        What was computed from frames that lay there before (latents, tokens, features) is removed with them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.json").unlink(missing_ok=True)
        for old in folder.glob("*.safetensors"):
            old.unlink()
        save_file({"frames": self.frames, "times_s": self.times_s}, folder / "frames.safetensors")
        (folder / "index.json").write_text(json.dumps([dataclasses.asdict(v) for v in self.videos], indent=0))

    def subset(self, validation: bool) -> "FrameCache":
        """The videos of one split; the frames are shared, not copied. Raises `ValueError` where it has none."""
        chosen = tuple(v for v in self.videos if v.validation == validation)
        if not chosen:
            raise ValueError(f"none of {len(self.videos)} videos is for {'validation' if validation else 'training'}")
        return dataclasses.replace(self, videos=chosen)

    def frame_rows(self) -> Tensor:
        """Row numbers of all frames of the videos in this (sub)set."""
        return torch.cat([torch.arange(v.first, v.first + v.count) for v in self.videos])

    def clip_rows(self, video: CachedVideo, start_s: float, num_frames: int, fps: float) -> Tensor:
        """Row of the frame shown at `start_s + i / fps`; a looping video wraps, another holds its last frame."""
        times = self.times_s[video.first : video.first + video.count].numpy()
        moments = start_s + np.arange(num_frames) / fps
        if video.loops:
            moments = moments % video.period_s
        shown = np.searchsorted(times, moments + 1e-6, side="right") - 1
        return torch.from_numpy(video.first + shown.clip(0, video.count - 1))


def thin(times_s: Sequence[float], max_fps: float) -> list[int]:
    """Indices of the frames to keep so that no two are closer than 1/max_fps (within 1 %)."""
    kept: list[int] = []
    for i, time_s in enumerate(times_s):
        if not kept or time_s - times_s[kept[-1]] >= 0.99 / max_fps:
            kept.append(i)
    return kept
