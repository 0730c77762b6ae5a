"""Jobs of the server, in a database of any number of processes: what was asked for, how far it is, what came of it.

A job is *queued* until a worker claims it, then *in_progress* under that claim until it is *completed* or *failed*. All
that a worker writes names its claim: one that was thought dead, and whose job was queued again, changes nothing more.
"""

import json
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from dicode.serve.database import Connection, Postgres, Sqlite

DATABASE = "DICODE_DATABASE"  # environment variable: the address of PostgreSQL, which holds a password
ATTEMPTS = 2  # a job whose worker died is begun once more
Status = Literal["queued", "in_progress", "completed", "failed"]
UNFINISHED = ("queued", "in_progress")
RECENT = 10  # jobs, whose time says how long the next ones take


class QueueFullError(Exception):
    """As many jobs wait as may."""


class UnknownJobError(KeyError):
    """There is no such job, or no longer."""


class KeyReusedError(Exception):
    """An idempotency key came before, with another request."""


class FinishedError(Exception):
    """A job is finished, and cannot be directed any more."""


class LostClaimError(Exception):
    """A job is no longer this worker's: it was cancelled, deleted, or given to another one."""


@dataclass(frozen=True)
class Job:
    """A row of the table, `request` read; times are seconds since 1970."""

    number: int
    id: str
    status: Status
    request: dict[str, Any]
    created_at: float
    started_at: float | None
    beat_at: float | None  # when its worker last showed that it lives, by that machine's clock
    completed_at: float | None
    progress: float  # 0…1
    attempts: int
    claim: str | None
    worker: str | None
    cancelled: bool
    code: str | None
    message: str | None

    @property
    def finished(self) -> bool:
        """Whether nothing more happens to it."""
        return self.status not in UNFINISHED


COLUMNS = ", ".join(Job.__dataclass_fields__)


@dataclass(frozen=True)
class Event:
    """What happened to a job, in order: queued, started, clip, completed, failed."""

    number: int
    kind: str
    data: dict[str, Any]


