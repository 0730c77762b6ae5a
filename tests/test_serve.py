"""`dicode serve`: the queue, the API and its errors, files of jobs, workers that die."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from openai import BadRequestError, NotFoundError, OpenAI
from PIL import Image
from postgres import PROGRAMS, postgres
from serving import served
from starlette.testclient import TestClient

from dicode.cli.app import main
from dicode.pipeline import DiCoDe
from dicode.serve import uploads
from dicode.serve.app import forget_old, make_app
from dicode.serve.database import Postgres
from dicode.serve.request import models_of
from dicode.serve.server import LOCAL, Server
from dicode.serve.store import Job, LostClaimError, QueueFullError, Store
from dicode.serve.supervisor import Supervisor
from dicode.serve.worker import Loaded, work
from dicode.video.read import read_video
from dicode.video.write import VideoWriter

REQUEST = {"prompt": "a spark", "model": None, "size": None, "shots": None, "seconds": 2.0}
PATIENCE_S = 60.0


def add(store: Store, key: str | None = None, most: int = 8) -> Job:
    return store.add(Store.new_id(), REQUEST, most, key)


# the store


@pytest.fixture(scope="session")
def database() -> Iterator[str]:
    if not PROGRAMS and not os.environ.get("DICODE_POSTGRES"):
        pytest.skip("no PostgreSQL")
    with postgres() as address:
        yield address


@pytest.fixture(params=["sqlite", "postgres"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Store]]:
    """Makes stores of the same empty tables, as several processes have them."""
    if request.param == "sqlite":
        yield lambda: Store(tmp_path)
        return
    address = request.getfixturevalue("database")
    yield lambda: Store(tmp_path, address)
    connection = Postgres(address).connect()
    connection.execute("DROP TABLE jobs")
    connection.execute("DROP TABLE events")


def test_jobs_are_claimed_in_order_and_once(stores: Callable[[], Store]) -> None:
    store, other = stores(), stores()
    first, second = add(store), add(store)
    assert store.waiting() == [first.id, second.id]
    claimed = [store.claim("a"), other.claim("b"), store.claim("a")]
    assert [job.id if job else None for job in claimed] == [first.id, second.id, None]
    assert store.get(first.id).status == "in_progress"
    assert [event.kind for event in store.events(first.id)] == ["queued", "started"]


def test_many_claimants_share_jobs_without_doubles(stores: Callable[[], Store]) -> None:
    store, found = stores(), list[str]()
    jobs = [add(store, most=100).id for _ in range(40)]

    def claim_all(name: str) -> None:
        while (job := store.claim(name)) is not None:
            found.append(job.id)
            store.complete(job)

    threads = [threading.Thread(target=claim_all, args=(str(i),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(jobs)
    assert store.counts() == {"completed": 40}


def test_a_key_queues_once_and_a_full_queue_refuses(stores: Callable[[], Store]) -> None:
    store = stores()
    assert add(store, "k").id == add(store, "k").id != add(store, "other").id
    with pytest.raises(QueueFullError):
        add(store, most=2)
    assert add(store, "k", most=2)  # known: it takes no place


def test_a_claim_that_was_lost_changes_nothing(stores: Callable[[], Store]) -> None:
    store = stores()
    add(store)
    old = store.claim("a")
    assert old is not None
    assert [job.id for job in store.release(worker="a")] == [old.id]
    new = store.claim("b")
    assert new is not None and new.attempts == 2
    for change in (store.beat, store.complete, lambda job: store.advance(job, 0.5, "clip", {})):
        with pytest.raises(LostClaimError):
            change(old)
    store.fail(old, "server_error", "late")
    assert store.get(new.id).status == "in_progress"
    store.complete(new)
    assert store.get(new.id).status == "completed"


def test_a_job_that_kills_its_workers_fails_in_the_end(stores: Callable[[], Store]) -> None:
    store = stores()
    job = add(store)
    for name in ("a", "b"):
        assert store.claim(name)
        store.release(worker=name)
    assert (store.get(job.id).status, store.get(job.id).code) == ("failed", "worker_died")
    assert store.claim("c") is None


def test_silent_jobs_are_given_to_others(stores: Callable[[], Store]) -> None:
    store = stores()
    add(store)
    job = store.claim("a")
    assert job is not None
    assert store.release(silent_s=60.0) == []
    assert [own.id for own in store.release(silent_s=-1.0)] == [job.id]


def test_cancelling(stores: Callable[[], Store]) -> None:
    store = stores()
    waiting, running = add(store), add(store)
    assert store.cancel(waiting.id).code == "cancelled"
    claimed = store.claim("a")
    assert claimed is not None and claimed.id == running.id
    assert store.cancel(running.id).status == "in_progress"
    with pytest.raises(LostClaimError):
        store.beat(claimed)
    store.fail(claimed, "cancelled", "cancelled")
    assert (store.get(running.id).status, store.get(running.id).code) == ("failed", "cancelled")
    assert store.cancel(running.id).status == "failed"  # as it is


# the API, without workers


@pytest.fixture
def server(tmp_path: Path, tiny_model: Path) -> Server:
    hosts = (*LOCAL, "testserver")
    return Server(tmp_path, models_of([str(tiny_model)]), Store(tmp_path), queue=4, most_s=30.0, hosts=hosts)


@pytest.fixture
def client(server: Server) -> Iterator[TestClient]:
    with TestClient(make_app(server), raise_server_exceptions=False) as client:
        yield client


def picture(side: int = 64, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few kilobytes that claims 30,000 × 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = (30_000).to_bytes(4, "big")
    header = chunk(b"IHDR", side + side + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1_000_000))) + chunk(b"IEND", b"")


def test_a_job_is_queued_from_json_and_from_a_form(client: TestClient, server: Server) -> None:
    from_json = client.post("/v1/videos", json={"prompt": "a spark", "seconds": "2", "guidance": 2.0})
    from_form = client.post("/v1/videos", data={"prompt": "a spark", "seconds": "2", "guidance": "2"})
    assert from_json.status_code == from_form.status_code == 200
    for found in (from_json.json(), from_form.json()):
        assert found["object"] == "video" and found["status"] == "queued" and found["seconds"] == "2"
        assert found["size"] == "256x256" and found["progress"] == 0 and found["error"] is None
    assert from_form.json()["position"] == 1
    shown = client.get(f"/v1/videos/{from_json.json()['id']}")
    assert shown.headers["openai-poll-after-ms"] and shown.json()["status"] == "queued"
    assert server.store.counts() == {"queued": 2}


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "  "}, "prompt"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"prompt": "a", "seconds": 0}, "seconds"),
        ({"prompt": "a", "seconds": "soon"}, "seconds"),
        ({"prompt": "a", "live": True, "seconds": 4000}, "seconds"),
        ({"prompt": "a", "seconds": 31}, "seconds"),
        ({"prompt": "a", "size": "100x100"}, "size"),
        ({"prompt": "a", "size": "big"}, "size"),
        ({"prompt": "a", "model": "none"}, "model"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "guidance": -1}, "guidance"),
        ({"prompt": "a", "guidance": "much"}, "guidance"),
        ({"prompt": "a", "joins": "glued"}, "joins"),
        ({"prompt": "a", "colour": "red"}, "unknown fields"),
        ({"prompt": "a", "reroll_seed": 3}, "reroll_seed"),
        ({"prompt": "a", "reroll_clips": 3}, "reroll_clips"),
        ({"prompt": "a", "seed": 3, "reroll_from": 0, "reroll_seed": 3}, "reroll_seed"),
        ({"shots": [{"prompt": "", "seconds": 2}]}, "shots.0.prompt"),
        ({"prompt": "a", "input_reference": "http://example.org/a.png"}, None),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_field(client: TestClient, values: Any, param: str | None) -> None:
    found = client.post("/v1/videos", json=values)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"]
    assert param is None or error["param"] == param
    assert client.get("/v1/videos").json()["data"] == []


def test_images_are_known_by_their_first_bytes(client: TestClient, server: Server) -> None:
    for kind, suffix in (("PNG", ".png"), ("JPEG", ".jpg"), ("WEBP", ".webp")):
        files = {"input_reference": ("../../etc/passwd", picture(kind=kind), "text/plain")}
        found = client.post("/v1/videos", data={"prompt": "a"}, files=files)
        assert found.status_code == 200
        folder = server.job_folder(found.json()["id"])
        assert [path.name for path in folder.iterdir()] == [f"image{suffix}"]
    url = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
    assert client.post("/v1/videos", json={"prompt": "a", "input_reference": url}).status_code == 200
    refused = client.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": b"<svg/>"})
    assert refused.status_code == 415
    assert client.post("/v1/videos", content=b"prompt=a", headers={"content-type": "text/plain"}).status_code == 415
    for broken in (b"{", b"[1]", b"\xff", b"[" * 100_000):
        assert client.post("/v1/videos", content=broken).status_code == 400


def test_bodies_are_limited(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MOST_BYTES", 10_000)
    assert client.post("/v1/videos", content=b" " * 10_001).status_code == 413
    parts = {f"field{i}": "x" for i in range(100)}
    assert client.post("/v1/videos", data={**parts, "prompt": "a"}, files={"other": b"x"}).status_code in (400, 413)


def test_the_queue_is_finite_and_lists_are_paged(client: TestClient) -> None:
    made = [client.post("/v1/videos", json={"prompt": f"{i}"}).json()["id"] for i in range(4)]
    full = client.post("/v1/videos", json={"prompt": "one more"})
    assert full.status_code == 429 and full.headers["retry-after"] and full.json()["error"]["code"] == "queue_full"
    first = client.get("/v1/videos?limit=3").json()
    assert [own["id"] for own in first["data"]] == made[:0:-1] and first["has_more"]
    rest = client.get(f"/v1/videos?limit=3&after={first['last_id']}").json()
    assert [own["id"] for own in rest["data"]] == made[:1] and not rest["has_more"]
    oldest = client.get("/v1/videos?order=asc&limit=1").json()
    assert oldest["first_id"] == oldest["last_id"] == made[0]
    for wrong in ("limit=0", "limit=x", "order=up"):
        assert client.get(f"/v1/videos?{wrong}").status_code == 400
    assert client.get(f"/v1/videos?after={Store.new_id()}").status_code == 404


def test_unknown_videos_and_unfinished_ones(client: TestClient) -> None:
    job_id = client.post("/v1/videos", json={"prompt": "a"}).json()["id"]
    for unknown in (Store.new_id(), "video_1", "..%2f..%2fetc"):
        for path in ("", "/content", "/plan", "/events", "/stream"):
            found = client.get(f"/v1/videos/{unknown}{path}")
            assert found.status_code == 404 and found.json()["error"]["message"]
    for path in ("/content", "/content?variant=thumbnail", "/plan"):
        assert client.get(f"/v1/videos/{job_id}{path}").status_code == 409
    assert client.post("/v1/videos/extensions", json={"prompt": "b", "video": job_id}).status_code == 409
    assert client.post(f"/v1/videos/{job_id}/cancel").json()["error"]["code"] == "cancelled"
    assert client.delete(f"/v1/videos/{job_id}").json() == {"id": job_id, "object": "video.deleted", "deleted": True}
    assert client.get(f"/v1/videos/{job_id}").status_code == 404


def test_an_idempotency_key_makes_one_job(client: TestClient, server: Server) -> None:
    same = [client.post("/v1/videos", json={"prompt": "a"}, headers={"Idempotency-Key": "k"}).json() for _ in range(2)]
    assert same[0]["id"] == same[1]["id"]
    assert len([*(server.folder / "jobs").iterdir()]) == 1


def test_a_key_guards_the_api_and_hosts_are_checked(server: Server) -> None:
    server.api_key = "secret"
    with TestClient(make_app(server)) as client:
        assert client.get("/v1/videos").status_code == 401
        assert client.get("/v1/videos", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/v1/videos", headers={"Authorization": "Bearer secret"}).status_code == 200
        client.cookies.set("dicode_key", "secret")
        assert client.get("/v1/videos").status_code == 200
        assert client.get("/healthz").status_code == 200
        assert client.get("/healthz", headers={"Host": "evil.example"}).status_code == 400


def test_pages_of_other_servers_queue_nothing(client: TestClient) -> None:
    asked = {"data": {"prompt": "a"}}  # a form, which a browser sends to anywhere without asking
    assert client.post("/v1/videos", headers={"Origin": "https://evil.example"}, **asked).status_code == 403
    assert client.post("/v1/videos", headers={"Origin": "null"}, **asked).status_code == 403
    assert client.post("/v1/videos", headers={"Origin": "http://testserver"}, **asked).status_code == 200


def test_models_state_and_metrics(client: TestClient, server: Server, tiny_model: Path) -> None:
    assert [own["id"] for own in client.get("/v1/models").json()["data"]] == [tiny_model.name]
    assert client.get("/readyz").json() == {"status": "ready"}
    client.post("/v1/videos", json={"prompt": "a"})
    assert 'dicode_jobs{status="queued"} 1.0' in client.get("/metrics").text
    server.draining = True
    assert client.get("/readyz").status_code == 503
    refused = client.post("/v1/videos", json={"prompt": "a"})
    assert refused.status_code == 503 and refused.headers["retry-after"]


# files of jobs


def run_next(server: Server, tiny_model: Path) -> Job:
    job = server.store.claim("here")
    assert job is not None
    work(server.store, Loaded(server.models, torch.device("cpu")), job, threading.Event())
    return server.store.get(job.id)


def test_a_video_is_rendered_and_its_files_are_served(client: TestClient, server: Server, tiny_model: Path) -> None:
    asked = {"prompt": "a spark", "seconds": 3, "seed": 5, "steps": 2, "size": "128x128"}
    job_id = client.post("/v1/videos", json=asked).json()["id"]
    assert run_next(server, tiny_model).status == "completed"
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
    run_next(server, tiny_model)
    remix = client.post(f"/v1/videos/{first['id']}/remix", json={"prompt": "b"}).json()
    assert remix["remixed_from_video_id"] == first["id"] and remix["prompt"] == "b"
    assert remix["request"]["seed"] == 3 and (server.job_folder(remix["id"]) / "image.png").is_file()
    board = {"shots": [{"prompt": "a", "seconds": 2}, {"prompt": "b", "seconds": 4}], "steps": 1}
    whole = client.post("/v1/videos", json=board).json()
    run_next(server, tiny_model)
    assert client.post(f"/v1/videos/{whole['id']}/remix", json={"prompt": "c"}).json()["seconds"] == "6"
    extended = client.post("/v1/videos/extensions", json={"prompt": "c", "seconds": 2, "video": {"id": first["id"]}})
    assert extended.status_code == 200
    assert [run_next(server, tiny_model).status for _ in range(3)] == ["completed"] * 3


def test_a_given_video_is_rendered_from_its_own_tokens(
    client: TestClient, server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), np.uint8)
    with VideoWriter(tmp_path / "own.mp4", 10.0) as writer:
        writer.write(frames)
    files = {"video": ("../own.txt", (tmp_path / "own.mp4").read_bytes())}
    found = client.post("/v1/videos/reconstructions", files=files, data={"seed": "3"}).json()
    job = run_next(server, tiny_model)
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
    client.post(reconstructions, files={"video": b"GIF89a and then nothing"})
    job = run_next(server, tiny_model)
    assert job.code == "invalid_request" and str(job.message).startswith("video: ")
    assert str(server.folder) not in str(job.message)
    for data in (b"\x89PNG\r\n\x1a\n and no more", bomb()):
        assert client.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": data}).status_code == 400
    cut = picture()[:-40]
    assert client.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": cut}).status_code == 200
    job = run_next(server, tiny_model)
    assert job.code == "invalid_request" and str(server.folder) not in str(job.message)


def test_old_videos_and_folders_of_no_job_are_removed(client: TestClient, server: Server, tiny_model: Path) -> None:
    for prompt in ("a", "b"):
        client.post("/v1/videos", json={"prompt": prompt, "seconds": 2})
    job = run_next(server, tiny_model)
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
    run_next(server, tiny_model)
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


# workers as processes


def wait_for(done: Any) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < until_s, "nothing happened"
        time.sleep(0.02)


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


# clients


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
