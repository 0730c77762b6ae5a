"""Endpoints of a job's files."""

import asyncio
from itertools import chain
from pathlib import Path
from typing import Literal, get_args

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from dicode.serve.names import KEY_FRAMES, PLAN, SOURCE, THUMBNAIL, VIDEO
from dicode.serve.request import RequestError
from dicode.serve.server import JobId, Server, length_s
from dicode.serve.streams import growing

Variant = Literal["video", "gif", "webm", "source", "thumbnail", "spritesheet"]
CONVERTED = ("gif", "webm")  # of the video, when they are first asked for
WHOLE = ("video", "source", *CONVERTED)  # are there once the video is completed
MOST_CONVERTED_S = 120.0
VARIANTS = {
    "video": (VIDEO, "video/mp4"),
    "gif": ("video.gif", "image/gif"),
    "webm": ("video.webm", "video/webm"),
    "source": (SOURCE, "video/mp4"),
    "thumbnail": (THUMBNAIL, "image/jpeg"),
    "spritesheet": (KEY_FRAMES, "image/png"),
}
assert set(VARIANTS) == set(get_args(Variant))


def add_files(app: FastAPI, server: Server) -> None:
    """The endpoints of what came of a job."""
    converting = asyncio.Lock()  # one after the other: a conversion takes a core

    @app.get("/v1/videos/{video_id}/content", summary="The video, a picture of it, or its key frames")
    async def content(video_id: JobId, variant: Variant = "video") -> Response:
        job = await run_in_threadpool(server.store.get, video_id)
        name, kind = VARIANTS[variant]
        path = server.file(job, name)
        if job.status == "failed":
            raise HTTPException(409, f"the video has failed: {job.message}")
        if job.status != "completed" and (variant in WHOLE or not path.is_file()):
            raise HTTPException(409, "the video is not completed yet")
        if variant in CONVERTED:
            async with converting:
                if not path.is_file():
                    await run_in_threadpool(_convert, server.file(job, VIDEO), path, length_s(job.request))
        if not path.is_file():
            raise HTTPException(404, f"this video has no {variant}")
        name = f"{video_id}{path.suffix}"
        return FileResponse(path, media_type=kind, filename=name, content_disposition_type="inline")

    app.add_api_route("/v1/videos/{video_id}/content", content, methods=["HEAD"], include_in_schema=False)

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
        return StreamingResponse(growing(server, video_id), media_type="video/mp4")


def _convert(video: Path, path: Path, seconds: float) -> None:
    """Write a completed video in another format, picture by picture, whole or not at all."""
    from dicode.video.container import container_frames
    from dicode.video.read import VideoReadError, read_metadata
    from dicode.video.write import VideoWriter

    if seconds > MOST_CONVERTED_S:
        raise RequestError(f"variant: a video of more than {MOST_CONVERTED_S:g} s is there as mp4 alone", "variant")
    try:
        frames = container_frames(video)
        first = next(frames)
        with VideoWriter(path, 1 / (first.end_s - first.start_s), read_metadata(video) or None) as writer:
            for frame in chain([first], frames):
                writer.write(frame.render()[None])
    except (VideoReadError, FileNotFoundError) as error:  # deleted just now
        raise HTTPException(409, "the video cannot be read") from error
