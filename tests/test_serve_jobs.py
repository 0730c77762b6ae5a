"""Jobs of `dicode serve` rendered: their files, what is made of them, how they end."""

import errno
import io
import json
import os
import sqlite3
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hostile import bomb
from PIL import Image
from serving import PATIENCE_S, picture, run_next, served, wait_for
from starlette.testclient import TestClient

from dicode.cli.app import main
from dicode.pipeline import DiCoDe
from dicode.serve.app import forget_old
from dicode.serve.downloads import _convert
from dicode.serve.render import save_picture
from dicode.serve.request import RequestError, models_of
from dicode.serve.server import Server
from dicode.serve.store import Job, Store
from dicode.serve.worker import Loaded, work, work_on
from dicode.video.read import read_video
from dicode.video.write import VideoWriter


def test_a_video_is_rendered_and_its_files_are_served(client: TestClient, server: Server, tiny_model: Path) -> None:
    asked = {"prompt": "a spark", "seconds": 3, "seed": 5, "steps": 2, "size": "128x128"}
    job_id = client.post("/v1/videos", json=asked).json()["id"]
    assert run_next(server).status == "completed"
    shown = client.get(f"/v1/videos/{job_id}").json()
    assert shown["status"] == "completed" and shown["progress"] == 100 and shown["completed_at"]
    data = client.get(f"/v1/videos/{job_id}/content").content
    (server.folder / "copy.mp4").write_bytes(data)
    frames = read_video(server.folder / "copy.mp4", fps=None).frames
    assert frames.shape == (24, 128, 128, 3)
    own = np.concatenate([*DiCoDe.from_pretrained(tiny_model).generate("a spark", seconds=3.0, seed=5, steps=2)])
    assert np.abs(frames.astype(int) - own.repeat(4, 1).repeat(4, 2)).mean() < 3  # but for the codec's loss
    part = client.get(f"/v1/videos/{job_id}/content", headers={"Range": "bytes=0-99"})
    assert part.status_code == 206 and part.content == data[:100]
    for variant, size in (("thumbnail", (128, 128)), ("spritesheet", (3 * 128, 128))):
        image = Image.open(io.BytesIO(client.get(f"/v1/videos/{job_id}/content?variant={variant}").content))
        assert image.size == size
    plan, again = server.folder / "plan.safetensors", server.folder / "again.mp4"
    plan.write_bytes(client.get(f"/v1/videos/{job_id}/plan").content)
    assert main(["reconstruct", str(plan), "--model", str(tiny_model), "--scale", "1", "-o", str(again)]) == 0
    assert read_video(again, fps=None).frames.shape == (24, 32, 32, 3)
    events = client.get(f"/v1/videos/{job_id}/events").text
    assert [line[7:] for line in events.splitlines() if line.startswith("event: ")] == [
        "queued", "started", "rendering", "clip", "clip", "completed",
    ]  # fmt: skip
    later = client.get(f"/v1/videos/{job_id}/events", headers={"Last-Event-ID": "3"}).text
    assert later.count("event: ") == 2
    assert client.get(f"/v1/videos/{job_id}/stream").content == data
    assert client.delete(f"/v1/videos/{job_id}").status_code == 200
    assert not server.job_folder(job_id).exists()


def test_remixes_and_extensions(client: TestClient, server: Server, tiny_model: Path) -> None:
    files = {"input_reference": picture()}
    values = {"prompt": "a", "seconds": "2", "seed": "3", "steps": "1"}
    first = client.post("/v1/videos", data=values, files=files).json()
    run_next(server)
    remix = client.post(f"/v1/videos/{first['id']}/remix", json={"prompt": "b"}).json()
    assert remix["remixed_from_video_id"] == first["id"] and remix["prompt"] == "b"
    assert remix["request"]["seed"] == 3 and (server.job_folder(remix["id"]) / "image.png").is_file()
    board = {"shots": [{"prompt": "a", "seconds": 2}, {"prompt": "b", "seconds": 4}], "steps": 1}
    whole = client.post("/v1/videos", json=board).json()
    run_next(server)
    assert client.post(f"/v1/videos/{whole['id']}/remix", json={"prompt": "c"}).json()["seconds"] == "6"
    extended = client.post("/v1/videos/extensions", json={"prompt": "c", "seconds": 2, "video": {"id": first["id"]}})
    assert extended.status_code == 200
    assert [run_next(server).status for _ in range(3)] == ["completed"] * 3


