"""Endpoints of jobs: to queue, list, watch, change and forget them."""

import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException

from dicode.serve import uploads
from dicode.serve.names import LEAST_SIDE, VIDEO
from dicode.serve.request import MOST_LIVE_S, OWN, RequestError, numbers, parse, schema_of_requests
from dicode.serve.server import JobId, Server, length_s
from dicode.serve.store import FinishedError, Store, UnknownJobError
from dicode.serve.streams import events_of

POLL_MS = 500  # what clients are asked to wait between looks
TEXT, FILE = {"type": "string"}, {"type": "string", "format": "binary"}


def add_jobs(app: FastAPI, server: Server) -> None:
    """The endpoints that make, list, change and forget jobs."""
    _add_new(app, server)
    _add_known(app, server)


def _add_new(app: FastAPI, server: Server) -> None:
    """What queues a job."""
    fields: dict[str, Any] = schema_of_requests()["properties"]

    @app.post(
        "/v1/videos",
        openapi_extra=_body({**fields, **dict.fromkeys(uploads.IMAGES.fields, TEXT)}),
        summary="Queue a video",
    )
    async def create(request: Request) -> Any:
        values, files = await uploads.body_of(request)
        return await run_in_threadpool(_queue, server, _clients(values), files, _key(request))

    @app.post(
        "/v1/videos/{video_id}/remix",
        openapi_extra=_body({**fields, **dict.fromkeys(uploads.IMAGES.fields, TEXT)}),
        summary="The same once more, but for the fields given: seeds under another prompt",
    )
    async def remix(video_id: JobId, request: Request) -> Any:
        values, files = await uploads.body_of(request)
        return await run_in_threadpool(_remixed, server, video_id, _clients(values), files, _key(request))

    own = {name: fields[name] for name in ("model", "size", "seed")}

    @app.post(
        "/v1/videos/reconstructions",
        openapi_extra=_body({**own, "video": FILE}, "video", form=True),
        summary="A given video through its deep tokens and back",
    )
    async def reconstruct(request: Request) -> Any:
        values, files = await uploads.body_of(request, uploads.MOVIES)
        return await run_in_threadpool(_queue, server, {**_clients(values), "reconstructs": True}, files, _key(request))

    @app.post(
        "/v1/videos/extensions",
        openapi_extra=_body({**fields, "video": TEXT}, "video", "prompt"),
        summary="Go on from a finished video, by its id, or from one that is given",
    )
    async def extend(request: Request) -> Any:
        values, files = await uploads.body_of(request, uploads.BEGINNINGS)
        return await run_in_threadpool(_extended, server, _clients(values), files, _key(request))


