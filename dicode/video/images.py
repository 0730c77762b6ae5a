"""Still and animated images, and pictures brought to one size; by Pillow: FFmpeg cannot decode animated WebP."""

import mmap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from dicode.video.timed import Frame, Picture, VideoReadError, check_pixels, check_work

Fit = Literal["crop", "pad"]
Size = int | tuple[int, int]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".apng", ".avif"})
# Browsers show a frame of an animated image that asks for 10 ms or less for 100 ms; so do we.
SHORTEST_DELAY_S, REPLACED_DELAY_S = 0.010, 0.100
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
_MAGIC = {b"GIF8": "GIF", b"\x89PNG\r\n\x1a\n": "PNG", b"BM": "BMP"}


def image_format(path: Path) -> str | None:
    """Pillow's name for what these bytes are, whatever the file is called; None for what is no image.

    Pillow opens a file as this format alone: left to itself it starts Ghostscript for an EPS that is called PNG.
    """
    with path.open("rb") as file:
        head = file.read(32)
    if head[4:8] == b"ftyp":
        if {head[8:12], *(head[i : i + 4] for i in range(16, len(head), 4))} & {b"avif", b"avis"}:
            return "AVIF"
        if head[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
            raise VideoReadError(f"{path}: is a HEIC image, which is not read; convert it to PNG or JPEG")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith(b"\xff\xd8\xff"):
        return None if _is_motion_jpeg(path) else "JPEG"
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def image_frames(path: Path, form: str, still_s: float) -> Iterator[Frame]:
    """Frames of an image of this format; a still one lasts `still_s`."""
    with _opened(path, form) as image:
        count = getattr(image, "n_frames", 1) if image.format in _ANIMATED else 1
        check_work(path, count * image.width * image.height)
        first = 1 if image.info.get("default_image") and count > 1 else 0  # an APNG's stand-in, not in the animation
        time_s = 0.0
        for index in range(first, count):
            image.seek(index)
            image.load()
            delay_s = float(image.info.get("duration") or 0) / 1000
            if count - first == 1:
                delay_s = still_s
            elif delay_s <= SHORTEST_DELAY_S:
                delay_s = REPLACED_DELAY_S
            yield Frame(time_s, time_s + delay_s, partial(np.asarray, _to_rgb(image)))
            time_s += delay_s
    if form == "GIF" and not _gif_ends(path):
        advice = "copy it again, or pass allow_partial=True to take these frames"
        raise VideoReadError(f"{path}: breaks off after {count - first} frames: its end is missing; {advice}")


def image_comment(path: Path, form: str) -> str:
    """The comment that an image carries, or ''."""
    with _opened(path, form) as image:
        comment = image.info.get("comment", "")
    return comment.decode("utf-8", "replace") if isinstance(comment, bytes) else str(comment)


@contextmanager
def _opened(path: Path, form: str) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound is lower
        image = Image.open(path, formats=(form,))
    with image:
        check_pixels(path, *image.size)
        yield image


def _is_motion_jpeg(path: Path) -> bool:
    """Whether JPEGs follow one another; a photograph may hold previews (MPF) behind its own picture."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(b"\xff\xd9\xff\xd8\xff") > 0 and data.find(b"MPF\0", 0, 2**16) < 0


def _gif_ends(path: Path) -> bool:
    """Whether blocks follow one another up to a trailer (GIF89a, section 27): Pillow takes what there is."""
    data = path.read_bytes()

    def palette_bytes(flags: int) -> int:
        return 3 * (2 << (flags & 7)) if flags & 0x80 else 0

    at = 13 + palette_bytes(data[10])
    while at + 10 < len(data) and data[at] in (0x21, 0x2C):  # an extension, or a picture with a palette of its own
        at += 2 if data[at] == 0x21 else 11 + palette_bytes(data[at + 9])
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
    return at < len(data) and data[at] == 0x3B


def _to_rgb(image: Image.Image) -> Picture:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
        upright = Image.fromarray((np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return over_white(np.asarray(upright.convert("RGBA")))


def over_white(rgba: Picture) -> Picture:
    """Lay a picture with transparency over white."""
    if rgba[..., 3].min(initial=255) == 255:
        return np.ascontiguousarray(rgba[..., :3])
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def fitted(path: Path, picture: Picture, size: Size | None, fit: Fit) -> Picture:
    """A picture scaled to cover (height, width) and cropped at the centre, or scaled to fit and padded with white."""
    if size is None:
        return picture
    height, width = (size, size) if isinstance(size, int) else size
    if fit == "crop":
        scaled = resized(picture, *covering(path, picture, (height, width)))
        top, left = (scaled.shape[0] - height) // 2, (scaled.shape[1] - width) // 2
        return scaled[top : top + height, left : left + width]
    scale = min(height / picture.shape[0], width / picture.shape[1])
    own_height, own_width = (max(1, round(side * scale)) for side in picture.shape[:2])
    padded = Image.new("RGB", (width, height), "white")
    shrunk = Image.fromarray(picture).resize((own_width, own_height), Image.Resampling.BILINEAR)  # without torch
    padded.paste(shrunk, ((width - own_width) // 2, (height - own_height) // 2))
    return np.asarray(padded)


def covering(path: Path, picture: Picture, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a picture scaled to cover a size. Raises `VideoReadError` for those of a strip."""
    scale = max(side / own for side, own in zip(size, picture.shape[:2], strict=True))
    height, width = (max(side, round(own * scale)) for side, own in zip(size, picture.shape[:2], strict=True))
    check_pixels(path, width, height)
    return height, width


def resized(picture: Picture, height: int, width: int) -> Picture:
    """Bilinear, averaging over the area when shrinking (torch on uint8: unbiased, ten times as fast as float)."""
    if picture.shape[:2] == (height, width):
        return picture
    import torch  # here: `dicode data index` resizes nothing, and would take three times as long

    pixels = torch.from_numpy(np.require(picture, requirements=["C", "W"])).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(scaled[0].permute(1, 2, 0).numpy())
