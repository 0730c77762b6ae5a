"""What a folder of clips holds: list files, videos with texts beside them, archives, folders of frames."""

import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from dicode.data.cache_folder import INDEX, is_own
from dicode.data.lists import NAMES, PROMPTS, SUFFIXES, VIDEOS, is_lerobot, read_lerobot, read_list, read_pairs
from dicode.data.records import ClipRecord, Member, described, faulty
from dicode.files import Place, TextError, decoded, is_utf8, json_value, read_text
from dicode.video.read import IMAGE_SUFFIXES, VIDEO_SUFFIXES, VideoReadError, natural_key
from dicode.video.write import FOLDER_METADATA

TAR_SUFFIX = ".tar"
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".zip", ".7z", ".rar")
STILLS = tuple(sorted(IMAGE_SUFFIXES - {".gif", ".apng"}))
MOVING = tuple(VIDEO_SUFFIXES - {*STILLS})
MEDIA = (TAR_SUFFIX, *PACKED, *VIDEO_SUFFIXES)
NOTES = (".json", ".txt")
NOTE_FOLDERS = ("labels", "captions")  # beside a folder `videos`
SYSTEM_NAMES = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")  # left behind by systems, beside names with a dot
MOST_NOTE = 2**24  # bytes of a text beside a clip
END_MARK = 2 * tarfile.BLOCKSIZE  # of zeros, and nothing but zeros after them (POSIX.1-2017, pax, ustar)
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
    unreadable: list[ClipRecord] = field(default_factory=list)  # names and kinds of files that cannot be read

    def ending_in(self, *suffixes: str) -> list[Place]:
        """Files by the ends of their names, whatever their case."""
        return [path for name, path in self.files.items() if name.lower().endswith(suffixes)]


@dataclass
class Tree:
    """A folder with all below it, or an archive; `read` gives the text of a file in it."""

    folder: Place  # the data set's
    read: Callable[[Place], str]
    archive: bool = False
    inside: dict[Place, Directory] = field(default_factory=dict)

    @cached_property
    def stems(self) -> set[str]:
        """Of all videos in it."""
        return {path.stem for directory in self.inside.values() for path in directory.ending_in(*MOVING)}

    def name(self, folder: Place) -> str:
        """A folder's name in the data set, with its slash; '' for the data set's folder."""
        below = folder.as_posix().removeprefix(self.folder.as_posix()).lstrip("/")
        return f"{below}/" if folder != self.folder else ""


def scan(folder: Place) -> DataSet:
    """Everything that a folder holds, in the order of names. Raises `VideoReadError` for a damaged list."""
    found = DataSet()
    tree = Tree(folder, lambda path: read_text(path, MOST_NOTE))
    _read_tree(tree, found.left_out)
    clips: list[tuple[Place, list[ClipRecord]]] = []
    stack: list[tuple[Place, Place | None]] = [(folder, None)]
    listed: set[str] = set()  # by the list of the folder that is the second in the stack
    while stack:
        here, owner = stack.pop()
        directory = tree.inside[here]
        if INDEX in directory.files and is_own(directory.files[INDEX]):
            continue  # a cache, which may lie among the clips
        if owner is None and (records := _listed(here, tree, found)) is not None:
            clips.append((here, records))
            owner, listed = here, {os.path.normpath(str(record.path)) for record in records}
        stack += [(path, owner) for path in directory.folders]
        if owner is not None:
            paths = {os.path.normpath(str(path)) for path in directory.ending_in(TAR_SUFFIX, *PACKED, *MOVING)}
            found.left_out["videos and archives that no list names"] += len(paths - listed)
            if here != owner and here.name != "meta":
                reason = f"(the list of {owner} is; name {here} itself)"
                found.unread += [f"{tree.name(here)}{name} {reason}" for name in NAMES if name in directory.files]
            continue
        for path in directory.ending_in(TAR_SUFFIX):
            found.lists.append(f"{tree.name(here)}{path.name}")
            clips.append((path, scan_archive(path, folder, found)))
        reason = "a compressed archive, which cannot be read in places; unpack it"
        packed = [faulty(path, folder, reason) for path in directory.ending_in(*PACKED)]
        clips += [(r.path, [r]) for r in (*packed, *directory.unreadable, *_media(here, tree, found))]
    clips.sort(key=lambda clip: natural_key(clip[0]))
    found.records = [record for _, records in clips for record in records]
    found.lists.sort()
    found.unread.sort()
    return found