def test_a_given_video_is_rendered_from_its_own_tokens(
    client: TestClient, server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), np.uint8)
    with VideoWriter(tmp_path / "own.mp4", 10.0) as writer:
        writer.write(frames)
    files = {"video": ("../own.txt", (tmp_path / "own.mp4").read_bytes())}
    found = client.post("/v1/videos/reconstructions", files=files, data={"seed": "3"}).json()
    job = run_next(server)
    assert (job.id, job.status) == (found["id"], "completed")
    shown = client.get(f"/v1/videos/{job.id}").json()
    assert shown["seconds"] == "3" and shown["request"]["reconstructs"]
    for variant, form in (("source", "mp4"), ("video", "mp4"), ("gif", "gif"), ("webm", "webm")):
        data = client.get(f"/v1/videos/{job.id}/content?variant={variant}").content
        (tmp_path / f"{variant}.{form}").write_bytes(data)
        assert len(read_video(tmp_path / f"{variant}.{form}", None).frames) == 24
    again = client.get(f"/v1/videos/{job.id}/content?variant=gif").content
    assert again == (tmp_path / "gif.gif").read_bytes()
    (tmp_path / "plan.safetensors").write_bytes(client.get(f"/v1/videos/{job.id}/plan").content)
    whole = ["reconstruct", str(tmp_path / "own.mp4"), "--model", str(tiny_model), "--seed", "3"]
    assert main([*whole, "--scale", "8", "-o", str(tmp_path / "a.mp4")]) == 0
    expected = read_video(tmp_path / "a.mp4", None).frames.astype(int)
    assert np.abs(read_video(tmp_path / "video.mp4", None).frames.astype(int) - expected).mean() < 2
    assert client.post(f"/v1/videos/{job.id}/remix", json={"prompt": "b"}).status_code == 400


def test_what_is_no_video_is_refused_or_fails_by_name(client: TestClient, server: Server, tiny_model: Path) -> None:
    reconstructions = "/v1/videos/reconstructions"
    assert client.post(reconstructions, files={"video": b"no video at all"}).status_code == 415
    for files, data in (({}, {"seed": "1"}), ({"input_reference": picture()}, {})):
        assert client.post(reconstructions, files=files, data=data).status_code == 400
    assert client.post("/v1/videos", data={"prompt": "a"}, files={"video": b"GIF89a"}).status_code == 400
    assert client.post("/v1/videos", json={"reconstructs": True}).status_code == 400
    assert client.post(reconstructions, files={"video": b"GIF89a"}, data={"loop": "true"}).status_code == 400
    assert client.post(reconstructions, files={"video": b"GIF89a and then nothing"}).status_code == 400
    client.post(reconstructions, files={"video": b"\0\0\0\x18ftypmp42 and then nothing"})
    job = run_next(server)
    assert job.code == "invalid_request" and str(job.message).startswith("video: ")
    assert str(server.folder) not in str(job.message)
    for data in (b"\x89PNG\r\n\x1a\n and no more", bomb()):
        assert client.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": data}).status_code == 400
    cut = picture()[:-40]
    assert client.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": cut}).status_code == 200
    job = run_next(server)
    assert job.code == "invalid_request" and str(server.folder) not in str(job.message)


