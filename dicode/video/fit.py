"""Pictures brought to one size."""

from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from dicode.video.timed import Picture, check_pixels

Fit = Literal["crop", "pad"]
Size = int | tuple[int, int]


def fitted(path: Path, picture: Picture, size: Size | None, fit: Fit) -> Picture:
    """A picture scaled to cover (height, width) and cropped at the centre, or scaled to fit and padded with white."""
    if size is None:
        return picture
    height, width = (size, size) if isinstance(size, int) else size
    own_height, own_width = picture.shape[:2]
    if fit == "crop":
        scaled = resized(picture, *covering(path, picture, (height, width)))
        top, left = (scaled.shape[0] - height) // 2, (scaled.shape[1] - width) // 2
        return scaled[top : top + height, left : left + width]
    scale = min(height / own_height, width / own_width)
    sides = max(1, round(own_width * scale)), max(1, round(own_height * scale))
    padded = Image.new("RGB", (width, height), "white")
    scaled_image = Image.fromarray(picture).resize(sides, Image.Resampling.BILINEAR)  # to look at: without torch
    padded.paste(scaled_image, ((width - sides[0]) // 2, (height - sides[1]) // 2))
    return np.asarray(padded)


def covering(path: Path, picture: Picture, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a picture scaled to cover a size. Raises `VideoReadError` for those of a strip."""
    (height, width), (own_height, own_width) = size, picture.shape[:2]
    scale = max(height / own_height, width / own_width)
    scaled_height, scaled_width = max(height, round(own_height * scale)), max(width, round(own_width * scale))
    check_pixels(path, scaled_width, scaled_height)
    return scaled_height, scaled_width


def resized(picture: Picture, height: int, width: int) -> Picture:
    """Bilinear, averaging over the area when shrinking (torch on uint8: unbiased, ten times as fast as float)."""
    if picture.shape[:2] == (height, width):
        return picture
    import torch  # here: `dicode data index` resizes nothing, and would take three times as long

    pixels = torch.from_numpy(np.require(picture, requirements=["C", "W"])).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(scaled[0].permute(1, 2, 0).numpy())
