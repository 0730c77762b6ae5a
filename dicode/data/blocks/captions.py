"""Captions of a script: each clause in other words, with nouns, articles and pronouns that fit what came before."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dicode.data.blocks.script import ENTRIES, Clause, Script
from dicode.data.blocks.world import Body, State, body_of, states, there

# {s} does it to {o}; wordings of training, and, after the bar, those that only `paraphrases` has: of the same words.
WORDINGS = {
    "enter": """
        {s} {rolls} in from the {how}; {s} comes in from the {how}; {s} enters from the {how}; from the {how}, {s}
        {rolls} in; from the {how} comes {s}; {s} {rolls} into view from the {how}; {s} arrives from the {how}; in
        from the {how} {rolls} {s}
        | from the {how} enters {s}; in from the {how} comes {s}; {s} comes into view from the {how}
    """,
    "fall": """
        {s} falls from above; {s} drops from above and bounces; {s} falls down and bounces; from above falls {s};
        {s} comes down from above; {s} drops to the floor; {s} falls to the floor and bounces; down from above drops
        {s}
        | from above drops {s}; {s} falls from above and bounces; {s} drops down from above; {s} falls to the floor
        from above
    """,
    "jump": """
        {s} jumps; {s} jumps up; {s} hops; {s} leaps into the air; {s} makes a jump; {s} hops up and lands; {s}
        jumps into the air; {s} does a hop
        | {s} makes a hop; {s} leaps up; {s} hops into the air; {s} does a jump
    """,
    "push": """
        {s} pushes {o}; {s} pushes {o} away; {s} shoves {o}; {s} shoves {o} along; {o} is pushed by {s}; {o} is
        pushed away by {s}; {s} gives {o} a push; {o} is pushed along by {s}
        | {s} shoves {o} away; {s} pushes {o} along; {o} gets a push from {s}
    """,
    "topple": """
        {s} knocks over {o}; {s} knocks {o} over; {s} knocks {o} down; {s} tips {o} over; {s} makes {o} fall over;
        {o} is knocked over by {s}; {s} topples {o}; {o} is knocked down by {s}
        | {s} knocks down {o}; {s} tips over {o}; {s} makes {o} fall down
    """,
    "pass": """
        {s} passes {way} {o}; {s} moves past {way} {o}; {s} goes by {way} {o}; {s} {rolls} by {way} {o}; {s} moves
        {way} {o} to the other side; {way} {o}, {s} passes by; {s} passes {way} {o} to the other side; {s} goes
        {way} {o}
        | {s} {rolls} past {way} {o}; {s} goes {way} {o} to the other side; {way} {o}, {s} moves past
    """,
    "bounce": """
        {s} bounces off {o}; {s} hits {o} and bounces back; {s} bumps into {o} and comes back; {s} bounces back from
        {o}; {s} hits {o} and returns; {s} runs into {o} and bounces back; {s} bumps against {o} and returns; {s}
        bumps against {o} and bounces off
        | {s} hits {o} and comes back; {s} bumps into {o} and bounces back; {s} runs into {o} and returns
    """,
    "spin": """
        {s} spins; {s} spins around; {s} spins around once; {s} rotates; {s} makes a full spin; {s} twirls around;
        {s} rotates once; {s} does a spin
        | {s} makes a spin; {s} twirls around once; {s} does a full spin; {s} rotates around once
    """,
    "grow": """
        {s} grows; {s} grows big; {s} becomes bigger; {s} gets bigger; {s} becomes big; {s} swells up; {s} grows in
        size; {s} expands
        | {s} gets big; {s} grows bigger; {s} swells in size; {s} expands in size
    """,
    "shrink": """
        {s} shrinks; {s} becomes smaller; {s} gets smaller; {s} becomes small; {s} shrinks in size; {s} shrinks
        down; {s} gets little; {s} becomes little
        | {s} gets small; {s} becomes smaller in size; {s} shrinks down in size
    """,
    "turn": """
        {s} turns {how}; {s} becomes {how}; {s} changes to {how}; {s} changes its colour to {how}; {s} goes {how};
        the colour of {s} changes to {how}; {s} fades to {how}; {s} turns its colour to {how}
        | {s} turns to {how}; {s} fades its colour to {how}; {s} becomes {how} in colour
    """,
    "leave": """
        {s} leaves to the {how}; {s} {rolls} out to the {how}; {s} goes away to the {how}; {s} exits to the {how};
        {s} {rolls} away to the {how}; {s} disappears to the {how}; {s} exits on the {how}; {s} leaves on the {how}
        | {s} goes out to the {how}; {s} disappears on the {how}; {s} goes away on the {how}
    """,
    "wait": """
        {s} waits; {s} stays still; {s} does not move; {s} rests; {s} stands still; {s} stays in place; {s} does
        nothing; {s} waits for a moment
        | {s} waits in place; {s} rests for a moment; {s} stands in place
    """,
}
JOINS = (", then {}", " and then {}", ". then {}", ". after that, {}", ". next, {}", ", and after that {}")
HELD_JOINS = (". after that {}", ", and next {}", " and after that {}")
OPENINGS = ("then {}", "next, {}", "after that, {}")  # of later shots: they begin with what is there
SIZE_WORDS = {"small": ("small", "little"), "big": ("big", "large")}
SIZED, NAMED_BY_SHAPE, PRONOUN, DEFINITE = 0.3, 0.2, 0.6, 0.25  # how often, where it fits


def _wordings(event: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    trained, held = (tuple(" ".join(text.split()) for text in part.split(";")) for part in WORDINGS[event].split("|"))
    return trained, held


TRAINED_WORDINGS, HELD_WORDINGS = ({event: _wordings(event)[held] for event in WORDINGS} for held in (0, 1))


class Phrase(NamedTuple):
    """A clause in words, and how it names its objects."""

    text: str
    nouns: tuple[str, ...]  # of `Clause.mentions`


def captions(script: Script, random: np.random.Generator, count: int, held: bool = False) -> tuple[str, ...]:
    """Up to `count` captions of the whole script, no two alike; `held`: in the wordings that training never has."""
    drawn = (caption(script, random, held) for _ in range(3 * count))
    return tuple(dict.fromkeys(drawn))[:count]


def caption(script: Script, random: np.random.Generator, held: bool = False) -> str:
    """All clauses in a row."""
    first, *others = (phrase.text for phrase in phrases(script, random, held))
    joins = HELD_JOINS if held else JOINS
    return first + "".join(_one(random, joins).format(other) for other in others)


def shots(script: Script, random: np.random.Generator, held: bool = False) -> list[str]:
    """A prompt for each clause, which names its objects in full; from the second on it begins with "then" or so."""
    first, *others = (phrase.text for phrase in phrases(script, random, held, alone=True))
    return [first, *(_one(random, OPENINGS).format(other) for other in others)]


def phrases(script: Script, random: np.random.Generator, held: bool = False, alone: bool = False) -> list[Phrase]:
    """The clauses in words, one after another; each `alone` has no pronoun."""
    found: list[Phrase] = []
    known: set[int] = set()
    before: tuple[int, ...] = ()
    for clause, state in zip(script.clauses, states(script)[:-1], strict=True):
        if clause.event in ENTRIES:
            state = {**state, clause.subject: body_of(script.objects[clause.subject])}
        shape = state[clause.subject].shape
        words = {
            "how": clause.how,
            "rolls": "rolls" if shape == "ball" and not state[clause.subject].lying else "slides",
            "way": {"front": "in front of"}.get(clause.how, clause.how),
        }
        wording = _one(random, (HELD_WORDINGS if held else TRAINED_WORDINGS)[clause.event])
        nouns = _nouns(random, clause, state, wording, known, () if alone else before)
        words |= dict(zip("so"[: len(nouns)], nouns, strict=True))
        found.append(Phrase(wording.format(**words) + " quickly" * clause.quick, nouns))
        known |= {*clause.mentions}
        before = clause.mentions
    return found


def _nouns(
    random: np.random.Generator, clause: Clause, state: State, wording: str, known: set[int], before: tuple[int, ...]
) -> tuple[str, ...]:
    """The names of a clause's objects. A pronoun stands for the only object of the clause before."""
    full = not wording.startswith("{s}") and not wording.split(", ")[-1].startswith("{s} ")  # no "from above falls it"
    found = []
    for place, number in enumerate(clause.mentions):
        fits = before == (number,) and "it" not in found and not (place == 0 and full)
        if fits and random.random() < PRONOUN:
            found.append("it")
        else:
            enters = clause.event in ENTRIES
            found.append(_noun(random, number, state, known, enters))
    return tuple(found)


def _noun(random: np.random.Generator, number: int, state: State, known: set[int], enters: bool) -> str:
    """An object by its colour and shape, perhaps its size; by its shape alone where there is no other like it."""
    body: Body = state[number]
    others = [other for i, other in there(state).items() if i != number]
    definite = number in known or (not known and not enters and random.random() < DEFINITE)
    if number in known and body.shape not in {other.shape for other in others} and random.random() < NAMED_BY_SHAPE:
        return f"the {body.shape}"
    size = f"{_one(random, SIZE_WORDS[body.size])} " if random.random() < SIZED else ""
    name = f"{size}{body.colour} {body.shape}"
    article = "the" if definite else "an" if name[0] in "aeiou" else "a"
    return f"{article} {name}"


def _one(random: np.random.Generator, values: Sequence[str]) -> str:
    return values[int(random.integers(len(values)))]