def scan_archive(path: Place, folder: Place, found: DataSet) -> list[ClipRecord]:
    """The clips of a plain tar, in its order, with the texts beside them; what is damaged is a clip with a fault."""
    with path.open("rb") as file:
        members, damage = _read_members(file)
        spans = {path / name: span for name, span, _ in members}
        faults = {path / name: fault for name, _, fault in members if fault}

        def text_of(member: Place) -> str:
            start, length = spans[member]
            if member in faults:
                raise TextError(f"{member.name}: {faults[member]}")
            if length > MOST_NOTE:
                raise TextError(f"{member.name}: expected a text of at most {MOST_NOTE:,} bytes, got {length:,}")
            file.seek(start)
            return decoded(file.read(length), member.name)

        tree = Tree(folder, text_of, archive=True)
        for name, count in Counter(name for name, *_ in members).items():
            member = path / name
            directory = tree.inside.setdefault(member.parent, Directory())
            if any(map(_is_hidden, name.split("/"))):
                found.left_out["hidden files and folders"] += count
            elif count > 1:
                directory.unreadable.append(faulty(member, folder, "twice in the archive; which is meant?"))
            elif member in faults and name.lower().endswith(MEDIA):
                directory.unreadable.append(faulty(member, folder, faults[member]))
            else:
                _add(directory, member, folder, is_folder=False, is_file=True)
        records = [r for here in tree.inside for r in (*tree.inside[here].unreadable, *_media(here, tree, found))]
    records = [r if r.fault else replace(r, inside=Member(path, spans[r.path])) for r in records]
    records.sort(key=lambda record: spans.get(record.path, (0, 0)))
    if damage:
        records.append(faulty(path, folder, f"not a whole, uncompressed tar ({damage}); unpack it, or copy it again"))
    return records


def _read_members(file: Any) -> tuple[list[tuple[str, tuple[int, int], str]], Exception | None]:
    """Names of what a plain tar, an open file, holds, up to the first damage; and that. Folders are left out.

    Each has offset and length, those of its target for a hard link, and why it cannot be read in its place, or ''.
    """
    members: list[tuple[str, tuple[int, int], str]] = []
    held: dict[str, tuple[tuple[int, int], str]] = {}  # the last of every name, which a hard link means
    size, before = file.seek(0, io.SEEK_END), -1
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
            for entry in tar:
                start, length = entry.offset_data, entry.size
                is_plain = entry.isfile() and not entry.issparse()
                if length < 0 or entry.offset <= before or (is_plain and start + length > size):
                    raise tarfile.ReadError(f"{entry.name!r} claims {length:,} bytes, and {size:,} are there")
                before = entry.offset
                name, target = (str(PurePosixPath(each.lstrip("/"))) for each in (entry.name, entry.linkname))
                span, fault = (start, length), "" if is_plain else _unlike_a_file(entry)
                if entry.islnk():
                    span, fault = held.get(target, (span, f"a hard link to {target!r}, which is not before it"))
                if not entry.isdir():
                    members.append((name, span, fault))
                    held[name] = span, fault
            file.seek(tar.offset)
            block = file.read(END_MARK)
            if len(block) < END_MARK:
                raise tarfile.ReadError("its end is missing")
            while block:
                if block.strip(b"\0"):
                    raise tarfile.ReadError("data after its end, as of two archives in one file")
                block = file.read(MOST_NOTE)
    except (tarfile.TarError, OSError, MemoryError, OverflowError, ValueError, RecursionError) as error:
        return members, error
    return members, None


def _unlike_a_file(entry: tarfile.TarInfo) -> str:
    """Why a member other than a plain file, a folder or a hard link cannot be read."""
    if entry.issparse():
        return "a sparse file, which cannot be read in its place; pack it without -S (--sparse)"
    return f"expected a file, got {'a link; pack what it points to (tar -h)' if entry.issym() else 'a pipe or device'}"


def _read_tree(tree: Tree, left_out: Counter[str]) -> None:
    """Add all folders under the root; links are followed, each folder once."""
    visited: set[tuple[int, int]] = set()
    stack = [tree.folder]
    while stack:
        here = stack.pop()
        tree.inside[here] = directory = Directory()
        try:
            if isinstance(here, Path):
                facts = here.stat()
                if (facts.st_dev, facts.st_ino) in visited:
                    left_out["links to folders that are read already"] += 1
                    continue
                visited.add((facts.st_dev, facts.st_ino))
            for path in here.iterdir():
                if _is_hidden(path.name):
                    left_out["hidden files and folders"] += 1
                else:
                    _add(directory, path, tree.folder, path.is_dir(), path.is_file())
        except OSError as error:
            reason = f"cannot be listed ({error.strerror or error})"
            if here == tree.folder:
                raise VideoReadError(f"{here}: {reason}") from error
            directory.unreadable.append(faulty(here, tree.folder, reason))
        stack += directory.folders


