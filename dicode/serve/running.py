"""The server as a process: it answers until the clips at hand are finished."""

import threading
from types import FrameType

import uvicorn

from dicode.serve.app import make_app
from dicode.serve.server import Server

STREAMS_END_S = 5.0  # within which streams notice that the server ends


class Draining(uvicorn.Server):
    """On a signal new jobs are refused with 503, and all else is answered until the workers have ended.

    A second signal ends it at once.
    """

    def __init__(self, server: Server, host: str, port: int) -> None:
        self.served = server
        app, patience_s = make_app(server), int(STREAMS_END_S)
        super().__init__(uvicorn.Config(app, host, port, log_level="warning", timeout_graceful_shutdown=patience_s))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for every signal, between two instructions of the main thread."""
        if self.served.draining:
            super().handle_exit(sig, frame)
            return
        self.served.draining = True
        threading.Thread(target=self._drain, args=(sig, frame)).start()

    def _drain(self, sig: int, frame: FrameType | None) -> None:
        self.served.drain()
        super().handle_exit(sig, frame)
