"""LeRobot data sets, drawn: the folders that `lerobot` 0.4 writes (version 3.0) and wrote before (2.1), two cameras.

Written after lerobot/datasets/lerobot_dataset.py and utils.py: AV1 with key frames two apart, in version 3 several
episodes a file, and the data of the robot beside them.
"""

import json
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow
from pyarrow import parquet
from synthetic import draw_clip

from dicode.video.timed import Video

CAMERAS = ("observation.images.front", "observation.images.wrist")
FPS = 10
SIZE = 96
LENGTHS = (24, 31, 20, 27, 33)  # frames of the episodes
PATHS = {
    "v2.1": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    "v3.0": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
DATA_PATHS = {
    "v2.1": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "v3.0": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
}
FILES = (0, 0, 0, 1, 1)  # version 3: the file of each episode


def drawn_episode(number: int, camera: str) -> tuple[Video, str]:
    """Frames and task of an episode; the wrist's camera sees the colours inverted."""
    frames, task = draw_clip(number, LENGTHS[number], SIZE)
    return (255 - frames if camera.endswith("wrist") else frames), task


def write_lerobot(folder: Path, version: str, episodes: int = len(LENGTHS)) -> Path:
    """A data set of this version; gives the folder."""
    tasks = [drawn_episode(number, CAMERAS[0])[1] for number in range(episodes)]
    video = {"video.height": SIZE, "video.width": SIZE, "video.codec": "av1", "video.pix_fmt": "yuv420p",
             "video.is_depth_map": False, "video.fps": FPS, "video.channels": 3, "has_audio": False}  # fmt: skip
    arm = {"dtype": "float32", "shape": [6], "names": [f"joint_{i}.pos" for i in range(6)]}
    numbers = {"dtype": "int64", "shape": [1], "names": None}
    features = {
        "action": arm,
        "observation.state": arm,
        **{
            name: {"dtype": "video", "shape": [SIZE, SIZE, 3], "names": ["height", "width", "channels"], "info": video}
            for name in CAMERAS
        },
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), numbers),
    }
    info = {
        "codebase_version": version,
        "robot_type": "so101_follower",
        "total_episodes": episodes,
        "total_frames": sum(LENGTHS[:episodes]),
        "total_tasks": episodes,
        "chunks_size": 1000,
        "fps": FPS,
        "splits": {"train": f"0:{episodes}"},
        "data_path": DATA_PATHS[version],
        "video_path": PATHS[version],
        "features": features,
    }
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info, indent=4))
    (folder / "README.md").write_text("---\ntags: [LeRobot]\n---\n")
    for number in range(episodes):
        name = DATA_PATHS[version].format(episode_chunk=0, episode_index=number, chunk_index=0, file_index=number)
        _write_data(folder / name, number)
    rows: list[dict[str, Any]] = [
        {"episode_index": number, "tasks": [task], "length": LENGTHS[number]} for number, task in enumerate(tasks)
    ]
    if version == "v2.1":
        (folder / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        named = [{"task_index": number, "task": task} for number, task in enumerate(tasks)]
        (folder / "meta/tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
        for camera in CAMERAS:
            for number in range(episodes):
                name = PATHS[version].format(episode_chunk=0, video_key=camera, episode_index=number)
                _write_av1(folder / name, drawn_episode(number, camera)[0])
        return folder
    for camera in CAMERAS:
        for file in {*FILES[:episodes]}:
            held = [number for number in range(episodes) if FILES[number] == file]
            name = PATHS[version].format(video_key=camera, chunk_index=0, file_index=file)
            _write_av1(folder / name, np.concatenate([drawn_episode(number, camera)[0] for number in held]))
            ends = list(accumulate(LENGTHS[number] / FPS for number in held))
            for number, start_s, end_s in zip(held, [0.0, *ends[:-1]], ends, strict=True):
                facts = {"chunk_index": 0, "file_index": file, "from_timestamp": start_s, "to_timestamp": end_s}
                rows[number] |= {f"videos/{camera}/{key}": value for key, value in facts.items()}
    _write_table(folder / "meta/episodes/chunk-000/file-000.parquet", rows)
    _write_table(folder / "meta/tasks.parquet", [{"task_index": i, "task": task} for i, task in enumerate(tasks)])
    return folder


def _write_data(path: Path, number: int) -> None:
    """What the robot measured in an episode, a row a frame."""
    generator, first, rows = np.random.default_rng(number), sum(LENGTHS[:number]), []
    for frame in range(LENGTHS[number]):
        state = generator.normal(size=6).astype(np.float32).tolist()
        rows.append({"action": state, "observation.state": state, "timestamp": frame / FPS, "frame_index": frame,
                     "episode_index": number, "index": first + frame, "task_index": number})  # fmt: skip
    _write_table(path, rows)


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _write_av1(path: Path, frames: Video) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libsvtav1", rate=Fraction(FPS), options={"crf": "20", "preset": "10", "g": "2"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
