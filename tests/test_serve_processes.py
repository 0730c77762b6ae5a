"""`dicode serve` as processes: its clients, workers and servers that are killed."""

import json
import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from serving import PATIENCE_S, Served, picture, served, wait_for
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
        board = {"shots": [{"prompt": "a", "seconds": 2}, {"prompt": "b", "seconds": 4}], "steps": 1, "loop": False}
        shots = client.videos.create(prompt="", extra_body=board)
        assert client.videos.poll(shots.id).seconds == "6"
        with (tmp_path / "got.mp4").open("rb") as video:
            extended = client.videos.extend(prompt="b", seconds="2", video=video)  # type: ignore[arg-type]
        assert client.videos.poll(extended.id).status == "completed"
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
    folder = tmp_path / "serve"
    with Served(tiny_model, folder) as own:
        process = own.begin()
        wait_for(own.ready)
        made = [own.add(prompt=str(i), seconds=16) for i in range(2)]
        store = Store(folder)
        wait_for(lambda: len(store.events(made[0])) > 3)
        process.kill()
        process.wait()
        process = own.begin()
        wait_for(own.ready)
        wait_for(lambda: store.counts() == {"completed": 2})
        for job_id in made:
            assert [event.kind for event in store.events(job_id)].count("completed") == 1
        files = sorted(str(path.relative_to(folder)) for path in (folder / "jobs").rglob("*") if path.is_file())
        assert len(files) == 2 * 5, files  # of the claims that are left; nothing unfinished
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)


@pytest.mark.parametrize(
    "end", [lambda process: process.terminate(), lambda process: os.killpg(process.pid, signal.SIGINT)]
)
def test_a_server_that_is_ended_answers_until_the_clip_at_hand_is_whole(
    tmp_path: Path, tiny_model: Path, end: Callable[["subprocess.Popen[bytes]"], None]
) -> None:
    """By a signal to it alone, and by Ctrl-C in a terminal, which goes to all of its group."""
    with Served(tiny_model, tmp_path / "serve") as own:
        process = own.begin()
        wait_for(own.ready)
        # every clip takes a while, and those who follow the video would do so for an hour
        job_id = own.add(live=True, seconds=3600, size="1024x1024", steps=400)
        store = Store(tmp_path / "serve")
        followed: list[str] = []

        def follow(path: str) -> None:
            with httpx.stream("GET", f"{own.client.base_url}/v1/videos/{job_id}/{path}", timeout=None) as response:
                for _ in response.iter_bytes():
                    pass
            followed.append(path)

        threads = [threading.Thread(target=follow, args=(path,), daemon=True) for path in ("events", "stream")]
        for thread in threads:
            thread.start()
        wait_for(lambda: "rendering" in [event.kind for event in store.events(job_id)])
        end(process)
        wait_for(lambda: own.client.get("/readyz").status_code == 503)
        refused = own.client.post("/v1/videos", json={"prompt": "b"})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert own.client.get(f"/v1/videos/{job_id}").status_code == 200
        process.wait(PATIENCE_S)
        for thread in threads:
            thread.join(PATIENCE_S)
        assert sorted(followed) == ["events", "stream"]
        assert (store.get(job_id).status, store.get(job_id).attempts) == ("queued", 0)
        assert [event.kind for event in store.events(job_id)].count("clip") == 1


def test_a_second_server_of_a_folder_leaves_the_jobs_of_the_first_alone(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "serve"
    with Served(tiny_model, folder) as own, Served(tiny_model, folder, own.port) as second:
        own.begin()
        wait_for(own.ready)
        job_id = own.add(live=True, seconds=600, steps=1)
        store = Store(folder)
        wait_for(lambda: "clip" in [event.kind for event in store.events(job_id)])
        assert second.begin().wait(PATIENCE_S) != 0  # the port is taken
        assert (store.get(job_id).status, store.get(job_id).attempts) == ("in_progress", 1)
        own.client.post(f"/v1/videos/{job_id}/direct", json={"end": True})
        wait_for(lambda: store.get(job_id).finished)
        assert store.get(job_id).status == "completed"


def test_a_worker_is_begun_again_while_the_database_is_busy(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicode.serve.database.BUSY_S", 0.2)  # of this process
    store = Store(tmp_path)
    supervisor = Supervisor(store, [str(tiny_model)], ["cpu"])
    supervisor.start()
    try:
        wait_for(lambda: bool(supervisor.ready))
        (process,) = supervisor.processes.values()
        with sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            process.kill()
            wait_for(lambda: supervisor.restarts == 1)
            other.execute("ROLLBACK")
        wait_for(lambda: bool(supervisor.ready))
        process.poll()
    finally:
        supervisor.stop()
    assert all(own.poll() is not None for own in supervisor.processes.values())
    supervisor.stop()  # once more: its pipes are closed
