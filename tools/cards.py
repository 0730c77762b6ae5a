"""Write the metadata of the bundled models' cards, with figures of `results/`; `--check` only compares.

`model-index` is the Hub's list of results (https://github.com/huggingface/hub-docs/blob/main/modelcard.md).
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
Metric = tuple[str, str, float]  # identifier, name, value

COMMON = {"license": "apache-2.0", "library_name": "dicode", "language": "en"}
OWN = {
    "blocks": {"pipeline_tag": "text-to-video", "tags": ["text-to-video", "dicode"]},
    "sprites": {"pipeline_tag": "text-to-video", "tags": ["text-to-video", "dicode", "pixel-art", "emoji"]},
    "world": {
        "pipeline_tag": "text-to-video",
        "tags": ["text-to-video", "image-to-video", "dicode", "robotics", "world-model"],
    },
    "tinyvt": {"pipeline_tag": "feature-extraction", "tags": ["video", "retrieval", "evaluation", "dicode"]},
}
DATA = {"sprites": "spells and emoji", "world": "DROID, RT-1 and BridgeData V2", "blocks": "dicode data blocks"}


def main() -> int:
    """Rewrite the metadata of each card; returns 1 where `--check` finds a stale one."""
    stale = []
    for name, own in OWN.items():
        path = ROOT / "dicode/checkpoints" / name / "README.md"
        _, _, body = path.read_text(encoding="utf-8").split("---\n", 2)
        index = [{"name": name, "results": video_text() if name == "tinyvt" else results(name)}]
        data = yaml.safe_dump({**COMMON, **own, "model-index": index}, sort_keys=False, allow_unicode=True, width=120)
        fresh = f"---\n{data}---\n{body}"
        if fresh != path.read_text(encoding="utf-8"):
            stale.append(path)
            if "--check" not in sys.argv:
                path.write_text(fresh, encoding="utf-8")
    for path in stale:
        print(f"{path}: metadata {'differ from results/' if '--check' in sys.argv else 'rewritten'}")
    return int(bool(stale) and "--check" in sys.argv)


def results(name: str) -> list[dict[str, Any]]:
    """What a video model was measured on: generation, and reconstruction of validation clips."""
    made = clauses() if name == "blocks" else generation(name)
    rebuilt = values_of(f"{name}-reconstruction")
    metrics: list[Metric] = [
        ("fvd-efflite0", "FVD-EffLite0 (not comparable with FVD)", rebuilt["FVD-EffLite0"]["reconstruction"]["value"]),
        ("psnr", "PSNR, dB", rebuilt["psnr"]["reconstruction"]["mean_db"]),
        ("ssim", "SSIM", rebuilt["SSIM"]["reconstruction"]["value"]),
    ]
    split = f"{DATA[name]}, {rebuilt['n']} validation clips"
    return [*made, result("video-to-video", "Reconstruction from deep tokens", name, split, metrics)]


def clauses() -> list[dict[str, Any]]:
    """The share of a prompt's clauses that videos of `blocks` show, one result a set of prompts."""
    found = values_of("blocks-events")["clauses_right"]
    return [
        result(
            "text-to-video",
            "Text to video",
            "blocks",
            f"{DATA['blocks']}, {own['n']} prompts of the set {key.split(':')[0]}",
            [("clauses-right", "clauses right, %", 100 * own["value"])],
        )
        for key, own in found.items()
        if key.endswith(": generated")
    ]


def generation(name: str) -> list[dict[str, Any]]:
    """How videos of `sprites` and `world` follow training and validation captions."""
    found = values_of(f"{name}-generation")
    control, rank, frechet = found["text_control"], found["validation_percentile"], found["FVD-EffLite0"]["generated"]
    trained: list[Metric] = [("text-control", "nearest training clip has the caption, %", 100 * control["share"])]
    held: list[Metric] = [
        ("percentile-rank", "percentile rank of the true clip (chance 50)", rank["mean"]),
        ("fvd-efflite0", "FVD-EffLite0 (not comparable with FVD)", frechet["value"]),
    ]
    return [
        result("text-to-video", "Text to video", name, f"{DATA[name]}, {control['n']} training captions", trained),
        result("text-to-video", "Text to video", name, f"{DATA[name]}, {rank['n']} validation captions", held),
    ]


def video_text() -> list[dict[str, Any]]:
    """How well TinyVT finds the caption of a clip, one result a data set."""
    return [
        result(
            "feature-extraction",
            "Retrieval of captions by clips",
            folder,
            f"{folder}, {row['clips']} validation clips",
            [
                ("percentile-rank", "percentile rank (chance 50)", row["caption of a clip"]["percentile"]),
                ("recall@5", "recall@5, %", 100 * row["caption of a clip"]["recall"]["5"]),
            ],
        )
        for folder, row in values_of("video-text")["folders"].items()
    ]


def result(task: str, task_name: str, data: str, data_name: str, metrics: list[Metric]) -> dict[str, Any]:
    """One entry of `model-index`; values with three digits."""
    return {
        "task": {"type": task, "name": task_name},
        "dataset": {"type": data, "name": data_name},
        "metrics": [{"type": kind, "name": name, "value": float(f"{value:.3g}")} for kind, name, value in metrics],
    }


def values_of(name: str) -> dict[str, Any]:
    """The figures of a result file."""
    return json.loads((ROOT / f"results/{name}.json").read_text(encoding="utf-8"))["values"]


if __name__ == "__main__":
    sys.exit(main())
