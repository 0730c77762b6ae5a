"""A server of `dicode serve` in this process, with a worker, and what its tests share."""

import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import uvicorn
from PIL import Image

from dicode.serve.app import make_app
from dicode.serve.server import Server
from dicode.serve.store import Job
from dicode.serve.worker import Loaded, work

PATIENCE_S = 60.0


@contextmanager
def served(server: Server) -> Iterator[str]:
    """The address of the server, on a port of its own."""
    running = uvicorn.Server(uvicorn.Config(make_app(server), port=0, log_level="error"))
    ending, loaded = threading.Event(), Loaded(server.models, torch.device("cpu"))

    def claim() -> None:
        while not ending.is_set():
            if (job := server.store.claim("here")) is not None:
                work(server.store, loaded, job, threading.Event())
            time.sleep(0.01)

    threads = [threading.Thread(target=target) for target in (running.run, claim)]
    for thread in threads:
        thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    finally:
        ending.set()
        running.should_exit = True
        for thread in threads:
            thread.join()


def run_next(server: Server) -> Job:
    """The next job of the queue, rendered in this thread."""
    job = server.store.claim("here")
    assert job is not None
    work(server.store, Loaded(server.models, torch.device("cpu")), job, threading.Event())
    return server.store.get(job.id)


def picture(side: int = 64, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def wait_for(done: Callable[[], bool]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < until_s, "nothing happened"
        time.sleep(0.02)


class Served:
    """`dicode serve` as users start it, on a port of its own; ended with the block."""

    def __init__(self, model: Path, folder: Path, port: int | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = port or free.getsockname()[1]
        flags = ["--model", str(model), "--port", str(self.port), "--data-folder", str(folder)]
        self.command = [sys.executable, "-m", "dicode", "serve", *flags]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE_S)
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        for process in self.processes:
            process.kill()
            process.wait()

    def begin(self) -> "subprocess.Popen[bytes]":
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.processes.append(  # in a group of its own, as a shell begins it
            subprocess.Popen(self.command, env=environment, stdout=subprocess.DEVNULL, process_group=0)
        )
        return self.processes[-1]

    def ready(self) -> bool:
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def add(self, **request: Any) -> str:
        return self.client.post("/v1/videos", json={"prompt": "a", **request}).json()["id"]
