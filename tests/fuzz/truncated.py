"""`python -m tests.fuzz.truncated -o results/video-truncated.json`: files that are taken though their end is missing.

Every animated kind of `videos.py`, cut at 50, 60, 70 and 80 % of its bytes, read by the `dicode` that is imported.
"""

import argparse
import tempfile
from pathlib import Path

from tests.fuzz import videos

SHARES = (50, 60, 70, 80)


def main() -> None:
    """Count, and write which."""
    from dicode.provenance import write_result
    from dicode.video.read import VideoReadError, native_frames

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.truncated", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args()
    taken: dict[str, str] = {}
    kinds = [kind for kind in videos.KINDS if not kind.startswith("still")]
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            whole = videos.source(kind)
            for share in SHARES:
                path = Path(folder) / kind
                path.write_bytes(whole.data[: len(whole.data) * share // 100])
                try:
                    taken[f"{kind} {share} %"] = f"{len(native_frames(path)[0])} of {len(whole.frames)} frames"
                except VideoReadError:
                    continue
    n = len(kinds) * len(SHARES)
    short = sum(text.split()[0] != text.split()[2] for text in taken.values())
    values = {"taken": len(taken), "taken_short": short, "which": taken}
    command = f"python -m tests.fuzz.truncated -o {asked.output}"
    write_result(asked.output, "videos cut off: accepted all the same", values, n, 0, command)
    print(f"{len(taken)} of {n} taken, {short} with fewer frames than the whole file")


if __name__ == "__main__":
    main()
