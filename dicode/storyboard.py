"""Prompts that change over time: a storyboard is a list of shots, each a prompt and its length in seconds."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import yaml

from dicode.config import Range, Unicode, check_ranges, config_from_dict, shortened
from dicode.files import read_text

EXAMPLE = "[4s: a spark] [4s: it grows into a fireball]"
FILE_EXAMPLE = "- {seconds: 4, prompt: a spark}"
MAX_BYTES = 2**20  # of a file
NO_VALUE = (ValueError, KeyError, AttributeError, IndexError, TypeError)  # of PyYAML for a date or number that is none
TOLERANCE = 1e-6  # in clips: 0.3 s are three clips of 0.1 s, though not in binary
_NUMBER = r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|inf(?:inity)?|nan)"
# An attempt at a storyboard; "[3 cats] play" and "[loud] a bell" are prompts
_OPENING = re.compile(rf"\s*\[\s*(?:{_NUMBER}|\d+,\d+)\s*(?::|(?:s|ms|secs?|seconds?|min|minutes?)\b)", re.IGNORECASE)
_SHOT = re.compile(rf"\[\s*(?P<seconds>{_NUMBER})\s*s\s*:(?P<prompt>[^\[\]]*)\]", re.IGNORECASE)


@dataclass(frozen=True)
class Shot:
    """A prompt and its length. Raises `ValueError` for an empty prompt, and for seconds that are not 0 … a day."""

    prompt: Annotated[str, Unicode]
    seconds: Annotated[float, Range(0, 86_400, above=True)]

    def __post_init__(self) -> None:
        check_ranges(self)
        if "\0" in self.prompt:
            raise ValueError("prompt: holds a NUL character")
        if not self.prompt.strip():
            raise ValueError("prompt: expected a text of at least one word, got none")


def parse_storyboard(text: str) -> list[Shot] | None:
    """Read '[4s: a spark] [4s: it grows into a fireball]'; None for a plain prompt.

    A storyboard begins with a bracket and a duration; its prompts may hold any character but brackets. Raises
    `ValueError`, with the place, where a text begins like one and is none.
    """
    if not _OPENING.match(text):
        return None
    shots: list[Shot] = []
    start = 0
    while rest := text[start:].lstrip():
        start = len(text) - len(rest)
        match = _SHOT.match(rest)
        try:
            if match is None:
                raise ValueError("expected a duration, a colon and a prompt in brackets")
            shots.append(Shot(match["prompt"].strip(), float(match["seconds"])))
        except ValueError as error:
            excerpt = repr(rest if len(rest) <= 30 else f"{rest[:29]}…")
            where = f"storyboard, shot {len(shots) + 1}, character {start + 1}"
            raise ValueError(f"{where}: {error}: {excerpt}; write {EXAMPLE!r}") from error
        start += match.end()
    return shots


def read_storyboard(path: Path) -> list[Shot]:
    """Read a YAML file: a list of '{seconds: 4, prompt: a spark}', or a mapping with such a list under 'shots'.

    Raises `ValueError` that names file, shot and key, and `OSError` where there is no such file.
    """
    try:
        content = yaml.load(read_text(path, MAX_BYTES), _Loader)
    except RecursionError as error:
        raise ValueError(f"{path}: expected YAML such as '{FILE_EXAMPLE}', got lists nested too deeply") from error
    except (yaml.YAMLError, *NO_VALUE) as error:
        raise ValueError(f"{path}: expected YAML such as '{FILE_EXAMPLE}' ({error})") from error
    if isinstance(content, dict) and list(content) == ["shots"]:
        content = content["shots"]
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path}: expected a list of shots such as '{FILE_EXAMPLE}', got {shortened(content)}")
    shots = [config_from_dict(Shot, values, f"{path}: shot {number}") for number, values in enumerate(content, start=1)]
    return [replace(shot, prompt=shot.prompt.strip()) for shot in shots]


def key_frames_of(shots: Sequence[Shot], clip_s: float) -> list[int]:
    """How many key frames each shot adds when they lie `clip_s` seconds apart.

    The first shot of s seconds has key frames 0 … s/clip_s, so one more than clips. Prompts change at key frames:
    raises `ValueError` for a shot but the last that is no whole number of clips. The last one is rounded up.
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


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` without aliases, and with an error for a key given twice: a shot without its dash."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # nine of them can stand for gigabytes
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(problem="a storyboard has no aliases (*)", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if key.value in keys[:index]:
                problem = f"{key.value!r} is given twice; every shot begins with '- '"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)