def test_old_videos_and_folders_of_no_job_are_removed(client: TestClient, server: Server, tiny_model: Path) -> None:
    for prompt in ("a", "b"):
        client.post("/v1/videos", json={"prompt": prompt, "seconds": 2})
    job = run_next(server)
    assert client.get(f"/v1/videos/{job.id}").json()["expires_at"] is None
    server.keep_days = 1.0
    forget_old(server)
    assert client.get(f"/v1/videos/{job.id}").json()["expires_at"] - int(job.completed_at or 0) in (86_400, 86_401)
    (orphan := server.job_folder(Store.new_id())).mkdir()
    server.sweep()
    assert not orphan.exists() and server.job_folder(job.id).exists()
    server.keep_days = 0.0
    forget_old(server)
    assert client.get(f"/v1/videos/{job.id}").status_code == 404 and not server.job_folder(job.id).exists()
    assert server.store.counts() == {"queued": 1}


def test_how_long_jobs_take_is_foreseen(client: TestClient, server: Server, tiny_model: Path) -> None:
    for prompt in "abc":
        client.post("/v1/videos", json={"prompt": prompt, "seconds": 2})
    assert "seconds_left" not in client.get("/v1/videos").json()["data"][0]
    run_next(server)
    last, first, _ = client.get("/v1/videos").json()["data"]
    assert (first["position"], last["position"]) == (0, 1)
    assert last["seconds_left"] == pytest.approx(2 * first["seconds_left"], abs=0.2)


