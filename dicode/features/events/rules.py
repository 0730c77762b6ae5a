"""A rule for each event: whether an object, or one and another, did it between two frames of a video.

Places are pixels of 64×64 frames. Bounds lie between what drawn clips do and what they do not, nearer to the latter:
rendered clips are softer and less exact than drawn ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dicode.data.blocks.script import COLOURS
from dicode.features.events.tracks import Patch, Track

SIZE = 64
STILL = 3.0  # pixels that an object at rest may seem to move
EDGE = 2  # pixels from the picture's edge within which an object is cut by it
ROLLED, FALLEN, LEFT, PUSHED, BOUNCED, JUMPED = 4.0, 14.0, 5.0, 6.0, 4.0, 5.5  # least ways, in pixels
TOUCH = 4.0  # most pixels between objects that touch
GROWN = 1.4  # least ratio of areas
TIPPED = 1.25  # least ratio of proportions, width over height
SWOLLEN = 1.35  # most ratio of areas of an object that tips over: one fading in beside one fading out is larger
HIDDEN = 0.68  # of the spot's paleness, which is left when it is turned away
CUT = 0.9  # of the area, most that is left of an object that leaves
STEP, SHORT = 0.65, 8.0  # most of a way that goes from one frame to the next where it is seen; of longer ways than this
SOON = 10  # frames of a clip by which a new object is to be seen


@dataclass(frozen=True)
class Window:
    """What is seen from frame `first` to frame `last`, of `clips` clips."""

    tracks: Sequence[Track]
    first: int
    last: int
    clips: int

    def within(self, track: Track) -> dict[int, Patch]:
        """An object's patches, by frame."""
        return {f: track.patches[f] for f in range(self.first, self.last + 1) if f in track.patches}

    def start(self, track: Track) -> Patch | None:
        """An object as the window begins."""
        return next((track.patches[f] for f in (self.first, self.first + 1) if f in track.patches), None)

    def end(self, track: Track) -> Patch | None:
        """An object as the window ends."""
        return next((track.patches[f] for f in (self.last, self.last - 1, self.last - 2) if f in track.patches), None)

    def middle(self, track: Track) -> list[Patch]:
        """An object around the middle of the window: the key frame of a window of two clips."""
        centre, near = (self.first + self.last + 1) // 2, 2 if self.clips > 1 else 1
        return [track.patches[f] for f in range(centre - near, centre + near + 1) if f in track.patches]


Ends = tuple[Patch, Patch]


def both_ends(window: Window, track: Track) -> Ends | None:
    """An object as the window begins and ends, if it is seen then."""
    start, end = window.start(track), window.end(track)
    return None if start is None or end is None else (start, end)


def meeting(window: Window, track: Track, other: Track) -> tuple[Ends, Ends, list[float]] | None:
    """An object and another as the window begins and ends, and how far each moves from the one towards the other."""
    ends, theirs = both_ends(window, track), both_ends(window, other)
    if ends is None or theirs is None:
        return None
    direction = float(np.sign(theirs[0].x - ends[0].x))
    return ends, theirs, [(end.x - start.x) * direction for start, end in (ends, theirs)]


def stays(window: Window, track: Track, within: bool = True) -> bool:
    """Whether an object is where it was, as large as it was, in its colour; and all the time, if asked for."""
    ends = both_ends(window, track)
    if ends is None:
        return False
    start, end = ends
    same = start.colour == end.colour and 1 / GROWN < end.area / start.area < GROWN
    patches = window.within(track).values() if within else [end]
    return same and all(abs(p.x - start.x) <= STILL and abs(p.bottom - start.bottom) <= STILL for p in patches)


def travels(window: Window, track: Track) -> bool:
    """Whether an object that is elsewhere at the end is seen on its way, rather than fading out here and in there."""
    patches = [patch for _, patch in sorted(window.within(track).items())]
    places = np.array([(patch.x, patch.y) for patch in patches])
    way = np.hypot(*(places - places[0]).T).max()
    steps = np.hypot(*np.diff(places, axis=0).T)
    return bool(way < SHORT or steps.max() <= STEP * way)


def appears(window: Window, track: Track) -> tuple[Patch, Patch] | None:
    """An object that is new in the window and there at its end: as it is first seen, and at the end."""
    patches, end = window.within(track), window.end(track)
    if end is None or window.first in patches or min(patches) > window.first + SOON or not travels(window, track):
        return None
    return patches[min(patches)], end


def enters(window: Window, track: Track, how: str) -> bool:
    """It comes in at that side of the picture, along the floor."""
    found = appears(window, track)
    if found is None:
        return False
    first, end = found
    if how == "left":
        return first.left <= EDGE and end.x - first.x >= ROLLED and abs(first.bottom - end.bottom) <= 2 * STILL
    at_edge = first.right >= SIZE - EDGE and first.x - end.x >= ROLLED
    return at_edge and abs(first.bottom - end.bottom) <= 2 * STILL


def falls(window: Window, track: Track, how: str) -> bool:
    """It comes in at the top of the picture, and stays below."""
    found = appears(window, track)
    if found is None:
        return False
    first, end = found
    return first.top <= 2 * EDGE and end.bottom - first.bottom >= FALLEN and abs(first.x - end.x) <= 2 * STILL


def leaves(window: Window, track: Track, how: str) -> bool:
    """It goes to that side, until the edge cuts it or it is gone."""
    patches, start = window.within(track), window.start(track)
    if start is None:
        return False
    last = patches[max(patches)]
    cut = last.left <= EDGE if how == "left" else last.right >= SIZE - EDGE
    way = (start.x - last.x) * (1 if how == "left" else -1)
    return cut and way >= LEFT and last.area <= CUT * start.area and travels(window, track)


