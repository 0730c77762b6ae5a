"""Local and remote paths (whatever fsspec reaches: `s3://…`, `gs://…`, `memory://…`), and whole files or none."""

import codecs
import errno
import hashlib
import json
import os
import re
import secrets
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

Place = Path | UPath  # a `Path` is always local
PARTIAL = ".part"  # suffix of unfinished files, whose names begin with a dot
UNFINISHED = re.compile(rf"\..+\.[0-9a-f]{{8}}{re.escape(PARTIAL)}")  # those names: see `unfinished`
MAX_NAME_BYTES = 255 - len("..12345678.part2")  # names of unfinished files are longer
MAX_SUFFIX = 16  # characters of a copy's; readers know none that is longer
MAX_TEXT_BYTES = 2**30  # captions of ten million clips


class TextError(ValueError):
    """A file that cannot be read as text or JSON: names the file, and the line."""


class UnreachableError(ValueError):
    """A store that does not answer, which says nothing about the file: stop, and try again later."""


def check_parent(path: Path | None) -> None:
    """Raise before any work is done where the folder of an output is missing or cannot be written to."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder to write {path.name!r} in")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent}: cannot write here")
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
        raise ValueError(f"expected a name of at most {MAX_NAME_BYTES} bytes for an output, got {path.name!r}")


def check_file(path: Path | None, is_own: Callable[[Path], bool] | None = None) -> None:
    """Raise before any work is done where an output would take the place of what this package did not write.

    Of a folder, a pipe or a device, and of a file that `is_own` does not recognise.
    """
    if path is None or not path.exists():
        return
    if not path.is_file():
        raise FileExistsError(f"{path}: is a folder, a pipe or a device; expected the name of a file")
    if is_own is not None and not is_own(path):
        raise FileExistsError(f"{path}: would be replaced and was not written by dicode; move it, or write elsewhere")


def check_folder(path: Path) -> None:
    """Raise before any work is done where a folder cannot be replaced: the current one, or a mounted disk."""
    held = path.resolve()
    if Path.cwd().is_relative_to(held) or os.path.ismount(held):
        raise ValueError(f"{str(path)!r} is the current folder or a mount point; name another folder")


def check_apart(output: str | Path, *inputs: Path | None) -> None:
    """Raise `ValueError` for an output that would replace one of these files or folders, which are read."""
    for own in inputs:
        if own is not None and own.exists() and Path(output).exists() and own.samefile(output):
            raise ValueError(f"{output}: is read by this command; write elsewhere")


def place(name: str | Path | UPath) -> Place:
    """The file or folder of this name or URL."""
    text = str(name)
    if isinstance(name, Path) or "://" not in text:
        return Path(text)
    return Path(text.removeprefix("file://")) if text.startswith("file://") else UPath(text)


@contextmanager
def fetched(source: Place, span: tuple[int, int] | None = None, name: str = "") -> Iterator[Path]:
    """A local path to the file for the length of the block: its own, or a temporary copy with the same suffix.

    `span` is offset and length of a part of the file, whose name is `name`. Raises `UnreachableError` where a store
    fails for another reason than that the file is missing or forbidden, and `OSError` where the copy cannot be written.
    """
    if isinstance(source, Path) and span is None:
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="dicode-") as folder:
        suffix = Path(name or source.name).suffix[:MAX_SUFFIX]
        copy = Path(folder) / f"clip{suffix}"  # its own name may be too long for this disk
        with copy.open("wb") as target:
            for part in _parts(source, span):
                target.write(part)
        yield copy


def _parts(source: Place, span: tuple[int, int] | None) -> Iterator[bytes]:
    """The bytes of a file, or of a part of it; errors of the store are those of `fetched`."""
    try:
        with source.open("rb") as file:
            if span is not None:
                file.seek(span[0])
                yield file.read(span[1])
                return
            while part := file.read(2**20):
                yield part
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except OSError as error:
        raise UnreachableError(f"{source}: cannot be fetched ({error}); try again") from error


def put(target: Place, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, which becomes `target` once it is whole and on the disk."""
    if not isinstance(target, Path):
        with tempfile.TemporaryDirectory(prefix="dicode-") as folder:
            local = Path(folder) / target.name
            _write(write, local)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.fs.put_file(str(local), target.path)  # object stores list a file when it is whole
        return
    check_file(target)  # a device would be replaced, /dev/null too
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = unfinished(target)
    try:
        _write(write, partial)
        flush(partial)
        partial.chmod(0o644)  # safetensors creates files for their owner alone
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def unfinished(target: Path) -> Path:
    """A name beside `target` that nothing has; known before the file is there: no interrupt leaves it behind."""
    return target.absolute().with_name(f".{target.name}.{secrets.token_hex(4)}{PARTIAL}")


