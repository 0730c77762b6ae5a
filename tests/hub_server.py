"""A small server in this process that plays the Hugging Face Hub: downloads, new repositories, commits and LFS uploads.

It speaks the endpoints that `huggingface_hub` asks for, checks what the Hub checks of an upload (hashes, sizes, the
metadata of a card), and answers anything else with 404.
"""

import base64
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

Answer = tuple[int, dict[str, str], bytes]
OWNER = "me"  # of the token that uploads


class FakeHub:
    """Folders under a repository's name and revision; uploads make new ones in `home`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folders: dict[tuple[str, str], Path] = {}
        self.private: dict[str, bool] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []
        self.stored: dict[str, bytes] = {}  # LFS objects by their hash
        self.commits: list[dict[str, Any]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.respond(hub.answer(unquote(urlsplit(self.path).path)))

            do_HEAD = do_GET

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.respond(hub.receive(unquote(urlsplit(self.path).path), body))

            do_PUT = do_POST

            def respond(self, answer: Answer) -> None:
                status, headers, body = answer
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self) -> None:
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()

    def commit(self, repository: str, revision: str) -> str:
        return sha1(f"{repository} {revision}".encode()).hexdigest()

    def answer(self, path: str) -> Answer:
        """What is read."""
        self.asked.append(path)
        match = re.fullmatch(r"/api/models/(?P<id>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<revision>.+))?", path)
        match = match or re.fullmatch(r"/(?P<id>[^/]+/[^/]+)/(?P<what>resolve)/(?P<revision>[^/]+)/(?P<file>.+)", path)
        if match is None:  # the library asks for more than it needs
            return 404, {}, b""
        repository, what, revision = match["id"], match["what"] or "revision", match["revision"] or "main"
        if repository in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        held = {name: folder for (owner, name), folder in self.folders.items() if owner == repository}
        if not held:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        commits = {name: self.commit(repository, name) for name in held}
        folder = held.get(revision) or next((held[n] for n, commit in commits.items() if commit == revision), None)
        if folder is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        commit = commits.get(revision, revision)
        if what == "revision":
            known = {"id": repository, "sha": commit, "siblings": [], "private": self.private.get(repository, False)}
            return as_json(known)
        if what == "tree":
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            entries = [
                {
                    "type": "file",
                    "path": file.relative_to(folder).as_posix(),
                    "size": file.stat().st_size,
                    "oid": sha1(file.read_bytes()).hexdigest(),
                }
                for file in files
            ]
            return as_json(entries)
        file = folder / match["file"]
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        body = file.read_bytes()
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{sha1(body).hexdigest()}"'}, body

    def receive(self, path: str, body: bytes) -> Answer:
        """What is written."""
        if path == "/api/repos/create":
            return self.created(**json.loads(body))
        if path == "/api/validate-yaml":
            return checked_card(json.loads(body)["content"])
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            if sha256(body).hexdigest() != match[1]:
                return 400, {}, b"not the content of this hash"
            self.stored[match[1]] = body
            return 200, {}, b""
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}
            return as_json({"transfer": "basic", "objects": objects})
        match = re.fullmatch(r"/api/models/(?P<id>[^/]+/[^/]+)/(?P<what>branch|preupload|commit)/(?P<to>.+)", path)
        if match is None or (match["id"], "main") not in self.folders:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if match["what"] == "branch":
            self.folders.setdefault((match["id"], match["to"]), self.folders[match["id"], "main"])
            return 200, {}, b""
        if match["what"] == "preupload":
            named = [one["path"] for one in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in named}
            return as_json(
                {"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()]}
            )
        return self.committed(match["id"], match["to"], [json.loads(line) for line in body.splitlines()])

    def created(self, name: str, organization: str | None = None, visibility: str = "public", **_: Any) -> Answer:
        repository = f"{organization or OWNER}/{name}"
        known = (repository, "main") in self.folders
        if not known:
            folder = self.home / str(len(self.folders))
            folder.mkdir(parents=True)
            self.folders[repository, "main"], self.private[repository] = folder, visibility == "private"
        status, headers, body = as_json({"url": f"{self.url}/{repository}"})
        return (409 if known else status), headers, body

    def committed(self, repository: str, revision: str, lines: list[dict[str, Any]]) -> Answer:
        """A commit is a new folder: the files of the one before, and those that it adds."""
        folder = self.home / str(len(self.folders) + len(self.commits))
        shutil.copytree(self.folders[repository, revision], folder)
        for value in (line["value"] for line in lines if line["key"] in ("file", "lfsFile")):
            content = base64.b64decode(value["content"]) if "content" in value else self.stored[value["oid"]]
            (folder / value["path"]).write_bytes(content)
        self.folders[repository, revision] = folder
        self.commits.append(next(line["value"] for line in lines if line["key"] == "header"))
        made = {
            "success": True,
            "commitOid": self.commit(repository, revision),
            "commitUrl": f"{self.url}/{repository}",
        }
        return as_json(made)


def as_json(value: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def checked_card(text: str) -> Answer:
    """The answer of the Hub's own check of a card, as far as `huggingface_hub` knows its rules."""
    errors, warnings = [], []
    try:
        data = huggingface_hub.ModelCard(text).data.to_dict()
        if not data:
            warnings = [{"message": "empty or missing yaml metadata in repo card"}]
    except ValueError as error:
        errors = [{"message": str(error)}]
    _, headers, body = as_json({"errors": errors, "warnings": warnings})
    return (400 if errors else 200), headers, body


@contextmanager
def hub_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """In here a Hub without repositories stands in place of the real one, and the cache is empty."""
    constants = huggingface_hub.constants
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol of chunks is that of another server
    huggingface_hub.utils.close_session()
    try:
        yield fake
    finally:
        huggingface_hub.utils.close_session()
        fake.stop()
