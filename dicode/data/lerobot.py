"""Folders of LeRobot, versions 2 and 3: an episode is a clip of each camera, its task the caption."""

import re
from dataclasses import replace
from typing import Any

from dicode.data.lists import json_object, read_parquet, rows, whole_number
from dicode.data.records import ClipRecord
from dicode.files import Place, TextError, read_text
from dicode.video.read import VideoReadError

INFO = "meta/info.json"


def is_lerobot(folder: Place) -> bool:
    """Whether a folder is one of LeRobot's."""
    return (folder / INFO).is_file() and "codebase_version" in read_text(folder / INFO)


def read_lerobot(folder: Place, root: Place) -> list[ClipRecord]:
    """Every episode of a folder in the data set `root`, as each of its cameras shows it.

    Raises `VideoReadError` for what is missing.
    """
    where = str(folder / INFO)
    try:
        info = json_object(read_text(folder / INFO), where)
    except (TextError, OSError) as error:
        raise VideoReadError(str(error)) from error
    features, template = info.get("features"), info.get("video_path")
    features = features if isinstance(features, dict) else {}
    kinds = {name: f.get("dtype") for name, f in features.items() if isinstance(f, dict)}
    cameras = [name for name, kind in kinds.items() if kind == "video" and not _is_depth(features[name])]
    if not cameras or not isinstance(template, str):
        images = [name for name, kind in kinds.items() if kind == "image"]
        raise VideoReadError(
            f"{where}: expected features of dtype video and a video_path, got"
            + (f" images inside of data/*.parquet ({', '.join(images)}): convert them to videos" if images else " none")
        )
    version = str(info["codebase_version"])
    major = int(match[1]) if (match := re.match(r"v?(\d+)", version)) else 0
    if major not in (2, 3):
        raise VideoReadError(f"{where}: expected codebase_version v2 or v3, got {version!r}; convert it with lerobot")
    if major == 2:
        episodes = [(at, row) for at, row in rows(folder / "meta/episodes.jsonl")]
    else:
        columns = ["episode_index", "tasks"]
        columns += [
            f"videos/{c}/{n}" for c in cameras for n in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
        ]
        files: list[Place] = sorted((folder / "meta/episodes").rglob("*.parquet"), key=str)
        episodes = [(f"{file}, row {i}", row) for file in files for i, row in enumerate(read_parquet(file, columns))]
    size = whole_number(info.get("chunks_size", 1000), f"{where}: chunks_size") or 1000
    clips = [_clip(folder, template, size, camera, *episode, major) for episode in episodes for camera in cameras]
    return [replace(clip, folder=root) for clip in clips]


def _clip(
    folder: Place, template: str, size: int, camera: str, where: str, row: dict[str, Any], major: int
) -> ClipRecord:
    number = whole_number(row.get("episode_index"), f"{where}: episode_index")
    values: dict[str, str | int] = {"video_key": camera, "episode_index": number, "episode_chunk": number // size}
    start_s, end_s = 0.0, None
    if major == 3:
        own = {key.removeprefix(f"videos/{camera}/"): value for key, value in row.items()}
        for key in ("chunk_index", "file_index"):
            values[key] = whole_number(own.get(key), f"{where}: {key} of {camera}")
        try:
            start_s, end_s = float(own["from_timestamp"]), float(own["to_timestamp"])
        except (KeyError, TypeError, ValueError) as error:
            raise VideoReadError(
                f"{where}: expected from_timestamp and to_timestamp of {camera} ({error!r})"
            ) from error
        if not 0 <= start_s < end_s < float("inf"):
            raise VideoReadError(f"{where}: expected a span of {camera}, got {start_s:g} to {end_s:g} s")
    tasks = row.get("tasks") or []
    texts = [" ".join(text.split()) for text in ([tasks] if isinstance(tasks, str) else tasks) if isinstance(text, str)]
    return ClipRecord(
        folder / _filled(template, values, where),
        tuple(dict.fromkeys(text for text in texts if text)),
        folder,
        start_s,
        end_s,
        extra={"episode_index": number, "camera": camera},
        episode=f"{folder}, episode {number}",
    )


def _is_depth(feature: dict[str, Any]) -> bool:
    facts = feature.get("info") or feature.get("video_info") or {}
    return isinstance(facts, dict) and facts.get("video.is_depth_map") is True


def _filled(template: str, values: dict[str, str | int], where: str) -> str:
    """`str.format` for names and widths alone."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise VideoReadError(f"{where}: video_path {template!r} asks for {match[1]!r}, which there is not")
        return str(values[match[1]]).rjust(int(match[2] or 0), "0")

    return re.sub(r"\{(\w+)(?::0(\d)d)?\}", value, template)
