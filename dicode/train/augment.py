"""Augmentation of a language model's samples: captions in other words, videos as another camera would have them."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor

from dicode.seeds import generator_for
from dicode.train.runs import AugmentConfig

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
        return cls(number % 2 == 1, crop, drawn[1], drawn[2], (red, green, blue), 2 ** (drawn[6] - 0.5))

    @property
    def name(self) -> str:
        """A hash of the change, for the name of what is cached."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:8]

    def of_frames(self, frames: UInt8[Tensor, "f h w 3"]) -> UInt8[Tensor, "f h w 3"]:
        """Frames of this view."""
        height, width = frames.shape[1:3]
        high, wide = round(self.crop * height), round(self.crop * width)
        top, left = round(self.down * (height - high)), round(self.across * (width - wide))
        part = rearrange(frames[:, top : top + high, left : left + wide], "f h w c -> f c h w").float() / 255
        if (high, wide) != (height, width):
            part = F.interpolate(part, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)
        part = (part.pow(self.gamma) * torch.tensor(self.gains)[:, None, None]).clamp(0, 1)
        changed = rearrange((part * 255).round().byte(), "f c h w -> f h w c")
        return changed.flip(2) if self.mirrored else changed

    def of_caption(self, caption: str) -> str:
        """A caption as it is true of this view: mirroring exchanges left and right, and reverses turns."""
        return SIDES.sub(_exchange, caption) if self.mirrored else caption


def _exchange(found: re.Match[str]) -> str:
    word = found.group()
    other = EXCHANGED.get(word.lower(), "clockwise")
    return other.capitalize() if word[0].isupper() else other


def augmented_caption(
    captions: Sequence[str], config: AugmentConfig, words: Sequence[Sequence[str]], generator: torch.Generator
) -> str:
    """One of a video's captions, whole, with words dropped or replaced, or nothing.

    Of two captions the second is the long one; of more each is as likely. `words` are those of all short captions,
    then of all long ones.
    """
    draws = torch.rand(4, generator=generator).tolist()
    if draws[0] < config.null_captions or not captions:
        return ""
    number = -1 if draws[1] < config.long_captions else 0
    if len(captions) > 2:  # not a short and a long one but several of a kind
        number = int(draws[1] * len(captions))
    own, others = captions[number].split(), words[min(number, 1)]
    if draws[3] < config.word_swaps:
        swapped = torch.rand(len(own), generator=generator) < config.swapped_words
        drawn = torch.randint(len(others), (len(own),), generator=generator).tolist()
        own = [others[i] if swap else word for word, swap, i in zip(own, swapped, drawn, strict=True)]
    elif draws[2] < config.word_dropout and len(own) > 1:
        kept = torch.rand(len(own), generator=generator) >= config.dropped_words
        own = [word for word, keep in zip(own, kept, strict=True) if keep] or own[-1:]
    return " ".join(own)
