"""A Hugging Face Space: page and API of `dicode serve` on a `gradio.Server`, and an API for Gradio's clients."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import gradio
from fastapi import FastAPI
from gradio.data_classes import FileData
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder
from httpx import ASGITransport, AsyncClient
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dicode.serve.app import make_app
from dicode.serve.names import VIDEO
from dicode.serve.request import models_of
from dicode.serve.server import Server
from dicode.serve.store import Store
from dicode.serve.supervisor import Supervisor

MODELS = os.environ.get("DICODE_MODELS", "blocks sprites world").split()  # the default first
DATA = Path(os.environ.get("DICODE_DATA", "serve"))  # videos; /data where the Space has persistent storage
KEY = os.environ.get("DICODE_API_KEY")  # a secret of the Space; without one anybody may make and delete videos
MOST_S, QUEUE, KEEP_DAYS = 60.0, 16, 1.0  # of a video; jobs that wait; that a video is kept
GRADIO, UPLOAD = ("/gradio_api", "/config"), "/gradio_api/upload"  # paths of Gradio's clients; nothing needs uploads
FRAMES = "; frame-ancestors 'self' https://huggingface.co https://*.hf.space"  # a Space is shown in a frame


class Page:
    """Middleware that gives all requests but those of Gradio's clients to the application of `dicode serve`."""

    def __init__(self, app: ASGIApp, page: ASGIApp) -> None:
        self.app, self.page = app, page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The proxy of Spaces may name the public host in a header: the page's own requests are known by it."""
        path = scope.get("path", "")
        if scope["type"] != "http" or (path.startswith(GRADIO) and not path.startswith(UPLOAD)):
            await self.app(scope, receive, send)
            return
        host = Headers(scope=scope).get("x-forwarded-host")
        if host is not None:
            others = [(name, value) for name, value in scope["headers"] if name != b"host"]
            scope = {**scope, "headers": [*others, (b"host", host.split(",")[0].strip().encode("latin-1"))]}

        async def framed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                del headers["x-frame-options"]
                headers["content-security-policy"] = (
                    headers.get("content-security-policy", "default-src 'self'") + FRAMES
                )
            await send(message)

        await self.page(scope, receive, framed)


def make_space() -> tuple[gradio.Server, Any]:
    """The server, and the lifespan to launch it with."""
    DATA.mkdir(parents=True, exist_ok=True)
    store = Store(DATA)
    server = Server(
        DATA, models_of(MODELS), store, Supervisor(store, MODELS, ["auto"]),
        api_key=KEY, queue=QUEUE, most_s=MOST_S, hosts=("*",), keep_days=KEEP_DAYS,
    )  # fmt: skip
    server.sweep()
    page = make_app(server)
    space = gradio.Server(title="dicode", docs_url=None, redoc_url=None, openapi_url=None)
    space.add_middleware(Page, page=page)
    if KEY is None:
        _add_api(space, page, server)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with page.router.lifespan_context(page):
            yield

    return space, lifespan


def _add_api(space: gradio.Server, page: FastAPI, server: Server) -> None:
    """What `gradio_client` calls; the queue and all checks are those of the page."""
    default = next(iter(server.models))

    @space.api(name="generate", concurrency_limit=QUEUE)
    async def generate(prompt: str, seconds: float = 4.0, seed: int = 0, model: str = default) -> FileData:
        """A video of a prompt: text to video with a language model."""
        request = {"prompt": prompt, "seconds": seconds, "seed": seed, "model": model}
        async with AsyncClient(transport=ASGITransport(page), base_url="http://space") as client:
            job = (await client.post("/v1/videos", json=request)).json()
            while job.get("status") in ("queued", "in_progress"):
                await asyncio.sleep(0.25)
                job = (await client.get(f"/v1/videos/{job['id']}")).json()
        if job.get("error"):
            raise gradio.Error(job["error"]["message"], print_exception=False)
        video = server.file(server.store.get(job["id"]), VIDEO)
        return FileData(path=save_file_to_cache(video, get_upload_folder()))  # the folder of all jobs stays closed


if __name__ == "__main__":
    space, lifespan = make_space()
    space.launch(app_kwargs={"lifespan": lifespan}, ssr_mode=False)
