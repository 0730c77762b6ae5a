"""Where objects stand: sizes, the state after each clause, and whether a clause can happen in a state.

Units of 8 pixels; x to the right, y away from the camera, z up; the picture is 8 wide. Objects stand in two rows.
Where a new object stops shows where it came from (left or right third: from that side; middle: from above), since the
decoder knows a clip by its first and last frame alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dicode.data.blocks.script import ENTRIES, Clause, SceneObject, Script

HALF_PICTURE = 4.0
EDGE = 3.75  # an object at rest lies within ±EDGE: the camera's place varies
ROWS = (-1.6, 1.6)  # y; 12 pixels apart
SIDE = {"small": 1.5, "big": 2.15}  # 12 and 17 pixels
RADIUS = {"ball": 0.5, "cube": 0.43, "cone": 0.5, "cylinder": 0.4}  # half the width, of the side
HEIGHT = {"ball": 1.0, "cube": 0.86, "cone": 1.1, "cylinder": 1.05}
# Knocked over: the angle in radians, and the length along the floor and its middle from the edge that it tips over
TIPPED = {"cylinder": np.pi / 2, "cone": np.pi / 2 + np.arctan(RADIUS["cone"] / HEIGHT["cone"])}
LENGTH = {"cylinder": 1.05, "cone": float(np.hypot(RADIUS["cone"], HEIGHT["cone"]))}
OUTER, INNER = 1.9, 0.7  # new objects from the sides stop beyond |x| = OUTER, from above within INNER
GAP = 0.2  # between objects of a row that do not touch
TOUCH = 0.02
APART = 0.72  # of objects in different rows, of the sum of their half widths: they hide little of each other
RUN, PUSHED, REBOUND = 0.3, (1.2, 2.2), 0.9  # least way to what is pushed; its own way; least way to bounce off
FOLLOWS = 0.6  # radii that an object goes on while it knocks another over


@dataclass(frozen=True)
class Body:
    """An object at rest."""

    colour: str
    shape: str
    size: str
    x: float  # the middle of what it covers
    y: float
    lying: int = 0  # −1 or 1: knocked over to that side
    away: int = 0  # clauses since it left; after the first it is half out of the picture

    @property
    def side(self) -> float:
        """The unit of its measures."""
        return SIDE[self.size]

    @property
    def half(self) -> float:
        """Half the width that it covers."""
        return (LENGTH[self.shape] / 2 if self.lying else RADIUS[self.shape] * 1.08) * self.side


State = Mapping[int, Body]


def body_of(obj: SceneObject) -> Body:
    """An object as it first stands."""
    return Body(obj.colour, obj.shape, obj.size, obj.x, obj.y)


def beginning(script: Script) -> State:
    """The state before the first clause."""
    return {i: body_of(script.objects[i]) for i in script.present()}


def after(state: State, objects: tuple[SceneObject, ...], clause: Clause) -> State:
    """The state that a clause leaves."""
    bodies = {i: replace(body, away=body.away + 1) if body.away else body for i, body in state.items()}
    subject = body_of(objects[clause.subject]) if clause.event in ENTRIES else bodies[clause.subject]
    changes: dict[str, dict[str, Any]] = {
        "grow": {"size": "big"},
        "shrink": {"size": "small"},
        "turn": {"colour": clause.how},
        "leave": {"away": 1},
    }
    bodies[clause.subject] = replace(subject, x=clause.x, **changes.get(clause.event, {}))
    if clause.target is not None:
        target = bodies[clause.target]
        lying = _direction(subject, target) if clause.event == "topple" else target.lying
        bodies[clause.target] = replace(target, x=clause.target_x, lying=lying)
    return bodies


def states(script: Script) -> list[State]:
    """The states before each clause, and after the last."""
    found = [beginning(script)]
    for clause in script.clauses:
        found.append(after(found[-1], script.objects, clause))
    return found


def there(state: State) -> dict[int, Body]:
    """The objects that stand in the picture."""
    return {i: body for i, body in state.items() if not body.away}


def crowded(bodies: Iterable[Body], touching: float = 0.0) -> bool:
    """Whether objects hide or touch each other, are of one colour, or are cut off by the picture's edge."""
    bodies = list(bodies)
    for i, one in enumerate(bodies):
        if abs(one.x) + one.half > EDGE + 1e-6:
            return True
        for other in bodies[:i]:
            apart, halves = abs(one.x - other.x), one.half + other.half
            if one.colour == other.colour or apart < (halves + touching if one.y == other.y else APART * halves):
                return True
    return False


