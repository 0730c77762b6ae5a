"""Views of training videos: as another camera in another room would have seen the same thing happen."""

import hashlib
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor

from dicode.seeds import generator_for

SMALLEST_CROP = 0.75  # of a side; the cache is of the model's size, and a smaller part of it would be a blur
STRONGEST_GAIN = 0.25  # of a colour, in either direction
# "left" as what remains is taken for a side too: instructions seldom say that
SIDES = re.compile(r"\b(?:(?:left|right)(?=(?:most|wards?)?\b)|(?:counter|anti)?-?clockwise\b)", re.IGNORECASE)
EXCHANGED = {"left": "right", "right": "left", "clockwise": "counterclockwise"}  # any other turn becomes clockwise


@dataclass(frozen=True)
class View:
    """One change of every frame: a part of the picture in its full size, perhaps mirrored, in other colours."""

    mirrored: bool
    crop: float  # side of the part, of the whole side
    across: float  # where it lies, 0…1 of where it can
    down: float
    gains: tuple[float, float, float]  # of red, green, blue
    gamma: float

    @classmethod
    def numbered(cls, number: int) -> "View":
        """View `number`, the same in every run; odd ones are mirrored, every second pair keeps the whole picture."""
        drawn = torch.rand(7, generator=generator_for(0, "view", number)).tolist()
        crop = 1.0 if number // 2 % 2 == 0 else SMALLEST_CROP + (1 - SMALLEST_CROP) * drawn[0]
        red, green, blue = (1 + STRONGEST_GAIN * (2 * value - 1) for value in drawn[3:6])
        gamma = 2 ** (drawn[6] - 0.5)
        return cls(number % 2 == 1, crop, drawn[1], drawn[2], (red, green, blue), gamma)

    @property
    def name(self) -> str:
        """Tells this change from every other one, for what is kept of it."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:8]

    def of_frames(self, frames: UInt8[Tensor, "f h w 3"]) -> UInt8[Tensor, "f h w 3"]:
        """Frames as this view shows them."""
        height, width = frames.shape[1:3]
        high, wide = round(self.crop * height), round(self.crop * width)
        top, left = round(self.down * (height - high)), round(self.across * (width - wide))
        part = rearrange(frames[:, top : top + high, left : left + wide], "f h w c -> f c h w").float() / 255
        if (high, wide) != (height, width):
            part = F.interpolate(part, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)
        part = (part.pow(self.gamma) * torch.tensor(self.gains)[:, None, None]).clamp(0, 1)
        seen = rearrange((part * 255).round().byte(), "f c h w -> f h w c")
        return seen.flip(2) if self.mirrored else seen

    def of_caption(self, caption: str) -> str:
        """A caption as it is true of this view: where it is mirrored, left is right and clockwise is not."""
        return SIDES.sub(_exchange, caption) if self.mirrored else caption


def _exchange(found: re.Match[str]) -> str:
    word = found.group()
    other = EXCHANGED.get(word.lower(), "clockwise")
    return other.capitalize() if word[0].isupper() else other
