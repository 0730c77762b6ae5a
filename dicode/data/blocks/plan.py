"""Scripts drawn at random: the same one for the same seed, set and number, whatever else is drawn."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import TypeVar

import numpy as np

from dicode.data.blocks.script import (
    COLOURS,
    ENTRIES,
    EVENTS,
    HELD_ORDERS,
    MOST_CLAUSES,
    MOST_CLIPS,
    PAIRS,
    SETS,
    SHAPES,
    SIDES,
    SIZES,
    SLOW,
    STORY_CLAUSES,
    Clause,
    SceneObject,
    Script,
    belongs,
    is_held_combination,
)
from dicode.data.blocks.world import (
    EDGE,
    FOLLOWS,
    GAP,
    HALF_PICTURE,
    INNER,
    OUTER,
    PUSHED,
    RADIUS,
    ROWS,
    TIPPED,
    State,
    after,
    beginning,
    body_of,
    contact,
    crowded,
    is_possible,
    there,
    tipped_x,
)

T = TypeVar("T")
# Of training scripts: events of two objects, which need much to be right, would be rare, and are drawn worst
OFTEN = {"push": 3.0, "topple": 3.0, "pass": 3.0, "bounce": 1.5}
MOST_THERE = 4
LENGTHS = (0.3, 0.25, 0.2, 0.15, 0.1)  # shares of training scripts of 1, 2, … clauses
# Clauses of the scripts of a set, in turn
SET_LENGTHS = {
    "seen": (1, 2, 3),
    "combinations": (1, 1, 2, 3),
    "lengths": (6, 7, 8),
    "paraphrases": (1, 2, 3),
    "swaps": (2,),
}
TRIES = 32  # of a clause, before a script is begun again
# Events of later clauses that need two clips, or a second object in the right place, are tried more often in return.
LATER = {"push": 9.0, "topple": 14.0, "pass": 9.0, "bounce": 14.0, "jump": 1.4, "spin": 1.4, "enter": 1.6, "fall": 1.6,
         "leave": 0.7, "wait": 0.7, "turn": 0.8}  # fmt: skip


def script_of(seed: int, name: str, index: int, within: float = 0.0) -> Script:
    """Script `index` of a set; `within` is the share of training scripts that are quick, as those of that set."""
    for attempt in count():
        random = np.random.default_rng([seed, SETS.index(name), index, attempt])
        quick = name == "within" or (name == "training" and within > 0 and random.random() < within)
        script = draw(random, events_of(random, name, index, quick), quick, name == "story", name == "combinations")
        if script is None or not belongs(script, "within" if quick else name):
            continue
        if name != "swaps" or exchanged(script) is not None:
            return script
    raise AssertionError


def events_of(random: np.random.Generator, name: str, index: int, quick: bool) -> list[str]:
    """What a script of a set is to consist of: an event, or '' for any, for each clause."""
    if name == "story":
        return [""] * STORY_CLAUSES
    if quick:
        return [SLOW[index % len(SLOW)]]
    if name == "orders":
        first, then = HELD_ORDERS[index % len(HELD_ORDERS)]
        return _one(random, ([first, then], [first, "", then], ["", first, then]))
    if name in SET_LENGTHS:
        clauses = SET_LENGTHS[name][index % len(SET_LENGTHS[name])]
    else:
        clauses = 1 + int(random.choice(MOST_CLAUSES, p=LENGTHS))
    if name == "training":
        weights = np.array([OFTEN.get(event, 1.0) for event in EVENTS])
        first = str(random.choice(EVENTS, p=weights / weights.sum()))
    else:
        first = EVENTS[random.integers(len(EVENTS))]
    return [first, *[""] * (clauses - 1)]


def draw(
    random: np.random.Generator, events: Sequence[str], quick: bool = False, story: bool = False, any_kind: bool = False
) -> Script | None:
    """A script of these events, None at a dead end. Without `any_kind` its combinations are those of training."""
    budget = MOST_CLIPS if len(events) <= MOST_CLAUSES else 2 * len(events)
    budget = len(events) if story else budget
    objects: list[SceneObject] = []
    clauses: list[Clause] = []
    state: State = {}
    for i, wanted in enumerate(events):
        allowed = [e for e in EVENTS if budget - (1 + (e in SLOW and not quick)) >= len(events) - i - 1]
        for _ in range(TRIES):
            event = wanted or str(random.choice(allowed, p=_shares(allowed, there(state))))
            if event not in allowed:
                return None
            found = _first(random, event) if i == 0 else _later(random, event, state, tuple(objects))
            if found is None:
                continue
            new_state, new_objects, clause = found
            clause = replace(clause, quick=quick and event in SLOW)
            subject = new_state[clause.subject] if clause.subject in new_state else body_of(new_objects[clause.subject])
            held = is_held_combination(subject.colour, subject.shape, event)
            earlier = clauses[-1:] if story else clauses
            again = (clause.event, clause.subject) in [(c.event, c.subject) for c in earlier]
            if again or (held and not any_kind) or not is_possible(new_state, new_objects, clause):
                continue
            break
        else:
            return None
        objects = list(new_objects)
        clauses.append(clause)
        budget -= clause.clips
        state = after(new_state, new_objects, clause)
    return Script(tuple(objects), tuple(clauses))


Found = tuple[State, tuple[SceneObject, ...], Clause]


def _shares(events: Sequence[str], bodies: State) -> np.ndarray:
    """Probabilities of a later clause's events, by what is there."""

    def weight(event: str) -> float:
        enough = len(bodies) < MOST_THERE if event in ENTRIES else len(bodies) >= 1 + (event in PAIRS)
        return LATER.get(event, 1.0) if enough else 0.0

    weights = np.array([weight(event) for event in events])
    return weights / weights.sum()


