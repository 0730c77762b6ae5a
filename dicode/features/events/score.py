"""How much of a script a video shows: every clause's colours, shapes and event, their order, and what stays."""

from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Any, NamedTuple

from dicode.data.blocks.script import CLIP_FRAMES, COLOURS, ENTRIES, Clause, Script
from dicode.features.events.rules import ALONE, MEETING, SIZE, Window
from dicode.features.events.tracks import Patch, Track, shape_of, tracks_of
from dicode.video.timed import Video

ATTRIBUTES = ("colour", "shape", "event")
NEAR_JOIN = 6.0  # pixels that an object moves at most from the frame before a join to the one after
SIMILAR = 0.6  # least ratio of its areas there


class ClauseResult(NamedTuple):
    """What of a clause is right, by the objects that show most of it."""

    colour: bool
    shape: bool
    event: bool

    @property
    def all(self) -> bool:
        """Whether the right objects did it."""
        return self.colour and self.shape and self.event


def score(frames: Video, script: Script) -> dict[str, Any]:
    """What is right in a video of 64×64, uint8 `f h w 3`, whose clips of 16 frames begin with those of the script.

    `clauses`: for each `colour`, `shape`, `event` and `all`, each true or false, of the one object (or two) that show
    most of it in the clips that the script gives it, and `when`, the clip in which all of it begins: there, or else the
    first one; None: nowhere. `exact`: all is right. `order`: Kendall's tau of `when`, −1 to 1, over all pairs of
    clauses, of which those that are nowhere count 0; None for a single clause. `kept` of `joins`: see `persistence`.
    """
    return score_tracks(tracks_of(frames), len(frames), script)


def score_tracks(tracks: Sequence[Track], length: int, script: Script) -> dict[str, Any]:
    """As `score`, of the objects of a video of `length` frames."""
    colours = script.colours()
    clauses = []
    for number, (clause, start) in enumerate(zip(script.clauses, script.starts, strict=True)):
        names = [(colours[number][i], script.objects[i].shape) for i in clause.mentions]
        found = seen(tracks, length, start, clause, names)
        when = start if found.all else first_seen(tracks, length, clause, names)
        clauses.append({"event_name": clause.event, **found._asdict(), "all": found.all, "when": when})
    kept, joins = persistence(tracks, length)
    exact, times = all(clause["all"] for clause in clauses), [clause["when"] for clause in clauses]
    return {"clauses": clauses, "exact": exact, "order": kendall(times), "kept": kept, "joins": joins}


Names = Sequence[tuple[str, str]]  # colour and shape of the objects of a clause


def seen(tracks: Sequence[Track], length: int, start: int, clause: Clause, names: Names) -> ClauseResult:
    """What of a clause is right in the clips from `start` on."""
    first, last = start * CLIP_FRAMES, min((start + clause.clips) * CLIP_FRAMES, length - 1)
    if last - first < clause.clips * CLIP_FRAMES - 2:
        return ClauseResult(False, False, False)
    window = Window(tracks, first, last, clause.clips)
    best = ClauseResult(False, False, False)
    for objects in permutations([track for track in tracks if window.within(track)], len(names)):
        shown = [shown_of(window, track, clause, place) for place, track in enumerate(objects)]
        colour = all(COLOURS[own[0].colour] == name for own, (name, _) in zip(shown, names, strict=True))
        shape = all(shape_of(own) == name for own, (_, name) in zip(shown, names, strict=True))
        result = ClauseResult(colour, shape, did(window, clause, objects))
        best = max(best, result, key=lambda own: (sum(own), own.event))
    return best


def did(window: Window, clause: Clause, objects: Sequence[Track]) -> bool:
    """Whether objects did what a clause says."""
    if len(objects) == 1:
        return ALONE[clause.event](window, objects[0], clause.how)
    return MEETING[clause.event](window, objects[0], objects[1], clause.how)


def shown_of(window: Window, track: Track, clause: Clause, place: int) -> list[Patch]:
    """The patches by which an object is named: before what happens to it, or after, if it is new."""
    patches = window.within(track)
    frames = sorted(patches)
    if clause.event in ENTRIES:
        chosen = frames[-3:]
    elif clause.event in ("leave", "turn", "topple"):
        chosen = frames[:2]
    else:
        chosen = [*frames[:2], *frames[-2:]]
    whole = [f for f in chosen if patches[f].left > 0 and patches[f].right < SIZE]
    return [patches[f] for f in whole or chosen]


def first_seen(tracks: Sequence[Track], length: int, clause: Clause, names: Names) -> int | None:
    """The first clip from which on all of a clause is right; None: nowhere."""
    starts = range(-(-length // CLIP_FRAMES))
    return next((start for start in starts if seen(tracks, length, start, clause, names).all), None)


def kendall(times: Sequence[int | None]) -> float | None:
    """Pairs in order less pairs out of order, over all pairs; a pair with None, or of one time, counts 0."""
    pairs = [(one, other) for i, one in enumerate(times) for other in times[i + 1 :]]
    if not pairs:
        return None
    return sum((o > e) - (o < e) for e, o in pairs if e is not None and o is not None) / len(pairs)


def persistence(tracks: Sequence[Track], length: int) -> tuple[int, int]:
    """How many objects that are whole right before a join of clips are there after it, and how many there were."""
    kept = total = 0
    for join in range(CLIP_FRAMES, length, CLIP_FRAMES):
        for before, track in _whole(tracks, join - 1):
            total += 1
            after = track.patches.get(join) or track.patches.get(join + 1)
            kept += after is not None and _alike(before, after)
    return kept, total


def _whole(tracks: Sequence[Track], frame: int) -> Iterator[tuple[Patch, Track]]:
    for track in tracks:
        patch = track.patches.get(frame)
        if patch is not None and min(patch.left, patch.top) > 0 and max(patch.right, patch.bottom) < SIZE:
            yield patch, track


def _alike(before: Patch, after: Patch) -> bool:
    near = abs(before.x - after.x) <= NEAR_JOIN and abs(before.y - after.y) <= NEAR_JOIN
    return near and before.colour == after.colour and SIMILAR <= after.area / before.area <= 1 / SIMILAR
