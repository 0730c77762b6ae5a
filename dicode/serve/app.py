"""The HTTP API: jobs in the shape of OpenAI's videos, their files, what happens to them as it happens, and the page."""

import asyncio
import hmac
import json
import shutil
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import FastAPI, Query, Request
from fastapi import Path as InPath
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dicode.serve import uploads
from dicode.serve.render import KEY_FRAMES, LEAST_SIDE, PLAN, THUMBNAIL, VIDEO
from dicode.serve.request import Model, RequestError, VideoRequest, parse
from dicode.serve.store import Job, QueueFullError, Store
from dicode.serve.streams import events_of, growing
from dicode.serve.supervisor import SILENT_S, Supervisor

PAGE = Path(__file__).parent / "page"
LOCAL = ("127.0.0.1", "localhost")
COOKIE = "dicode_key"
POLL_MS = 500  # what clients are asked to wait between looks
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}  # of errors; others are invalid_request_error, from 500 on server_error
JobId = Annotated[str, InPath(pattern=r"^video_[0-9a-f]{32}$", description="The id of a video")]
VARIANTS = {
    "video": (VIDEO, "video/mp4"),
    "thumbnail": (THUMBNAIL, "image/jpeg"),
    "spritesheet": (KEY_FRAMES, "image/png"),
}


@dataclass
class Server:
    """What the endpoints share."""

    folder: Path
    models: dict[str, Model]
    store: Store
    supervisor: Supervisor | None = None
    api_key: str | None = None
    queue: int = 32  # jobs that may wait
    most_s: float = 600.0  # seconds of a video
    hosts: tuple[str, ...] = LOCAL
    draining: bool = False
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def job_folder(self, job_id: str) -> Path:
        """Where a job's files are."""
        return self.folder / "jobs" / job_id

    def file(self, job: Job, name: str) -> Path:
        """A file of the claim that a job has."""
        return self.job_folder(job.id) / str(job.claim) / name


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
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        return response

    _handle_errors(app)
    _add_jobs(app, server)
    _add_files(app, server)
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
    """Give the jobs of silent workers to others."""
    while True:
        await asyncio.sleep(SILENT_S / 4)
        with suppress(sqlite3.OperationalError):  # busy: the next look will do
            await run_in_threadpool(server.store.release, None, SILENT_S)


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


# jobs