def _first(random: np.random.Generator, event: str) -> Found | None:
    """The first clause, and the objects that are there before it."""
    if event in ENTRIES:
        return _entry(random, event, {}, ())
    objects: list[SceneObject] = []
    for _ in range(1 + (event in PAIRS)):
        size = {"grow": "small", "shrink": "big"}.get(event) or _one(random, SIZES)
        colour = _one(random, [c for c in COLOURS if c not in {obj.colour for obj in objects}])
        shape = _one(random, tuple(TIPPED) if event == "topple" and objects else SHAPES)
        objects.append(_placed(random, SceneObject(colour, shape, size, 0.0, _one(random, ROWS)), -EDGE, EDGE))
    if event in ("push", "topple", "bounce"):
        objects[1] = replace(objects[1], y=objects[0].y)
    if event == "pass":
        objects[1] = replace(objects[1], y=-objects[0].y)
    state = {i: body_of(obj) for i, obj in enumerate(objects)}
    clause = _act(random, event, state, 0, 1 if event in PAIRS else None)
    return None if clause is None or crowded(state.values(), GAP) else (state, tuple(objects), clause)


def _later(random: np.random.Generator, event: str, state: State, objects: tuple[SceneObject, ...]) -> Found | None:
    """A clause about objects that are there, or a new one."""
    bodies = there(state)
    if event in ENTRIES:
        return None if len(bodies) >= MOST_THERE else _entry(random, event, state, objects)
    if len(bodies) < 1 + (event in PAIRS):
        return None
    subject, target = ([*map(int, random.permutation(list(bodies))), None])[:2]
    clause = _act(random, event, state, int(subject or 0), target if event in PAIRS else None)
    return None if clause is None else (state, objects, clause)


def _entry(random: np.random.Generator, event: str, state: State, objects: tuple[SceneObject, ...]) -> Found | None:
    taken = {body.colour for body in state.values() if body.away < 2}
    colour = _one(random, [colour for colour in COLOURS if colour not in taken])
    obj = SceneObject(colour, _one(random, SHAPES), _one(random, SIZES), 0.0, _one(random, ROWS))
    how = "" if event == "fall" else _one(random, SIDES)
    low, high = {"": (-INNER, INNER), "left": (-EDGE, -OUTER), "right": (OUTER, EDGE)}[how]
    obj = _placed(random, obj, low, high)
    return state, (*objects, obj), Clause(event, len(objects), None, how, x=obj.x)


def _act(random: np.random.Generator, event: str, state: State, number: int, other: int | None) -> Clause | None:
    """A clause of this event with its places drawn; whether it is possible is for `is_possible`."""
    subject = state[number]
    if other is not None:
        target = state[other]
        if event == "topple":
            if target.shape not in TIPPED or target.lying:
                return None
            follows = FOLLOWS * RADIUS[target.shape] * target.side * np.sign(target.x - subject.x)
            end = contact(subject, target) + follows
            return Clause(event, number, other, x=_x(end), target_x=_x(tipped_x(subject, target)))
        if event == "pass":
            gap = (subject.half + target.half) * random.uniform(0.8, 1.6)
            end = target.x + np.sign(target.x - subject.x) * gap
            way = "behind" if subject.y > target.y else "front"
            return Clause(event, number, other, way, x=_x(end), target_x=target.x)
        if event == "bounce":
            return Clause(event, number, other, x=subject.x, target_x=target.x)
        end = _x(target.x + np.sign(target.x - subject.x) * random.uniform(*PUSHED))
        return Clause(event, number, other, x=_x(contact(subject, replace(target, x=end))), target_x=end)
    how = ""
    if event == "leave":
        how = _one(random, SIDES)
        end = HALF_PICTURE + 0.1 * subject.half
        return Clause(event, number, None, how, x=_x(-end if how == "left" else end))
    if event == "turn":
        how = _one(random, [c for c in COLOURS if c not in {b.colour for b in state.values() if b.away < 2}])
    return Clause(event, number, None, how, x=subject.x)


def exchanged(script: Script) -> Script | None:
    """A script of two clauses with these exchanged, of the same objects; None where that is none or held out."""
    first, then = script.clauses
    if first.event in ENTRIES and then.event in ENTRIES:
        objects = tuple(reversed(script.objects))
        clauses = (replace(then, subject=0), replace(first, subject=1))
    elif first.event in ENTRIES or then.event in ENTRIES or set(first.mentions) != set(then.mentions):
        return None
    else:
        objects, clauses = script.objects, (then, first)
    other = Script(objects, clauses)
    return other if first.event != then.event and is_script(other) and belongs(other, "seen") else None


def is_script(script: Script) -> bool:
    """Whether every clause is possible where it comes."""
    state = beginning(script)
    for clause in script.clauses:
        if not is_possible(state, script.objects, clause):
            return False
        state = after(state, script.objects, clause)
    return True


def _placed(random: np.random.Generator, obj: SceneObject, low: float, high: float) -> SceneObject:
    """An object somewhere between two x, whole within the picture."""
    half = body_of(obj).half
    return replace(obj, x=_x(random.uniform(max(low, half - EDGE), min(high, EDGE - half))))


def _one(random: np.random.Generator, values: Sequence[T]) -> T:
    return values[int(random.integers(len(values)))]


def _x(value: float) -> float:
    """Places as scripts have them."""
    return round(float(value), 3)
