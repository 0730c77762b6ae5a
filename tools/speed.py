"""Seconds that videos take: one of four seconds, one of a minute, 64 at once, in float32 and bfloat16.

python tools/speed.py world cuda results/world-speed-h200.json
"""

import sys
import time

import numpy as np
import torch

from dicode import DiCoDe
from dicode.evaluate.scores import repeats_score
from dicode.provenance import write_result

REPEATS = 5


def main() -> None:
    """Write the medians, with bootstrap intervals over repeats; the first video of each kind warms up."""
    name, device, out = sys.argv[1:]
    values = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = DiCoDe.from_pretrained(name, device=device, dtype=dtype)
        for seconds, count in ((4.0, 1), (60.0, 1), (4.0, 64)):
            took, frames = [], 0
            for repeat in range(REPEATS + 1):
                began = time.perf_counter()
                clips = model.generate_batch(["pick up the cup"] * count, seconds=seconds, seed=repeat)
                frames = sum(clip.shape[1] for clip in clips)
                took.append(time.perf_counter() - began)
            values[f"{count} × {seconds:g} s, {dtype}".replace("torch.", "")] = {
                "median_s": repeats_score(np.median, np.array(took[1:])),
                "frames": frames,
            }
    write_result(out, f"{name}: speed", values, REPEATS, 0, "python tools/speed.py " + " ".join(sys.argv[1:]), device)


if __name__ == "__main__":
    main()
