"""What all endpoints of the server share: its store, models and limits, and how a job is shown."""

import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import Path as InPath
from prometheus_client import CollectorRegistry

from dicode.serve.names import LEAST_SIDE
from dicode.serve.request import JOB_ID, Model
from dicode.serve.store import Job, Store
from dicode.serve.supervisor import Supervisor

LOCAL = ("127.0.0.1", "localhost")
DAY_S = 86_400.0
JobId = Annotated[str, InPath(pattern=JOB_ID, description="The id of a video")]


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
    keep_days: float | None = None  # that a finished job is kept; None: until it is deleted
    silent_s: float = 10.0  # after which the job of a worker that shows no sign of life is given to another
    draining: bool = False  # no new jobs; those that run finish their clips
    ended: bool = False  # what follows a job is to end too
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    _lives: dict[str | None, tuple[Job, float]] = field(default_factory=dict)  # by claim, and since when it is so

    def job_folder(self, job_id: str) -> Path:
        """Where a job's files are."""
        return self.folder / "jobs" / job_id

    def file(self, job: Job, name: str) -> Path:
        """A file of the claim that a job has."""
        return self.job_folder(job.id) / str(job.claim) / name

    def forget(self, job_id: str) -> None:
        """Delete a job and its files. Raises `UnknownJobError`."""
        self.store.delete(job_id)
        shutil.rmtree(self.job_folder(job_id), ignore_errors=True)

    def release_silent(self) -> None:
        """Give the jobs of silent workers to others, and remove what those had written of them.

        Silent is one whose sign of life has stayed the same for so long by this machine's steady clock: those of other
        machines may go wrong, and any may be set.
        """
        now_s, lives = time.monotonic(), self._lives
        self._lives = {}
        for job in self.store.running():
            before, since_s = lives.get(job.claim, (job, now_s))
            self._lives[job.claim] = (job, since_s if before.beat_at == job.beat_at else now_s)
        silent = [job for job, since_s in self._lives.values() if now_s - since_s >= self.silent_s]
        for job in self.store.release(silent=silent) if silent else []:
            shutil.rmtree(self.job_folder(job.id) / str(job.claim), ignore_errors=True)

    def drain(self) -> None:
        """Take no new jobs, wait for the clips at hand, and end the workers; then what follows jobs may end."""
        self.draining = True
        if self.supervisor is not None:
            self.supervisor.stop()
        self.ended = True

    def sweep(self) -> None:
        """Remove folders of jobs that were never queued: the server died between their files and their row."""
        known = self.store.ids()
        for folder in (self.folder / "jobs").glob("video_*"):
            if folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)

    def shown(self, *jobs: Job) -> list[dict[str, Any]]:
        """Jobs as the API shows them."""
        unfinished = any(not job.finished for job in jobs)
        waiting = self.store.waiting() if unfinished else []
        usual_s = self.store.usual_s() if unfinished else None
        return [self._shown(job, waiting, usual_s) for job in jobs]

    def _shown(self, job: Job, waiting: list[str], usual_s: float | None) -> dict[str, Any]:
        request, model = job.request, self.models.get(job.request["model"])
        side = model.tokenizer.size * model.scale(None, LEAST_SIDE) if model else 0
        kept_s = None if self.keep_days is None or job.completed_at is None else self.keep_days * DAY_S
        shown = {
            "id": job.id,
            "object": "video",
            "status": job.status,
            "progress": int(100 * job.progress),
            "created_at": int(job.created_at),
            "completed_at": None if job.completed_at is None else int(job.completed_at),
            "expires_at": None if kept_s is None else math.ceil((job.completed_at or 0.0) + kept_s),
            "model": request["model"],
            "prompt": request["prompt"],
            "seconds": f"{length_s(request):g}",
            "size": request["size"] or f"{side}x{side}",
            "remixed_from_video_id": request["remixed_from_video_id"],
            "error": None if job.code is None else {"code": job.code, "message": job.message},
            "request": request,
        }
        if job.id in waiting:
            shown["position"] = position = waiting.index(job.id)
            if usual_s is not None:
                workers = max(1, len(self.supervisor.devices) if self.supervisor else 1)
                shown["seconds_left"] = round((position // workers + 1) * usual_s, 1)
        elif job.status == "in_progress" and job.progress > 0 and not request["live"]:
            worked_s = max(0.0, time.time() - (job.started_at or 0.0))
            shown["seconds_left"] = round(worked_s * (1 - job.progress) / job.progress, 1)
        return shown


def length_s(request: dict[str, Any]) -> float:
    """Seconds of a video, of a request as it is stored."""
    return sum(shot["seconds"] for shot in request["shots"]) if request["shots"] else request["seconds"]