def _add_known(app: FastAPI, server: Server) -> None:
    """What is asked of jobs, and done to them."""

    @app.get("/v1/videos", summary="Jobs, newest first")
    def listed(
        after: Annotated[str | None, Query(max_length=64)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Any:
        try:
            jobs, more = server.store.page(after, limit, order == "desc")
        except UnknownJobError as error:
            raise HTTPException(404, "after: no such video") from error
        data = server.shown(*jobs)
        ends = {"first_id": jobs[0].id if jobs else None, "last_id": jobs[-1].id if jobs else None}
        return {"object": "list", "data": data, **ends, "has_more": more}

    @app.get("/v1/videos/{video_id}", summary="A job, and how far it is")
    def retrieve(video_id: JobId, response: Response) -> Any:
        job = server.store.get(video_id)
        if not job.finished:
            response.headers["openai-poll-after-ms"] = str(POLL_MS)
        return server.shown(job)[0]

    @app.delete("/v1/videos/{video_id}", summary="Forget a job, and remove its files")
    def delete(video_id: JobId) -> Any:
        server.forget(video_id)
        return {"id": video_id, "object": "video.deleted", "deleted": True}

    @app.post("/v1/videos/{video_id}/cancel", summary="Stop a job")
    def cancel(video_id: JobId) -> Any:
        return server.shown(server.store.cancel(video_id))[0]

    @app.post(
        "/v1/videos/{video_id}/direct",
        openapi_extra=_body({"prompt": TEXT, "end": {"type": "boolean"}}),
        summary="What a live video goes on with, or that it ends",
    )
    async def direct(video_id: JobId, request: Request) -> Any:
        values, _ = await uploads.body_of(request)
        return await run_in_threadpool(_directed, server, video_id, values)

    @app.get("/v1/videos/{video_id}/events", summary="What happens to a job, as server-sent events")
    async def events(video_id: JobId, request: Request) -> Response:
        server.store.get(video_id)
        seen = request.headers.get("last-event-id", "")
        after = int(seen) if seen.isdecimal() and len(seen) < 10 else -1
        return StreamingResponse(events_of(server, video_id, after), media_type="text/event-stream")


def _body(properties: dict[str, Any], *required: str, form: bool = False) -> dict[str, Any]:
    """OpenAPI's description of a request's body."""
    schema = {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}
    kind = "multipart/form-data" if form else "application/json"
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


def _clients(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request. Raises `RequestError` for those that only the server sets."""
    if taken := [name for name in OWN if values.get(name)]:
        message = f"{taken[0]}: is not for clients to set; use …/remix, /v1/videos/extensions or …/reconstructions"
        raise RequestError(message, taken[0])
    return {name: value for name, value in values.items() if name not in OWN}


def _key(request: Request) -> str | None:
    return request.headers.get("idempotency-key") or None


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
    if request.reconstructs != any(own.startswith("source") for own in files):
        raise RequestError("video: expected a video file, and that at /v1/videos/reconstructions alone", "video")
    model = server.models[name]
    model.scale(request.size, LEAST_SIDE)
    model.check(request, any(own.startswith("last_image") for own in files), server.most_s)
    job_id = Store.new_id()
    folder = server.job_folder(job_id)
    try:
        uploads.keep(files, folder)
        if continued is not None:
            shutil.copyfile(continued, folder / f"continued{continued.suffix}")
        given = sorted(path.stem for path in folder.glob("*.*"))
        stored = {**request.model_dump(), **numbers(request.sampling), "model": name, "given": given}
        job = server.store.add(job_id, stored, server.queue, key)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, FileNotFoundError):  # what it goes on from, or is a remix of, was deleted just now
            raise UnknownJobError(job_id) from error
        raise
    if job.id != job_id:  # its key was known
        shutil.rmtree(folder, ignore_errors=True)
    return server.shown(job)[0]


def _directed(server: Server, video_id: str, values: dict[str, Any]) -> dict[str, Any]:
    job = server.store.get(video_id)
    if not job.request["live"]:
        raise RequestError("only a live video can be directed", "video_id")
    if unknown := sorted(values.keys() - {"prompt", "end"}):
        raise RequestError(f"{unknown[0][:80]}: unknown field", unknown[0][:80])
    if (ends := values.get("end")) not in (None, True, False, "true", "false"):
        raise RequestError("end: expected true or false", "end")
    try:
        if ends in (True, "true"):
            server.store.direct(video_id, "end", {})
        else:
            server.store.direct(video_id, "prompt", {"prompt": parse({"prompt": values.get("prompt", "")}).prompt})
    except FinishedError as error:
        raise HTTPException(409, "the video is finished") from error
    return server.shown(server.store.get(video_id))[0]


def _remixed(
    server: Server, video_id: str, values: dict[str, Any], files: uploads.Files, key: str | None
) -> dict[str, Any]:
    """The same request with other fields and files; a file's place is taken by one of the same field."""
    job = server.store.get(video_id)
    if job.request["reconstructs"]:
        raise RequestError("a reconstruction has no prompt to change", "video_id")
    given = {path.name: path for path in server.job_folder(video_id).glob("*.*") if path.is_file()}
    replaced = {name.partition(".")[0] for name in files}
    kept = {name: path for name, path in given.items() if name.partition(".")[0] not in replaced}
    continued = next((kept.pop(name) for name in [*kept] if name.startswith("continued.")), None)
    own: dict[str, Any] = {"remixed_from_video_id": video_id}
    if job.request["live"]:
        own["seconds"] = MOST_LIVE_S  # as long as it is not ended
    if values.get("prompt"):
        own |= {"seconds": length_s(job.request), **own, "shots": None}
    try:
        files = {**{name: path.read_bytes() for name, path in kept.items()}, **files}
    except FileNotFoundError as error:  # deleted just now
        raise UnknownJobError(video_id) from error
    return _queue(server, {**job.request, **own, **values}, files, key, continued)


def _extended(server: Server, values: dict[str, Any], files: uploads.Files, key: str | None) -> dict[str, Any]:
    """Go on from a video of this server, or from a file."""
    source = values.pop("video", None)
    source = source.get("id") if isinstance(source, dict) else source
    if files and source is None:
        return _queue(server, values, files, key)
    if not isinstance(source, str):
        raise RequestError("video: expected the id of a video, or a video file", "video")
    job = server.store.get(source)
    if job.status != "completed":
        raise HTTPException(409, "the video is not completed yet")
    own = {"model": job.request["model"], "size": job.request["size"], "extends": source}
    return _queue(server, {**own, **values}, {}, key, continued=server.file(job, VIDEO))
