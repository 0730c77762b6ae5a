"""What clients follow while a job runs: its events, and its video as it grows."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Any

from fastapi.concurrency import run_in_threadpool

from dicode.serve.names import ALONE_S, VIDEO
from dicode.serve.server import Server
from dicode.serve.store import FinishedError, Job, UnknownJobError

# between looks for events, and at growing files: a share of the time since the last one, from the first to the second
FIRST_LOOK_S, LAST_LOOK_S, LOOK_SHARE = 0.05, 0.5, 0.05
KEPT_ALIVE_S = 15.0  # of silence, before a stream of events sends a comment
CHUNK = 2**16


async def events_of(server: Server, video_id: str, after: int) -> AsyncIterator[str]:
    """Server-sent events until the job is finished or gone, or the server ends.

    Those of the store have numbers; a queued job's `position`, which is none of them, is sent whenever it changes.
    """
    store, silent_s, kept_s, place = server.store, 0.0, 0.0, None
    while not server.ended:
        try:
            job = await run_in_threadpool(store.get, video_id)
        except UnknownJobError:
            yield "event: deleted\ndata: {}\n\n"
            return
        for event in await run_in_threadpool(store.events, video_id, after):
            after = event.number
            if event.kind == "watched":
                continue
            silent_s, kept_s = 0.0, 0.0
            yield f"id: {event.number}\nevent: {event.kind}\ndata: {json.dumps(event.data)}\n\n"
        if job.finished:
            return
        if (found := await run_in_threadpool(_place, server, job)) != place:
            place = found
            if place is not None:
                yield f"event: position\ndata: {json.dumps(place)}\n\n"
        pause_s = min(max(LOOK_SHARE * silent_s, FIRST_LOOK_S), LAST_LOOK_S)
        await asyncio.sleep(pause_s)
        silent_s, kept_s = silent_s + pause_s, kept_s + pause_s
        if kept_s >= KEPT_ALIVE_S:
            kept_s = 0.0
            yield ": still here\n\n"


def _place(server: Server, job: Job) -> dict[str, Any] | None:
    """Where a queued job is in the queue, and how long that takes; None for another one."""
    if job.status != "queued":
        return None
    shown = server.shown(job)[0]
    return {name: shown[name] for name in ("position", "seconds_left") if name in shown}


async def growing(server: Server, video_id: str) -> AsyncIterator[bytes]:
    """The bytes of a video from its first clip on, until it is finished; ends early where its worker died.

    Of a live one it notes again and again that it is watched. The file is opened once: in the end another one takes its
    name, and this one still has all clips.
    """
    claim, file, silent_s, noted_s = None, None, 0.0, -math.inf
    try:
        while not server.ended:
            try:
                job = await run_in_threadpool(server.store.get, video_id)
                if job.request["live"] and not job.finished and time.monotonic() - noted_s > ALONE_S / 3:
                    await run_in_threadpool(server.store.direct, video_id, "watched", {})
                    noted_s = time.monotonic()
            except FinishedError:  # just now
                continue
            except UnknownJobError:
                return
            if file is None:
                claim, file = job.claim, await run_in_threadpool(_opened, server.file(job, VIDEO))
            if file is not None and job.claim == claim:
                while data := await run_in_threadpool(file.read, CHUNK):
                    silent_s = 0.0
                    yield data
            if job.finished or (file is not None and job.claim != claim):
                return
            pause_s = min(max(LOOK_SHARE * silent_s, FIRST_LOOK_S), LAST_LOOK_S)
            await asyncio.sleep(pause_s)
            silent_s += pause_s
    finally:
        if file is not None:
            file.close()


def _opened(path: Path) -> IO[bytes] | None:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None
