"""Small clips of one moving shape with a caption, drawn from a seed."""

import json
from pathlib import Path

import numpy as np

from dicode.video.timed import Video
from dicode.video.write import VideoWriter

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 200, 30),
    "purple": (150, 60, 190),
    "black": (20, 20, 20),
}
SHAPES = ("square", "circle", "diamond")
DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}  # (y, x)


def draw_clip(seed: int, num_frames: int = 16, size: int = 32) -> tuple[Video, str]:
    """A shape crossing white ground once, and its caption, such as "a red square moves right".

    Neighbouring seeds differ in colour first, then shape, then direction: any 72 in a row are all different.
    """
    colour = list(COLOURS)[seed % len(COLOURS)]
    shape = SHAPES[seed // len(COLOURS) % len(SHAPES)]
    direction = list(DIRECTIONS)[seed // (len(COLOURS) * len(SHAPES)) % len(DIRECTIONS)]
    offset = np.random.default_rng(seed).uniform(-0.15, 0.15)  # off the middle line, so that captions don't say all

    y_step, x_step = DIRECTIONS[direction]
    travelled = np.linspace(-0.3, 0.3, num_frames)
    centre_y = (0.5 + y_step * travelled + abs(x_step) * offset) * size
    centre_x = (0.5 + x_step * travelled + abs(y_step) * offset) * size
    grid = np.arange(size) + 0.5
    y = np.abs(grid[None, :, None] - centre_y[:, None, None])
    x = np.abs(grid[None, None, :] - centre_x[:, None, None])
    distance = {"square": np.maximum(y, x), "circle": np.hypot(y, x), "diamond": (y + x) / 1.25}[shape]
    frames = np.full((num_frames, size, size, 3), 255, dtype=np.uint8)
    frames[distance < 0.18 * size] = COLOURS[colour]
    return frames, f"a {colour} {shape} moves {direction}"


def write_dataset(
    folder: str | Path, count: int, num_frames: int = 17, size: int = 32, fps: float = 8.0, seed: int = 0
) -> Path:
    """Write `count` clips, mp4 and gif in turn, under folder/videos with folder/captions.jsonl; gives the folder."""
    folder = Path(folder)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        frames, caption = draw_clip(seed + index, num_frames, size)
        file = f"videos/{index:04d}.{'gif' if index % 2 else 'mp4'}"
        with VideoWriter(folder / file, fps) as writer:
            writer.write(frames)
        lines.append(json.dumps({"file": file, "caption": caption}) + "\n")
    (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
