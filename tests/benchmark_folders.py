"""Miniature data sets in the folders of the published ones, and networks that stand in for theirs."""

import json
from pathlib import Path

import av
import numpy as np
import torch
from synthetic import draw_clip
from test_evaluate_networks import StandIn3D, saved
from torch import Tensor, nn
from torch.nn import functional

from dicode.video.write import VideoWriter

COUNTS = {"ApplyEyeMakeup": 4, "YoYo": 3, "HandstandPushups": 2}


class DecidedC3D(nn.Module):
    """Takes what StyleGAN-V's C3D takes, and is sure of its class, so that scores are far from 1."""

    def forward(self, video: Tensor) -> Tensor:
        return torch.softmax(functional.interpolate(video.mean((1, 2)).flatten(1)[:, None], 101)[:, 0] / 2, dim=-1)


def write_avi(path: Path, seed: int, num_frames: int = 60, size: int = 40) -> None:
    """Frames at 25 a second in MPEG-4, as UCF-101 has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for frame in draw_clip(seed, num_frames, size)[0]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))))
        container.mux(stream.encode())


def write_ucf101(folder: Path) -> Path:
    """Nine videos in three classes with the lists of the first split; the second YoYo is too short for a clip."""
    lists = folder / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    train, test = [], []
    for number, (name, count) in enumerate(COUNTS.items()):
        for i in range(count):
            file = f"{name}/v_{name}_g{i + 1:02d}_c01.avi"
            write_avi(
                folder / "UCF-101" / file, seed=10 * number + i, num_frames=20 if (name, i) == ("YoYo", 1) else 60
            )
            (test if i == 0 else train).append(file)
    (lists / "classInd.txt").write_text("".join(f"{i + 1} {name}\n" for i, name in enumerate(COUNTS)))
    (lists / "testlist01.txt").write_text("\n".join(test))
    (lists / "trainlist01.txt").write_text("\n".join(f"{file} 1" for file in train))
    return folder


def write_msrvtt(folder: Path, videos: str, notes: str, count: int = 5) -> Path:
    """Test videos 7 …, three captions each, and one of the training split, whose video is not there."""
    (folder / videos).mkdir(parents=True)
    info: dict[str, list[dict[str, str]]] = {"videos": [], "sentences": []}
    for number in reversed(range(6, 7 + count)):
        name = f"video{number}"
        info["videos"].append({"video_id": name, "split": "test" if number > 6 else "train"})
        frames, caption = draw_clip(number, 24, 40)
        info["sentences"] += [{"video_id": name, "caption": f"{caption} {way}"} for way in ("fast", "slowly", "twice")]
        if number > 6:
            with VideoWriter(folder / videos / f"{name}.mp4", 8.0) as writer:
                writer.write(frames)
    (folder / notes).write_text(json.dumps(info))
    return folder


def write_networks(folder: Path) -> tuple[Path, Path]:
    """I3D and C3D that are neither."""
    return saved(StandIn3D(), folder / "i3d.pt"), saved(DecidedC3D(), folder / "c3d.pt")