def waits(window: Window, track: Track, how: str) -> bool:
    """It stays, and nothing else happens, but that something leaves for good."""
    leaving = [t for t in window.tracks if (p := window.start(t)) and (p.left < 1 or p.right > SIZE - 1)]
    seen = [t for t in window.tracks if window.within(t) and t not in leaving]
    spotted = both_ends(window, track)
    return spotted is not None and all(stays(window, t) for t in seen) and not spins(window, track, how)


def jumps(window: Window, track: Track, how: str) -> bool:
    """It is higher in the middle, and back at the end."""
    ends, middle = both_ends(window, track), window.middle(track)
    if ends is None or not middle or not stays(window, track, within=False):
        return False
    level = (ends[0].bottom + ends[1].bottom) / 2
    return max(level - p.bottom for p in middle) >= JUMPED and all(abs(p.x - ends[0].x) <= STILL for p in middle)


def spins(window: Window, track: Track, how: str) -> bool:
    """The spot on its front is away in the middle."""
    ends, middle = both_ends(window, track), window.middle(track)
    if ends is None or not middle or not stays(window, track, within=False):
        return False
    whole = [p for p in middle if p.area >= CUT * min(ends[0].area, ends[1].area)]  # the spot is not behind another
    return bool(whole) and min(p.pale for p in whole) <= HIDDEN * min(p.pale for p in ends)


def grows(window: Window, track: Track, how: str) -> bool:
    """It is larger at the end."""
    return _resized(window, track, 1)


def shrinks(window: Window, track: Track, how: str) -> bool:
    """It is smaller at the end."""
    return _resized(window, track, -1)


def _resized(window: Window, track: Track, sign: int) -> bool:
    ends = both_ends(window, track)
    if ends is None:
        return False
    start, end = ends
    larger, longer = (end.area / start.area) ** sign, (end.height / start.height) ** sign
    return larger >= GROWN and longer > 1.12 and abs(end.x - start.x) <= STILL and start.colour == end.colour


def turns(window: Window, track: Track, how: str) -> bool:
    """It has another colour at the end, in the same place."""
    start = window.start(track)
    if start is None or COLOURS[start.colour] == how:
        return False
    ends = (end for other in window.tracks if (end := window.end(other)) is not None)
    return any(
        COLOURS[end.colour] == how and abs(end.x - start.x) <= STILL and abs(end.bottom - start.bottom) <= STILL
        and 1 / GROWN < end.area / start.area < GROWN
        for end in ends
    )  # fmt: skip


def pushes(window: Window, track: Track, other: Track, how: str) -> bool:
    """Both move the same way, and touch at the end."""
    if (met := meeting(window, track, other)) is None:
        return False
    ends, theirs, moved = met
    upright = _proportion(theirs[1]) / _proportion(theirs[0]) < TIPPED
    level = abs(theirs[1].bottom - theirs[0].bottom) <= STILL
    together = _gap(ends[1], theirs[1]) <= TOUCH and travels(window, track) and travels(window, other)
    return min(moved) >= PUSHED and upright and level and together


def topples(window: Window, track: Track, other: Track, how: str) -> bool:
    """It comes nearer, and the other lies at the end, further away."""
    if (met := meeting(window, track, other)) is None:
        return False
    _, theirs, moved = met
    tipped = _proportion(theirs[1]) / _proportion(theirs[0]) >= TIPPED
    whole = max(patch.area for patch in window.within(other).values()) <= SWOLLEN * max(p.area for p in theirs)
    return min(moved) >= STILL - 1 and tipped and whole and travels(window, track)


def passes(window: Window, track: Track, other: Track, how: str) -> bool:
    """It is on the other side at the end, in a row behind or in front, and the other has stayed."""
    ends, theirs = both_ends(window, track), both_ends(window, other)
    if ends is None or theirs is None or not stays(window, other, within=False):
        return False
    crossed = (theirs[0].x - ends[0].x) * (theirs[1].x - ends[1].x) < 0
    nearer = ends[0].bottom + ends[1].bottom > theirs[0].bottom + theirs[1].bottom
    kept = ends[0].colour == ends[1].colour and travels(window, track)
    return crossed and nearer == (how == "front") and kept


def bounces(window: Window, track: Track, other: Track, how: str) -> bool:
    """It goes to the other, touches it in the middle, and comes back; the other stays."""
    ends, theirs, middle = both_ends(window, track), both_ends(window, other), window.middle(track)
    if ends is None or theirs is None or not middle:
        return False
    direction = float(np.sign(theirs[0].x - ends[0].x))
    way = max((p.x - ends[0].x) * direction for p in middle)
    gap = min(_gap(p, theirs[0]) for p in middle)
    stay = stays(window, track, within=False) and stays(window, other)
    return stay and way >= BOUNCED and gap <= TOUCH and abs(ends[0].bottom - theirs[0].bottom) <= 2 * STILL


def _gap(one: Patch, other: Patch) -> float:
    """Pixels between two objects from side to side."""
    return float(max(one.left, other.left) - min(one.right, other.right))


def _proportion(patch: Patch) -> float:
    return patch.width / patch.height


ALONE: dict[str, Callable[[Window, Track, str], bool]] = {
    "enter": enters, "fall": falls, "jump": jumps, "spin": spins, "grow": grows, "shrink": shrinks, "turn": turns,
    "leave": leaves, "wait": waits,
}  # fmt: skip
MEETING: dict[str, Callable[[Window, Track, Track, str], bool]] = {
    "push": pushes, "topple": topples, "pass": passes, "bounce": bounces,
}  # fmt: skip
