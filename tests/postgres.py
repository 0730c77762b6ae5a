"""A PostgreSQL of its own for tests, where its programs are installed: a folder, a socket, no network."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: -int(path.parent.name))
PROGRAMS = str(FOLDERS[0]) if FOLDERS else os.path.dirname(shutil.which("initdb") or "")
USER = "nobody" if hasattr(os, "getuid") and os.getuid() == 0 else None  # it refuses to run as root


@contextmanager
def postgres() -> Iterator[str]:
    """The address of an empty database."""
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        if USER:
            shutil.chown(folder, USER)

        def run(program: str, *flags: str) -> None:
            command = [f"{PROGRAMS}/{program}", "-D", f"{folder}/data", *flags]
            subprocess.run(command, check=True, user=USER, stdout=subprocess.DEVNULL, cwd=folder)

        run("initdb", "-U", "dicode", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C")
        run("pg_ctl", "-w", "-o", f"-c listen_addresses= -k {folder} -F", "-l", f"{folder}/log", "start")
        try:
            yield f"postgresql:///postgres?host={folder}&user=dicode"
        finally:
            run("pg_ctl", "-m", "immediate", "stop")
