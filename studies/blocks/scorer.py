"""What the scorer of `blocks` misses on real validation clips, by attribute and by event.

python studies/blocks/scorer.py cache/blocks results/blocks-scorer.json
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dicode.data.blocks.script import Script
from dicode.data.cache import FrameCache
from dicode.data.columns import VALIDATION
from dicode.features.events.score import score
from dicode.provenance import write_result
from dicode.stopwatch import tracked


def main(argv: Sequence[str]) -> None:
    """Score every validation video of a cache against its own script, and write shares of clauses."""
    cache = FrameCache.load(Path(argv[0]))
    counts, right, missed = Counter[str](), Counter[str](), []
    videos = [*cache.columns.having(VALIDATION)]
    for video in tracked(videos, "scoring", "video"):
        frames = cache.frames[video.first : video.first + video.count - 1].numpy()  # the last one is the next key frame
        for clause in score(frames, Script.parse(video.extra["script"]))["clauses"]:
            event = ("within: " if video.extra["set"] == "within" else "") + clause["event_name"]
            for key, own in (*((key, clause[key]) for key in ("colour", "shape", "event")), (event, clause["all"])):
                counts[key] += 1
                right[key] += bool(own)
            if not clause["all"]:
                missed.append(f"{video.file}: {clause['event_name']}")
    shares = {key: {"value": right[key] / count, "right": right[key], "of": count} for key, count in counts.items()}
    values = {"clauses_right": shares, "missed": missed}
    command = f"python studies/blocks/scorer.py {' '.join(argv)}"
    write_result(Path(argv[1]), "the scorer of blocks on real clips", values, len(videos), 0, command)


if __name__ == "__main__":
    main(sys.argv[1:])
