"""What clients follow while a job runs: its events, and its video as it grows."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO

from fastapi.concurrency import run_in_threadpool

from dicode.serve.names import VIDEO
from dicode.serve.store import Job, Store

LOOK_S = 0.05  # between looks for events, and at growing files
KEPT_ALIVE_S = 15.0  # of silence, before a stream of events sends a comment
CHUNK = 2**16


async def events_of(store: Store, video_id: str, after: int) -> AsyncIterator[str]:
    """Server-sent events until the job is finished or gone."""
    silent_s = 0.0
    while True:
        try:
            job = await run_in_threadpool(store.get, video_id)
        except KeyError:
            yield "event: deleted\ndata: {}\n\n"
            return
        found = await run_in_threadpool(store.events, video_id, after)
        for event in found:
            after, silent_s = event.number, 0.0
            yield f"id: {event.number}\nevent: {event.kind}\ndata: {json.dumps(event.data)}\n\n"
        if job.finished:
            return
        await asyncio.sleep(LOOK_S)
        silent_s += LOOK_S
        if silent_s >= KEPT_ALIVE_S:
            silent_s = 0.0
            yield ": still here\n\n"


async def growing(store: Store, file_of: Callable[[Job, str], Path], video_id: str) -> AsyncIterator[bytes]:
    """The bytes of a video from its first clip on, until it is finished; ends early where its worker died.

    The file is opened once: in the end another one takes its name, and this one still has all clips.
    """
    claim, file = None, None
    try:
        while True:
            try:
                job = await run_in_threadpool(store.get, video_id)
            except KeyError:
                return
            if file is None:
                claim, file = job.claim, await run_in_threadpool(_opened, file_of(job, VIDEO))
            if file is not None and job.claim == claim:
                while data := await run_in_threadpool(file.read, CHUNK):
                    yield data
            if job.finished or (file is not None and job.claim != claim):
                return
            await asyncio.sleep(LOOK_S)
    finally:
        if file is not None:
            file.close()


def _opened(path: Path) -> IO[bytes] | None:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None
