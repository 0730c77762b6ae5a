"""Contact sheets: clips as rows of frames, to look at many at once."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont

from dicode import __version__
from dicode.files import check_file, check_parent, put

AnyVideo = UInt8[ndarray, "_f _h _w c"]  # unlike `Video`: rows of a sheet may differ in length and size
SHEET_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
GAP = 2  # pixels between frames
SOFTWARE = 0x0131  # of Exif
LABEL_WIDTH, LABEL_CHARACTERS, LABEL_SIZE = 150, 24, 11  # pixels, characters that fit, font height


def contact_sheet(
    clips: Sequence[AnyVideo], labels: Sequence[str] | None = None, columns: int = 8, scale: int = 1
) -> Image.Image:
    """One row a clip: its label at the left, then `columns` frames picked evenly from first to last.

    `scale` enlarges every pixel to scale x scale. A clip of fewer frames shows each once; small frames stand top left.
    """
    if not clips or (labels is not None and len(labels) != len(clips)):
        raise ValueError(f"expected clips and a label for each, got {len(clips)} clips, {len(labels or ())} labels")
    cell_height = max(clip.shape[1] for clip in clips) * scale + GAP
    cell_width = max(clip.shape[2] for clip in clips) * scale + GAP
    left = LABEL_WIDTH if labels else 0
    sheet = Image.new("RGB", (left + columns * cell_width, len(clips) * cell_height), "white")
    for row, clip in enumerate(clips):
        picked = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
        for column, frame in enumerate(clip[picked]):
            enlarged = frame.repeat(scale, axis=0).repeat(scale, axis=1)
            sheet.paste(Image.fromarray(enlarged), (left + column * cell_width, row * cell_height))
    if labels:
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LABEL_SIZE)
        max_lines = max(1, cell_height // (LABEL_SIZE + 3))
        for row, label in enumerate(labels):
            lines = textwrap.wrap(label, LABEL_CHARACTERS, max_lines=max_lines, placeholder=" …")
            draw.multiline_text((2, row * cell_height), "\n".join(lines), fill="black", font=font, spacing=1)
    return sheet


def check_sheet(path: Path | None) -> None:
    """Raise before any work is done where no sheet can be written: for its suffix, its folder, or what lies there."""
    if path is not None and path.suffix.lower() not in SHEET_SUFFIXES:
        raise ValueError(f"{path}: expected a name ending in {', '.join(SHEET_SUFFIXES)} for a contact sheet")
    check_parent(path)
    check_file(path, is_sheet)


def is_sheet(path: Path) -> bool:
    """Whether an image file is one of `save_sheet`."""
    Image.init()
    read = Image.OPEN[Image.registered_extensions()[path.suffix.lower()]][0]  # `Image.open` refuses large pictures
    try:
        with path.open("rb") as file, read(file, str(path)) as image:
            return str(image.getexif().get(SOFTWARE, "")).startswith("dicode ")
    except (OSError, SyntaxError):
        return False


def save_sheet(
    path: str | Path, clips: Sequence[AnyVideo], labels: Sequence[str] | None = None, columns: int = 8, scale: int = 1
) -> None:
    """Write the contact sheet of some clips as an image file, whole or not at all."""
    write_sheet(Path(path), contact_sheet(clips, labels, columns, scale))


def write_sheet(path: Path, sheet: Image.Image) -> None:
    """Write a contact sheet, which notes who made it, whole or not at all. Raises as `check_sheet`."""
    check_sheet(path)
    exif = Image.Exif()
    exif[SOFTWARE] = f"dicode {__version__}"
    put(path, lambda partial: sheet.save(partial, Image.registered_extensions()[path.suffix.lower()], exif=exif))
