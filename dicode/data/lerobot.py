"""Folders of LeRobot, versions 2 and 3: an episode is a clip of each camera, its task the caption."""

import re
from typing import Any

from dicode.data.lists import Row, json_object, read_parquet, rows, whole_number
from dicode.data.records import ClipRecord
from dicode.files import Place, TextError, read_text
from dicode.video.read import VideoReadError

INFO = "meta/info.json"
PLACE_KEYS, TIME_KEYS = ("chunk_index", "file_index"), ("from_timestamp", "to_timestamp")


def is_lerobot(folder: Place) -> bool:
    """Whether a folder is one of LeRobot's."""
    return (folder / INFO).is_file() and "codebase_version" in read_text(folder / INFO)


def read_lerobot(folder: Place, root: Place) -> list[ClipRecord]:
    """Every episode of a folder in the data set `root`, by each of its cameras.

    Raises `VideoReadError` for what is missing.
    """
    info_path = str(folder / INFO)
    try:
        info = json_object(read_text(folder / INFO), info_path)
    except (TextError, OSError) as error:
        raise VideoReadError(str(error)) from error
    cameras = _cameras(info, info_path)
    version = str(info["codebase_version"])
    major = re.match(r"v?([23])(?!\d)", version)
    if not major:
        raise VideoReadError(
            f"{info_path}: expected codebase_version v2 or v3, got {version!r}; convert it with lerobot"
        )
    chunk_size = whole_number(info.get("chunks_size", 1000), f"{info_path}: chunks_size") or 1000
    clips = []
    for where, row in _episodes(folder, major[1], cameras):
        number = whole_number(row.get("episode_index"), f"{where}: episode_index")
        tasks = row.get("tasks") or []
        texts = [text for text in ([tasks] if isinstance(tasks, str) else tasks) if isinstance(text, str)]
        captions = dict.fromkeys(stripped for text in texts if (stripped := " ".join(text.split())))
        for camera in cameras:
            values = {"video_key": camera, "episode_index": number, "episode_chunk": number // chunk_size}
            places, start_s, end_s = _span(row, camera, where) if major[1] == "3" else ({}, 0.0, None)
            path = folder / _filled(info["video_path"], values | places, where)
            extra = {"episode_index": number, "camera": camera}
            episode = f"{folder}, episode {number}"
            clips.append(ClipRecord(path, tuple(captions), root, start_s, end_s, extra=extra, episode=episode))
    return clips


def _cameras(info: dict[str, Any], where: str) -> list[str]:
    held = info.get("features")
    features = {k: v for k, v in held.items() if isinstance(v, dict)} if isinstance(held, dict) else {}
    cameras = [name for name, feature in features.items() if feature.get("dtype") == "video" and not _is_depth(feature)]
    if not cameras or not isinstance(info.get("video_path"), str):
        images = ", ".join(name for name, feature in features.items() if feature.get("dtype") == "image")
        found = f"images inside of data/*.parquet ({images}): convert them to videos" if images else "none"
        raise VideoReadError(f"{where}: expected features of dtype video and a video_path, got {found}")
    return cameras


def _is_depth(feature: dict[str, Any]) -> bool:
    facts = feature.get("info") or feature.get("video_info") or {}
    return isinstance(facts, dict) and facts.get("video.is_depth_map") is True


def _episodes(folder: Place, version: str, cameras: list[str]) -> list[Row]:
    if version == "2":
        return list(rows(folder / "meta/episodes.jsonl"))
    columns = ["episode_index", "tasks", *(f"videos/{c}/{key}" for c in cameras for key in (*PLACE_KEYS, *TIME_KEYS))]
    files: list[Place] = sorted((folder / "meta/episodes").rglob("*.parquet"), key=str)
    return [(f"{file}, row {i}", row) for file in files for i, row in enumerate(read_parquet(file, columns))]


def _span(row: dict[str, Any], camera: str, where: str) -> tuple[dict[str, int], float, float]:
    """The file of an episode by its numbers, and the episode's span in it; of version 3."""
    own = {key.removeprefix(f"videos/{camera}/"): value for key, value in row.items()}
    places = {key: whole_number(own.get(key), f"{where}: {key} of {camera}") for key in PLACE_KEYS}
    try:
        start_s, end_s = (float(own[key]) for key in TIME_KEYS)
    except (KeyError, TypeError, ValueError) as error:
        raise VideoReadError(f"{where}: expected {' and '.join(TIME_KEYS)} of {camera} ({error!r})") from error
    if not 0 <= start_s < end_s < float("inf"):
        raise VideoReadError(f"{where}: expected a span of {camera}, got {start_s:g} to {end_s:g} s")
    return places, start_s, end_s


def _filled(template: str, values: dict[str, Any], where: str) -> str:
    """`str.format` for names and widths alone."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise VideoReadError(f"{where}: video_path {template!r} has the unknown field {match[1]!r}")
        return str(values[match[1]]).rjust(int(match[2] or 0), "0")

    return re.sub(r"\{(\w+)(?::0(\d)d)?\}", value, template)
