"""The Space, started as Hugging Face does: `python app.py`; its page, its API, and Gradio's client."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import yaml
from packaging.requirements import Requirement

from dicode import __version__
from dicode.serve.app import PAGE
from dicode.video.read import read_video

SPACE = Path(__file__).parents[1] / "integrations/space"
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="pip install gradio: its server")
COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")  # of thumbnails on the Hub


@pytest.fixture(params=[None, "a secret"], ids=["open", "with a key"])
def space(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Path
) -> Iterator[tuple[httpx.Client, str | None]]:
    """A client of a Space that is ready, and its key."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    key = {"DICODE_API_KEY": request.param} if request.param else {}
    own = {"DICODE_MODELS": str(tiny_model), "DICODE_DATA": str(tmp_path / "videos"), "GRADIO_SERVER_PORT": str(port),
           "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(tmp_path / "gradio")}  # fmt: skip
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, SPACE / "app.py"], cwd=tmp_path, env={**os.environ, **own, **key}, stdout=log, stderr=log
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            until_s = time.monotonic() + 120
            while not is_ready(client):
                assert process.poll() is None and time.monotonic() < until_s, (tmp_path / "log").read_text()
                time.sleep(0.1)
            yield client, request.param
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


@needs_gradio
def test_the_space_serves_the_page_its_api_and_gradios_client(space, tmp_path):
    client, key = space
    page = client.get("/")
    assert page.text == (PAGE / "index.html").read_text() and client.get("/app.js").status_code == 200
    assert "x-frame-options" not in page.headers
    assert "frame-ancestors 'self' https://huggingface.co" in page.headers["content-security-policy"]
    public = {"Origin": "https://owner-name.hf.space", "X-Forwarded-Host": "owner-name.hf.space"}
    request = {"prompt": "a red square", "seconds": 2, "seed": 1}
    assert client.post("/v1/videos", json=request, headers={"Origin": "https://example.org"}).status_code in (401, 403)
    if key:
        assert client.post("/v1/videos", json=request, headers=public).status_code == 401
        public["Authorization"] = f"Bearer {key}"
    job = client.post("/v1/videos", json=request, headers=public).json()
    until_s = time.monotonic() + 60
    while job["status"] != "completed":
        assert job["status"] in ("queued", "in_progress") and time.monotonic() < until_s, job
        time.sleep(0.1)
        job = client.get(f"/v1/videos/{job['id']}", headers=public).json()
    assert "event: clip" in client.get(f"/v1/videos/{job['id']}/events", headers=public).text
    (tmp_path / "a.mp4").write_bytes(client.get(f"/v1/videos/{job['id']}/content", headers=public).content)
    expected = read_video(tmp_path / "a.mp4").frames
    assert expected.shape == (16, 256, 256, 3)
    for file in (tmp_path / "videos").rglob("*"):  # Gradio hands out none of the server's files
        assert client.get(f"/gradio_api/file={file}").status_code in (403, 404)
    assert client.post("/gradio_api/upload", files={"files": b"any"}).status_code in (404, 405)

    from gradio_client import Client
    from gradio_client.exceptions import AppError

    gradio = Client(str(client.base_url), verbose=False, download_files=tmp_path / "got")
    endpoints = gradio.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(endpoints) == ([] if key else ["/generate"])
    if not key:
        video = gradio.predict(**request, api_name="/generate")
        assert (read_video(video).frames == expected).all()
        with pytest.raises(AppError, match="at least one word"):
            gradio.predict(prompt="", api_name="/generate")


def test_the_readme_configures_a_space_and_the_requirements_name_this_version():
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match is not None
    header = yaml.safe_load(match[1])
    assert header["sdk"] == "gradio" and (SPACE / header["app_file"]).is_file()
    assert header["sdk_version"].split(".")[0] == "6" and header["python_version"] in ("3.11", "3.12", "3.13")
    assert {header["colorFrom"], header["colorTo"]} <= {*COLOURS} and len(header["short_description"]) <= 60
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    (own,) = (Requirement(line) for line in lines if not line.startswith("-"))
    assert own.name == "dicode" and own.extras == {"serve"} and __version__ in own.specifier
