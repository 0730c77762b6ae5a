"""A server of `dicode serve` in this process, with a worker, for tests of its clients."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import uvicorn

from dicode.serve.app import make_app
from dicode.serve.server import Server
from dicode.serve.worker import Loaded, work


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
