"""The newcomer's hour: from a folder of clips to videos of prompts, by the commands of docs/train.md alone, each timed.

    python tools/newcomer.py ../shared/data/emoji --clips 600 --minutes 50 --work /tmp/newcomer

writes results/newcomer.json and docs/newcomer.webp. On a processor forced to AVX2 and float32, put before it
ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2. The same command goes on where it was
stopped (times are then of the last start).
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from dicode.device import compute_dtype, pick_device
from dicode.provenance import write_result
from dicode.stopwatch import duration
from dicode.train.chain import spent_minutes
from dicode.train.stages import read_plan
from dicode.video.read import read_video
from dicode.video.sheet import contact_sheet

PROMPTS, HELD = 12, 4  # training captions, and validation captions after them
MOST_BYTES = 26_000


def main() -> None:
    """Run every command and write what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a folder with captions.jsonl")
    parser.add_argument("--clips", type=int, default=600, help="the first of it")
    parser.add_argument("--minutes", type=float, default=50, help="of training")
    parser.add_argument("--work", type=Path, default=Path("/tmp/newcomer"))
    parser.add_argument("-o", "--output", type=Path, default=Path("results/newcomer.json"))
    parser.add_argument("--sheet", type=Path, default=Path("docs/newcomer.webp"))
    asked = parser.parse_args()
    rows = copied(asked.source, asked.work / "clips", asked.clips)
    trained = [row["caption"] for line, row in enumerate(rows) if line % 15]
    held = [row["caption"] for row in rows[::15]]
    prompts = trained[:: max(1, len(trained) // PROMPTS)][:PROMPTS] + held[:: max(1, len(held) // HELD)][:HELD]
    (asked.work / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    seconds, recipe = {}, Path("recipes/small.py")
    for line in (
        "dicode data index clips",
        "dicode data cache clips -o cache --loops",
        "dicode data check cache",
        f"dicode train {recipe} --all --cache cache --minutes {asked.minutes:g} -o model",
        "dicode generate --prompts prompts.txt --seconds 2 --scale 1 --model model -o video.mp4",
    ):
        seconds[line] = timed(line.replace(str(recipe), str(recipe.resolve())), asked.work)
    runs = {folder.name: read_plan(folder) for folder in sorted((asked.work / "runs").iterdir())}
    minutes = {name: spent_minutes(asked.work / "runs" / name) for name in runs}  # of all starts
    best = {name: last_validation(asked.work / "runs" / name) for name in runs}
    values = {"seconds": seconds, "minutes": minutes, "plans": runs, "validation": best}
    device = pick_device("auto")
    values |= {"dtype": str(compute_dtype(device)), "threads": torch.get_num_threads()}
    values["isa"] = {name: os.environ.get(name) for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")}
    write_result(asked.output, "the newcomer's hour", values, len(rows), 0, f"python {shlex.join(sys.argv)}", device)
    videos = [read_video(asked.work / f"video-{number:03d}.mp4", None).frames for number in range(len(prompts))]
    sheet = contact_sheet(videos, prompts, columns=6)
    for quality in range(90, 0, -10):
        sheet.save(asked.sheet, quality=quality)
        if asked.sheet.stat().st_size <= MOST_BYTES:
            break
    print(f"{asked.output}, {asked.sheet}: {duration(60 * sum(minutes.values()))} of training")


def copied(source: Path, folder: Path, count: int) -> list[dict[str, str]]:
    """A folder of links to the first clips of another, with their captions; gives its lines."""
    lines = (source / "captions.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    for row in rows:
        path = folder / row["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.symlink_to((source / row["file"]).resolve())
    (folder / "captions.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return rows


def timed(line: str, folder: Path) -> float:
    """Seconds of a command in a folder; ends with it where it fails."""
    print(f"$ {line}", flush=True)
    began_s = time.monotonic()
    arguments = shlex.split(line)[1:]
    code = subprocess.run([sys.executable, "-m", "dicode", *arguments], cwd=folder, check=False)
    if code.returncode:
        sys.exit(code.returncode)
    spent_s = time.monotonic() - began_s
    print(f"  {duration(spent_s)}", flush=True)
    return spent_s


def last_validation(folder: Path) -> dict[str, float]:
    """The last validation metrics of a run."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return next(line for line in reversed(lines) if line["kind"] == "validation")


if __name__ == "__main__":
    main()
