"""`blocks`: the same scripts and bytes whoever draws them, true captions, and splits that training never sees."""

import dataclasses
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_blocks import training_scripts, write_blocks

from dicode.cli.app import main
from dicode.data.blocks.captions import HELD_JOINS, HELD_WORDINGS, JOINS, TRAINED_WORDINGS, captions, phrases, shots
from dicode.data.blocks.clips import BlocksOptions, build_blocks, drawn
from dicode.data.blocks.draw import Camera, look_of
from dicode.data.blocks.motion import poses_of
from dicode.data.blocks.plan import MOST_THERE, exchanged, is_script, script_of
from dicode.data.blocks.script import (
    COLOURS,
    EVENTS,
    HELD_ORDERS,
    MOST_CLAUSES,
    MOST_CLIPS,
    SETS,
    SHAPES,
    SLOW,
    Script,
    held_clauses,
    is_held_combination,
)
from dicode.data.blocks.world import states, there
from dicode.data.cache import FrameCache
from dicode.storyboard import parse_storyboard

MANY = 3000
OPTIONS = BlocksOptions(count=5, validation=2, scripts_per_shard=3)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def training() -> list[Script]:
    return training_scripts(MANY)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blocks(tmp_path_factory.mktemp("blocks") / "cache", OPTIONS)


def test_training_never_has_what_the_splits_hold_out(training: list[Script]) -> None:
    assert not any(any(held_clauses(script)) for script in training)
    assert not any(script.orders() & set(HELD_ORDERS) for script in training)
    assert all(len(script.clauses) <= MOST_CLAUSES and script.clips <= MOST_CLIPS for script in training)
    assert not any(clause.quick for script in training for clause in script.clauses)


def test_training_has_every_part_of_what_is_held_out(training: list[Script]) -> None:
    seen = {part for script in training for colour, shape, event in script.combinations()
            for part in ((colour, shape), (colour, event), (shape, event))}  # fmt: skip
    held = [(c, s, e) for c in COLOURS for s in SHAPES for e in EVENTS if is_held_combination(c, s, e)]
    assert len(held) == pytest.approx(len(COLOURS) * len(SHAPES) * len(EVENTS) / 8, rel=0.25)
    assert {event for *_, event in held} == set(EVENTS)
    for colour, shape, event in held:
        assert {(colour, shape), (colour, event), (shape, event)} <= seen
    orders = set().union(*(script.orders() for script in training))
    assert all((then, first) in orders for first, then in HELD_ORDERS)
    for event in {event for pair in HELD_ORDERS for event in pair}:
        assert any(first == event for first, _ in orders) and any(then == event for _, then in orders)


def test_events_of_training_are_balanced(training: list[Script]) -> None:
    counts = Counter(clause.event for script in training for clause in script.clauses)
    assert counts.keys() == set(EVENTS)
    assert min(counts.values()) > 0.25 * sum(counts.values()) / len(EVENTS), counts
    lengths = Counter(len(script.clauses) for script in training)
    assert min(lengths.values()) > 0.05 * MANY, lengths


@pytest.mark.parametrize("name", SETS[1:])
def test_each_set_holds_out_what_it_says_and_nothing_else(name: str) -> None:
    for index in range(1 if name == "story" else 14):
        script = script_of(0, name, index)
        order, quick = bool(script.orders() & set(HELD_ORDERS)), any(clause.quick for clause in script.clauses)
        assert any(held_clauses(script)) == (name == "combinations")
        assert quick == (name == "within")
        assert (len(script.clauses) > MOST_CLAUSES) == (name in ("lengths", "story"))
        if name != "story":
            assert order == (name == "orders")
        assert is_script(script) and Script.parse(script.record()) == script
    if name == "story":
        assert len(script.clauses) == script.clips == 30


def test_a_script_depends_on_its_seed_set_and_number_alone() -> None:
    alone = script_of(3, "training", 17)
    assert [script_of(3, "training", index) for index in range(20)][17] == alone
    assert script_of(4, "training", 17) != alone != script_of(3, "seen", 17)


def test_exchanged_clauses_are_a_script_of_the_same_things() -> None:
    for index in range(14):
        script = script_of(0, "swaps", index)
        other = exchanged(script)
        assert other is not None and is_script(other)
        assert sorted(other.objects, key=str) == sorted(script.objects, key=str)
        assert [c.event for c in other.clauses] == [c.event for c in reversed(script.clauses)]
        back = exchanged(other)
        assert back is None or back == script