class Store:
    """The jobs of a data folder, in a file there or in the database named; called from any thread."""

    def __init__(self, folder: Path, database: str | None = None) -> None:
        self.folder, self.database = folder, database
        self._kind = Sqlite(folder) if database is None else Postgres(database)
        self._local = threading.local()
        with self._transaction() as db:
            for statement in self._kind.schema.split(";"):
                db.execute(statement)

    @property
    def passing(self) -> tuple[type[Exception], ...]:
        """Errors of the database after which another try may do: it is busy, or away."""
        return self._kind.passing

    def _connection(self) -> Connection:
        if not hasattr(self._local, "db") or not self._kind.works(self._local.db):
            self._local.db = self._kind.connect()
        return self._local.db

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        db = self._connection()
        db.execute(self._kind.begin[0])
        try:
            for statement in self._kind.begin[1:]:
                db.execute(statement)
            yield db
            db.execute("COMMIT")
        except BaseException:  # of a full disk, which the last statement may be the first to find
            if self._kind.works(db):
                with suppress(*self.passing):  # SQLite may have rolled back already
                    db.execute("ROLLBACK")
            raise

    def _jobs(self, where: str, values: tuple[object, ...] = ()) -> list[Job]:
        rows = self._connection().execute(f"SELECT {COLUMNS} FROM jobs {where}", values).fetchall()
        return [_job(row) for row in rows]

    # what clients do

    @staticmethod
    def new_id() -> str:
        """A name for a job."""
        return f"video_{uuid.uuid4().hex}"

    def add(
        self, job_id: str, request: Mapping[str, Any], most_waiting: int, idempotency_key: str | None = None
    ) -> Job:
        """Queue a job, or return the one that this key has queued before.

        Raises `QueueFullError`, and `KeyReusedError` where the key has queued another request.
        """
        text = json.dumps(request)
        with self._transaction() as db:
            if idempotency_key is not None and (same := self._jobs("WHERE idempotency_key = ?", (idempotency_key,))):
                own = json.loads(text)
                if own["reconstructs"] or own["live"]:  # its length is found out when it is rendered
                    own["seconds"] = same[0].request["seconds"]
                if same[0].request != own:
                    raise KeyReusedError(idempotency_key)
                return same[0]
            if db.execute("SELECT count(*) FROM jobs WHERE status = 'queued'").fetchone()[0] >= most_waiting:
                raise QueueFullError
            db.execute(
                "INSERT INTO jobs (id, idempotency_key, status, request, created_at) VALUES (?, ?, 'queued', ?, ?)",
                (job_id, idempotency_key, text, time.time()),
            )
            self._note(db, job_id, "queued", {})
        return self.get(job_id)

    def get(self, job_id: str) -> Job:
        """Raises `UnknownJobError` for one that is not there."""
        found = self._jobs("WHERE id = ?", (job_id,))
        if not found:
            raise UnknownJobError(job_id)
        return found[0]

    def page(self, after: str | None, limit: int, newest_first: bool) -> tuple[list[Job], bool]:
        """Up to `limit` jobs that follow the one named, and whether there are more. Raises `UnknownJobError`."""
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        where, values = "", tuple[object, ...]()
        if after is not None:
            where, values = f"WHERE number {sign} ? ", (self.get(after).number,)
        found = self._jobs(f"{where}ORDER BY number {order} LIMIT ?", (*values, limit + 1))
        return found[:limit], len(found) > limit

    def waiting(self) -> list[str]:
        """The ids of queued jobs, the next one first."""
        rows = self._connection().execute("SELECT id FROM jobs WHERE status = 'queued' ORDER BY number").fetchall()
        return [job_id for (job_id,) in rows]

    def usual_s(self) -> float | None:
        """Seconds that one of the last jobs took, their median; None before the first one."""
        query = "SELECT completed_at - started_at FROM jobs WHERE status = 'completed' ORDER BY number DESC LIMIT ?"
        lengths_s = [length_s for (length_s,) in self._connection().execute(query, (RECENT,)).fetchall()]
        return max(0.0, median(lengths_s)) if lengths_s else None  # a clock may have been set back

    def ids(self) -> set[str]:
        """Of all jobs."""
        return {job_id for (job_id,) in self._connection().execute("SELECT id FROM jobs").fetchall()}

    def finished_before(self, time_s: float) -> list[str]:
        """The ids of jobs that were finished before this time."""
        query = "SELECT id FROM jobs WHERE completed_at < ?"
        return [job_id for (job_id,) in self._connection().execute(query, (time_s,)).fetchall()]

    def running(self) -> list[Job]:
        """Jobs that a worker has claimed."""
        return self._jobs("WHERE status = 'in_progress'")

    def counts(self) -> dict[str, int]:
        """Jobs by status."""
        return dict(self._connection().execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall())

    def cancel(self, job_id: str) -> Job:
        """A queued job fails at once, a running one when its worker looks; a finished one stays as it is."""
        with self._transaction() as db:
            job = self.get(job_id)
            if job.status == "queued":
                self._finish(db, job_id, "failed", "cancelled", "cancelled before it was begun")
            elif job.status == "in_progress":
                db.execute("UPDATE jobs SET cancelled = 1 WHERE id = ?", (job_id,))
        return self.get(job_id)

    def direct(self, job_id: str, kind: Literal["prompt", "end", "watched"], data: Mapping[str, Any]) -> None:
        """Note what a live video goes on with, that it ends, or is watched.

        Raises `UnknownJobError` and `FinishedError`.
        """
        with self._transaction() as db:
            if self.get(job_id).finished:
                raise FinishedError(job_id)
            self._note(db, job_id, kind, data)

    def delete(self, job_id: str) -> None:
        """Forget a job; a worker that has it loses its claim. Raises `UnknownJobError`."""
        with self._transaction() as db:
            self.get(job_id)
            db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
            db.execute("DELETE FROM events WHERE job = ?", (job_id,))

    def events(self, job_id: str, after: int = -1) -> list[Event]:
        """What happened to a job, after the event of this number."""
        query = "SELECT number, kind, data FROM events WHERE job = ? AND number > ? ORDER BY number"
        rows = self._connection().execute(query, (job_id, after)).fetchall()
        return [Event(number, kind, json.loads(data)) for number, kind, data in rows]

    # what workers do

    def claim(self, worker: str) -> Job | None:
        """The oldest queued job, from now on this worker's; None where none waits."""
        if not self._connection().execute("SELECT 1 FROM jobs WHERE status = 'queued' LIMIT 1").fetchone():
            return None  # without a lock, as it is asked many times a second
        with self._transaction() as db:
            waiting = self._jobs("WHERE status = 'queued' ORDER BY number LIMIT 1")
            if not waiting:
                return None
            now, job_id = time.time(), waiting[0].id
            db.execute(
                "UPDATE jobs SET status = 'in_progress', claim = ?, worker = ?, started_at = ?, beat_at = ?, "
                "progress = 0, attempts = attempts + 1 WHERE id = ?",
                (uuid.uuid4().hex, worker, now, now, job_id),
            )
            self._note(db, job_id, "started", {"attempt": waiting[0].attempts + 1})
        return self.get(job_id)

    def beat(self, job: Job) -> None:
        """Note that a job is being worked on. Raises `LostClaimError` where it no longer is to be."""
        with self._held(job) as db:
            db.execute("UPDATE jobs SET beat_at = ? WHERE id = ?", (time.time(), job.id))

    def advance(self, job: Job, progress: float, kind: str, data: Mapping[str, Any]) -> None:
        """Note an event and how far the job is, 0…1. Raises `LostClaimError`."""
        with self._held(job) as db:
            db.execute("UPDATE jobs SET progress = ?, beat_at = ? WHERE id = ?", (progress, time.time(), job.id))
            self._note(db, job.id, kind, data)

    def complete(self, job: Job, seconds: float | None = None) -> None:
        """Its files are whole; `seconds`: of a video whose length was not known before.

        Raises `LostClaimError`, after which the files are to be removed.
        """
        with self._held(job) as db:
            if seconds is not None:
                request = json.dumps({**job.request, "seconds": seconds})
                db.execute("UPDATE jobs SET request = ? WHERE id = ?", (request, job.id))
            self._finish(db, job.id, "completed")

    def fail(self, job: Job, code: str, message: str) -> None:
        """A job has ended in an error; of a claim that was lost nothing is noted."""
        with self._transaction() as db:
            if self._jobs("WHERE id = ? AND claim = ?", (job.id, job.claim)):
                self._finish(db, job.id, "failed", code, message)

    def give_back(self, job: Job) -> None:
        """Queue a job again that its worker leaves in good order; it does not count as begun."""
        with self._transaction() as db:
            if self._jobs("WHERE id = ? AND claim = ?", (job.id, job.claim)):
                db.execute(
                    "UPDATE jobs SET status = 'queued', claim = NULL, progress = 0, attempts = attempts - 1 "
                    "WHERE id = ?",
                    (job.id,),
                )
                self._note(db, job.id, "queued", {"again": True})

    def release(self, worker: str | None = None, silent: Sequence[Job] = ()) -> list[Job]:
        """Queue the jobs of a dead worker again, or those that were `silent` since they were read; returns them.

        One that was begun `ATTEMPTS` times fails.
        """
        with self._transaction() as db:
            lost = self._jobs("WHERE status = 'in_progress' AND worker = ?", (worker,)) if worker else []
            for own in silent:
                values = (own.id, own.claim, own.beat_at)
                lost += self._jobs("WHERE status = 'in_progress' AND id = ? AND claim = ? AND beat_at = ?", values)
            for job in lost:
                if job.cancelled:
                    self._finish(db, job.id, "failed", "cancelled", "cancelled")
                elif job.attempts < ATTEMPTS:
                    db.execute("UPDATE jobs SET status = 'queued', claim = NULL, progress = 0 WHERE id = ?", (job.id,))
                    self._note(db, job.id, "queued", {"again": True})
                else:
                    message = f"the worker died {job.attempts} times while it rendered this video"
                    self._finish(db, job.id, "failed", "worker_died", message)
        return lost

    @contextmanager
    def _held(self, job: Job) -> Iterator[Connection]:
        """A transaction on a job that is this worker's and is not to be stopped; else raises `LostClaimError`."""
        with self._transaction() as db:
            if not self._jobs("WHERE id = ? AND claim = ? AND cancelled = 0", (job.id, job.claim)):
                raise LostClaimError(job.id)
            yield db

    def _finish(
        self, db: Connection, job_id: str, status: Status, code: str | None = None, message: str | None = None
    ) -> None:
        done = 1.0 if status == "completed" else None
        db.execute(
            "UPDATE jobs SET status = ?, completed_at = ?, progress = coalesce(?, progress), code = ?, message = ? "
            "WHERE id = ?",
            (status, time.time(), done, code, message, job_id),
        )
        self._note(db, job_id, status, {"code": code, "message": message} if code else {})

    def _note(self, db: Connection, job_id: str, kind: str, data: Mapping[str, Any]) -> None:
        db.execute(
            "INSERT INTO events (job, number, kind, data) "
            "SELECT ?, coalesce(max(number), -1) + 1, ?, ? FROM events WHERE job = ?",
            (job_id, kind, json.dumps(data), job_id),
        )


def _job(row: tuple[Any, ...]) -> Job:
    values = dict(zip(Job.__dataclass_fields__, row, strict=True))
    values |= {"request": json.loads(values["request"]), "cancelled": bool(values["cancelled"])}
    return Job(**values)
