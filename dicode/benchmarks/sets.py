"""Data sets of the published protocols in their usual folders: which videos, which prompts, in which order."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch

from dicode.config import shortened
from dicode.files import read_json, read_text
from dicode.seeds import generator_for
from dicode.video.read import natural_key

Split = Literal["all", "train", "test"]
T = TypeVar("T")

CAPTION_FILES = ("test_videodatainfo.json", "videodatainfo.json")
VIDEO_FOLDERS = ("TestVideo", "videos/all")


class CaptionedVideo(NamedTuple):
    """One test video of MSR-VTT and all sentences that people wrote of it."""

    path: Path
    captions: tuple[str, ...]


def ucf101_videos(folder: Path, split: Split = "all") -> dict[str, list[Path]]:
    """The videos of every class of UCF-101, classes and files in order.

    FOLDER/UCF-101/ApplyEyeMakeup/v_*.avi, or FOLDER/ApplyEyeMakeup/v_*.avi. The classes of
    FOLDER/ucfTrainTestlist/classInd.txt, if it exists, must have videos; `train` and `test` are those of
    trainlist01.txt and testlist01.txt. Raises `FileNotFoundError` for what is missing.
    """
    root = folder / "UCF-101" if (folder / "UCF-101").is_dir() else folder
    lists = folder / "ucfTrainTestlist"
    found = {path: sorted(path.glob("v_*.avi"), key=natural_key) for path in sorted(root.glob("*")) if path.is_dir()}
    videos = {path.name: files for path, files in found.items() if files}
    if not videos:
        raise FileNotFoundError(f"{folder}: expected UCF-101/<ClassName>/v_*.avi in it, found no such file")
    if (lists / "classInd.txt").is_file():
        named = [line.split()[-1] for line in _lines(lists / "classInd.txt")]  # "1 ApplyEyeMakeup"
        missing = [name for name in named if name not in videos]
        _check_none(missing, f"{root}: expected the {len(named)} classes of {lists / 'classInd.txt'}", "have no videos")
    if split == "all":
        return videos
    listed = [line.split()[0] for line in _lines(lists / f"{split}list01.txt")]  # train lists end in a class number
    missing = [name for name in listed if not (root / name).is_file()]
    _check_none(missing, f"{root}: expected the {len(listed)} videos of {split}list01.txt")
    chosen: dict[str, list[Path]] = {}
    for name in listed:
        chosen.setdefault(Path(name).parent.name, []).append(root / name)
    return chosen


def class_words(name: str) -> str:
    """A class name as words: ApplyEyeMakeup → apply eye makeup."""
    return " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)).lower()


def class_prompts(classes: Sequence[str], template: str = "{}", file: Path | None = None) -> dict[str, str]:
    """One prompt a class: its words in the template, or its sentence in a JSON file {"ApplyEyeMakeup": "…"}.

    Raises `ValueError` for a template without {} and for a file that lacks a class.
    """
    if file is None:
        if template.count("{}") != 1:
            raise ValueError(f"template: expected one {{}} where the class goes, got {template!r}")
        return {name: template.replace("{}", class_words(name)) for name in classes}
    sentences = read_json(file)
    if not isinstance(sentences, dict) or not all(
        isinstance(text, str) and text.strip() for text in sentences.values()
    ):
        raise ValueError(f"{file}: expected an object of a sentence a class, as in {{'ApplyEyeMakeup': '…'}}")
    if missing := [name for name in classes if name not in sentences]:
        raise ValueError(f"{file}: expected a sentence for each class, {len(missing)} have none, first: {missing[0]}")
    return {name: sentences[name] for name in classes}


def share_out(samples: int, counts: Mapping[str, int]) -> dict[str, int]:
    """`samples` in the proportions of `counts`, by largest remainders; of equal remainders the first comes first."""
    total = sum(counts.values())
    shares = {name: samples * count // total for name, count in counts.items()}
    by_remainder = sorted(counts, key=lambda name: -(samples * counts[name] % total))  # sorted() keeps equals in order
    for name in by_remainder[: samples - sum(shares.values())]:
        shares[name] += 1
    return shares


def msrvtt_videos(folder: Path) -> list[CaptionedVideo]:
    """The test videos of MSR-VTT in the order of their numbers.

    FOLDER/TestVideo/*.mp4 or FOLDER/videos/all/*.mp4, and test_videodatainfo.json or videodatainfo.json with `videos`
    (`video_id`, `split`) and `sentences` (`video_id`, `caption`). Raises `FileNotFoundError` for missing files,
    `ValueError` for a file of another form.
    """
    notes = next((folder / name for name in CAPTION_FILES if (folder / name).is_file()), None)
    root = next((folder / name for name in VIDEO_FOLDERS if (folder / name).is_dir()), None)
    if notes is None or root is None:
        raise FileNotFoundError(
            f"{folder}: expected one of {', '.join(CAPTION_FILES)} and one of the folders {', '.join(VIDEO_FOLDERS)}, "
            f"found {notes.name if notes else 'no such file'} and {root.name if root else 'no such folder'}"
        )
    info = read_json(notes)
    try:
        names = [video["video_id"] for video in info["videos"] if video["split"] == "test"]
        captions: dict[str, list[str]] = {name: [] for name in names}
        for sentence in info["sentences"]:
            if sentence["video_id"] in captions:
                captions[sentence["video_id"]].append(sentence["caption"].strip())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{notes}: expected videos (video_id, split) and sentences (video_id, caption): {error!r}"
        ) from error
    if bare := [name for name in names if not captions[name]]:
        raise ValueError(f"{notes}: expected a caption at least of every test video, {len(bare)} without: {bare[0]}")
    if not names:
        raise ValueError(f"{notes}: expected videos of the split test, found none among {len(info['videos'])}")
    videos = [CaptionedVideo(root / f"{name}.mp4", tuple(captions[name])) for name in names]
    missing = [video.path.name for video in videos if not video.path.is_file()]
    _check_none(missing, f"{root}: expected the {len(videos)} test videos of {notes.name}")
    return sorted(videos, key=lambda video: natural_key(video.path))


def drawn_captions(videos: Sequence[CaptionedVideo], seed: int, all_captions: bool = False) -> list[str]:
    """One caption a video, drawn by the seed and the video's name, or all of all."""
    if all_captions:
        return [caption for video in videos for caption in video.captions]
    generators = (generator_for(seed, "caption", path.stem) for path, _ in videos)
    return [c[int(torch.randint(len(c), (1,), generator=g))] for (_, c), g in zip(videos, generators, strict=True)]


def vbench_prompts(file: Path) -> list[str]:
    """The prompts of VBench in their order, each once: a .txt with one a line, or VBench_full_info.json (`prompt_en`).

    Raises `ValueError` for a file without any, and for a prompt that cannot be the name of a file.
    """
    if file.suffix == ".json":
        try:
            texts = [entry["prompt_en"].strip() for entry in read_json(file)]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: expected a list of objects with prompt_en, as VBench_full_info.json") from error
    else:
        texts = _lines(file)
    prompts = list(dict.fromkeys(text for text in texts if text))
    if not prompts:
        raise ValueError(f"{file}: expected a prompt a line, or the list of VBench_full_info.json; found none")
    for prompt in prompts:
        if "/" in prompt or "\0" in prompt or len(f".{prompt}-000.mp4.00000000.part".encode()) > 255:
            raise ValueError(
                f"{file}: VBench finds videos by their prompts; this one can be no file name: {shortened(prompt)}"
            )
    return prompts


def shuffled(items: Sequence[T], seed: int, *place: str) -> list[T]:
    """The items in an order that the seed gives."""
    return [items[i] for i in torch.randperm(len(items), generator=generator_for(seed, *place)).tolist()]


def _check_none(missing: Sequence[str], expected: str, what: str = "are missing") -> None:
    if missing:
        raise FileNotFoundError(
            f"{expected}, {len(missing)} {what}, the first being {missing[0]}: unpack the archive again"
        )


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in read_text(file).split("\n") if line.strip()]
