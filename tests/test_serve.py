"""The API of `dicode serve` without workers: what is queued, and what is refused."""

import base64
import errno
import json
import os
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from serving import picture
from starlette.testclient import TestClient

from dicode.serve import uploads
from dicode.serve.app import make_app
from dicode.serve.request import models_of
from dicode.serve.server import Server
from dicode.serve.store import Store


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
        ({"prompt": "a", "colour": "red"}, "colour"),
        ({"prompt": "a", "flow_steps": 1.5}, "flow_steps"),
        ({"prompt": "a", "reroll_from": 10**400}, "reroll_from"),
        ({"prompt": "a", "extends": f"video_{'0' * 32}"}, "extends"),
        ({"prompt": "a", "remixed_from_video_id": "x"}, "remixed_from_video_id"),
        ({"prompt": "a", "reroll_seed": 3}, "reroll_seed"),
        ({"prompt": "a", "reroll_clips": 3}, "reroll_clips"),
        ({"prompt": "a", "seed": 3, "reroll_from": 0, "reroll_seed": 3}, "reroll_seed"),
        ({"shots": [{"prompt": "", "seconds": 2}]}, "shots.0.prompt"),
        ({"shots": [{"prompt": " \n", "seconds": 2}]}, "shots.0.prompt"),
        ({"shots": [{"prompt": "a\0", "seconds": 2}]}, "shots.0.prompt"),
        ({"shots": [{"prompt": "a", "seconds": 3}, {"prompt": "b", "seconds": 2}]}, "shots"),  # between key frames
        ({"prompt": "a", "input_reference": "http://example.org/a.png"}, "input_reference"),
        ({"prompt": "a", "input_reference": {"file_id": "file_1"}}, "input_reference"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_field(client: TestClient, values: Any, param: str) -> None:
    found = client.post("/v1/videos", json=values)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"]
    assert error["param"] == param
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
    other = client.post("/v1/videos", json={"prompt": "b"}, headers={"Idempotency-Key": "k"})
    assert other.status_code == 409 and other.json()["error"]["code"] == "idempotency_key_reused"
    path = f"/v1/videos/{same[0]['id']}/remix"
    remixes = [client.post(path, json={"prompt": "b"}, headers={"Idempotency-Key": "r"}).json() for _ in range(2)]
    assert remixes[0]["id"] == remixes[1]["id"] != same[0]["id"]
    for _ in range(2):  # an empty one is none
        assert client.post("/v1/videos", json={"prompt": "a"}, headers={"Idempotency-Key": ""}).status_code == 200
    assert server.store.counts() == {"queued": 4}


def test_a_key_of_a_reconstruction_is_known_after_its_length_is(client: TestClient, server: Server) -> None:
    asked: Any = {"files": {"video": b"\0\0\0\x18ftypmp42"}, "headers": {"Idempotency-Key": "k"}}
    first = client.post("/v1/videos/reconstructions", **asked).json()
    job = server.store.claim("here")
    assert job is not None
    server.store.complete(job, 1.5)
    again = client.post("/v1/videos/reconstructions", **asked).json()
    assert again["id"] == first["id"] and again["seconds"] == "1.5"


def test_a_key_guards_the_api_and_hosts_are_checked(server: Server) -> None:
    server.api_key = "secret"
    with TestClient(make_app(server)) as client:
        assert client.get("/v1/videos").status_code == 401
        assert client.get("/v1/videos", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/v1/videos", headers={"Authorization": "Bearer secret"}).status_code == 200
        client.cookies.set("dicode_key", "secret")
        assert client.get("/v1/videos").status_code == 200
        assert client.get("/healthz").status_code == 200
        for host in ("evil.example", "[::1", ""):
            refused = client.get("/healthz", headers={"Host": host})
            assert refused.status_code == 400 and "--hosts" in refused.json()["error"]["message"]


@pytest.mark.parametrize("key", ["secret", "a/b+c=;,%ü"])
def test_the_cookie_of_the_page_is_the_key_as_the_page_writes_it(server: Server, key: str) -> None:
    server.api_key = key
    with TestClient(make_app(server)) as client:
        assert client.get("/v1/videos", headers={"Cookie": f"dicode_key={quote(key, safe='')}"}).status_code == 200
        refused = client.get("/v1/videos", headers={"Cookie": "dicode_key=secre"})
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"


def test_every_error_has_the_shape_that_clients_expect(client: TestClient, server: Server) -> None:
    job_id = client.post("/v1/videos", json={"prompt": "a"}).json()["id"]
    job = server.store.claim("here")
    assert job is not None
    server.file(job, "video.mp4").parent.mkdir(parents=True)
    server.file(job, "video.mp4").write_bytes(bytes(100))
    server.store.complete(job)
    path = f"/v1/videos/{job_id}/content"
    assert client.head(path).headers["content-length"] == "100" and not client.head(path).content
    asked = [("GET", path, "bytes=200-300"), ("GET", path, "bytes=x"), ("PUT", "/v1/videos", ""), ("GET", "/a/b", "")]
    found = [client.request(method, own, headers={"Range": value} if value else {}) for method, own, value in asked]
    assert [own.status_code for own in found] == [416, 400, 405, 404]
    assert all(own.json()["error"]["message"] for own in found)
    assert found[0].headers["content-range"] == "bytes */100" and found[2].headers["allow"] == "GET, POST"


def test_nothing_that_was_queued_makes_the_list_fail(client: TestClient, server: Server) -> None:
    for name in ("extends", "remixed_from_video_id", "model", "x"):  # half of a character, which no answer can hold
        body = json.dumps({"prompt": "a", name: "\ud800", f"{name}\ud800": 1})
        assert client.post("/v1/videos", content=body).status_code == 400
    numbers = {"prompt": "a", "guidance": f"{'0' * 10_000}2", "steps": "3"}
    job_id = client.post("/v1/videos", data=numbers).json()["id"]
    stored = server.store.get(job_id).request
    assert (stored["guidance"], stored["steps"]) == (2.0, 3)
    client.post("/v1/videos", json={"prompt": "b", "size": "96x96"})
    server.models = models_of(["sprites"])  # served before by another name, or with another size
    server.models = {"tiny": server.models["sprites"]}
    listed = client.get("/v1/videos").json()["data"]
    assert [own["size"] for own in listed] == ["96x96", "256x256"]


def test_forms_hold_lists_and_objects_as_clients_write_them(client: TestClient) -> None:
    both = [("seconds", "2"), ("seconds", "2.5")]
    form = {name: (None, text) for name, text in [("shots[][prompt]", "a"), ("seed", "3")]}
    shots = [("shots[][prompt]", (None, "b")), *((f"shots[][{name}]", (None, text)) for name, text in both)]
    made = client.post("/v1/videos", files=[*form.items(), *shots]).json()
    assert made["request"]["shots"] == [{"prompt": "a", "seconds": 2.0}, {"prompt": "b", "seconds": 2.5}]
    image = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
    files = [("prompt", (None, "a")), ("input_reference[image_url]", (None, image))]
    assert client.post("/v1/videos", files=files).status_code == 200
    for wrong in (["shots[][prompt]", "shots"], ["shots", "shots[][prompt]"], ["a[b]", "a[b]"], ["a", "a[b]"]):
        refused = client.post("/v1/videos", files=[(name, (None, "[]")) for name in wrong])
        assert refused.status_code == 400 and "given twice" in refused.json()["error"]["message"]
    refused = client.post("/v1/videos", files=[("input_reference", picture()), ("input_reference", (None, image))])
    assert refused.status_code == 400


def test_only_true_ends_a_live_video(client: TestClient, server: Server) -> None:
    job_id = client.post("/v1/videos", json={"prompt": "a", "live": True}).json()["id"]
    path = f"/v1/videos/{job_id}/direct"
    for wrong, param in (({"end": "no"}, "end"), ({"end": [1]}, "end"), ({"stop": True}, "stop"), ({}, "prompt")):
        refused = client.post(path, json=wrong)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == param
    assert [event.kind for event in server.store.events(job_id)] == ["queued"]


def test_a_store_that_is_busy_or_full_is_no_fault_of_the_server(
    client: TestClient, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicode.serve.database.BUSY_S", 0.1)
    with sqlite3.connect(server.folder / "jobs.sqlite", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        busy = client.post("/v1/videos", json={"prompt": "a"})
        other.execute("ROLLBACK")
    assert busy.status_code == 503 and busy.headers["retry-after"]
    assert not [*(server.folder / "jobs").iterdir()]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(server.folder))

    monkeypatch.setattr(uploads, "keep", full)
    found = client.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": picture()})
    assert found.status_code == 503 and str(server.folder) not in found.text
    assert client.get("/v1/videos").json()["data"] == []


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
