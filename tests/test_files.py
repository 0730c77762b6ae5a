"""Files: whole or not at all, text of any editor, locks, and states that change with a file."""

from pathlib import Path

import pytest
from safetensors import SafetensorError
from upath import UPath

from dicode.files import (
    TextError,
    UnreachableError,
    alone_with,
    check_file,
    check_parent,
    fetched,
    is_utf8,
    place,
    printable,
    put,
    put_text,
    read_json,
    read_text,
    state_of,
    whole_folder,
)


def half(path: Path) -> None:
    path.write_text("half")
    raise RuntimeError("halfway")


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, kind: str) -> None:
    folder = tmp_path if kind == "local" else UPath(f"memory://{tmp_path.name}")
    put_text(folder / "new" / "a.txt", "one")
    with pytest.raises(RuntimeError, match="halfway"):
        put(folder / "new" / "a.txt", half)
    assert (folder / "new" / "a.txt").read_text() == "one"
    assert [path.name for path in (folder / "new").iterdir()] == ["a.txt"]
    with fetched(folder / "new" / "a.txt") as copy:
        assert copy.suffix == ".txt" and copy.read_text() == "one"
    with fetched(folder / "new" / "a.txt", (1, 2), "b.txt") as copy:
        assert copy.suffix == ".txt" and copy.read_text() == "ne"


def test_a_full_disk_is_an_os_error_from_safetensors_too(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left on device") as raised:
        put(tmp_path / "w.safetensors", full)
    assert raised.value.errno == 28 and not list(tmp_path.iterdir())


def test_a_store_that_fails_is_no_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise ConnectionError("timed out")

    source = UPath("memory://nowhere/a.mp4")
    with pytest.raises(FileNotFoundError), fetched(source):
        pass
    monkeypatch.setattr(type(source), "open", failing)
    with pytest.raises(UnreachableError, match=r"cannot be fetched \(timed out\); try again"), fetched(source):
        pass


def test_a_copy_that_cannot_be_written_is_no_fault_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    source = UPath(f"memory://{tmp_path.name}/a.mp4")
    source.write_bytes(b"1")
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left") as raised, fetched(source):
        pass
    assert raised.value.errno == 28


def test_a_folder_replaces_another_when_it_is_whole(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with whole_folder(tmp_path / "out") as folder:
            (folder / name).touch()
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out") as folder:
        half(folder / "c")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("interrupted", [1, 2])
def test_an_interrupt_between_two_renames_leaves_the_old_folder(tmp_path, monkeypatch, interrupted) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    rename, calls = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == interrupted:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "model") as folder:
        (folder / "new").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["model", "model/old"]


def test_an_output_is_checked_before_any_work(tmp_path: Path) -> None:
    for path, error in (
        (tmp_path / "none/a.json", FileNotFoundError),
        (tmp_path / ("x" * 240), ValueError),
    ):
        with pytest.raises(error):
            check_parent(path)
    with pytest.raises(FileExistsError, match="expected the name of a file"):
        check_file(tmp_path)
    check_parent(tmp_path / "a.json")
    check_file(tmp_path / "a.json")
    check_file(None)


def test_text_is_read_as_editors_write_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes("é\r\n".encode(encoding))
        assert read_text(path) == "é\r\n"
    for data, message in (
        (b"a\n\xff", "line 2: not UTF-8"),
        (b"a\n\0b", "line 2: holds a NUL"),
        (b"x" * 9, "at most 8"),
    ):
        path.write_bytes(data)
        with pytest.raises(TextError, match=message):
            read_text(path, 8)
    with pytest.raises(TextError, match="got a folder"):
        read_text(tmp_path)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[" * 100_000, "9" * 5000, "{"])
def test_json_that_python_accepts_or_fails_on_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(TextError, match=r"a\.json: not JSON"):
        read_json(tmp_path / "a.json")


def test_a_lock_is_held_once(tmp_path: Path) -> None:
    with alone_with(tmp_path, wait=True) as first, alone_with(tmp_path, wait=False) as second:
        assert first and not second
    with alone_with(tmp_path, wait=False) as again:
        assert again


def test_a_state_changes_with_a_file_and_with_those_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    assert state_of(path) == state_of(tmp_path / "\0") == ""
    states = set()
    for text in ("", "x"):
        path.write_text(text)
        states |= {state_of(path), state_of(tmp_path)}
    assert len(states) == 4


def test_names_and_urls_of_any_kind() -> None:
    assert place("a/b") == place(Path("a/b")) == place("file://a/b") == Path("a/b")
    assert isinstance(place("memory://a/b"), UPath) and not isinstance(place("memory://a/b"), Path)
    assert is_utf8("é🔥") and not is_utf8("a\udcff") and printable("a\udcff") == "a�"