def _add(directory: Directory, path: Place, folder: Place, is_folder: bool, is_file: bool) -> None:
    is_media = path.name.lower().endswith(MEDIA)
    if not is_utf8(path.name):
        if is_folder or is_media:
            directory.unreadable.append(faulty(path, folder, "its name is not UTF-8; rename it"))
    elif is_folder:
        directory.folders.append(path)
    elif is_file:
        directory.files[path.name] = path
    elif is_media or path.name in (*NAMES, *PROMPTS, VIDEOS):
        kind = "a link to nothing" if isinstance(path, Path) and not path.exists() else "a pipe, socket or device"
        directory.unreadable.append(faulty(path, folder, f"expected a file, got {kind}"))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_NAMES


def _listed(here: Place, tree: Tree, found: DataSet) -> list[ClipRecord] | None:
    """The clips that the list file of a folder names, None where it has no list."""
    directory, where = tree.inside[here], tree.name(here)
    files = {name.lower(): path for name, path in directory.files.items()}
    lists = [files[name] for name in NAMES if name in files]
    prompts = next((files[name] for name in PROMPTS if name in files), None)
    chosen, records = "", None
    if any(path.name == "meta" for path in directory.folders) and is_lerobot(here):
        chosen, records = "meta/ (LeRobot)", read_lerobot(here, tree.folder)
    elif lists:
        chosen, records = lists[0].name, read_list(lists[0], tree.folder)
    elif prompts is not None and VIDEOS in files:
        chosen, records = f"{prompts.name} + {VIDEOS}", read_pairs(prompts, files[VIDEOS], tree.folder)
    found.lists += [f"{where}{chosen}"] if chosen else []
    stems = Counter(path.stem for path in files.values())
    why = f"{chosen} is" if chosen else f"call it {NAMES[0]} or {NAMES[1]}, or name the file itself"
    for path in directory.ending_in(*SUFFIXES):
        is_note = path.suffix.lower() == ".json" and (stems[path.stem] > 1 or path.stem in directory.files)  # of a clip
        if not is_note and path.name not in (chosen, FOLDER_METADATA):
            found.unread.append(f"{where}{path.name} ({why})")
    return records


def _media(here: Place, tree: Tree, found: DataSet) -> Iterator[ClipRecord]:
    """The clips of a folder without a list."""
    directory, left_out = tree.inside[here], found.left_out
    videos, stills, notes = directory.ending_in(*MOVING), directory.ending_in(*STILLS), _notes(here, tree)
    captioned = {path for path in stills if path.stem in notes or path.name in notes}
    are_beside = bool(videos or directory.ending_in(TAR_SUFFIX, *PACKED))
    frames = [] if captioned or are_beside or tree.archive else _frames(stills)
    if frames and len(frames) < len(stills):
        others = ", ".join(sorted(path.name for path in {*stills} - {*frames})[:3])
        yield faulty(here, tree.folder, f"numbered images, and others ({others}): move those, or list each image")
        return
    if frames and here.name in tree.stems:
        left_out["folders with the frames of a video that is read"] += 1
        return
    if frames:
        own = {".json": directory.files[FOLDER_METADATA]} if FOLDER_METADATA in directory.files else {}
        yield _noted(here, own | _notes(here.parent, tree).get(here.name, {}), tree, found)
        return
    if are_beside and not tree.archive:
        videos += [path for path in stills if _is_animated(path)]
    kept = [path for path in stills if path.stem not in tree.stems and (path in captioned or not are_beside)]
    clips = list(dict.fromkeys([*videos, *kept]))
    left_out["images beside videos"] += len({*stills} - {*clips})
    texts_of, loose = _matched(clips, notes, tree.archive, {path.name for path in directory.folders})
    if here.name not in NOTE_FOLDERS:
        found.unread += [f"{tree.name(here)}{path.name} (no clip has that name)" for path in loose]
    own_suffixes = tuple(VIDEO_SUFFIXES) if tree.archive else MEDIA  # archives within one are not read
    for name in directory.files:
        suffix = f".{name.rpartition('.')[2].lower()}" if "." in name else name
        if suffix not in (*NOTES, *SUFFIXES) and not name.lower().endswith(own_suffixes):
            left_out[f"{suffix} files"] += 1
    for path, texts in texts_of.items():
        yield faulty(path, tree.folder, texts) if isinstance(texts, str) else _noted(path, texts, tree, found)


