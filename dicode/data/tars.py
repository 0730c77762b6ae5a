"""Plain tar archives, such as WebDataset's: where each of their files lies, and what is damaged."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO

from dicode.files import TextError, decoded

TAR_SUFFIX = ".tar"
MOST_NOTE = 2**24  # bytes of a text beside a clip


def read_members(file: IO[bytes]) -> tuple[list[tuple[str, tuple[int, int]]], Exception | None]:
    """Names of an archive's plain files, each with offset and length, up to the first damage; and that."""
    members: list[tuple[str, tuple[int, int]]] = []
    try:
        with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
            for entry in _whole(tar, file):
                name = str(PurePosixPath(entry.name.lstrip("/")))
                members.append((name, (entry.offset_data, entry.size)))
            _check_end(file, tar.offset)
    except (tarfile.TarError, OSError, MemoryError, OverflowError, ValueError, RecursionError) as error:
        return members, error
    return members, None


def read_member(file: IO[bytes], name: str, span: tuple[int, int]) -> str:
    """The text of a member. Raises `TextError` where it is none."""
    if span[1] > MOST_NOTE:
        raise TextError(f"{name}: expected a text of at most {MOST_NOTE:,} bytes, got {span[1]:,}")
    file.seek(span[0])
    return decoded(file.read(span[1]), name)


def _whole(tar: tarfile.TarFile, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
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
    while block := file.read(MOST_NOTE):
        if block.strip(b"\0"):
            raise tarfile.ReadError("data after its end, as of two archives in one file")