def _add_jobs(app: FastAPI, server: Server) -> None:
    content = {"application/json": {"schema": _inlined(VideoRequest.model_json_schema())}}
    body = {"requestBody": {"required": True, "content": content}}

    @app.post("/v1/videos", openapi_extra=body, summary="Queue a video")
    async def create(request: Request) -> Any:
        values, files = await uploads.body_of(request)
        return await run_in_threadpool(_queue, server, values, files, request.headers.get("idempotency-key"))

    @app.get("/v1/videos", summary="Jobs, newest first")
    def listed(
        after: Annotated[str | None, Query(max_length=64)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Any:
        jobs, more = server.store.page(after, limit, order == "desc")
        data = [_video(server, job) for job in jobs]
        ends = {"first_id": jobs[0].id if jobs else None, "last_id": jobs[-1].id if jobs else None}
        return {"object": "list", "data": data, **ends, "has_more": more}

    @app.get("/v1/videos/{video_id}", summary="A job, and how far it is")
    def retrieve(video_id: JobId, response: Response) -> Any:
        job = server.store.get(video_id)
        if not job.finished:
            response.headers["openai-poll-after-ms"] = str(POLL_MS)
        return _video(server, job)

    @app.delete("/v1/videos/{video_id}", summary="Forget a job, and remove its files")
    def delete(video_id: JobId) -> Any:
        server.store.delete(video_id)
        shutil.rmtree(server.job_folder(video_id), ignore_errors=True)
        return {"id": video_id, "object": "video.deleted", "deleted": True}

    @app.post("/v1/videos/{video_id}/cancel", summary="Stop a job")
    def cancel(video_id: JobId) -> Any:
        return _video(server, server.store.cancel(video_id))

    @app.post("/v1/videos/{video_id}/direct", summary="What a live video goes on with, or that it ends")
    async def direct(video_id: JobId, request: Request) -> Any:
        values, _ = await uploads.body_of(request)
        return await run_in_threadpool(_directed, server, video_id, values)

    @app.post("/v1/videos/{video_id}/remix", summary="The same seeds under another prompt")
    async def remix(video_id: JobId, request: Request) -> Any:
        values, _ = await uploads.body_of(request)
        return await run_in_threadpool(_remixed, server, video_id, values)

    @app.post("/v1/videos/extensions", summary="Go on from a finished video")
    async def extend(request: Request) -> Any:
        values, _ = await uploads.body_of(request)
        return await run_in_threadpool(_extended, server, values, request.headers.get("idempotency-key"))

    @app.get("/v1/videos/{video_id}/events", summary="What happens to a job, as server-sent events")
    async def events(video_id: JobId, request: Request) -> Response:
        server.store.get(video_id)
        seen = request.headers.get("last-event-id", "")
        after = int(seen) if seen.isdecimal() and len(seen) < 10 else -1
        return StreamingResponse(events_of(server.store, video_id, after), media_type="text/event-stream")


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without definitions apart, which OpenAPI would look for elsewhere."""
    definitions = schema.pop("$defs", {})
    text = json.dumps(schema)
    for name, own in definitions.items():
        text = text.replace(json.dumps({"$ref": f"#/$defs/{name}"}), json.dumps(own))
    return json.loads(text)


def _queue(
    server: Server, values: dict[str, Any], files: uploads.Files, key: str | None = None, continued: Path | None = None
) -> dict[str, Any]:
    """Check a request, keep its files, and queue it."""
    if server.draining:
        raise HTTPException(503, "the server is ending; try again later")
    request = parse({name: value for name, value in values.items() if value is not None})
    name = request.model or next(iter(server.models))
    if name not in server.models:
        raise RequestError(f"model: expected one of {', '.join(server.models)}, got {name[:80]!r}", "model")
    model = server.models[name]
    model.scale(request.size, LEAST_SIDE)
    model.check(request, any(own.startswith("last_image") for own in files), server.most_s)
    job_id = Store.new_id()
    folder = server.job_folder(job_id)
    try:
        uploads.keep(files, folder)
        if continued is not None:
            shutil.copyfile(continued, folder / "continued.mp4")
        job = server.store.add(job_id, request.model_copy(update={"model": name}).model_dump(), server.queue, key)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if job.id != job_id:  # its key was known
        shutil.rmtree(folder, ignore_errors=True)
    return _video(server, job)


def _directed(server: Server, video_id: str, values: dict[str, Any]) -> dict[str, Any]:
    job = server.store.get(video_id)
    if not job.request["live"]:
        raise RequestError("only a live video can be directed", "video_id")
    try:
        if values.get("end"):
            server.store.direct(video_id, "end", {})
        else:
            server.store.direct(video_id, "prompt", {"prompt": parse({"prompt": values.get("prompt", "")}).prompt})
    except RequestError:
        raise
    except ValueError as error:
        raise HTTPException(409, str(error)) from error
    return _video(server, server.store.get(video_id))


def _remixed(server: Server, video_id: str, values: dict[str, Any]) -> dict[str, Any]:
    job = server.store.get(video_id)
    kept = {path.name: path.read_bytes() for path in server.job_folder(video_id).glob("*.*") if path.is_file()}
    files = {name: data for name, data in kept.items() if not name.startswith("continued")}
    given = server.job_folder(video_id) / "continued.mp4"
    own = {"prompt": values.get("prompt", ""), "shots": None, "remixed_from_video_id": video_id}
    own["seconds"] = _length_s(job.request)
    return _queue(server, {**job.request, **own}, files, continued=given if given.is_file() else None)


def _extended(server: Server, values: dict[str, Any], key: str | None) -> dict[str, Any]:
    source = values.pop("video", None)
    source = source.get("id") if isinstance(source, dict) else source
    if not isinstance(source, str):
        raise RequestError("video: expected the id of a video", "video")
    job = server.store.get(source)
    if job.status != "completed":
        raise HTTPException(409, "the video is not completed yet")
    own = {"model": job.request["model"], "extends": source}
    return _queue(server, {**own, **values}, {}, key, continued=server.file(job, VIDEO))


def _length_s(request: dict[str, Any]) -> float:
    """Seconds of a video, of a request as it is stored."""
    return sum(shot["seconds"] for shot in request["shots"]) if request["shots"] else request["seconds"]


def _video(server: Server, job: Job) -> dict[str, Any]:
    """A job as the API shows it."""
    request, model = job.request, server.models.get(job.request["model"])
    side = model.tokenizer.size * model.scale(request["size"], LEAST_SIDE) if model else 0
    shown = {
        "id": job.id,
        "object": "video",
        "status": job.status,
        "progress": int(100 * job.progress),
        "created_at": int(job.created_at),
        "completed_at": None if job.completed_at is None else int(job.completed_at),
        "expires_at": None,
        "model": request["model"],
        "prompt": request["prompt"],
        "seconds": f"{_length_s(request):g}",
        "size": f"{side}x{side}",
        "remixed_from_video_id": request["remixed_from_video_id"],
        "error": None if job.code is None else {"code": job.code, "message": job.message},
        "request": request,
    }
    if job.status == "queued":
        shown["position"] = server.store.position(job)
    return shown


# files


def _add_files(app: FastAPI, server: Server) -> None:
    @app.get("/v1/videos/{video_id}/content", summary="The video, a picture of it, or its key frames")
    def content(video_id: JobId, variant: Literal["video", "thumbnail", "spritesheet"] = "video") -> Response:
        job = server.store.get(video_id)
        name, kind = VARIANTS[variant]
        path = server.file(job, name)
        if job.status == "failed":
            raise HTTPException(409, f"the video has failed: {job.message}")
        if not path.is_file() or (variant == "video" and job.status != "completed"):
            raise HTTPException(409, "the video is not completed yet")
        name = f"{video_id}{path.suffix}"
        return FileResponse(path, media_type=kind, filename=name, content_disposition_type="inline")

    @app.get("/v1/videos/{video_id}/plan", summary="Deep tokens of its key frames, as safetensors")
    def plan(video_id: JobId) -> Response:
        job = server.store.get(video_id)
        if job.status != "completed":
            raise HTTPException(409, "the video is not completed yet")
        if not server.file(job, PLAN).is_file():
            raise HTTPException(404, "a live video keeps no tokens")
        name = f"{video_id}.safetensors"
        return FileResponse(server.file(job, PLAN), media_type="application/octet-stream", filename=name)

    @app.get("/v1/videos/{video_id}/stream", summary="The video while it grows, as fragmented MP4")
    async def stream(video_id: JobId) -> Response:
        server.store.get(video_id)
        return StreamingResponse(growing(server.store, server.file, video_id), media_type="video/mp4")


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