def test_every_clause_has_six_wordings_and_others_of_the_same_words_that_are_held_out() -> None:
    fields = {"s": "red ball", "o": "cube", "how": "left", "rolls": "rolls", "way": "behind"}
    trained, held = (
        {text.format(**fields) for texts in wordings.values() for text in texts}
        for wordings in (TRAINED_WORDINGS, HELD_WORDINGS)
    )
    assert all(len(set(texts)) >= 6 for texts in TRAINED_WORDINGS.values())
    assert all(len(set(texts)) >= 2 for texts in HELD_WORDINGS.values())
    assert not trained & held and not set(JOINS) & set(HELD_JOINS)
    assert TRAINED_WORDINGS.keys() == HELD_WORDINGS.keys() == set(EVENTS)
    words = {word.strip(",.;") for text in [*trained, *JOINS] for word in text.split()}
    assert {word.strip(",.;") for text in [*held, *HELD_JOINS] for word in text.split()} <= words


def test_names_are_of_the_right_thing_and_pronouns_of_the_only_thing_before(training: list[Script]) -> None:
    random, pronouns = np.random.default_rng(0), 0
    for script in training[:300]:
        made = phrases(script, random)
        for number, (clause, phrase, state) in enumerate(zip(script.clauses, made, states(script)[:-1], strict=True)):
            bodies = there(state)
            for obj, noun in zip(clause.mentions, phrase.nouns, strict=True):
                if noun == "it":
                    pronouns += 1
                    assert script.clauses[number - 1].mentions == (obj,)
                    assert re.search(r"\bit\b", phrase.text)
                    continue
                body = bodies.get(obj, script.objects[obj])
                others = [other for i, other in bodies.items() if i != obj]
                article, *adjectives, shape = noun.split()
                assert shape == body.shape
                assert all(other.shape != shape for other in others) if not adjectives else body.colour in adjectives
                assert not set(adjectives) & {other.colour for other in others}
                sizes = {"small": {"small", "little"}, "big": {"big", "large"}}[body.size]
                assert set(adjectives) <= {body.colour} | sizes
                assert (article == "an") == (article != "the" and (adjectives[0][0] in "aeiou"))
                before = {i for clause in script.clauses[:number] for i in clause.mentions}
                assert article == "the" if obj in before else article != "the" or number == 0
    assert pronouns > 60


def test_captions_differ_and_shots_make_a_storyboard(training: list[Script]) -> None:
    script = next(script for script in training if len(script.clauses) == 3)
    random = np.random.default_rng(1)
    texts = captions(script, random, 6)
    assert len(set(texts)) == 6 and not any("{" in text for text in texts)
    own = shots(script, random)
    board = " ".join(f"[{2 * clause.clips}s: {text}]" for clause, text in zip(script.clauses, own, strict=True))
    read = parse_storyboard(board)
    assert read is not None and [shot.prompt for shot in read] == own
    assert [shot.seconds for shot in read] == [2.0 * clause.clips for clause in script.clauses]
    assert not re.search(r"\bit\b", board.replace("where it", ""))
    assert all(text.startswith(("then ", "next, ", "after that, ")) for text in own[1:])


def test_things_are_seen_and_lie_within_the_picture_between_clauses() -> None:
    for name, index in (("lengths", 0), ("seen", 5), ("lengths", 4)):
        script = script_of(0, name, index)
        camera, poses = Camera(look_of(np.random.default_rng(index), len(script.objects))), poses_of(script)
        places = [16 * start for start in [*script.starts, script.clips]]
        for place, state in zip(places, states(script), strict=True):
            _, numbers = camera.drawn(poses, min(place, script.frames - 1))
            assert len(there(state)) <= MOST_THERE
            for i in there(state):
                rows, columns = np.nonzero(numbers == i)
                _, alone = camera.drawn([own if j == i else _absent(own) for j, own in enumerate(poses)], place)
                assert len(rows) > 0.5 * (alone == i).sum()
                assert min(rows.min(), columns.min()) > 0 and max(rows.max(), columns.max()) < 127
        assert camera.frame(poses, 0).shape == (64, 64, 3)


def _absent(poses):
    import dataclasses

    return dataclasses.replace(poses, there=np.zeros_like(poses.there))


def test_an_event_between_key_frames_leaves_them_alike_and_one_across_them_does_not() -> None:
    for index, event in enumerate(SLOW):
        quick, slow = script_of(0, "within", index), None
        assert quick.clauses[0].event == event and quick.clips == 1
        frames = drawn(quick, 0, "within", index)
        assert np.array_equal(frames[0], frames[16])
        slow = next(s for i in range(500) if (s := script_of(0, "training", i)).clauses[0].event == event)
        frames = drawn(slow, 0, "training", 0)
        assert (np.abs(frames[0].astype(int) - frames[16]).max(-1) > 40).sum() >= 8
        assert np.array_equal(frames[0], frames[32])