def _write(write: Callable[[Path], object], path: Path) -> None:
    """Let `write` fill a file; a full disk is an `OSError` from safetensors too."""
    try:
        write(path)
    except SafetensorError as error:
        code = int(match[1]) if (match := re.search(r"os error (\d+)", str(error))) else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error


def put_text(target: Place, text: str) -> None:
    """Write a text file; see `put`."""
    put(target, lambda path: path.write_text(text, encoding="utf-8"))


def read_text(source: Place, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """A text file in UTF-8, or UTF-16 with a byte order mark; line ends unchanged.

    Raises `TextError` for another encoding, for more than `max_bytes`, and for a folder, pipe or device.
    """
    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise TextError(f"{source}: expected a text file, got a folder, pipe or device")
    with source.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise TextError(f"{source}: expected a text file of at most {max_bytes:,} bytes, got more")
    return decoded(data, str(source))


def decoded(data: bytes, name: str) -> str:
    """The text of a file's bytes, as by `read_text`; errors call the file `name`."""
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


def read_json(source: Place, max_bytes: int = MAX_TEXT_BYTES) -> Any:
    """The value of a JSON file, read as by `read_text`. Raises `TextError` for other text and for duplicate keys."""
    return json_value(read_text(source, max_bytes), str(source))


def json_value(text: str, name: str) -> Any:
    """The value of a JSON text, in which no object has a key twice; errors, `TextError`, call it `name`.

    NaN is a number here, as many programs write it.
    """
    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise TextError(f"{name}: not JSON (nested too deeply)") from error
    except ValueError as error:  # a JSONDecodeError, or an integer of thousands of digits
        raise TextError(f"{name}: not JSON ({error})") from error


@contextmanager
def alone_with(path: Path, wait: bool) -> Iterator[bool]:
    """Whether this process holds the lock (`flock`) of a file or folder during the block; others wait, or get False.

    The lock ends with the process. Windows has none: there every process gets True.
    """
    if os.name == "nt":
        yield True
        return
    import fcntl

    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def printable(name: str) -> str:
    """A file's name as valid text: bytes that are not UTF-8 become question marks."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def is_utf8(name: str) -> bool:
    """Whether a file's name is valid text; Python reads other bytes as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """An empty folder, which takes the place of `output`, whatever that holds, when the block ends without an error.

    Where `output` is a link, of the folder that it leads to. Raises as `check_folder`.
    """
    check_folder(output)
    output = output.resolve()
    folder = unfinished(output)
    try:
        folder.mkdir(parents=True)
        yield folder
        replace_folder(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Rename a folder to `target`; what has that name, or what a link of that name leads to, is removed."""
    target = target.resolve()
    if not target.exists():
        source.replace(target)
        return
    old = unfinished(target)
    try:
        target.replace(old)
        source.replace(target)
    except BaseException:  # an interrupt too
        if old.exists() and not target.exists():
            old.replace(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sha256_of(source: Place) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def state_of(source: Place) -> str:
    """A text that changes with a file, or with those in a folder: sizes and times, or a store's own mark.

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
            entry = os.stat(source / name)
            digest.update(os.fsencode(name) + f" {entry.st_size} {entry.st_mtime_ns}\n".encode())
        return digest.hexdigest()
    except (OSError, ValueError):  # ValueError: a NUL in its name
        return ""
