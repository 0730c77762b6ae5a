"""Endpoints of a job's files."""

from pathlib import Path
from typing import Literal, get_args

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from dicode.serve.names import KEY_FRAMES, PLAN, SOURCE, THUMBNAIL, VIDEO
from dicode.serve.server import JobId, Server
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

    @app.get("/v1/videos/{video_id}/content", summary="The video, a picture of it, or its key frames")
    def content(video_id: JobId, variant: Variant = "video") -> Response:
        job = server.store.get(video_id)
        name, kind = VARIANTS[variant]
        path = server.file(job, name)
        if job.status == "failed":
            raise HTTPException(409, f"the video has failed: {job.message}")
        if job.status != "completed" and (variant in WHOLE or not path.is_file()):
            raise HTTPException(409, "the video is not completed yet")
        if variant in CONVERTED and not path.is_file():
            _convert(server.file(job, VIDEO), path)
        if not path.is_file():
            raise HTTPException(404, f"this video has no {variant}")
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


def _convert(video: Path, path: Path) -> None:
    """Write a completed video in another format, whole or not at all."""
    from dicode.video.read import VideoReadError, read_metadata, read_video
    from dicode.video.write import VideoWriter

    try:
        frames, fps = read_video(video, None, end_s=MOST_CONVERTED_S)
    except VideoReadError as error:
        raise HTTPException(409, "the video cannot be read") from error
    if len(frames) >= MOST_CONVERTED_S * fps:
        raise HTTPException(400, f"variant: a video of {MOST_CONVERTED_S:g} s and more is there as mp4 alone")
    with VideoWriter(path, fps, read_metadata(video) or None) as writer:
        writer.write(frames)
