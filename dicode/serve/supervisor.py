"""Workers as processes of the server, one a device: begun with it, begun again when they die, ended with it."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from dicode.serve.store import DATABASE, Store

# before a worker that died is begun again; doubled while it dies before it was ready
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
LONGEST_CLIP_S = 60.0  # that is waited for when the server ends


class Supervisor:
    """Keeps one worker a device alive, from `start` to `stop`."""

    def __init__(self, store: Store, models: Sequence[str], devices: Sequence[str]) -> None:
        self.store, self.models, self.devices = store, list(models), list(devices)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.ready: set[str] = set()
        self.restarts = 0
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Queue again what the server of before left behind, and begin all workers."""
        own = f"{socket.gethostname()}:"
        for name in {job.worker for job in self.store.running() if job.worker and job.worker.startswith(own)}:
            if not lives(int(name.removeprefix(own).partition(":")[0])):
                self.release(name)
        for number, device in enumerate(self.devices):
            thread = threading.Thread(target=self._keep, args=(f"{own}{os.getpid()}:{number}", device), daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self, wait_s: float = LONGEST_CLIP_S) -> None:
        """Let every worker finish the clip at hand, then end them; their jobs are queued for the next start."""
        self._ending.set()
        for process in [*self.processes.values()]:
            if process.stdin is not None:
                with suppress(OSError, ValueError):  # it has ended, and its pipe may be closed
                    process.stdin.write(b"drain\n")
                    process.stdin.flush()
        until_s = time.monotonic() + wait_s
        for process in [*self.processes.values()]:
            try:
                process.wait(max(0.1, until_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        for thread in self._threads:
            thread.join(5)

    def release(self, name: str) -> None:
        """Queue the jobs of a worker that has ended again, and remove what it had written of them.

        Where the database is busy or away, that is left to those who look for silent workers.
        """
        with suppress(*self.store.passing):
            for job in self.store.release(worker=name):
                shutil.rmtree(self.store.folder / "jobs" / job.id / str(job.claim), ignore_errors=True)

    def _keep(self, name: str, device: str) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._ending.is_set():
            with self._begin(name, device) as process:  # closes its pipes, and waits for it
                self.processes[name] = process
                assert process.stdout is not None
                for line in process.stdout:
                    if line.strip() == b"ready":
                        self.ready.add(name)
            worked = name in self.ready
            self.ready.discard(name)
            self.release(name)
            if self._ending.is_set():
                return
            self.restarts += 1
            pause_s = FIRST_PAUSE_S if worked else min(2 * pause_s, LONGEST_PAUSE_S)
            self._ending.wait(pause_s)

    def _begin(self, name: str, device: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "dicode.serve.worker", str(self.store.folder), name, "--device", device]
        database = {DATABASE: self.store.database} if self.store.database else {}
        return subprocess.Popen(
            [*command, "--models", *self.models],
            env={**os.environ, **database},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,  # Ctrl-C in a terminal is for the server, which lets the clip at hand be finished
        )


def lives(number: int) -> bool:
    """Whether another process of this machine has this number. That of a server in a container may be its own again."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return number != os.getpid()
