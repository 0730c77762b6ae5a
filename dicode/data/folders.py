"""What a folder of clips holds: list files, videos with notes, archives, folders of frames; and what is no clip."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from dicode.data.cache_folder import INDEX, is_own
from dicode.data.lerobot import is_lerobot, read_lerobot
from dicode.data.lists import NAMES, PROMPTS, SUFFIXES, VIDEOS, read_list, read_pairs
from dicode.data.notes import NOTES, noted
from dicode.data.records import OF_SYSTEMS, STILLS, ClipRecord, faulty
from dicode.data.tars import TAR_SUFFIX, tar_records
from dicode.files import Place, is_utf8
from dicode.video.read import VIDEO_SUFFIXES, VideoReadError, natural_key
from dicode.video.write import FOLDER_METADATA

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".zip", ".7z", ".rar")
MOVING = VIDEO_SUFFIXES - {*STILLS}
NOTE_FOLDERS = ("labels", "captions")  # beside a folder `videos`
LEAST_AMONG_OTHERS = 5  # numbered images that are taken for frames although other images lie among them
LEAST_OF_FRAMES = 0.5  # of the numbers from the first to the last: where more are missing, images are no video's frames

Notes = dict[str, dict[str, Place]]  # file name or its stem → suffix → path


@dataclass
class DataSet:
    """The clips of a folder, an index or an archive; what it was read from, and what lies there and was not."""

    records: list[ClipRecord] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)  # files that name clips
    unread: list[str] = field(default_factory=list)  # files that may name clips too, and why they are not read
    left_out: Counter[str] = field(default_factory=Counter)  # how many of what are no clips


@dataclass
class Directory:
    """What one folder holds, hidden names left out."""

    files: dict[str, Place] = field(default_factory=dict)
    folders: list[Place] = field(default_factory=list)
    strange: list[ClipRecord] = field(default_factory=list)  # names and kinds that cannot be read

    def ending_in(self, *suffixes: str) -> list[Place]:
        """Files by the ends of their names, whatever their case."""
        return [path for name, path in self.files.items() if name.lower().endswith(suffixes)]


Tree = dict[Place, Directory]


def scan(folder: Place) -> DataSet:
    """Everything that a folder holds, in the order of names. Raises `VideoReadError` for a damaged list."""
    found = DataSet()
    tree = _tree(folder, found.left_out)
    clips: list[tuple[Place, list[ClipRecord]]] = []
    videos = {path.stem for inside in tree.values() for path in inside.ending_in(*MOVING)}
    stack = [folder]
    while stack:
        here = stack.pop()
        records = _listed(here, tree, folder, found)
        if records is not None:
            clips.append((here, records))
            continue
        clips += [(record.path, [record]) for record in tree[here].strange]
        clips += _media(here, tree, folder, videos, found)
        stack += [path for path in tree[here].folders if path in tree]
    clips.sort(key=lambda clip: natural_key(clip[0]))
    found.records = [record for _, records in clips for record in records]
    found.lists.sort()
    found.unread.sort()
    return found


def _tree(root: Place, left_out: Counter[str]) -> Tree:
    """All folders under one; links are followed, each folder once."""
    tree: Tree = {}
    seen: set[tuple[int, int]] = set()
    stack = [root]
    while stack:
        here = stack.pop()
        tree[here] = inside = Directory()
        try:
            if isinstance(here, Path):
                facts = here.stat()
                if (facts.st_dev, facts.st_ino) in seen:
                    left_out["links to folders that are read already"] += 1
                    continue
                seen.add((facts.st_dev, facts.st_ino))
            _fill(inside, here, root, left_out)
        except OSError as error:
            if here == root:
                raise VideoReadError(f"{here}: cannot be listed ({error.strerror or error})") from error
            inside.strange.append(faulty(here, root, f"cannot be listed ({error.strerror or error})"))
        stack += inside.folders
    return tree


def _fill(inside: Directory, here: Place, root: Place, left_out: Counter[str]) -> None:
    for path, is_folder, is_file in _entries(here):
        name = path.name
        if name.startswith(".") or name in OF_SYSTEMS:
            left_out["hidden files and folders"] += 1
        elif not name.isascii() and not is_utf8(name):
            if is_folder or _is_media(name):
                inside.strange.append(faulty(path, root, "its name is not UTF-8; rename it"))
        elif is_folder:
            inside.folders.append(path)
        elif is_file:
            inside.files[name] = path
        elif _is_media(name) or name in (*NAMES, *PROMPTS, VIDEOS):
            kind = "a link to nothing" if isinstance(path, Path) and not path.exists() else "a pipe, socket or device"
            inside.strange.append(faulty(path, root, f"expected a file, got {kind}"))


def _entries(folder: Place) -> Iterator[tuple[Place, bool, bool]]:
    """What a folder holds, each with whether it is a folder and whether it is a file."""
    if isinstance(folder, Path):
        with os.scandir(folder) as entries:
            yield from ((folder / entry.name, entry.is_dir(), entry.is_file()) for entry in entries)
    else:
        yield from ((path, path.is_dir(), path.is_file()) for path in folder.iterdir())


def _is_media(name: str) -> bool:
    return name.lower().endswith((TAR_SUFFIX, *PACKED, *VIDEO_SUFFIXES))


def _below(here: Place, root: Place) -> str:
    return "" if here == root else f"{here.as_posix().removeprefix(root.as_posix()).lstrip('/')}/"


def _listed(here: Place, tree: Tree, root: Place, found: DataSet) -> list[ClipRecord] | None:
    """The clips that the list file of a folder names, None where it has no list."""
    files, where = tree[here].files, _below(here, root)
    lower = {name.lower(): path for name, path in files.items()}
    known = [lower[name] for name in NAMES if name in lower]
    prompts = next((files[name] for name in PROMPTS if name in files), None)
    records: list[ClipRecord] | None = None
    chosen = ""
    if INDEX in files and is_own(files[INDEX]):  # a cache, which may lie among the clips
        return []
    if any(path.name == "meta" for path in tree[here].folders) and is_lerobot(here):
        chosen, records = "meta/ (LeRobot)", read_lerobot(here, root)
    elif known:
        chosen, records = known[0].name, read_list(known[0], root)
    elif prompts is not None and VIDEOS in files:
        chosen, records = f"{prompts.name} + {VIDEOS}", read_pairs(prompts, files[VIDEOS], root)
    stems = Counter(path.stem for path in files.values())
    for path in files.values():
        beside = path.suffix.lower() == ".json" and (stems[path.stem] > 1 or path.stem in files)  # a clip of that name
        if path.suffix.lower() in SUFFIXES and not beside and path.name not in (chosen, FOLDER_METADATA):
            why = (
                f"{chosen} is" if records is not None else f"call it {NAMES[0]} or {NAMES[1]}, or name the file itself"
            )
            found.unread.append(f"{where}{path.name} ({why})")
    if records is not None:
        found.lists.append(f"{where}{chosen}")
        _count_unlisted(here, tree, root, records, found)
    return records


def _count_unlisted(here: Place, tree: Tree, root: Place, records: list[ClipRecord], found: DataSet) -> None:
    """Note what lies under a folder and is not in its list."""
    named = {os.path.normpath(str(record.path)) for record in records}
    stack = [here]
    while stack:
        folder = stack.pop()
        for path in tree[folder].ending_in(TAR_SUFFIX, *PACKED, *MOVING):
            if os.path.normpath(str(path)) not in named:
                found.left_out["videos and archives that no list names"] += 1
        for path in (tree[folder].files[name] for name in NAMES if name in tree[folder].files):
            if folder != here and folder.name != "meta":
                found.unread.append(f"{_below(folder, root)}{path.name} (the list of {here} is; name {folder} itself)")
        stack += [path for path in tree[folder].folders if path in tree]


def _media(
    here: Place, tree: Tree, root: Place, all_videos: set[str], found: DataSet
) -> Iterator[tuple[Place, list[ClipRecord]]]:
    """The clips of a folder without a list."""
    inside, left_out = tree[here], found.left_out
    videos, stills, notes = inside.ending_in(*MOVING), inside.ending_in(*STILLS), _notes(here, tree)
    archives, packed = inside.ending_in(TAR_SUFFIX), inside.ending_in(*PACKED)
    for path in archives:
        found.lists.append(f"{_below(here, root)}{path.name}")
        yield path, tar_records(path, root, left_out)
    for path in packed:
        yield path, [faulty(path, root, "a compressed archive, which cannot be read in places; unpack it")]
    if videos or archives or packed:
        moving = [path for path in stills if _is_animated(path)]
        left_out["images beside videos"] += len(stills) - len(moving)
        videos, stills = videos + moving, []
    elif stray := _frames_but_for(stills, notes):
        reason = f"numbered images, and others ({', '.join(sorted(stray)[:3])}): move those, or list each image"
        yield here, [faulty(here, root, reason)]
        return
    elif _are_frames(stills) and not any(path.stem in notes or path.name in notes for path in stills):
        if here.name in all_videos:
            left_out["folders with the frames of a video that is read"] += 1
            return
        texts = {".json": inside.files[FOLDER_METADATA]} if FOLDER_METADATA in inside.files else {}
        texts |= _notes(here.parent, tree).get(here.name, {})
        yield here, [noted(here, texts, root if here != root else root.parent, left_out)]
        return
    thumbnails = [path for path in stills if path.stem in all_videos]
    left_out["images beside videos"] += len(thumbnails)
    stills = [path for path in stills if path.stem not in all_videos]
    used = {name for path in (*videos, *stills, *inside.folders) for name in (path.stem, path.name)}
    if here.name not in NOTE_FOLDERS:
        loose = [notes[stem][".txt"] for stem in notes.keys() - used if ".txt" in notes[stem]]
        found.unread += [f"{_below(here, root)}{path.name} (no clip has that name)" for path in loose]
    for name in inside.files:
        suffix = f".{name.rpartition('.')[2].lower()}" if "." in name else name
        if suffix not in (*NOTES, *SUFFIXES) and not _is_media(name):
            left_out[f"{suffix} files"] += 1
    for path in chain(videos, stills):
        yield path, [noted(path, {**notes.get(path.stem, {}), **notes.get(path.name, {})}, root, left_out)]


def _notes(here: Place, tree: Tree) -> Notes:
    """The .txt and .json of a folder by the names they belong to: a.txt to a, a.mp4.txt to a.mp4."""
    folders = [here.parent / name for name in NOTE_FOLDERS] if here.name == "videos" else []
    found: Notes = {}
    for folder in (*folders, here):
        for name, path in tree[folder].files.items() if folder in tree else ():
            stem, dot, ending = name.rpartition(".")
            if dot and (suffix := f".{ending.lower()}") in NOTES:
                found.setdefault(stem, {})[suffix] = path
    return found


def _are_frames(stills: list[Place]) -> bool:
    """Whether images are the frames of one video: equal names but for one number, hardly any missing."""
    parts = [re.fullmatch(r"(.*?)(\d{1,18})(\D*)", path.name) for path in stills]
    if len(stills) < 2 or not all(parts) or len({(part[1], part[3].lower()) for part in parts if part}) > 1:
        return False
    numbers = {int(part[2]) for part in parts if part}
    return len(numbers) == len(stills) >= LEAST_OF_FRAMES * (max(numbers) - min(numbers) + 1)


def _frames_but_for(stills: list[Place], notes: Notes) -> list[str]:
    """Names of the few images that are no frames, among many that are."""
    groups: dict[tuple[str, str], list[Place]] = {}
    for path in stills:
        if part := re.fullmatch(r"(.*?)(\d{1,18})(\D*)", path.name):
            groups.setdefault((part[1], part[3].lower()), []).append(path)
    most = max(groups.values(), key=len, default=[])
    if not 0.8 * len(stills) <= len(most) < len(stills) or len(most) < LEAST_AMONG_OTHERS or not _are_frames(most):
        return []
    if any(path.stem in notes or path.name in notes for path in stills):
        return []
    frames = set(most)
    return [path.name for path in stills if path not in frames]


def _is_animated(path: Place) -> bool:
    """Whether a .png or .webp tells in its first bytes that it moves."""
    if path.suffix.lower() not in (".png", ".webp"):
        return False
    with path.open("rb") as file:
        head = file.read(4096)
    return b"acTL" in head.partition(b"IDAT")[0] if head.startswith(b"\x89PNG") else b"ANIM" in head[:64]
