"""How much clips move that continue a video, against the clips of one run: motion is the mean step of pixel levels.

    python tools/continue.py MODEL CAPTIONS.jsonl

Writes results/continue.json: five captions, 8 s of each in one run (seed 3), and the same from its first 2 s by three
continuations of 2 s (seeds 11 to 13), each of the 2 s before it, then one continuation of the run's first 6 s.
"""

import json
import sys
from pathlib import Path

import numpy as np

from dicode.features.metrics import frame_steps
from dicode.pipeline import DiCoDe
from dicode.provenance import write_result
from dicode.video.timed import Video

LINES = (1, 101, 301, 601, 901)


def motion(clip: Video) -> float:
    """Mean step from frame to frame, in levels of 0…255."""
    return float(frame_steps(clip).mean())


def main() -> None:
    """A line a caption while it runs; then the means, and the ratios to the first clip of each run."""
    name, captions = sys.argv[1:]
    model, lines = DiCoDe.from_pretrained(name), Path(captions).read_text(encoding="utf-8").splitlines()
    values: dict[str, list[list[float]]] = {"run": [], "continued": [], "after 6 s": []}
    for line in LINES:
        caption = json.loads(lines[line])["caption"]
        run = np.concatenate(list(model.generate(caption, seconds=8, seed=3)))
        length = len(run) // 4
        values["run"].append([motion(run[i * length : (i + 1) * length]) for i in range(4)])
        video, moved = run[:length], [values["run"][-1][0]]
        for seed in (11, 12, 13):
            given = model.given(continued=video)
            video = np.concatenate(list(model.generate(caption, seconds=2, seed=seed, given=given)))
            moved.append(motion(video))
        values["continued"].append(moved)
        given = model.given(continued=run[: 3 * length])
        after = np.concatenate(list(model.generate(caption, seconds=2, seed=11, given=given)))
        values["after 6 s"].append([values["run"][-1][2], motion(after)])
        print(caption[:40], {kind: np.round(rows[-1], 1).tolist() for kind, rows in values.items()}, flush=True)
    run_means, continued, after_6 = (np.mean(rows, 0) for rows in values.values())
    figures = {
        "captions": [json.loads(lines[line])["caption"] for line in LINES],
        "motion of clips 1-4": {"one run": run_means.tolist(), "continued": continued.tolist()},
        "clips 2-4 over clip 1": {
            "one run": run_means[1:].mean() / run_means[0],
            "continued": continued[1:].mean() / continued[0],
        },
        "clip 3 of the run, clip after 6 s of it": after_6.tolist(),
    }
    print(json.dumps(figures["clips 2-4 over clip 1"]))
    write_result(
        "results/continue.json",
        "motion of continued videos",
        figures,
        len(LINES),
        3,
        f"python tools/continue.py {name} {captions}",
    )


if __name__ == "__main__":
    main()
