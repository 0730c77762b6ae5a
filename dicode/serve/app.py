"""The HTTP API: jobs in the shape of OpenAI's videos, their files, what happens to them as it happens, and the page."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import Counter, Gauge, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dicode.serve import uploads
from dicode.serve.downloads import add_files
from dicode.serve.jobs import add_jobs
from dicode.serve.request import Model, RequestError
from dicode.serve.server import DAY_S, Server
from dicode.serve.store import QueueFullError

PAGE = Path(__file__).parent / "page"
COOKIE = "dicode_key"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self'; media-src 'self' blob:; img-src 'self' blob: data:",
}
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}  # of errors; others are invalid_request_error, from 500 on server_error


def make_app(server: Server) -> FastAPI:
    """The application; its lifespan begins and ends the workers."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        look = asyncio.create_task(_look_after(server))
        if server.supervisor is not None:
            await run_in_threadpool(server.supervisor.start)
        yield
        server.draining = True
        look.cancel()
        if server.supervisor is not None:
            await run_in_threadpool(server.supervisor.stop)

    app = FastAPI(title="dicode", version=version("dicode"), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(uploads.LimitedBodies)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["*"] if "*" in server.hosts else [*server.hosts])
    counted = Counter("dicode_requests", "Requests by status", ["status"], registry=server.registry)

    @app.middleware("http")
    async def guarded(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        closed = server.api_key is not None and request.url.path.startswith(("/v1", "/metrics"))
        if closed and not _knows(server, request):
            response: Response = _error(401, "expected the server's API key as a bearer token")
        elif request.method not in ("GET", "HEAD") and not _from_here(request):
            response = _error(403, "requests of pages of other servers are refused")
        else:
            response = await call(request)
        counted.labels(str(response.status_code)).inc()
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    _handle_errors(app)
    add_jobs(app, server)
    add_files(app, server)
    _add_state(app, server)
    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


def _knows(server: Server, request: Request) -> bool:
    """Whether a request has the key, as a header or as the page's cookie."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ") or request.cookies.get(COOKIE, "")
    return hmac.compare_digest(given.encode(), str(server.api_key).encode())


def _from_here(request: Request) -> bool:
    """Whether a request was not made by a page of another server: browsers name it."""
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


async def _look_after(server: Server) -> None:
    """Give the jobs of silent workers to others, and forget the old ones."""
    while True:
        with suppress(*server.store.passing):  # busy: the next look will do
            await run_in_threadpool(server.release_silent)
            await run_in_threadpool(forget_old, server)
        await asyncio.sleep(server.silent_s / 4)


def forget_old(server: Server) -> None:
    """Delete jobs that were finished longer ago than they are kept."""
    if server.keep_days is not None:
        for job_id in server.store.finished_before(time.time() - server.keep_days * DAY_S):
            with suppress(KeyError):  # somebody else was faster
                server.forget(job_id)


# errors


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    headers = {"Retry-After": "5"} if status in (429, 503) else {}
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers)


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def of_request(_: Request, error: RequestError) -> Response:
        return _error(400, str(error), error.param)

    @app.exception_handler(RequestValidationError)
    async def of_parameters(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where, name = first["loc"][0], ".".join(map(str, first["loc"][1:]))
        if where == "path":
            return _error(404, "no such video", name)
        return _error(400, f"{name}: {first['msg']}", name)

    @app.exception_handler(QueueFullError)
    async def full(_: Request, __: QueueFullError) -> Response:
        return _error(429, "the queue is full; try again later", code="queue_full")

    @app.exception_handler(KeyError)
    async def missing(_: Request, __: KeyError) -> Response:
        return _error(404, "no such video", "video_id", "not_found")

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def other(_: Request, __: Exception) -> Response:
        return _error(500, "the server failed; its log has the reason")


# state


def _add_state(app: FastAPI, server: Server) -> None:
    jobs = Gauge("dicode_jobs", "Jobs by status", ["status"], registry=server.registry)
    restarts = Gauge("dicode_worker_restarts", "Workers that died and were begun again", registry=server.registry)

    @app.get("/v1/models", summary="Models that this server has")
    def models() -> Any:
        return {"object": "list", "data": [_model(name, own) for name, own in server.models.items()]}

    @app.get("/healthz", summary="Whether the server answers")
    def healthz() -> Any:
        return {"status": "ok"}

    @app.get("/readyz", summary="Whether a worker is ready for a job")
    def readyz() -> Response:
        if server.draining or (server.supervisor is not None and not server.supervisor.ready):
            return _error(503, "no worker is ready")
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", summary="For Prometheus")
    def metrics() -> Response:
        counts = server.store.counts()
        for status in ("queued", "in_progress", "completed", "failed"):
            jobs.labels(status).set(counts.get(status, 0))
        restarts.set(server.supervisor.restarts if server.supervisor is not None else 0)
        return Response(generate_latest(server.registry), media_type="text/plain; version=0.0.4")


def _model(name: str, model: Model) -> dict[str, Any]:
    config, lm = model.tokenizer, model.lm
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "dicode",
        "size": config.size,
        "fps": config.fps,
        "clip_s": config.clip_s,
        "tokens_per_keyframe": config.block_tokens,
        "numbers_per_keyframe": config.block_tokens * config.token_width,
        "loops": lm.end_frame_conditioning,
    }
