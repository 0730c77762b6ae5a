"""The HTTP API: jobs in the shape of OpenAI's videos, their files, what happens to them as it happens, and the page."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import Counter, Gauge, generate_latest
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from dicode.serve import uploads
from dicode.serve.downloads import add_files
from dicode.serve.jobs import add_jobs
from dicode.serve.request import Model, RequestError
from dicode.serve.server import DAY_S, Server
from dicode.serve.store import KeyReusedError, QueueFullError, UnknownJobError

NOTHING: Mapping[str, str] = {}
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
PLAIN = {400: "range: expected bytes=FIRST-LAST", 416: "range: begins behind the end of the file"}  # Starlette's errors


def make_app(server: Server) -> FastAPI:
    """The application; its lifespan begins and ends the workers."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        look = asyncio.create_task(_look_after(server))
        if server.supervisor is not None:
            await run_in_threadpool(server.supervisor.start)
        yield
        look.cancel()
        await run_in_threadpool(server.drain)

    app = FastAPI(title="dicode", version=version("dicode"), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(uploads.LimitedBodies)
    counted = Counter("dicode_requests", "Requests by status", ["status"], registry=server.registry)

    @app.middleware("http")
    async def guarded(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        closed = server.api_key is not None and request.url.path.startswith(("/v1", "/metrics"))
        if not _is_for(server, request):
            response: Response = _error(400, "host: the server is not called so; start it with --hosts and this name")
        elif closed and not _knows(server, request):
            response = _error(401, "expected the server's API key as a bearer token")
        elif request.method not in ("GET", "HEAD") and not _from_here(request):
            response = _error(403, "requests of pages of other servers are refused")
        else:
            response = await call(request)
            if response.status_code in PLAIN and "json" not in response.headers.get("content-type", ""):
                response = _error(response.status_code, PLAIN[response.status_code], headers=response.headers)
        counted.labels(str(response.status_code)).inc()
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    _handle_errors(app, server)
    add_jobs(app, server)
    add_files(app, server)
    _add_state(app, server)
    _add_page(app)
    return app


def _is_for(server: Server, request: Request) -> bool:
    """Whether a request is for one of the server's names, or it takes any."""
    try:
        name = urlsplit(f"//{request.headers.get('host', '')}").hostname
    except ValueError:  # half of an IPv6 address
        name = None
    return "*" in server.hosts or name in server.hosts


def _knows(server: Server, request: Request) -> bool:
    """Whether a request has the key, as a header or as the page's cookie."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ") or unquote(request.cookies.get(COOKIE, ""))
    return hmac.compare_digest(given.encode(), str(server.api_key).encode())


def _from_here(request: Request) -> bool:
    """Whether a request was not made by a page of another server: browsers name it."""
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


async def _look_after(server: Server) -> None:
    """Give the jobs of silent workers to others, and forget the old ones."""
    while True:
        with suppress(*server.store.passing, OSError):  # busy: the next look will do
            await run_in_threadpool(server.release_silent)
            await run_in_threadpool(forget_old, server)
        await asyncio.sleep(server.silent_s / 4)


def forget_old(server: Server) -> None:
    """Delete jobs that were finished longer ago than they are kept."""
    if server.keep_days is not None:
        for job_id in server.store.finished_before(time.time() - server.keep_days * DAY_S):
            with suppress(UnknownJobError):  # somebody else was faster
                server.forget(job_id)


# errors


def _error(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: Mapping[str, str] = NOTHING
) -> JSONResponse:
    """An error as all clients of this API expect it, and of the headers those that belong to it."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    kept = {name: value for name, value in headers.items() if name.lower() in ("allow", "content-range")}
    kept |= {"Retry-After": "5"} if status in (429, 503) else {}
    kept |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, kept)


def _handle_errors(app: FastAPI, server: Server) -> None:
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
    async def many(_: Request, __: QueueFullError) -> Response:
        return _error(429, "the queue is full; try again later", code="queue_full")

    @app.exception_handler(KeyReusedError)
    async def reused(_: Request, __: KeyReusedError) -> Response:
        message = "Idempotency-Key: came before with another request; take a new one"
        return _error(409, message, code="idempotency_key_reused")

    @app.exception_handler(UnknownJobError)
    async def missing(_: Request, __: UnknownJobError) -> Response:
        return _error(404, "no such video", "video_id", "not_found")

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        headers = error.headers or NOTHING
        if error.status_code == 405:  # the routes of one path are several, each with its method
            found = [
                own for own in app.routes if isinstance(own, Route) and own.matches(request.scope)[0] != Match.NONE
            ]
            headers = {"Allow": ", ".join(sorted({method for own in found for method in own.methods or ()}))}
        return _error(error.status_code, str(error.detail), headers=headers)

    async def full(_: Request, __: Exception) -> Response:
        return _error(503, "the server cannot store anything at the moment; try again later", code="unavailable")

    for kind in (*server.store.passing, OSError):  # the database is busy or away, or the disk is full
        app.exception_handler(kind)(full)

    @app.exception_handler(Exception)
    async def other(_: Request, __: Exception) -> Response:
        return _error(500, "the server failed; its log has the reason")


# the page, and state


def _add_page(app: FastAPI) -> None:
    """Its files, which browsers ask for again each time: another version may serve them."""
    files = StaticFiles(directory=PAGE)

    @app.get("/", include_in_schema=False)
    @app.get("/{name}", include_in_schema=False)
    async def page(request: Request, name: str = "index.html") -> Response:
        found = await files.get_response(name, request.scope)
        found.headers["Cache-Control"] = "no-cache"
        return found


def _add_state(app: FastAPI, server: Server) -> None:
    jobs = Gauge("dicode_jobs", "Jobs by status", ["status"], registry=server.registry)
    restarts = Gauge("dicode_worker_restarts", "Workers that died and were begun again", registry=server.registry)

    @app.get("/v1/models", summary="Models that this server has")
    def models() -> Any:
        return {"object": "list", "data": [_model(name, own) for name, own in server.models.items()]}

    @app.get("/healthz", summary="Whether the server answers")
    async def healthz() -> Any:  # though all threads may wait for the database
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
