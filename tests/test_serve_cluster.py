"""`dicode serve` on Ray Serve with PostgreSQL, as on several machines; one of its workers dies amid a video."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from postgres import PROGRAMS, postgres

from dicode.serve.names import VIDEO
from dicode.serve.request import models_of
from dicode.serve.store import Store
from dicode.serve.worker import Loaded, work
from dicode.video.read import read_video

if not PROGRAMS and not os.environ.get("DICODE_POSTGRES"):
    pytest.skip("no PostgreSQL", allow_module_level=True)
PATIENCE_S = 120.0
REQUESTS = [{"prompt": "a spark", "seconds": 60, "context_key_frames": 3, "seed": seed} for seed in range(4)]


def worker_numbers() -> list[int]:
    """Process numbers of the replicas that render."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::ServeReplica:dicode:worker"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_killed_replica_loses_and_changes_nothing(tmp_path: Path, tiny_model: Path) -> None:
    folder, port = tmp_path / "shared", free_port()
    flags = ["--ray", "local", "--workers", "2", "--port", str(port), "--data-folder", str(folder)]
    command = [sys.executable, "-m", "dicode", "serve", "--model", str(tiny_model), *flags]
    with ExitStack() as ending:
        database = ending.enter_context(postgres())
        environment = {
            **os.environ,
            "DICODE_DATABASE": database,
            "OMP_NUM_THREADS": "1",
            "RAY_SERVE_LOG_TO_STDERR": "0",
        }
        process = ending.enter_context(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
        ending.callback(process.wait, PATIENCE_S)
        ending.callback(process.send_signal, signal.SIGTERM)
        client = ending.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S))
        wait_for(lambda: answers(client))
        store = Store(folder, database)
        videos = [client.post("/v1/videos", json=request).json()["id"] for request in REQUESTS]
        wait_for(lambda: len(store.running()) == 2)  # both have one to lose
        os.kill(worker_numbers()[0], signal.SIGKILL)
        wait_for(lambda: store.counts() == {"completed": len(videos)})
        contents = [client.get(f"/v1/videos/{video}/content").content for video in videos]
        listed = client.get("/v1/videos?order=asc").json()["data"]
        assert [own["id"] for own in listed] == videos
        assert [[event.kind for event in store.events(video)].count("completed") for video in videos] == [1] * 4
        assert sorted(store.get(video).attempts for video in videos)[-1] == 2
    alone, loaded = Store(tmp_path), Loaded(models_of([str(tiny_model)]), torch.device("cpu"))
    for shown, content in zip(listed, contents, strict=True):
        alone.add(Store.new_id(), shown["request"], 1)
        job = alone.claim("here")
        assert job is not None
        work(alone, loaded, job, threading.Event())
        (tmp_path / "got.mp4").write_bytes(content)
        own = tmp_path / "jobs" / job.id / str(job.claim) / VIDEO
        got, expected = (read_video(path, None).frames.astype(int) for path in (tmp_path / "got.mp4", own))
        assert np.abs(got - expected).mean() < 0.01  # another process may round otherwise


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def wait_for(true: Callable[[], bool]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < until_s
        time.sleep(0.02)
