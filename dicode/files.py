"""Where files lie: a folder here, or anything that fsspec reaches (`s3://…`, `gs://…`, `memory://…`)."""

import codecs
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from upath import UPath

from dicode.config import unique

Place = Path | UPath  # a `Path` always lies here
PARTIAL = ".part"  # what unfinished files end in, and their names begin with a dot


MOST_NAME = 255 - len("..12345678.part2")  # unfinished files have longer ones
MOST_TEXT = 2**30  # bytes of a text file: captions of ten million clips


class TextError(ValueError):
    """A text file that cannot be read as one: says which file, and which line."""


class UnreachableError(ValueError):
    """A store that does not answer, which says nothing about the file asked for: stop, and try again later."""


def check_parent(path: Path | None) -> None:
    """Raise before any work is done where the folder of an output is missing, or nothing can be written there."""
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder to write {path.name!r} in")
    if path is not None and not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent}: cannot write here")
    if path is not None and len(os.fsencode(path.name)) > MOST_NAME:
        raise ValueError(f"expected a name of at most {MOST_NAME} bytes for an output, got {path.name!r}")


def check_file(path: Path | None) -> None:
    """Raise before any work is done where a folder, a pipe or a device has the name of a file that is to be written."""
    if path is not None and path.exists() and not path.is_file():
        raise FileExistsError(f"{path}: is a folder, a pipe or a device; expected the name of a file")


def place(name: str | Path | UPath) -> Place:
    """The file or folder of this name or URL."""
    text = str(name)
    if isinstance(name, Path) or "://" not in text:
        return Path(text)
    return Path(text.removeprefix("file://")) if text.startswith("file://") else UPath(text)


@contextmanager
def fetched(source: Place, span: tuple[int, int] | None = None, name: str = "") -> Iterator[Path]:
    """A local path to the file as long as the block lasts: its own, or a copy that keeps its name.

    `span` is offset and length of a part of the file, copied under `name`. Raises `UnreachableError` where a store
    fails for another reason than that the file is missing or forbidden.
    """
    if isinstance(source, Path) and span is None:
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="dicode-") as folder:
        copy = Path(folder) / (Path(name).name or source.name)
        try:
            with source.open("rb") as file, copy.open("wb") as target:
                if span is None:
                    shutil.copyfileobj(file, target)
                else:
                    file.seek(span[0])
                    target.write(file.read(span[1]))
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except OSError as error:
            raise UnreachableError(f"{source}: cannot be fetched ({error}); try again") from error
        yield copy


def put(target: Place, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file that then appears at `target` whole: never half, whatever stops it."""
    if isinstance(target, Path):
        check_file(target)  # a device would be replaced, /dev/null too
        target.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(PARTIAL, f".{target.name}.", target.parent)
        os.close(number)
        partial = Path(name)
        try:
            _written(write, partial)
            flush(partial)
            partial.chmod(0o644)  # mkstemp and safetensors make files for their owner alone
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="dicode-") as folder:
        _written(write, Path(folder) / target.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.fs.put_file(str(Path(folder) / target.name), target.path)  # object stores show a file when it is whole


def _written(write: Callable[[Path], object], path: Path) -> None:
    """Let `write` fill a file; what safetensors cannot write for want of space is an `OSError`, as elsewhere."""
    try:
        write(path)
    except SafetensorError as error:
        code = int(match[1]) if (match := re.search(r"os error (\d+)", str(error))) else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error


def put_text(target: Place, text: str) -> None:
    """Write a text file; see `put`."""
    put(target, lambda path: path.write_text(text, encoding="utf-8"))


def read_text(source: Place, most_bytes: int = MOST_TEXT) -> str:
    """A text file in UTF-8, without the byte order mark that Windows tools put first; line ends as they are.

    The one reader of every text file that a user supplies. Raises `TextError` naming the file, and the line where it is
    not UTF-8, for a file of more than `most_bytes`, and for what is no regular file.
    """
    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise TextError(f"{source}: expected a text file, got a folder, pipe or device")
    with source.open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise TextError(f"{source}: expected a text file of at most {most_bytes:,} bytes, got more")
    return decoded(data, str(source))


def decoded(data: bytes, name: str) -> str:
    """Bytes of a text as `read_text` reads them, or of UTF-16 with its byte order mark; `name` is for the error."""
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        text = data.decode("utf-16" if data.startswith(marks) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise TextError(f"{name}, line {line}: not UTF-8 ({error.reason}); save it as UTF-8") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise TextError(f"{name}, line {line}: holds a NUL character, as UTF-16 read as UTF-8 does; save it as UTF-8")
    return text


def read_json(source: Place, most_bytes: int = MOST_TEXT) -> Any:
    """The value of a JSON file, read as by `read_text`. Raises `TextError` where it is none, or nested too deeply."""
    text = read_text(source, most_bytes)
    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise TextError(f"{source}: nested too deeply to be read as JSON") from error
    except ValueError as error:  # a JSONDecodeError, or an integer of thousands of digits
        raise TextError(f"{source}: not JSON ({error})") from error


@contextmanager
def alone_with(held: Path, wait: bool) -> Iterator[bool]:
    """Whether this process has a file or folder to itself as long as the block lasts; others `wait`, or are refused.

    A lock of the system's (`flock`), which ends with the process. Windows has none: there all have it.
    """
    if os.name == "nt":
        yield True
        return
    import fcntl

    handle = os.open(held, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(handle)


def printable(name: str) -> str:
    """A file's name as text that can be written: bytes of it that are not UTF-8 become question marks."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def is_utf8(name: str) -> bool:
    """Whether a file's name is text: bytes of it that are not UTF-8 are half characters here."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk itself."""
    if path.is_dir():
        if os.name == "nt":
            return  # which opens no folders
        handle = os.open(path, os.O_RDONLY)
    else:
        handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """An empty folder, which takes the place of `output`, whatever that holds, when the block ends without an error."""
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(PARTIAL, f".{output.name}.", parent))
    try:
        yield made
        made.chmod(0o755)  # mkdtemp makes folders for their owner alone
        if output.exists():
            held = Path(tempfile.mkdtemp(PARTIAL, f".{output.name}.old.", parent))
            output.replace(held / "old")
            made.replace(output)
            shutil.rmtree(held)
        else:
            made.replace(output)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def sha256_of(source: Place) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def state_of(source: Place) -> str:
    """What changes when a file, or one in a folder, does: size and time for one here, what its store tells for another.

    '' where there is none.
    """
    try:
        if not isinstance(source, Path):
            return str(source.fs.ukey(source.path))
        facts = source.stat()
        if not stat.S_ISDIR(facts.st_mode):
            return f"{facts.st_size} {facts.st_mtime_ns}"
        digest = hashlib.sha256()
        for name in sorted(os.listdir(source)):
            held = os.stat(source / name)
            digest.update(os.fsencode(name) + f" {held.st_size} {held.st_mtime_ns}\n".encode())
        return digest.hexdigest()
    except (OSError, ValueError):  # ValueError: of a NUL in its name
        return ""
