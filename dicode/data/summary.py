"""A data set as a table: lengths, rates, sizes, captions, what is short, what was read and what not."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dicode.data.folders import DataSet

CLIP_S = 2.0  # of the bundled models: 16 frames at 8 a second
MOST_SHOWN = 5  # of different values


@dataclass(frozen=True)
class Clip:
    """A clip as it was found; `size` and `hdr` are of its file, and not known of a cache."""

    frames: int
    seconds: float
    captions: tuple[str, ...]
    size: str = ""
    hdr: bool = False
    loops: bool = False


def table(clips: Sequence[Clip], found: Sequence[DataSet], bad: int, copies: int | None = None) -> str:
    """A line for each property: its name and values."""
    moving = [clip for clip in clips if clip.frames > 1]
    short = sum(clip.seconds < CLIP_S - 0.5 * clip.seconds / clip.frames for clip in moving if not clip.loops)
    lengths = [clip.seconds for clip in moving]
    captioned = sum(bool(clip.captions) for clip in clips)
    left_out = sum((each.left_out for each in found), Counter())
    lists, unread = ([name for each in found for name in getattr(each, kind)] for kind in ("lists", "unread"))
    rows = [
        ("clips", f"{len(clips):,}"),
        ("seconds", f"{sum(lengths):,.1f}, from {min(lengths):.3g} to {max(lengths):.3g}, median"
         f" {statistics.median(lengths):.3g}" if lengths else "none"),
        ("frames a second", _counted(f"{clip.frames / clip.seconds:.3g}" for clip in moving if clip.seconds > 0)),
        ("sizes", _counted(clip.size for clip in clips if clip.size)),
        ("captions", f"{captioned:,} clips with, {len(clips) - captioned:,} without;"
         f" {len({text for clip in clips for text in clip.captions}):,} different texts"),
        (f"under {CLIP_S:g} s", f"{short:,}" + (f": shorter than a clip of {CLIP_S:g} s, so they train single frames,"
         " not motion (with --loops they repeat)" if short else "")),
        ("still images", f"{len(clips) - len(moving):,}"),
        ("HDR", f"{sum(clip.hdr for clip in clips):,}" if any(clip.size for clip in clips) else ""),
        ("bad files", f"{bad:,}"),
        ("copies left out", "" if copies is None else f"{copies:,}"),
        ("read", shortened_list(lists) or "files and the texts beside them"),
        ("not read", shortened_list(unread)),
        ("left out", ", ".join(f"{count:,} {kind}" for kind, count in left_out.items())),
    ]  # fmt: skip
    return "\n".join(f"  {name:<16} {value}" for name, value in rows if value)


def shortened_list(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = [f"and {len(names) - MOST_SHOWN} more"] if len(names) > MOST_SHOWN else []
    return ", ".join([*names[:MOST_SHOWN], *more])


def _counted(values: Iterable[str]) -> str:
    return shortened_list([f"{value} ({count:,})" for value, count in Counter(values).most_common()])
