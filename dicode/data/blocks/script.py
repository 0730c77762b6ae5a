"""The script of a video: which objects there are, and who does what when; and what training never sees of it."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from dicode.config import config_from_dict

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("ball", "cube", "cone", "cylinder")
SIZES = ("small", "big")
EVENTS = (
    "enter",  # rolls or slides in; `how` is the side
    "fall",  # from above, and bounces
    "jump",
    "push",  # `target`, which moves
    "topple",  # knocks over `target`
    "pass",  # by `target`; `how` is behind or front
    "bounce",  # off `target`, and comes back
    "spin",
    "grow",
    "shrink",
    "turn",  # another colour: `how`
    "leave",  # `how` is the side
    "wait",
)
ENTRIES = ("enter", "fall")
PAIRS = ("push", "topple", "pass", "bounce")  # events of two objects
SLOW = ("jump", "bounce", "spin")  # begin and end alike: two clips, with their middle on the key frame between these
SIDES = ("left", "right")

FPS, CLIP_FRAMES = 8, 16
MOST_CLAUSES = MOST_CLIPS = 5  # of a training video: ten seconds
STORY_CLAUSES = 30  # a minute

# Clips of no set but `training` are trained on; the others are for validation.
SETS = (
    "training",
    "seen",  # new scenes of combinations, orders and lengths that training has
    "combinations",  # a colour, shape and event that never come together in training
    "orders",  # two events that come in the other order only
    "lengths",  # 6 to 8 clauses
    "paraphrases",  # wordings that training never has
    "within",  # jumps, spins and rebounds between two key frames, which cannot show them
    "swaps",  # two clauses whose exchange is a script too
    "story",  # 30 clauses, to be generated as a storyboard
)
HELD_SHARE = 8  # one in so many combinations
# (first, then): never in this order in a training caption, however far apart; the other way round they are.
HELD_ORDERS = (
    ("jump", "turn"),
    ("turn", "push"),
    ("spin", "grow"),
    ("shrink", "jump"),
    ("wait", "spin"),
    ("pass", "wait"),
    ("grow", "pass"),
)


@dataclass(frozen=True)
class SceneObject:
    """An object as it first appears; `x` (to the right) and `y` (away from the camera) are in units of 8 pixels."""

    colour: str
    shape: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Clause:
    """One event: `subject` does it (a number of an object), to `target`; `how` is a side or a colour."""

    event: str
    subject: int
    target: int | None = None
    how: str = ""
    quick: bool = False  # in one clip instead of two
    x: float = 0.0  # where `subject` is at the end …
    target_x: float = 0.0  # … and `target`

    @property
    def clips(self) -> int:
        """Clips of two seconds that it takes."""
        return 2 if self.event in SLOW and not self.quick else 1

    @property
    def mentions(self) -> tuple[int, ...]:
        """The objects in it, `subject` first."""
        return (self.subject,) if self.target is None else (self.subject, self.target)


@dataclass(frozen=True)
class Script:
    """Objects, and clauses one after another. What is in the first clause and does not enter is there before it."""

    objects: tuple[SceneObject, ...]
    clauses: tuple[Clause, ...]

    @property
    def clips(self) -> int:
        """Clips of two seconds of the whole."""
        return sum(clause.clips for clause in self.clauses)

    @property
    def frames(self) -> int:
        """Frames of the video, the last key frame included."""
        return self.clips * CLIP_FRAMES + 1

    @property
    def starts(self) -> list[int]:
        """The clip in which each clause begins."""
        return [sum(clause.clips for clause in self.clauses[:i]) for i in range(len(self.clauses))]

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def parse(cls, record: dict[str, Any]) -> "Script":
        """Of `record`. Raises `ValueError` for anything else."""
        script = config_from_dict(cls, record, "script")
        known = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}
        right = all(getattr(obj, key) in values for obj in script.objects for key, values in known.items())
        numbers = range(len(script.objects))
        right &= all(c.event in EVENTS and all(n in numbers for n in c.mentions) for c in script.clauses)
        right &= all((c.target is not None) == (c.event in PAIRS) for c in script.clauses)
        if not right or not script.clauses:
            raise ValueError(f"script: expected objects and clauses of the world `blocks`, got {str(record)[:80]}")
        return script

    def present(self) -> tuple[int, ...]:
        """The objects that are there before the first clause."""
        first = self.clauses[0]
        return () if first.event in ENTRIES else first.mentions

    def colours(self) -> list[dict[int, str]]:
        """The colours of all objects before each clause, and after the last."""
        colours = {i: obj.colour for i, obj in enumerate(self.objects)}
        found = [dict(colours)]
        for clause in self.clauses:
            if clause.event == "turn":
                colours[clause.subject] = clause.how
            found.append(dict(colours))
        return found

    def combinations(self) -> Iterator[tuple[str, str, str]]:
        """Colour, shape and event of every clause."""
        for clause, colours in zip(self.clauses, self.colours()[:-1], strict=True):
            yield colours[clause.subject], self.objects[clause.subject].shape, clause.event

    def orders(self) -> set[tuple[str, str]]:
        """All pairs of events of which the first comes before the second."""
        events = [clause.event for clause in self.clauses]
        return {(first, then) for i, first in enumerate(events) for then in events[i + 1 :]}


@cache
def is_held_combination(colour: str, shape: str, event: str) -> bool:
    """Whether training never has it: one in eight, by a fixed hash."""
    digest = hashlib.sha256(f"blocks: {colour} {shape} {event}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_SHARE == 0


def held_clauses(script: Script) -> list[bool]:
    """Whether each clause is a combination that training never has."""
    return [is_held_combination(*own) for own in script.combinations()]


def belongs(script: Script, name: str) -> bool:
    """Whether a script may be of a set: each of the others has one object that training never has, and no other."""
    combination, order = any(held_clauses(script)), bool(script.orders() & set(HELD_ORDERS))
    quick, long = any(clause.quick for clause in script.clauses), len(script.clauses) > MOST_CLAUSES
    if name == "story":  # its clauses are prompts of their own: their order is not in any
        return not combination and not quick
    held = {"combinations": combination, "orders": order, "lengths": long, "within": quick}
    return all(value == (key == name) for key, value in held.items())
