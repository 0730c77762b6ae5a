"""Prompts that change over time: a storyboard is a list of shots, each a prompt and how many seconds it lasts."""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from dicode.config import shortened
from dicode.files import TextError, read_text

EXAMPLE = "[4s: a spark] [4s: it grows into a fireball]"
FILE_EXAMPLE = "- {seconds: 4, prompt: a spark}"
MOST_SECONDS = 86_400  # a day
MOST_BYTES = 2**20  # of a file
TOLERANCE = 1e-6  # in clips: 0.3 s are three clips of 0.1 s, though not in binary
_NUMBER = r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|inf(?:inity)?|nan)"
# What is taken for an attempt at a storyboard. "[3 cats] play" and "[loud] a bell" are prompts.
_OPENING = re.compile(rf"\s*\[\s*(?:{_NUMBER}|\d+,\d+)\s*(?::|(?:s|ms|secs?|seconds?|min|minutes?)\b)", re.IGNORECASE)
_SHOT = re.compile(rf"\s*(?P<seconds>{_NUMBER})\s*s\s*:(?P<prompt>.*)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Shot:
    """What is to be seen, and for how long. Raises ValueError for an empty prompt or a time that is none."""

    prompt: str
    seconds: float

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= MOST_SECONDS:
            raise ValueError(f"expected a positive number of seconds, got {self.seconds:g} (at most {MOST_SECONDS:,})")
        if not self.prompt.strip():
            raise ValueError("expected a prompt, got none")


def parse_storyboard(text: str) -> list[Shot] | None:
    """Read '[4s: a spark] [4s: it grows into a fireball]'; None for a text that is no storyboard but a prompt.

    A storyboard begins with a bracket and a duration. A prompt in it may hold any character but brackets. Raises
    ValueError, with the place, for a text that begins so and does not go on so.
    """
    if not _OPENING.match(text):
        return None
    shots: list[Shot] = []
    start = 0
    while rest := text[start:].lstrip():
        start = len(text) - len(rest)
        shot, length = _first_shot(rest, f"storyboard, shot {len(shots) + 1}, character {start + 1}")
        shots.append(shot)
        start += length
    return shots


def read_storyboard(path: Path) -> list[Shot]:
    """Read a YAML file: a list of '{seconds: 4, prompt: a spark}', or a mapping with such a list under 'shots'.

    Raises ValueError that names file, shot and key, and OSError where there is no such file.
    """
    try:
        content = yaml.load(read_text(path, MOST_BYTES), _Loader)
    except TextError as error:
        raise ValueError(f"{path}: expected YAML in utf-8, such as '{FILE_EXAMPLE}' ({error})") from error
    except RecursionError as error:
        raise ValueError(f"{path}: expected YAML such as '{FILE_EXAMPLE}', got lists in lists without end") from error
    except (yaml.YAMLError, ValueError) as error:  # the latter of dates and numbers that are none
        raise ValueError(f"{path}: expected YAML such as '{FILE_EXAMPLE}' ({error})") from error
    if isinstance(content, dict):
        _check_keys(content, ["shots"], str(path))
        content = content["shots"]
    if not isinstance(content, list) or not content:
        found = "nothing" if content is None or content == [] else shortened(content)
        raise ValueError(f"{path}: expected a list of shots such as '{FILE_EXAMPLE}', got {found}")
    return [_shot_of(values, f"{path}: shot {number}") for number, values in enumerate(content, start=1)]


def key_frames_of(shots: Sequence[Shot], clip_s: float) -> list[int]:
    """How many key frames each shot adds when they lie `clip_s` seconds apart.

    The first shot of s seconds has key frames 0 … s/clip_s, so one more than clips; every later one goes on from there.
    A prompt can change at a key frame only: every shot but the last is a whole number of clips long, else ValueError.
    The last one is rounded up.
    """
    if not shots:
        raise ValueError("expected at least one shot, got none")
    counts = []
    for number, shot in enumerate(shots, start=1):
        clips = max(1, math.ceil(shot.seconds / clip_s - TOLERANCE))
        if number < len(shots) and abs(shot.seconds / clip_s - clips) > TOLERANCE:
            allowed = " or ".join(f"{count * clip_s:g} s" for count in (clips - 1, clips) if count)
            raise ValueError(
                f"shot {number} ({shot.prompt!r}): expected a multiple of {clip_s:g} s, since prompts change at key"
                f" frames, got {shot.seconds:g} s; make it {allowed}"
            )
        counts.append(clips)
    return [counts[0] + 1, *counts[1:]]


def _first_shot(text: str, where: str) -> tuple[Shot, int]:
    """The shot that `text` begins with, and how many characters it takes."""
    excerpt = repr(text if len(text) <= 30 else f"{text[:29]}…")
    if not text.startswith("["):
        raise ValueError(f"{where}: expected '[' and a duration, got {excerpt}; write {EXAMPLE!r}")
    end = re.search(r"[\[\]]", text[1:])
    if end is None or end[0] == "[":
        raise ValueError(f"{where}: the bracket is not closed, or holds another: {excerpt}; write {EXAMPLE!r}")
    match = _SHOT.fullmatch(text[1 : end.start() + 1])
    if match is None:
        raise ValueError(f"{where}: expected a duration and a colon, such as '4s:', got {excerpt}; write {EXAMPLE!r}")
    try:
        return Shot(match["prompt"].strip(), float(match["seconds"])), end.end() + 1
    except ValueError as error:
        raise ValueError(f"{where}: {error} in {excerpt}; write {EXAMPLE!r}") from error


def _shot_of(values: Any, where: str) -> Shot:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a mapping such as '{FILE_EXAMPLE[2:]}', got {shortened(values)}")
    _check_keys(values, [field.name for field in fields(Shot)], where)
    seconds, prompt = values["seconds"], values["prompt"]
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise ValueError(f"{where}, seconds: expected a number such as 4 or 2.5, got {shortened(seconds)}")
    if not isinstance(prompt, str):
        raise ValueError(f"{where}, prompt: expected a text, got {shortened(prompt)}; put it in quotes")
    try:
        return Shot(prompt.strip(), float(seconds))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from error


def _check_keys(values: dict[Any, Any], known: list[str], where: str) -> None:
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            meant = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"{where}: unknown key {shortened(key)}{meant}; expected {' and '.join(known)}")
    for key in known:
        if key not in values:
            raise ValueError(f"{where}: no {key!r}; expected for example '{FILE_EXAMPLE}'")


class _Loader(yaml.SafeLoader):
    """`yaml.safe_load`, but a key given twice, which means that a shot lacks its dash, is an error."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # nine of them can stand for gigabytes
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(problem="a storyboard repeats nothing by name (*)", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if key.value in keys[:index]:
                said = f"{key.value!r} is given twice; every shot begins with '- '"
                raise yaml.constructor.ConstructorError(problem=said, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)
