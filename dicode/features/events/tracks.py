"""Objects in the frames of a video: pixels by hue, joined to patches, followed over frames, without a script."""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int
from numpy import ndarray

from dicode.config import missing_extra
from dicode.data.blocks.motion import HUES
from dicode.data.blocks.script import COLOURS
from dicode.video.timed import Video

CHROMA = 52  # largest less smallest channel, of 255, from which a pixel is coloured: floors have up to 30
LEAST_AREA = 18  # pixels of an object; the smallest whole one has about 95
FAR, NEAR = 44.0, 5.0  # pixels that an object moves in a frame: as it falls, or while it changes colour
MOST_LOST = 9  # frames in which an object is not seen, while it turns to another colour or is hidden
OTHER_COLOUR = 60.0  # pixels that a change of colour counts as
CELLS = 8  # rows and columns of a silhouette
KINDS = ("ball", "cube", "cone", "cylinder", "cone to the left", "cone to the right", "cylinder lying")
SHAPES_FILE = Path(__file__).parent / "shapes.json"  # written by tools/blocks_shapes.py
PALEST = 6  # pixels of a spot


class Patch(NamedTuple):
    """An object in one frame, in pixels."""

    colour: int  # of COLOURS
    left: int
    top: int
    right: int  # the first column and row beyond it
    bottom: int
    area: int
    pale: float  # of its palest pixels: a spot on the front
    silhouette: ndarray  # see `silhouette_of`

    @property
    def x(self) -> float:
        """Its middle."""
        return (self.left + self.right) / 2

    @property
    def y(self) -> float:
        return (self.top + self.bottom) / 2

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top


@dataclass
class Track:
    """One object through a video: its patch in every frame where it is seen."""

    patches: dict[int, Patch] = field(default_factory=dict)

    @property
    def last(self) -> int:
        """The last frame in which it was seen."""
        return max(self.patches)


def tracks_of(frames: Video) -> list[Track]:
    """The objects of a video. Frames are 64×64."""
    tracks: list[Track] = []
    for f, frame in enumerate(frames):
        patches = patches_of(frame)
        open_tracks = [track for track in tracks if f - track.last <= MOST_LOST]
        costs = np.array([[_cost(track, f, patch) for patch in patches] for track in open_tracks])
        taken: set[int] = set()
        if costs.size:
            for i, j in zip(*_scipy()[1].linear_sum_assignment(np.minimum(costs, 1e6)), strict=True):
                if np.isfinite(costs[i, j]):
                    open_tracks[i].patches[f] = patches[j]
                    taken.add(int(j))
        tracks += [Track({f: patch}) for j, patch in enumerate(patches) if j not in taken]
    return tracks


@cache
def _scipy() -> tuple[Any, Any]:
    """`scipy.ndimage` and `scipy.optimize`. Raises `ImportError` that names the extra where they are missing."""
    try:
        from scipy import ndimage, optimize
    except ModuleNotFoundError as error:
        raise missing_extra(error, "blocks") from error
    return ndimage, optimize


def _cost(track: Track, f: int, patch: Patch) -> float:
    """How badly a patch continues a track; infinite where it does not."""
    before = track.patches[track.last]
    distance = float(np.hypot(patch.x - before.x, patch.y - before.y))
    if patch.colour == before.colour:
        return distance + f - track.last if distance <= FAR else np.inf
    return distance + OTHER_COLOUR if distance <= NEAR else np.inf


def patches_of(frame: ndarray) -> list[Patch]:
    """The coloured objects of a frame, uint8 `h w 3`."""
    ndimage, colours, found = _scipy()[0], colours_of(frame), []
    for colour in np.unique(colours[colours >= 0]):
        numbers, _ = ndimage.label(colours == colour)
        for number, place in enumerate(ndimage.find_objects(numbers), start=1):
            mask = numbers[place] == number
            if mask.sum() >= LEAST_AREA:
                found.append(_patch(int(colour), mask, place, frame[place]))
    return found


def _patch(colour: int, mask: Bool[ndarray, "h w"], place: tuple[slice, slice], pixels: ndarray) -> Patch:
    filled = _scipy()[0].binary_fill_holes(mask)
    palest = np.sort(pixels.min(-1)[filled].astype(float))[-PALEST:]
    rows, columns = place
    return Patch(
        colour, columns.start, rows.start, columns.stop, rows.stop, int(filled.sum()), float(palest.mean()),
        silhouette_of(filled),
    )  # fmt: skip


def colours_of(frame: ndarray) -> Int[ndarray, "h w"]:
    """The colour of every pixel, as its neighbours have it too, by number; −1 for what has none."""
    values = frame.astype(np.float64)
    chroma = values.max(-1) - values.min(-1)
    angle = hue_of(values)
    apart = np.abs((angle[..., None] - _hues() + np.pi) % (2 * np.pi) - np.pi)
    nearest = apart.argmin(-1)
    votes = np.stack(
        [_scipy()[0].uniform_filter(chroma * (nearest == c), 3, mode="nearest") for c in range(len(COLOURS))]
    )
    return np.where(chroma >= CHROMA, votes.argmax(0), -1)


def hue_of(values: Float64[ndarray, "*n 3"]) -> Float64[ndarray, "*n"]:
    """Angle of a colour in the plane across grey, radians."""
    red, green, blue = np.moveaxis(values, -1, 0)
    return np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)


@cache
def _hues() -> Float64[ndarray, "colours"]:
    return hue_of(np.array([HUES[colour] for colour in COLOURS]))


def silhouette_of(mask: Bool[ndarray, "h w"]) -> Float64[ndarray, "n"]:
    """A mask in its own frame at 8×8, and its proportions and size."""
    height, width = mask.shape
    rows, columns = (_cells(size) for size in (height, width))
    cells = rows @ mask.astype(np.float64) @ columns.T
    facts = [np.log(width / height), height / 16, width / 16, mask.mean()]
    return np.concatenate([cells.ravel(), facts])


@cache
def _cells(size: int) -> Float64[ndarray, "cells size"]:
    """Means of `size` pixels over equal cells, which may cut pixels."""
    bounds = np.linspace(0, size, CELLS + 1)
    pixels = np.arange(size)
    shares = np.minimum(bounds[1:, None], pixels + 1) - np.maximum(bounds[:-1, None], pixels)
    return np.clip(shares, 0, None) * CELLS / size


@cache
def _shape_weights() -> dict[str, ndarray]:
    return {name: np.array(value) for name, value in json.loads(SHAPES_FILE.read_text(encoding="utf-8")).items()}


def shape_scores(silhouettes: Float64[ndarray, "b n"]) -> Float64[ndarray, "b kinds"]:
    """Log-probabilities of KINDS, by a network with one hidden layer."""
    weights = _shape_weights()
    hidden = np.tanh((silhouettes - weights["mean"]) @ weights["first"] + weights["first_bias"])
    scores = hidden @ weights["second"] + weights["second_bias"]
    return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)


def shape_of(patches: list[Patch]) -> str:
    """The likeliest shape of an object, by all these silhouettes together, standing or lying in each."""
    scores = shape_scores(np.stack([patch.silhouette for patch in patches]))
    shapes: dict[str, list[np.ndarray]] = {}
    for number, kind in enumerate(KINDS):
        shapes.setdefault(kind.split()[0], []).append(scores[:, number])
    totals = {shape: float(np.logaddexp.reduce(np.stack(own), axis=0).sum()) for shape, own in shapes.items()}
    return max(totals, key=lambda shape: totals[shape])
