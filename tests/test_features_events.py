"""The scorer of `blocks`: right on drawn clips, and wrong on videos that do not show what a script says."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

pytest.importorskip("scipy")

from dicode.data.blocks.clips import drawn
from dicode.data.blocks.plan import exchanged, script_of
from dicode.data.blocks.script import EVENTS, PAIRS, SHAPES, SLOW, Clause, Script
from dicode.features.events.rules import ALONE, MEETING, Window
from dicode.features.events.score import ATTRIBUTES, kendall, score
from dicode.features.events.tracks import tracks_of

REVERSIBLE = (*SLOW, "pass", "wait")  # what they say is as true backwards


@cache
def single(event: str, seed: int = 0) -> tuple[Script, np.ndarray]:
    """A script of one clause, of this event, and its video without the last key frame."""
    index = next(i for i in range(2000) if (s := script_of(seed, "seen", i)).clauses[0].event == event
                 and len(s.clauses) == 1)  # fmt: skip
    script = script_of(seed, "seen", index)
    return script, drawn(script, seed, "training", index)[:-1]


@cache
def sequence(length: int, index: int = 0) -> tuple[Script, np.ndarray]:
    script = script_of(0, "seen", 3 * index + length - 1)
    return script, drawn(script, 0, "seen", 3 * index + length - 1)[:-1]


def test_drawn_clips_are_right_in_every_attribute() -> None:
    right, total = dict.fromkeys(ATTRIBUTES, 0), 0
    for index in range(14):
        script, frames = sequence(1 + index % 3, index)
        found = score(frames, script)
        total += len(found["clauses"])
        for name in ATTRIBUTES:
            right[name] += sum(clause[name] for clause in found["clauses"])
        assert found["kept"] == found["joins"]
    assert total > 20 and min(right.values()) >= total - 1, (right, total)


@pytest.mark.parametrize("event", EVENTS)
def test_each_event_is_found_as_itself_and_as_no_other(event: str) -> None:
    for seed in (0, 1):
        script, frames = single(event, seed)
        found = score(frames, script)
        assert found["exact"] and found["order"] is None, found
        clause, tracks = script.clauses[0], tracks_of(frames)
        window = Window(tracks, 0, len(frames) - 1, clause.clips)
        held = {name for name, rule in ALONE.items() for how in (clause.how, "left", "right")
                if any(rule(window, track, how) for track in tracks)}  # fmt: skip
        held |= {name for name, rule in MEETING.items() for how in ("behind", "front")
                 if any(rule(window, a, b, how) for a in tracks for b in tracks if a is not b)}  # fmt: skip
        assert held == {event}, (held, script)


@pytest.mark.parametrize("event", [event for event in EVENTS if event not in REVERSIBLE])
def test_a_video_backwards_is_wrong(event: str) -> None:
    script, frames = single(event)
    assert not score(frames[::-1], script)["clauses"][0]["event"]


@pytest.mark.parametrize("event", [event for event in EVENTS if event != "wait"])
def test_a_video_in_which_nothing_happens_is_wrong(event: str) -> None:
    script, frames = single(event)
    for still in (frames[:1], frames[-1:], frames[len(frames) // 2 :][:1]):
        assert not score(still.repeat(len(frames), axis=0), script)["clauses"][0]["event"]


@pytest.mark.parametrize(
    "event", [event for event in EVENTS if event not in ("wait", "turn", "spin", "grow", "shrink")]
)
def test_things_that_fade_out_here_and_in_there_are_wrong(event: str) -> None:
    script, frames = single(event)
    share = np.linspace(0, 1, len(frames))[:, None, None, None]
    faded = (frames[:1] * (1 - share) + frames[-1:] * share).round().astype(np.uint8)
    assert not score(faded, script)["clauses"][0]["event"]


@pytest.mark.parametrize("event", EVENTS)
def test_other_colours_and_shapes_are_wrong_and_the_event_is_not(event: str) -> None:
    script, frames = single(event)
    if event != "turn":
        found = score(np.ascontiguousarray(frames[..., [1, 2, 0]]), script)["clauses"][0]
        assert not found["colour"] and found["shape"] and found["event"] and not found["all"]
    subject = script.clauses[0].subject
    others = [shape for shape in SHAPES if shape != script.objects[subject].shape]
    objects = [replace(obj, shape=others[0]) if i == subject else obj for i, obj in enumerate(script.objects)]
    found = score(frames, Script(tuple(objects), script.clauses))["clauses"][0]
    assert found["colour"] and not found["shape"] and found["event"] and not found["all"]


@pytest.mark.parametrize("event", [event for event in EVENTS if event in ("enter", "leave", "pass")])
def test_the_other_side_is_wrong(event: str) -> None:
    script, frames = single(event)
    other = {"left": "right", "right": "left", "behind": "front", "front": "behind"}[script.clauses[0].how]
    assert not score(frames, Script(script.objects, (replace(script.clauses[0], how=other),)))["clauses"][0]["event"]


@pytest.mark.parametrize("event", PAIRS)
def test_the_things_of_an_event_cannot_be_exchanged(event: str) -> None:
    script, frames = single(event)
    clause = script.clauses[0]
    assert clause.target is not None
    found = score(frames, Script(script.objects, (replace(clause, subject=clause.target, target=clause.subject),)))
    assert not found["clauses"][0]["all"]


def test_a_missing_clause_is_wrong_and_the_others_are_not() -> None:
    script, frames = next((s, f) for i in range(9) if (s := sequence(3, i)[0]) and (f := sequence(3, i)[1]) is not None
                          and s.clauses[2].event != "wait")  # fmt: skip
    start = 16 * script.starts[2]
    without = frames.copy()
    without[start:] = frames[start]
    found = score(without, script)
    assert not found["clauses"][2]["event"] and not found["exact"]
    assert found["clauses"][0]["all"] and found["clauses"][1]["all"]
    assert found["order"] == pytest.approx(1 / 3)
    assert not any(clause["all"] for clause in score(frames[: start - 4], script)["clauses"][2:])


def test_exchanged_clauses_are_in_the_other_order() -> None:
    orders = []
    for index in range(6):
        script = script_of(0, "swaps", index)
        other = exchanged(script)
        assert other is not None
        found = score(drawn(other, 0, "swaps", index)[:-1], script)
        assert not found["exact"] and found["order"] <= 0
        orders.append(found["order"])  # 0 where the first one changes what does the second, as by another colour
    assert orders.count(-1.0) >= 3, orders


def test_things_that_vanish_at_a_join_do_not_last() -> None:
    script, frames = single("jump")
    grey = frames.copy()
    grey[16:] = 160
    found = score(grey, script)
    assert (found["joins"], found["kept"]) == (1, 0)


def test_order_counts_pairs() -> None:
    assert kendall([0, 1, 2]) == 1 and kendall([2, 1, 0]) == -1 and kendall([0]) is None
    assert kendall([0, None, 2]) == pytest.approx(1 / 3)  # two of three pairs are nowhere
    assert kendall([0, 2, 1]) == pytest.approx(1 / 3) and kendall([1, 1]) == 0


def test_a_script_of_another_world_is_an_error() -> None:
    script, _ = single("jump")
    record = script.record()
    record["clauses"][0]["event"] = "flies"
    with pytest.raises(ValueError, match="world `blocks`"):
        Script.parse(record)
    with pytest.raises(ValueError, match="script"):
        Script.parse({"objects": [], "clauses": [], "more": 1})
    assert Clause("jump", 0).clips == 2 and Clause("jump", 0, quick=True).clips == 1