def test_a_cache_holds_scripts_sets_and_true_lengths(cache: Path) -> None:
    frames = FrameCache.load(cache)
    counts = Counter(video.extra["set"] for video in frames.videos)
    assert counts["training"] == 5 and all(counts[name] == 2 for name in SETS[1:-1]) and counts["story"] == 1
    for video in frames.videos:
        assert video.validation == (video.extra["set"] not in ("training", "shots"))
        own = torch.arange(video.first, video.first + video.count)
        assert torch.equal(frames.clip_rows(video, 0.0, video.count, 8.0), own)  # of shots too, which begin later
        if video.extra["set"] == "shots":
            assert video.captions[0].startswith(("then ", "next, ", "after that, ")) and video.count in (17, 33)
            continue
        script = Script.parse(video.extra["script"])
        assert video.count == script.frames and video.period_s == script.frames / 8
        assert len(set(video.captions)) >= (1 if video.extra["set"] == "story" else 3)
    index = next(i for i, video in enumerate(frames.videos) if video.file == "seen/000001")
    video = frames.videos[index]
    again = drawn(script_of(0, "seen", 1), 0, "seen", 1)
    assert np.array_equal(frames.frames[video.first : video.first + video.count].numpy(), again)


def test_key_frames_of_training_can_be_drawn_alone(tmp_path: Path, cache: Path) -> None:
    build_blocks(dataclasses.replace(OPTIONS, key_frames_only=True), tmp_path)
    whole, alone = FrameCache.load(cache), FrameCache.load(tmp_path)
    assert len(whole.videos) == len(alone.videos)
    for video, other in zip(whole.videos, alone.videos, strict=True):
        assert video == dataclasses.replace(other, first=video.first, count=video.count)
        every = 1 if video.validation else 16
        assert other.count == 1 + (video.count - 1) // every
        frames = alone.frames[other.first : other.first + other.count]
        assert torch.equal(frames, whole.frames[video.first : video.first + video.count : every])
        times_s = alone.times_s[other.first : other.first + other.count]
        assert torch.equal(times_s - times_s[0], torch.arange(other.count).double() * every / 8)
        rows = torch.arange(other.first, other.first + other.count)
        assert torch.equal(alone.clip_rows(other, 0.0, other.count, 8 / every), rows)


def test_processes_make_the_bytes_that_one_process_makes(tmp_path: Path, cache: Path) -> None:
    build_blocks(OPTIONS, tmp_path / "processes", workers=2)
    assert contents(tmp_path / "processes") == contents(cache)


COMMAND = [sys.executable, "-m", "dicode", "data", "blocks", "-n", "2", "--validation", "1", "-o"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
HANGING_S = 600  # no measure of speed


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks") / "small"
    subprocess.run([*COMMAND, str(folder)], env=ENVIRONMENT, check=True)
    return folder


def test_ray_makes_the_bytes_that_one_process_makes(tmp_path: Path, small: Path) -> None:
    pytest.importorskip("ray.data")
    subprocess.run([*COMMAND, str(tmp_path / "ray"), "--ray", "local", "--workers", "2"], env=ENVIRONMENT, check=True)
    assert contents(tmp_path / "ray") == contents(small)


def test_a_killed_command_goes_on_and_makes_the_same_bytes(tmp_path: Path, small: Path) -> None:
    command, out = [*COMMAND, str(tmp_path / "c")], subprocess.DEVNULL
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=out, stderr=out) as process:
        deadline_s = time.monotonic() + HANGING_S
        while not (tmp_path / "c" / "shard-00002.json").exists():
            assert time.monotonic() < deadline_s and process.poll() is None, "no shard was written"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    shard = tmp_path / "c" / "shard-00000.safetensors"
    kept = shard.stat().st_mtime_ns
    assert not (tmp_path / "c" / "index.json").exists()
    assert subprocess.run(command, env=ENVIRONMENT, capture_output=True).returncode == 0
    assert shard.stat().st_mtime_ns == kept and contents(tmp_path / "c") == contents(small)


def test_more_training_scripts_keep_the_shards_of_fewer(tmp_path: Path, cache: Path) -> None:
    folder = Path(shutil.copytree(cache, tmp_path / "more"))
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.safetensors")}
    build_blocks(BlocksOptions(count=6, validation=2, scripts_per_shard=3), folder)
    same = [name for name, at in before.items() if (folder / name).stat().st_mtime_ns == at]
    assert len(same) == len(before) - 1  # the last one had room
    assert (
        hashlib.sha256((folder / same[0]).read_bytes()).digest()
        == hashlib.sha256((cache / same[0]).read_bytes()).digest()
    )


def test_a_sheet_of_a_cache_shows_the_clips_of_one_set(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "sheet.png"
    assert main(["data", "sheet", str(cache), "-o", str(out), "--only", "set=orders", "--columns", "4"]) == 0
    assert out.is_file() and "2 of 2 clips" in capsys.readouterr().out
    assert main(["data", "sheet", str(cache), "-o", str(out), "--only", "set=none"]) == 2
    assert "no clip of" in capsys.readouterr().err