def _matched(
    clips: list[Place], notes: Notes, by_first_dot: bool, folders: set[str]
) -> tuple[dict[Place, dict[str, Place] | str], list[Place]]:
    """The texts of each clip by suffix, or why it is not clear which they are; and texts that belong to none.

    A text belongs to the clip with its name, or with its name up to the last dot: KEY.v1.json to KEY.v1.mp4. In
    archives one that fits none so belongs to the one clip with its name up to the first dot, as `webdataset` has it.
    """
    texts: dict[Place, dict[str, Place] | str] = {p: {**notes.get(p.stem, {}), **notes.get(p.name, {})} for p in clips}
    used = {name for path in clips for name in (path.stem, path.name)} | folders
    loose: list[Place] = []
    by_first: dict[str, list[Place]] = {}
    for path in clips if by_first_dot else ():
        by_first.setdefault(path.name.partition(".")[0], []).append(path)
    for stem in notes.keys() - used:
        found, fitting = notes[stem], by_first.get(stem.partition(".")[0], [])
        loose += [found[".txt"]] if not fitting and ".txt" in found else []
        for path in fitting:
            own = texts[path]
            if len(fitting) > 1 and not own:
                names = ", ".join(note.name for note in found.values())
                texts[path] = f"{names} may belong to any of {len(fitting)} videos; name it as one"
            elif len(fitting) == 1 and isinstance(own, dict):
                texts[path] = {**found, **own}
    return texts, loose


def _noted(path: Place, notes: Mapping[str, Place], tree: Tree, found: DataSet) -> ClipRecord:
    """A clip with the values of the .json and .txt beside it; one that cannot be understood makes it a bad file."""
    folder = tree.folder if path != tree.folder else path.parent
    try:
        texts = {suffix: tree.read(note) for suffix, note in notes.items()}
        row = json_value(texts[".json"], "the .json") if ".json" in texts else {}
        if not isinstance(row, dict):
            if ".txt" not in texts:
                raise VideoReadError(f"expected an object, got {str(row)[:60]}")
            found.left_out[".json files that hold no object"] += 1
            row = {}
        record = described({key: value for key, value in row.items() if key != "file"}, str(path), folder, path)
        if record.captions or ".txt" not in texts:
            return record
        return replace(record, captions=described({"caption": texts[".txt"]}, str(path), folder, path).captions)
    except (VideoReadError, TextError, OSError) as error:
        return faulty(path, folder, f"the text beside it cannot be read ({str(error).removeprefix(f'{path}: ')})")


def _notes(here: Place, tree: Tree) -> Notes:
    """The .txt and .json of a folder by the names they belong to: a.txt to a, a.mp4.txt to a.mp4."""
    folders = [here.parent / name for name in NOTE_FOLDERS] if here.name == "videos" else []
    found: Notes = {}
    for folder in (*folders, here):
        for path in tree.inside[folder].ending_in(*NOTES) if folder in tree.inside else ():
            found.setdefault(path.stem, {})[path.suffix.lower()] = path
    return found


def _frames(stills: list[Place]) -> list[Place]:
    """The images that are frames of one video: equal names but for one number, hardly any missing."""
    groups: dict[tuple[str, str], dict[int, Place]] = {}
    for path in stills:
        if part := re.fullmatch(r"(.*?)(\d{1,18})(\D*)", path.name):
            groups.setdefault((part[1], part[3].lower()), {})[int(part[2])] = path
    frames = max(groups.values(), key=len, default={})
    if len(frames) < max(2, LEAST_OF_FRAMES * (max(frames, default=0) - min(frames, default=0) + 1)):
        return []
    if len(frames) < len(stills) and len(frames) < max(LEAST_AMONG_OTHERS, 0.8 * len(stills)):
        return []
    return list(frames.values())


def _is_animated(path: Place) -> bool:
    """Whether a .png or .webp is animated, by its first bytes."""
    if path.suffix.lower() not in (".png", ".webp"):
        return False
    with path.open("rb") as file:
        head = file.read(4096)
    return b"acTL" in head.partition(b"IDAT")[0] if head.startswith(b"\x89PNG") else b"ANIM" in head[:64]