def is_free(state: State, start: float, end: float, but: Iterable[int]) -> bool:
    """Whether no object, in either row, stands on the way from one x to another."""
    low, high = min(start, end), max(start, end)
    others = [body for i, body in state.items() if i not in but and body.away < 2]
    return not any(low - APART * body.half < body.x < high + APART * body.half for body in others)


def contact(subject: Body, target: Body) -> float:
    """The x of `subject` where it touches `target`, from the side on which it is."""
    return target.x - _direction(subject, target) * (subject.half + target.half + TOUCH)


def tipped_x(subject: Body, target: Body) -> float:
    """The x of `target` after it is knocked over by `subject`."""
    way = RADIUS[target.shape] + LENGTH[target.shape] / 2
    return target.x + _direction(subject, target) * way * target.side


def _direction(subject: Body, target: Body) -> int:
    return 1 if target.x > subject.x else -1


def is_possible(state: State, objects: tuple[SceneObject, ...], clause: Clause) -> bool:
    """Whether a clause can happen, and is what it says: to be seen, and not to be taken for another event."""
    if clause.event in ENTRIES:
        fits = clause.subject not in state and _enters(state, objects, clause)
    else:
        bodies = there(state)
        fits = all(i in bodies for i in clause.mentions) and _acts(state, clause)
    if not fits:
        return False
    half_out = {body.colour for body in state.values() if body.away == 1}
    left = there(after(state, objects, clause))
    return not crowded(left.values()) and not half_out & {body.colour for body in left.values()}


def _enters(state: State, objects: tuple[SceneObject, ...], clause: Clause) -> bool:
    """Whether a new object stops where its kind of entry does, with nothing in its way."""
    body = body_of(objects[clause.subject])
    if crowded([*there(state).values(), body], GAP):
        return False
    if clause.event == "fall":
        return abs(body.x) <= INNER
    outward = -1 if clause.how == "left" else 1
    return outward * body.x >= OUTER and is_free(state, outward * 9.0, body.x, ())


def _acts(state: State, clause: Clause) -> bool:
    """Whether an object that is there can do it."""
    subject = state[clause.subject]
    if subject.lying and clause.event not in ("wait", "turn", "leave"):
        return False
    if clause.event in ("grow", "shrink"):
        return subject.size == ("small" if clause.event == "grow" else "big") and clause.x == subject.x
    if clause.event == "turn":
        return clause.how not in {body.colour for body in state.values() if body.away < 2} and clause.x == subject.x
    if clause.event == "leave":
        outward = -1 if clause.how == "left" else 1
        return outward * clause.x > HALF_PICTURE and is_free(state, subject.x, outward * 9.0, [clause.subject])
    return clause.x == subject.x if clause.target is None else _meets(state, clause)


def _meets(state: State, clause: Clause) -> bool:
    """Whether one object can do it to another."""
    assert clause.target is not None
    subject, target = state[clause.subject], state[clause.target]
    if clause.event == "pass":
        beyond = (clause.x - target.x) * (subject.x - target.x) < 0 and clause.target_x == target.x
        way = "behind" if subject.y > target.y else "front"
        apart = subject.y != target.y and clause.how == way
        return beyond and apart and is_free(state, subject.x, clause.x, clause.mentions)
    run = abs(subject.x - target.x) - subject.half - target.half
    if target.lying or subject.y != target.y or not is_free(state, subject.x, clause.target_x, clause.mentions):
        return False
    if clause.event == "bounce":
        return run >= REBOUND and clause.x == subject.x and clause.target_x == target.x
    if clause.event == "topple":
        return run >= RUN and target.shape in TIPPED and abs(clause.target_x - tipped_x(subject, target)) < 1e-3
    moved = (clause.target_x - target.x) * _direction(subject, target)
    touching = contact(subject, replace(target, x=clause.target_x))
    return run >= RUN and PUSHED[0] - 0.01 <= moved and abs(clause.x - touching) < 0.01
