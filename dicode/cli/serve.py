"""`dicode serve`: an HTTP API, a queue and a page."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from dicode.cli import common
from dicode.config import DEFAULT_MODEL, Count, Range
from dicode.stopwatch import Stopwatch

KEY = "DICODE_API_KEY"


@dataclass(frozen=True)
class Serve:
    """Serve models over HTTP: an API in the shape of OpenAI's videos, a queue, and a page at /. Ctrl-C ends it."""

    model: tuple[str, ...] = (DEFAULT_MODEL, "sprites", "world")  # models by name, folder or Hub id, the default first
    host: str = "127.0.0.1"  # address to listen on; any other than this machine's needs an API key
    port: Annotated[int, Range(0, 65535)] = 8000
    device: str = "auto"  # auto, cpu, cuda, or several with commas, such as cuda:0,cuda:1: a worker each
    data_folder: Path = Path("serve")  # folder of jobs and videos; a later start goes on with it
    api_key: str | None = None  # key that clients have to send; default: DICODE_API_KEY
    hosts: tuple[str, ...] = ()  # host names that requests may be for, beside this machine's
    queue: Count = 32  # jobs that may wait; more are refused with 429
    max_seconds: common.Seconds = 600.0  # longest video in seconds
    ray: str | None = None  # Ray cluster to serve on: an address, auto, or local for one started here; needs --database
    workers: Count = 1  # worker replicas on the Ray cluster
    database: str | None = None  # address of PostgreSQL, for several machines; default: DICODE_DATABASE, or SQLite
    keep_days: common.Days | None = None  # days that a finished video is kept; default: until it is deleted


def serve(command: Serve, watch: Stopwatch) -> None:
    """Runs until a signal, then lets the clip at hand be finished."""
    with common.needs_extra("serve"):
        from dicode.serve.running import Draining
    from dicode.serve.request import models_of
    from dicode.serve.server import LOCAL, Server
    from dicode.serve.store import DATABASE, Store
    from dicode.serve.supervisor import Supervisor

    key = command.api_key or os.environ.get(KEY)
    if command.host not in LOCAL and not key:
        raise ValueError(f"--host: {command.host} can be reached from other machines; set --api-key or {KEY}")
    database = command.database or os.environ.get(DATABASE)
    if command.ray and not database:
        raise ValueError(f"--ray: machines share jobs in PostgreSQL; set --database or {DATABASE}")
    models = models_of(list(command.model))
    command.data_folder.mkdir(parents=True, exist_ok=True)
    hosts = (*LOCAL, *command.hosts) if command.hosts or command.host in LOCAL else ("*",)
    limits: dict[str, Any] = {"api_key": key, "queue": command.queue, "most_s": command.max_seconds, "hosts": hosts}
    limits["keep_days"] = command.keep_days
    print(f"http://{command.host}:{command.port}: {', '.join(models)}; jobs in {command.data_folder}", flush=True)
    if command.ray:
        from dicode.serve.cluster import run

        run(command.ray, (command.host, command.port), command.workers, {
            "folder": str(command.data_folder.resolve()), "database": database, "models": list(command.model),
            "device": command.device, **limits,
        })  # fmt: skip
        return
    store = Store(command.data_folder, database)
    supervisor = Supervisor(store, command.model, command.device.split(","))
    server = Server(command.data_folder, models, store, supervisor, **limits)
    server.sweep()
    running = Draining(server, command.host, command.port)
    running.run()
    if not running.started:
        raise OSError("the server could not be started; what it printed before says why")
