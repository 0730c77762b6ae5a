"""WebDataset archives: plain tars in which KEY.mp4 and KEY.txt or KEY.json are one sample."""

import io
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from typing import IO

from dicode.data.notes import MOST_BYTES, NOTES, of_texts
from dicode.data.records import OF_SYSTEMS, STILLS, ClipRecord, Member, faulty
from dicode.files import Place, TextError, decoded
from dicode.video.read import IMAGE_SUFFIXES, VIDEO_SUFFIXES

TAR_SUFFIX = ".tar"


def tar_records(archive: Place, folder: Place, left_out: Counter[str]) -> list[ClipRecord]:
    """The clips of an archive, in its order, each with its .json and .txt; what is damaged is a clip with a fault."""
    try:
        with archive.open("rb") as file:
            return list(_records(archive, folder, file, left_out))
    except tarfile.ReadError as error:
        return [_damaged(archive, folder, error)]


def _damaged(archive: Place, folder: Place, error: Exception) -> ClipRecord:
    return faulty(archive, folder, f"not a whole, uncompressed tar ({error}); unpack it, or copy it again")


def _records(archive: Place, folder: Place, file: IO[bytes], left_out: Counter[str]) -> Iterator[ClipRecord]:
    damage: Exception | None = None
    with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
        entries: dict[str, tarfile.TarInfo] = {}
        twice: set[str] = set()
        try:
            for entry in _members(tar, file):
                twice |= {entry.name} & entries.keys()
                entries[entry.name] = entry
            _check_end(file, tar.offset)
        except (tarfile.TarError, OSError, MemoryError, OverflowError, ValueError, RecursionError) as error:
            damage = error
        for name, notes in _samples(list(entries), left_out):
            path, entry = archive / _utf8(name), entries[name]
            if isinstance(notes, str) or name in twice or _utf8(name) != name:
                reasons = notes if isinstance(notes, str) else "its name is not UTF-8" if _utf8(name) != name else ""
                yield faulty(path, folder, reasons or "twice in the archive; which is meant?")
                continue
            try:
                texts = {suffix: _text(tar, entries[note]) for suffix, note in notes.items()}
            except (TextError, OSError, tarfile.TarError) as error:
                yield faulty(path, folder, f"the text beside it cannot be read ({error})")
                continue
            span = (entry.offset_data, entry.size)
            yield replace(of_texts(path, texts, folder, left_out), inside=Member(archive, span))
    if damage is not None:
        yield _damaged(archive, folder, damage)


def _members(tar: tarfile.TarFile, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The plain files of an archive that lie in it whole. Raises `tarfile.ReadError` for one that claims more."""
    size = file.seek(0, io.SEEK_END)
    before = -1
    for entry in tar:
        if entry.size < 0 or entry.offset <= before or (entry.isfile() and entry.offset_data + entry.size > size):
            raise tarfile.ReadError(f"{entry.name!r} claims {entry.size:,} bytes, and {size:,} are there")
        before = entry.offset
        if entry.isfile() and not entry.issparse():
            yield entry


def _check_end(file: IO[bytes], offset: int) -> None:
    """Raise `tarfile.ReadError` where an archive ends without its mark, or is followed by another.

    The mark is two blocks of zeros (POSIX.1-2017, pax, ustar); nothing but zeros may come after it.
    """
    file.seek(offset)
    if len(file.read(2 * tarfile.BLOCKSIZE)) < 2 * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("its end is missing")
    file.seek(offset)
    while block := file.read(MOST_BYTES):
        if block.strip(b"\0"):
            raise tarfile.ReadError("data after its end, as of two archives in one file")


def _samples(names: Sequence[str], left_out: Counter[str]) -> Iterator[tuple[str, dict[str, str] | str]]:
    """Each video with its notes by suffix, or with why they cannot be told.

    A note belongs to the video of its name up to the last dot: of KEY.v1.mp4 that is KEY.v1.json, and only where no
    name fits so, that of `webdataset`, up to the first dot, counts, if it fits one video alone.
    """
    videos: dict[str, list[str]] = {}
    notes: dict[str, dict[str, str]] = {}
    for name in names:
        stem, dot, ending = name.rpartition(".")
        suffix = f".{ending.lower()}"
        if any(part in OF_SYSTEMS or part.startswith(".") for part in name.split("/") if part not in (".", "..")):
            left_out["hidden files and folders"] += 1
            continue
        if not dot:
            continue
        if suffix in NOTES:
            notes.setdefault(stem, {})[suffix] = name
        elif suffix in VIDEO_SUFFIXES:
            videos.setdefault(stem, []).append(name)
    by_first = _shared(videos, notes.keys(), left_out)
    loose = {stem: found for stem, found in notes.items() if stem not in videos}
    told: dict[str, dict[str, str] | str] = {stem: dict(notes.get(stem, {})) for stem in videos}
    for stem, found in loose.items():
        fitting = by_first.get(_first(stem), [])
        left_out["texts that belong to no clip"] += len(found) if not fitting else 0
        for video in fitting:
            own = told[video]
            if len(fitting) > 1 and not isinstance(own, str) and not own:
                told[video] = f"{', '.join(found.values())} may belong to any of {len(fitting)} videos; name it as one"
            elif len(fitting) == 1 and isinstance(own, dict):
                told[video] = {**found, **own}
    for stem, (name, *_) in videos.items():
        yield name, told[stem]


def _shared(videos: dict[str, list[str]], captioned: Set[str], left_out: Counter[str]) -> dict[str, list[str]]:
    """Stems by their first part; images beside videos and without a text are taken out, and second videos of a key."""
    moving = [stem for stem, names in videos.items() if not all(name.lower().endswith(STILLS) for name in names)]
    folders, bases = ({stem.rpartition("/")[part] for stem in moving} for part in (0, 2))
    for stem in videos.keys() - set(moving) - captioned:
        folder, _, base = stem.rpartition("/")
        if folder in folders or base in bases:  # thumbnails and sheets, as in folders
            left_out["images beside videos"] += len(videos.pop(stem))
    by_first: dict[str, list[str]] = {}
    for stem in videos:
        by_first.setdefault(_first(stem), []).append(stem)
    for stems in by_first.values():
        moving = [stem for stem in stems if any(not _is_still(name) for name in videos[stem])]
        for stem in [stem for stem in stems if moving and stem not in moving]:
            left_out["images beside videos"] += len(videos.pop(stem))
            stems.remove(stem)
        for stem in stems:
            names = sorted(videos[stem], key=_is_still)
            kept = [name for name in names if not _is_still(name)] or names
            left_out["images beside videos"] += len(names) - len(kept)
            left_out["further videos of one key in archives"] += len(kept) - 1
            videos[stem] = kept
    return by_first


def _first(stem: str) -> str:
    folder, slash, name = stem.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _is_still(name: str) -> bool:
    return f".{name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES


def _utf8(name: str) -> str:
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _text(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> str:
    if entry.size > MOST_BYTES:
        raise TextError(f"{entry.name}: expected a text of at most {MOST_BYTES:,} bytes, got {entry.size:,}")
    return decoded(tar.extractfile(entry).read(), entry.name)  # type: ignore[union-attr]
