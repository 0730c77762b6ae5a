"""Storyboards: what is one is read exactly, what is none is left alone, and what is wrong is shown."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from dicode.storyboard import EXAMPLE, FILE_EXAMPLE, Shot, key_frames_of, parse_storyboard, read_storyboard


@pytest.mark.parametrize(
    ("text", "shots"),
    [
        (EXAMPLE, [("a spark", 4.0), ("it grows into a fireball", 4.0)]),
        ("[4 s: a spark]", [("a spark", 4.0)]),
        (" [2.5s:a spark]\n[ .5 s :  and gone ]\n", [("a spark", 2.5), ("and gone", 0.5)]),
        ('[1e1s: 3s: "ein Wirbel" — ❄ {a}, (b); 10:30]', [('3s: "ein Wirbel" — ❄ {a}, (b); 10:30', 10.0)]),
        ("[2S: one][2s: two\nlines]", [("one", 2.0), ("two\nlines", 2.0)]),
    ],
)
def test_a_storyboard_in_a_line_is_read(text, shots):
    assert parse_storyboard(text) == [Shot(prompt, seconds) for prompt, seconds in shots]


@pytest.mark.parametrize(
    "text",
    ["", "a spark", "4s: a spark", "a spark [4s: grows]", "[a spark] grows", "[3 cats] play", "[4 spirits: a tale]"],
)
def test_a_prompt_is_no_storyboard(text):
    assert parse_storyboard(text) is None


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("[4s: a spark] [grows]", "shot 2, character 15", r"expected a duration, a colon.*: '\[grows\]'"),
        ("[4: a spark]", "shot 1, character 1", "expected a duration, a colon"),
        ("[4s a spark]", "shot 1, character 1", "expected a duration, a colon"),
        ("[4 seconds: a spark]", "shot 1, character 1", "expected a duration, a colon"),
        ("[4,5s: a spark]", "shot 1, character 1", "expected a duration, a colon"),
        ("[500ms: a spark]", "shot 1, character 1", "expected a duration, a colon"),
        ("[4s: ]", "shot 1, character 1", "expected a text of at least one word, got none"),
        ("[4s:a] and then [4s:b]", "shot 2, character 8", r"expected a duration, a colon.*: 'and then \[4s:b\]'"),
        ("[4s:a], [4s:b]", "shot 2, character 7", r"expected a duration, a colon.*: ', \[4s:b\]'"),
        ("[4s:a]]", "shot 2, character 7", r"expected a duration, a colon.*: '\]'"),
        ("[0s: a]", "shot 1, character 1", "seconds: expected a positive number, got 0"),
        ("[4s: a] [-4s: b]", "shot 2, character 9", "seconds: expected a positive number, got -4"),
        ("[infs: a]", "shot 1, character 1", "seconds: expected a positive number, got inf"),
        ("[nan s: a]", "shot 1, character 1", "seconds: expected a positive number, got nan"),
        ("[1e999s: a]", "shot 1, character 1", "seconds: expected a positive number, got inf"),
        ("[4s: a spark", "shot 1, character 1", "expected a duration, a colon"),
        ("[4s: a [red] spark]", "shot 1, character 1", "expected a duration, a colon"),
        ("[4s: a] [4s: " + "b" * 90, "shot 2, character 9", r"expected a duration, a colon.*'\[4s: b{24}…'"),
    ],
)
def test_a_malformed_storyboard_is_shown_its_place_and_a_right_example(text, place, said):
    with pytest.raises(ValueError, match=f"^storyboard, {place}: .*{said}") as raised:
        parse_storyboard(text)
    assert str(raised.value).endswith(f"write {EXAMPLE!r}")
    assert parse_storyboard(EXAMPLE)


@pytest.mark.parametrize(
    "text",
    [
        "- {seconds: 4, prompt: a spark}\n- seconds: 2.5\n  prompt: 'it [grows]: fast'\n",
        "# a film\nshots:\n  - {prompt: a spark, seconds: 4}\n  - {prompt: ' it [grows]: fast ', seconds: 2.5}\n",
    ],
)
def test_a_storyboard_file_is_read(tmp_path, text):
    (tmp_path / "film.yaml").write_text(text)
    assert read_storyboard(tmp_path / "film.yaml") == [Shot("a spark", 4.0), Shot("it [grows]: fast", 2.5)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a list of shots.*got None"),
        ("[]", r"expected a list of shots.*got \[\]"),
        ("shots:\n", "expected a list of shots.*got None"),
        ("a spark", "expected a list of shots.*got 'a spark'"),
        ("shots: {seconds: 4, prompt: a}", "expected a list of shots.*got {'prompt'"),
        ("{shot: []}", r"expected a list of shots.*got {'shot': \[\]}"),
        ("{}", "expected a list of shots.*got {}"),
        ("{shots: [], shots: []}", "expected YAML.*'shots' is given twice"),
        ("- a spark", "shot 1: expected a section of Shot, got 'a spark'"),
        (FILE_EXAMPLE + "\n- {seconds: 4, promt: a}", r"shot 2: unknown key 'promt' \(did you mean 'prompt'\?\)"),
        ("- {seconds: 4, prompt: a, 7: b}", "shot 1: unknown key 7"),
        ("{<<: {shots: 3}}", "expected a list of shots.*got 3"),
        ("- {[a]: 4}", "expected YAML.*unhashable"),
        ("- {seconds: 4}", "shot 1: missing key 'prompt'"),
        ("- {prompt: a}", "shot 1: missing key 'seconds'"),
        ("- {seconds: 4s, prompt: a}", "shot 1.seconds: expected float, got '4s'"),
        ("- {seconds: yes, prompt: a}", "shot 1.seconds: expected float, got True"),
        ("- {seconds: 4, prompt: 7}", "shot 1.prompt: expected str, got 7"),
        ("- {seconds: 4, prompt: ' '}", "shot 1: prompt: expected a text of at least one word, got none"),
        ("- {seconds: -1, prompt: a}", "shot 1.seconds: expected a positive number, got -1"),
        ("- {seconds: .nan, prompt: a}", "shot 1.seconds: expected a finite number, got nan"),
        (
            "- seconds: 4\n  prompt: a\n  seconds: 2\n  prompt: b",
            "expected YAML.*'seconds' is given twice.*line 3",
        ),
        ("- {seconds: 4, prompt: a", "expected YAML.*line 1"),
        ("- !!python/object/apply:os.system ['true']", "expected YAML"),
        ("prompt: \xff", "expected YAML.*UTF-8"),
    ],
)
def test_a_wrong_file_is_told_by_name_shot_and_key(tmp_path, text, said):
    path = tmp_path / "film.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"(?s)film\.yaml: {said}"):
        read_storyboard(path)


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"film\.yaml"):
        read_storyboard(tmp_path / "film.yaml")


@pytest.mark.parametrize(
    ("durations_s", "clip_s", "key_frames"),
    [
        ([4], 2.0, [3]),
        ([4, 2, 6], 2.0, [3, 1, 3]),
        ([4, 5], 2.0, [3, 3]),
        ([0.5], 2.0, [2]),
        ([0.3, 0.7, 0.1], 0.1, [4, 7, 1]),
        ([4 + 1e-9, 4 - 1e-9, 4 + 1e-9], 2.0, [3, 2, 2]),
    ],
)
def test_shots_add_a_key_frame_a_clip_and_the_first_one_more(durations_s, clip_s, key_frames):
    counted = key_frames_of([Shot("a", float(seconds)) for seconds in durations_s], clip_s)
    assert counted == key_frames
    assert sum(counted) == math.ceil(sum(durations_s) / clip_s - 1e-6) + 1


@pytest.mark.parametrize(
    ("durations_s", "said"),
    [
        ([4, 5, 4], r"shot 2 \('b'\): expected a multiple of 2 s.*got 5 s; make it 4 s or 6 s"),
        ([0.5, 4], r"shot 1 \('a'\): .*got 0.5 s; make it 2 s$"),
        ([2.001, 4], "got 2.001 s; make it 2 s or 4 s"),
        ([1e-9, 4], "got 1e-09 s; make it 2 s$"),
        ([], "expected at least one shot"),
    ],
)
def test_a_prompt_that_would_change_between_key_frames_is_refused(durations_s, said):
    shots = [
        Shot(prompt, float(seconds)) for prompt, seconds in zip("abc"[: len(durations_s)], durations_s, strict=True)
    ]
    with pytest.raises(ValueError, match=said):
        key_frames_of(shots, 2.0)


def test_a_storyboard_is_read_without_torch():
    program = "import dicode.storyboard, sys; assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 20_000, "expected YAML .*nested too deeply"),
        ("a: &a [x]\nb: *a", "has no aliases"),
        ("- {seconds: 1.0e+308, prompt: x}", "at most 86,400"),
        ("- {seconds: " + "9" * 5000 + ", prompt: x}", "expected YAML"),
        ("- {seconds: 2024-99-99, prompt: x}", "expected YAML"),
        ("- " + "x" * 10**6, "section of Shot|at most"),
        ("- {seconds: 2, prompt: !!bool x}", "expected YAML"),
        ("- {seconds: 2, prompt: !!timestamp x}", "expected YAML"),
        ('- {seconds: !!int "", prompt: x}', "expected YAML"),
        ('- {seconds: 2, prompt: "\\ud800"}', "shot 1.*expected text in UTF-8"),
        ('- {seconds: 2, prompt: "a\\0b"}', "shot 1.*NUL"),
    ],
)
def test_a_storyboard_that_grows_or_never_ends_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "board.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_storyboard(tmp_path / "board.yaml")
    assert len(str(caught.value)) < 1000
