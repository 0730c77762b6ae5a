"""`dicode serve` as processes: its clients, workers and servers that are killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from serving import PATIENCE_S, picture, wait_for
from starlette.testclient import TestClient

from dicode.serve.app import make_app
from dicode.serve.request import models_of
from dicode.serve.server import Server
from dicode.serve.store import Store
from dicode.serve.supervisor import Supervisor
from dicode.video.read import read_video


@pytest.fixture
def address(server: Server) -> Iterator[str]:
    """The server on a port of its own, and a worker of this process."""
    with served(server) as address:
        yield address


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")  # their service ends, not the client
def test_the_client_of_openai(address: str, tiny_model: Path, tmp_path: Path) -> None:
    with OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        made = client.videos.create(prompt="a spark", model="tiny", seconds="2", extra_body={"steps": 1})
        assert made.object == "video" and made.status in ("queued", "in_progress") and made.seconds == "2"
        assert client.videos.poll(made.id).status == "completed"
        image = ("a.png", picture(), "image/png")
        second = client.videos.create_and_poll(prompt="another", seconds="2", input_reference=image)
        assert second.status == "completed" and second.progress == 100
        assert client.videos.retrieve(made.id).completed_at
        assert [own.id for own in client.videos.list(limit=1)] == [second.id, made.id]  # page after page
        client.videos.download_content(made.id).write_to_file(tmp_path / "got.mp4")
        assert read_video(tmp_path / "got.mp4", fps=None).frames.shape == (16, 256, 256, 3)
        assert client.videos.download_content(made.id, variant="thumbnail").read()[:2] == b"\xff\xd8"
        remix = client.videos.remix(made.id, prompt="a third one")
        assert remix.remixed_from_video_id == made.id and client.videos.poll(remix.id).status == "completed"
        assert client.videos.delete(made.id).deleted
        with pytest.raises(NotFoundError):
            client.videos.retrieve(made.id)
        with pytest.raises(BadRequestError, match="seconds"):
            client.videos.create(prompt="a", seconds="1000")


def test_a_stream_can_be_watched_before_the_video_is_whole(address: str, server: Server, tmp_path: Path) -> None:
    with httpx.Client(base_url=address, timeout=PATIENCE_S) as client:
        job_id = client.post("/v1/videos", json={"prompt": "a", "seconds": 16, "steps": 1}).json()["id"]
        status, data = "", b""
        with client.stream("GET", f"/v1/videos/{job_id}/stream") as response:
            for part in response.iter_bytes():
                status = status or server.store.get(job_id).status
                data += part
        assert status == "in_progress"
        (tmp_path / "stream.mp4").write_bytes(data)
        assert len(read_video(tmp_path / "stream.mp4", fps=None).frames) == 128
        wait_for(lambda: server.store.get(job_id).finished)


def test_many_clients_at_once(address: str, server: Server) -> None:
    took: list[float] = []

    def ask(number: int) -> None:
        with httpx.Client(base_url=address, timeout=PATIENCE_S) as client:
            found = client.post("/v1/videos", json={"prompt": str(number), "seconds": 2, "steps": 1})
            if found.status_code == 429:
                assert found.headers["retry-after"]
                return
            for _ in range(20):
                began_s = time.monotonic()
                assert client.get(f"/v1/videos/{found.json()['id']}").status_code == 200
                took.append(time.monotonic() - began_s)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for(lambda: not set(server.store.counts()) & {"queued", "in_progress"})
    assert took and set(server.store.counts()) == {"completed"}


def test_a_killed_worker_is_begun_again_and_its_job_too(tmp_path: Path, tiny_model: Path) -> None:
    store = Store(tmp_path)
    supervisor = Supervisor(store, [str(tiny_model)], ["cpu"])
    server = Server(tmp_path, models_of([str(tiny_model)]), store, supervisor, hosts=("*",))
    with TestClient(make_app(server)) as client:
        assert client.get("/readyz").status_code == 503
        job_id = client.post("/v1/videos", json={"prompt": "a", "seconds": 12}).json()["id"]
        wait_for(lambda: len(store.events(job_id)) > 3)  # a clip is there
        (process,) = supervisor.processes.values()
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: store.get(job_id).finished)
        job = store.get(job_id)
        assert (job.status, job.attempts) == ("completed", 2)
        kinds = [event.kind for event in store.events(job_id)]
        assert kinds.count("started") == 2 and kinds.count("completed") == 1
        assert json.loads(client.get(f"/v1/videos/{job_id}").text)["progress"] == 100
    assert not supervisor.processes or all(own.poll() is not None for own in supervisor.processes.values())


def test_every_device_has_a_worker(tmp_path: Path, tiny_model: Path) -> None:
    store = Store(tmp_path)
    supervisor = Supervisor(store, [str(tiny_model)], ["cpu", "cpu"])
    with TestClient(
        make_app(Server(tmp_path, models_of([str(tiny_model)]), store, supervisor, hosts=("*",)))
    ) as client:
        wait_for(lambda: len(supervisor.ready) == 2)
        videos = [client.post("/v1/videos", json={"prompt": "a", "seconds": 12}).json()["id"] for _ in range(2)]
        wait_for(lambda: all(store.get(video).finished for video in videos))
        assert len({store.get(video).worker for video in videos}) == 2


def test_a_killed_server_goes_on_where_it_was(tmp_path: Path, tiny_model: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "serve"
    flags = ["--model", str(tiny_model), "--port", str(port), "--data-folder", str(folder)]
    command = [sys.executable, "-m", "dicode", "serve", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def begin() -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        wait_for(lambda: answers("/readyz"))
        return process

    def answers(path: str) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 200
        except httpx.TransportError:
            return False

    with ExitStack() as ending:
        process = ending.enter_context(begin())
        ending.callback(process.kill)
        url = f"http://127.0.0.1:{port}/v1/videos"
        made = [httpx.post(url, json={"prompt": str(i), "seconds": 16}).json()["id"] for i in range(2)]
        store = Store(folder)
        wait_for(lambda: len(store.events(made[0])) > 3)
        process.kill()
        process.wait()
        process = ending.enter_context(begin())
        ending.callback(process.kill)
        wait_for(lambda: store.counts() == {"completed": 2})
        for job_id in made:
            assert [event.kind for event in store.events(job_id)].count("completed") == 1
        files = sorted(str(path.relative_to(folder)) for path in (folder / "jobs").rglob("*") if path.is_file())
        assert len(files) == 2 * 5, files  # of the claims that are left; nothing unfinished
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