def test_models_are_let_go_when_memory_is_short(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    loaded = Loaded(models_of([str(tiny_model), "blocks"]), torch.device("cpu"))
    assert loaded.get("blocks") is loaded.get("blocks")
    loaded.get(tiny_model.name)
    assert list(loaded.models) == ["blocks", tiny_model.name]
    monkeypatch.setattr("dicode.serve.worker.available_bytes", lambda device: 0.0)
    loaded.models.popitem()
    loaded.get(tiny_model.name)
    assert list(loaded.models) == [tiny_model.name]


def test_a_running_job_stops_where_it_is_cancelled(client: TestClient, server: Server, tiny_model: Path) -> None:
    job_id = client.post("/v1/videos", json={"prompt": "a", "seconds": 16}).json()["id"]
    job = server.store.claim("here")
    assert job is not None
    cancelling = threading.Timer(0.5, server.store.cancel, (job_id,))
    cancelling.start()
    began_s = time.monotonic()
    work(server.store, Loaded(server.models, torch.device("cpu")), job, threading.Event())
    assert time.monotonic() - began_s < PATIENCE_S
    assert server.store.get(job_id).code == "cancelled"
    assert not [*server.job_folder(job_id).iterdir()]


def test_a_job_of_a_server_that_ends_is_queued_again(client: TestClient, server: Server) -> None:
    job_id = client.post("/v1/videos", json={"prompt": "a", "seconds": 16}).json()["id"]
    draining = threading.Event()
    draining.set()
    for _ in range(3):  # as often as it happens
        job = server.store.claim("here")
        assert job is not None and job.id == job_id and job.attempts == 1
        work(server.store, Loaded(server.models, torch.device("cpu")), job, draining)
        assert server.store.get(job_id).status == "queued"
        assert not [*server.job_folder(job_id).iterdir()]


@pytest.fixture
def address(server: Server) -> Iterator[str]:
    """The server on a port of its own, and a worker of this process."""
    with served(server) as address:
        yield address


def test_a_live_video_follows_its_prompts_until_it_is_ended(
    address: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicode.serve.render.AHEAD_S", 1000.0)
    with httpx.Client(base_url=address, timeout=PATIENCE_S) as client:
        asked = {"prompt": "a spark", "live": True, "seconds": 3600, "steps": 1, "size": "32x32"}
        assert client.post("/v1/videos", json={**asked, "loop": True}).status_code == 400
        job_id = client.post("/v1/videos", json=asked).json()["id"]
        path = f"/v1/videos/{job_id}/direct"

        def prompts() -> list[str]:
            return [event.data["prompt"] for event in server.store.events(job_id) if event.kind == "clip"]

        wait_for(lambda: len(prompts()) > 2)
        assert client.post(path, json={"prompt": "it grows"}).status_code == 200
        wait_for(lambda: prompts()[-1] == "it grows")
        assert client.post(path, json={"prompt": ""}).status_code == 400
        assert client.post(path, json={"end": True}).status_code == 200
        wait_for(lambda: server.store.get(job_id).finished)
        assert server.store.get(job_id).status == "completed"
        frames = read_video(server.file(server.store.get(job_id), "video.mp4"), fps=None).frames
        assert len(frames) == 16 * len(prompts())
        assert client.post(path, json={"end": True}).status_code == 409
        assert client.get(f"/v1/videos/{job_id}/plan").status_code == 404


def test_a_live_video_is_rendered_no_further_than_it_can_be_watched(address: str, server: Server) -> None:
    with httpx.Client(base_url=address, timeout=PATIENCE_S) as client:
        asked = {"prompt": "a spark", "live": True, "seconds": 3600, "steps": 1}
        job_id = client.post("/v1/videos", json=asked).json()["id"]
        wait_for(lambda: len(server.store.events(job_id)) > 4)
        time.sleep(2)
        clips = len([event for event in server.store.events(job_id) if event.kind == "clip"])
        assert clips <= 1 + (4 + 30) / 2  # four seconds, and those that went by
        client.post(f"/v1/videos/{job_id}/cancel")
        wait_for(lambda: server.store.get(job_id).code == "cancelled")


def test_a_job_that_is_deleted_while_it_is_written_leaves_no_folder(
    client: TestClient, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = client.post("/v1/videos", json={"prompt": "a", "seconds": 2, "steps": 1}).json()["id"]

    def save(path: Path, frame: Any) -> None:
        if server.job_folder(job_id).exists():
            client.delete(f"/v1/videos/{job_id}")
        save_picture(path, frame)  # makes its folder anew

    monkeypatch.setattr("dicode.serve.render.save_picture", save)
    job = server.store.claim("here")
    assert job is not None
    work(server.store, Loaded(server.models, torch.device("cpu")), job, threading.Event())
    assert not [*(server.folder / "jobs").iterdir()]


def test_what_a_job_fails_of_is_said_with_a_remedy(
    client: TestClient, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory() -> None:
        torch.empty(2**62, dtype=torch.uint8)

    def no_space() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(server.folder))

    for cause, code in ((no_memory, "out_of_memory"), (no_space, "disk_full"), ([].clear, None)):
        client.post("/v1/videos", json={"prompt": "a", "seconds": 2, "steps": 1})
        monkeypatch.setattr("dicode.serve.render.save_picture", lambda *_, cause=cause: cause())
        job = run_next(server)
        assert job.code == code and str(server.folder) not in str(job.message)
    client.post("/v1/videos", json={"prompt": "a", "seconds": 2})
    job = server.store.claim("here")
    assert job is not None
    work(server.store, Loaded(models_of(["blocks"]), torch.device("cpu")), job, threading.Event())
    assert server.store.get(job.id).message == "model: tiny is not served any more"


def test_a_job_whose_end_cannot_be_noted_is_done_again(
    client: TestClient, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = client.post("/v1/videos", json={"prompt": "a", "seconds": 2, "steps": 1}).json()["id"]
    draining, tries = threading.Event(), [0]
    complete = server.store.complete

    def sometimes(job: Job, seconds: float | None = None) -> None:
        tries[0] += 1
        if tries[0] == 1:
            raise sqlite3.OperationalError("database is locked")
        complete(job, seconds)
        draining.set()

    monkeypatch.setattr(server.store, "complete", sometimes)
    monkeypatch.setattr("dicode.serve.worker.AWAY_S", 0.0)
    loaded = Loaded(server.models, torch.device("cpu"))
    working = threading.Thread(target=work_on, args=(server.store, loaded, "here", draining))
    working.start()
    wait_for(lambda: tries[0] == 1)
    server.silent_s = 0.5
    wait_for(lambda: bool(server.release_silent()) or tries[0] == 2)
    working.join()
    assert server.store.get(job_id).status == "completed"
    assert [path.name for path in server.job_folder(job_id).iterdir()] == [str(server.store.get(job_id).claim)]


def test_events_tell_the_place_in_the_queue_and_how_long_clips_took(address: str, server: Server) -> None:
    with httpx.Client(base_url=address, timeout=PATIENCE_S) as client:

        def add(**request: object) -> str:
            return client.post("/v1/videos", json={"prompt": "a", "seconds": 2, "steps": 1, **request}).json()["id"]

        first = add(live=True, seconds=30)
        wait_for(lambda: server.store.get(first).status == "in_progress")
        before, last = add(), add()
        places = []
        with client.stream("GET", f"/v1/videos/{last}/events") as response:
            for line in response.iter_lines():
                if line.startswith('data: {"position"'):
                    places.append(json.loads(line[6:])["position"])
                    server.store.cancel(before if len(places) == 1 else first)
        assert places == [1, 0]
        assert server.store.get(last).status == "completed"
        (clip,) = [event.data for event in server.store.events(last) if event.kind == "clip"]
        assert clip["ms"] > 0 and clip["of"] == 1


def test_a_remix_takes_the_images_that_are_given(client: TestClient, server: Server) -> None:
    first = client.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": picture()}).json()["id"]
    other = {"input_reference": picture(48, "JPEG")}
    remix = client.post(f"/v1/videos/{first}/remix", data={"prompt": "b"}, files=other).json()["id"]
    assert [path.name for path in server.job_folder(remix).iterdir()] == ["image.jpg"]


def test_a_live_video_is_as_long_as_it_was_watched(address: str, server: Server) -> None:
    with httpx.Client(base_url=address, timeout=PATIENCE_S) as client:
        job_id = client.post("/v1/videos", json={"prompt": "a", "live": True, "steps": 1, "seconds": 60}).json()["id"]
        wait_for(lambda: server.store.get(job_id).progress > 0)
        client.post(f"/v1/videos/{job_id}/direct", json={"end": True})
        wait_for(lambda: server.store.get(job_id).finished)
        clips = [event.kind for event in server.store.events(job_id)].count("clip")
        assert client.get(f"/v1/videos/{job_id}").json()["seconds"] == str(2 * clips)
        assert client.get(f"/v1/videos/{job_id}/content?variant=gif").content[:4] == b"GIF8"
        remix = client.post(f"/v1/videos/{job_id}/remix", json={"prompt": "b"}).json()
        assert remix["request"]["live"] and remix["seconds"] == "3600"
        client.post(f"/v1/videos/{remix['id']}/cancel")


def test_a_conversion_holds_few_pictures_at_a_time(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3), np.uint8).repeat(32, 1).repeat(32, 2)
    with VideoWriter(tmp_path / "video.mp4", 8.0) as writer:
        writer.write(frames)
    tracemalloc.start()
    try:
        _convert(tmp_path / "video.mp4", tmp_path / "video.gif", 5.0)
        assert tracemalloc.get_traced_memory()[1] < frames.nbytes / 3
    finally:
        tracemalloc.stop()
    made = read_video(tmp_path / "video.gif", None)
    assert len(made.frames) == 40 and made.fps == pytest.approx(8.0, rel=0.02)
    with pytest.raises(RequestError, match="mp4 alone"):
        _convert(tmp_path / "video.mp4", tmp_path / "long.gif", 121.0)


def test_a_live_video_ends_when_nobody_watches_it_any_more(
    address: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("streams", "worker"):
        monkeypatch.setattr(f"dicode.serve.{module}.ALONE_S", 3.0)
    with httpx.Client(base_url=address, timeout=PATIENCE_S) as client:
        asked = {"prompt": "a", "live": True, "steps": 1, "seconds": 120, "size": "32x32"}
        job_id = client.post("/v1/videos", json=asked).json()["id"]
        with client.stream("GET", f"/v1/videos/{job_id}/stream") as response:
            began_s = time.monotonic()
            for _ in response.iter_bytes():
                if time.monotonic() - began_s > 7:  # longer than it may be alone
                    break
        assert server.store.get(job_id).status == "in_progress"
        wait_for(lambda: server.store.get(job_id).finished)
        assert server.store.get(job_id).status == "completed"
        assert "watched" not in client.get(f"/v1/videos/{job_id}/events").text
