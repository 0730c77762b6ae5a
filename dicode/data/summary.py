"""What a data set is, as a table: lengths, rates, sizes, captions, what is short, what was read and what not."""

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


def table(clips: Sequence[Clip], found: Iterable[DataSet], bad: int, copies: int | None = None) -> str:
    """Lines of a name and what is known of it."""
    moving = [clip for clip in clips if clip.frames > 1]
    short = sum(clip.seconds < CLIP_S - 0.5 * clip.seconds / clip.frames for clip in moving if not clip.loops)
    lengths = [clip.seconds for clip in moving]
    captioned = [clip for clip in clips if clip.captions]
    rows = [
        ("clips", f"{len(clips):,}"),
        ("seconds", f"{sum(lengths):,.1f}, from {min(lengths):.3g} to {max(lengths):.3g}, median"
         f" {statistics.median(lengths):.3g}" if lengths else "none"),
        ("frames a second", _counted(f"{clip.frames / clip.seconds:.3g}" for clip in moving if clip.seconds > 0)),
        ("sizes", _counted(clip.size for clip in clips if clip.size)),
        ("captions", f"{len(captioned):,} clips with, {len(clips) - len(captioned):,} without;"
         f" {len({text for clip in clips for text in clip.captions}):,} different texts"),
        (f"under {CLIP_S:g} s", f"{short:,}" + (f": shorter than a clip of {CLIP_S:g} s, so they train single frames,"
         " not motion (with --loops they repeat)" if short else "")),
        ("still images", f"{len(clips) - len(moving):,}"),
        ("HDR", f"{sum(clip.hdr for clip in clips):,}" if any(clip.size for clip in clips) else ""),
        ("bad files", f"{bad:,}"),
        ("copies left out", "" if copies is None else f"{copies:,}"),
        *_of_folders(found),
    ]  # fmt: skip
    return "\n".join(f"  {name:<16} {value}" for name, value in rows if value)


def _of_folders(found: Iterable[DataSet]) -> Iterable[tuple[str, str]]:
    lists, unread, left_out = [], [], Counter[str]()
    for each in found:
        lists += each.lists
        unread += each.unread
        left_out += each.left_out
    yield "read", _some(lists) or "files and the texts beside them"
    yield "not read", _some(unread)
    yield "left out", ", ".join(f"{count:,} {what}" for what, count in left_out.items())


def _some(names: Sequence[str]) -> str:
    shown = [*names[:MOST_SHOWN], *([f"and {len(names) - MOST_SHOWN} more"] if len(names) > MOST_SHOWN else [])]
    return ", ".join(shown)


def _counted(values: Iterable[str]) -> str:
    counts = Counter(values).most_common()
    return _some([f"{value} ({count:,})" for value, count in counts])
