"""Scripts as motion: where every object is in every frame, by mechanics where objects meet, fall or tip.

Every clause begins and ends at rest (but for objects that leave), and fills its clips.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from dicode.data.blocks.script import CLIP_FRAMES, Clause, Script
from dicode.data.blocks.world import (
    HALF_PICTURE,
    HEIGHT,
    LENGTH,
    RADIUS,
    SIDE,
    TIPPED,
    Body,
    State,
    body_of,
    contact,
    states,
)

HUES = {  # red, green, blue, 0…1
    "red": (0.85, 0.11, 0.13),
    "orange": (0.97, 0.50, 0.05),
    "yellow": (0.97, 0.88, 0.12),
    "green": (0.16, 0.66, 0.22),
    "cyan": (0.15, 0.80, 0.84),
    "blue": (0.14, 0.28, 0.88),
    "purple": (0.52, 0.18, 0.80),
    "pink": (0.97, 0.36, 0.68),
}
DROP = 7.6  # height from which objects fall: above the picture
JUMP = 1.55  # height of a jump, 11 pixels
KEPT = {"ball": (0.52, 3)}  # of its speed, in each of so many bounces
KEPT_OTHERS = (0.3, 2)
LOST = 0.6  # of the speed of one object that both have after they meet
LEAST_EXIT = 0.18  # units a frame, of what is half out


@dataclass(frozen=True)
class Poses:
    """Where one object is, a row a frame: of the middle of its bounding box as if it stood, turned and tipped."""

    shape: str
    place: Float64[ndarray, "f 3"]  # x, y, and z of the middle
    yaw: Float64[ndarray, "f"]  # radians about the upright axis
    tilt: Float64[ndarray, "f"]  # radians towards +x
    side: Float64[ndarray, "f"]
    colour: Float64[ndarray, "f 3"]  # 0…1
    there: ndarray  # bool

    def at(self, f: int) -> bytes:
        """All of one frame, to compare."""
        values = (self.place, self.yaw, self.tilt, self.side, self.colour, self.there)
        return b"".join(value[f].tobytes() for value in values)


def poses_of(script: Script) -> list[Poses]:
    """The poses of every object in every frame of a script."""
    parts: list[list[Poses]] = [[] for _ in script.objects]
    leaving: dict[int, float] = {}
    for number, (clause, state) in enumerate(zip(script.clauses, states(script)[:-1], strict=True)):
        frames = clause.clips * CLIP_FRAMES + (number == len(script.clauses) - 1)
        time = np.arange(frames) / CLIP_FRAMES  # in clips
        speeds: dict[int, float] = {}
        for i, obj in enumerate(script.objects):
            body = state.get(i)
            if i in clause.mentions:
                part = _moving(script, clause, state, i, time)
                speeds[i] = float(part.place[CLIP_FRAMES - 1, 0] - part.place[CLIP_FRAMES - 2, 0])
            elif body is None or body.away > 1:
                part = _still(body or body_of(obj), time, np.zeros(frames, bool))
            elif body.away == 1:
                part = _gone(body, time, leaving[i])
            else:
                part = _still(body, time)
            parts[i].append(part)
        leaving = speeds
    return [_joined(own) for own in parts]


def _still(body: Body, time: ndarray, there: ndarray | None = None) -> Poses:
    """An object at rest."""
    ones = np.ones_like(time)
    height, middle, tilt = HEIGHT[body.shape] * body.side / 2, body.x, 0.0
    if body.lying:
        tilt = TIPPED[body.shape] * body.lying
        offset, height = tipped(body.shape, body.side, TIPPED[body.shape])
        middle = body.x + body.lying * (offset - LENGTH[body.shape] * body.side / 2)
    place = np.stack([middle * ones, body.y * ones, height * ones], axis=1)
    colour = np.array(HUES[body.colour])[None].repeat(len(time), axis=0)
    return Poses(body.shape, place, 0 * ones, tilt * ones, body.side * ones, colour,
                 np.ones(len(time), bool) if there is None else there)  # fmt: skip


def tipped(shape: str, side: float, angle: float | ndarray) -> tuple[Any, Any]:
    """How far beyond the edge that it tips over, and how high, the middle of an object is at an angle."""
    radius, half = RADIUS[shape] * side, HEIGHT[shape] * side / 2
    return -radius * np.cos(angle) + half * np.sin(angle), radius * np.sin(angle) + half * np.cos(angle)


def _gone(body: Body, time: ndarray, speed: float) -> Poses:
    """The rest of an object that left in the clause before."""
    poses = _still(body, time)
    speed = np.sign(body.x) * max(abs(speed), LEAST_EXIT)
    poses.place[:, 0] += speed * time * CLIP_FRAMES
    poses.there[:] = np.abs(poses.place[:, 0]) < HALF_PICTURE + body.half + 0.3
    return poses


def _moving(script: Script, clause: Clause, state: State, number: int, time: ndarray) -> Poses:
    """What a clause does to one of its objects."""
    body = state[number] if number in state else body_of(script.objects[number])
    poses = _still(body, time)
    if clause.target is None:
        ALONE[clause.event](poses, body, clause, time)
    else:
        MEETING[clause.event](poses, state, clause, number, time)
    return poses


def smooth(u: ndarray) -> ndarray:
    """From 0 to 1 with least jerk, at rest at both ends."""
    u = np.clip(u, 0, 1)
    return u**3 * (10 - 15 * u + 6 * u**2)


def slowing(u: ndarray) -> ndarray:
    """From 0 to 1, braked all the way."""
    return 1 - (1 - np.clip(u, 0, 1)) ** 1.8


def _enter(poses: Poses, body: Body, clause: Clause, time: ndarray) -> None:
    start = (-1 if clause.how == "left" else 1) * (HALF_PICTURE + body.half + 0.2)
    poses.place[:, 0] = start + (clause.x - start) * slowing(time / 0.95)
    poses.there[0] = False


def _fall(poses: Poses, body: Body, clause: Clause, time: ndarray) -> None:
    """Falls and bounces: parabolas, each `kept` times as fast as the one before."""
    kept, bounces = KEPT.get(body.shape, KEPT_OTHERS)
    fall_s = 0.95 / (1 + 2 * sum(kept**n for n in range(1, bounces + 1)))
    height = DROP * (1 - (time / fall_s) ** 2)
    start = fall_s
    for n in range(1, bounces + 1):
        length = 2 * fall_s * kept**n
        u = (time - start) / length
        height = np.where((u >= 0) & (u <= 1), DROP * kept ** (2 * n) * 4 * u * (1 - u), height)
        start += length
    poses.place[:, 2] += np.where(time < start, np.clip(height, 0, None), 0)
    poses.there[0] = False


def _jump(poses: Poses, body: Body, clause: Clause, time: ndarray) -> None:
    middle = clause.clips / 2
    u = (time - middle) / (0.36 if clause.quick else 0.7)
    poses.place[:, 2] += JUMP * np.clip(1 - u**2, 0, None)


def _spin(poses: Poses, body: Body, clause: Clause, time: ndarray) -> None:
    poses.yaw[:] += 2 * np.pi * smooth(time / clause.clips)


def _resize(poses: Poses, body: Body, clause: Clause, time: ndarray) -> None:
    end = SIDE["big" if clause.event == "grow" else "small"]
    poses.side[:] = body.side + (end - body.side) * smooth((time - 0.06) / 0.88)
    poses.place[:, 2] = HEIGHT[body.shape] * poses.side / 2


def _turn(poses: Poses, body: Body, clause: Clause, time: ndarray) -> None:
    share = smooth((time - 0.12) / 0.76)[:, None]
    poses.colour[:] = poses.colour * (1 - share) + np.array(HUES[clause.how]) * share


def _leave(poses: Poses, body: Body, clause: Clause, time: ndarray) -> None:
    poses.place[:, 0] += (clause.x - body.x) * np.clip(time, 0, 1.1) ** 1.7


def _wait(poses: Poses, body: Body, clause: Clause, time: ndarray) -> None:
    pass


Alone = Callable[[Poses, Body, Clause, ndarray], None]
ALONE: dict[str, Alone] = {
    "enter": _enter, "fall": _fall, "jump": _jump, "spin": _spin, "grow": _resize, "shrink": _resize, "turn": _turn,
    "leave": _leave, "wait": _wait,
}  # fmt: skip


def _pass(poses: Poses, state: State, clause: Clause, number: int, time: ndarray) -> None:
    """Around the other object, nearer to it than its row is."""
    if number != clause.subject or clause.target is None:
        return
    subject, target = state[clause.subject], state[clause.target]
    x = subject.x + (clause.x - subject.x) * smooth((time - 0.03) / 0.94)
    near = target.y + np.sign(subject.y - target.y) * ((subject.side + target.side) / 2 + 0.1)
    way = min(abs(subject.x - target.x), abs(clause.x - target.x))
    share = np.clip(1 - ((x - target.x) / way) ** 2, 0, 1) ** 2
    poses.place[:, 0] = x
    poses.place[:, 1] += (near - subject.y) * share * (abs(near - target.y) < abs(subject.y - target.y))


def _bounce(poses: Poses, state: State, clause: Clause, number: int, time: ndarray) -> None:
    """There faster and faster, and back slower and slower; the other object stays."""
    if number != clause.subject or clause.target is None:
        return
    subject, target = state[clause.subject], state[clause.target]
    u = time / clause.clips * 2  # 1 where they touch
    share = np.where(u <= 1, np.clip((u - 0.06) / 0.94, 0, 1) ** 1.6, np.clip((1.94 - u) / 0.94, 0, 1) ** 1.6)
    poses.place[:, 0] += (contact(subject, target) - subject.x) * share


def _push(poses: Poses, state: State, clause: Clause, number: int, time: ndarray) -> None:
    """Up to the other object, then both on together, slower, until friction has stopped them."""
    assert clause.target is not None
    subject, target = state[clause.subject], state[clause.target]
    run, moved = abs(contact(subject, target) - subject.x), abs(clause.target_x - target.x)
    ratio = np.clip(2 * moved / (1.5 * LOST * run), 0.6, 2.5)  # of the times after and before they meet
    meet = 0.92 / (1 + ratio)
    after = slowing((time - meet) / (0.92 - meet)) * (clause.target_x - target.x)
    before = np.clip(time / meet, 0, 1) ** 1.5 * (contact(subject, target) - subject.x)
    poses.place[:, 0] += after + before if number == clause.subject else after


def _topple(poses: Poses, state: State, clause: Clause, number: int, time: ndarray) -> None:
    """Up to the other object, which tips over its far edge, faster and faster, and rocks once."""
    assert clause.target is not None
    subject, target = state[clause.subject], state[clause.target]
    direction = np.sign(target.x - subject.x)
    meet, down = 0.4, 0.8
    if number == clause.subject:
        follows = clause.x - contact(subject, target)
        poses.place[:, 0] += np.clip(time / meet, 0, 1) ** 1.5 * (contact(subject, target) - subject.x)
        poses.place[:, 0] += follows * slowing((time - meet) / 0.35)
        return
    share = np.clip((time - meet) / (down - meet), 0, 1) ** 2
    share -= 0.05 * np.sin(np.pi * np.clip((time - down) / 0.13, 0, 1))
    angle = TIPPED[target.shape] * share
    beyond, height = tipped(target.shape, target.side, angle)
    poses.place[:, 0] = target.x + direction * (RADIUS[target.shape] * target.side + beyond)
    poses.place[:, 2] = height
    poses.tilt[:] = direction * angle


Meeting = Callable[[Poses, State, Clause, int, ndarray], None]
MEETING: dict[str, Meeting] = {"pass": _pass, "bounce": _bounce, "push": _push, "topple": _topple}


def _joined(parts: list[Poses]) -> Poses:
    """Consecutive poses of one object."""
    keys = [field.name for field in fields(Poses) if field.name != "shape"]
    return Poses(parts[0].shape, **{key: np.concatenate([getattr(part, key) for part in parts]) for key in keys})
