"""A signal to end does what Ctrl-C does: no unfinished file is left, whatever command was writing."""

import os
import signal
import time
from pathlib import Path

import pytest

from dicode.cli.app import main
from dicode.data.parallel_map import parallel_map
from tests.fuzz import forked

COMMANDS = {
    "generate": ["generate", "a red square moves right", "--model", "MODEL", "-o", "OUT/a.mp4", "--seconds", "4"],
    "generate frames": ["generate", "a blue circle", "--model", "MODEL", "-o", "OUT/frames/", "--seconds", "4"],
    "generate sheet": [
        "generate",
        "x",
        "--model",
        "MODEL",
        "-o",
        "OUT/a.gif",
        "--seconds",
        "4",
        "--sheet",
        "OUT/s.png",
    ],
    "reconstruct": ["reconstruct", "CLIPS/videos/0000.mp4", "--model", "MODEL", "-o", "OUT/a.webm"],
    "tokenize": ["tokenize", "CLIPS/videos/0000.mp4", "--model", "MODEL", "-o", "OUT/a.safetensors"],
    "cache": ["data", "cache", "CLIPS", "-o", "OUT/cache", "--size", "16"],
    "data sheet": ["data", "sheet", "CLIPS", "-o", "OUT/s.png", "--count", "2"],
}
WAIT_S = 600.0  # against hanging only


def run_until_it_writes(folder: Path, number: int, work) -> tuple[int, list[str]]:
    """Exit code of a forked process that never gets to rename a file, and files that the signal left in the folder."""
    child = forked()
    if child == 0:
        code = 99
        try:
            for holder, name in ((os, "replace"), (os, "fsync"), (Path, "replace"), (Path, "rename")):
                setattr(holder, name, lambda *_: time.sleep(2 * WAIT_S))  # unfinished files stay unfinished
            signal.signal(number, signal.SIG_DFL)  # under nohup a process is born with SIGHUP ignored, and goes on so
            code = work()
        finally:
            os._exit(code)
    deadline_s = time.monotonic() + WAIT_S
    while not any(".part" in path.name for path in folder.rglob("*")):
        assert time.monotonic() < deadline_s, "no unfinished file appeared"
        assert os.waitpid(child, os.WNOHANG)[0] == 0, "ended before it wrote"
        time.sleep(0.01)
    os.kill(child, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, [path.name for path in folder.rglob("*") if ".part" in path.name]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_to_end_leaves_no_unfinished_file(tiny_model, drawn_clips, tmp_path, name, capfd):
    places = {"MODEL": str(tiny_model), "CLIPS": str(drawn_clips), "OUT": str(tmp_path)}
    argv = []
    for word in COMMANDS[name]:
        for place, path in places.items():
            word = word.replace(place, path)
        argv.append(word)
    number = signal.SIGHUP if name == "reconstruct" else signal.SIGTERM
    assert run_until_it_writes(tmp_path, number, lambda: main(argv)) == (128 + number, [])
    assert "dicode: interrupted; " in capfd.readouterr().err


def test_handlers_are_as_before_when_a_command_has_run(capsys):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    assert main(["data", "sheet", "missing"]) == 2
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before


def write_for_ever(folder: Path) -> None:
    partial = folder / f"{os.getpid()}.part"
    try:
        partial.touch()
        time.sleep(2 * WAIT_S)
    finally:
        partial.unlink()


def test_worker_processes_clear_up_and_end_with_the_one_that_started_them(tmp_path):
    """Three units for two workers: the third must not begin."""

    def work() -> int:
        def ended(*_: object) -> None:
            raise KeyboardInterrupt

        signal.signal(signal.SIGTERM, ended)
        try:
            list(parallel_map(write_for_ever, [tmp_path] * 3, workers=2))
        except KeyboardInterrupt:
            return 7
        return 0

    assert run_until_it_writes(tmp_path, signal.SIGTERM, work) == (7, [])
