"""Where the store's tables are: a file of SQLite beside the videos, or PostgreSQL for several machines."""

import sqlite3
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dicode.config import missing_extra

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number {number},
    id TEXT NOT NULL UNIQUE,
    idempotency_key TEXT UNIQUE,
    status TEXT NOT NULL,
    request TEXT NOT NULL,
    created_at DOUBLE PRECISION NOT NULL,
    started_at DOUBLE PRECISION,
    completed_at DOUBLE PRECISION,
    progress DOUBLE PRECISION NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    claim TEXT,
    worker TEXT,
    beat_at DOUBLE PRECISION,
    cancelled INTEGER NOT NULL DEFAULT 0,
    code TEXT,
    message TEXT
);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, number);
CREATE TABLE IF NOT EXISTS events (
    job TEXT NOT NULL,
    number INTEGER NOT NULL,
    kind TEXT NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (job, number)
)
"""
BUSY_S = 10.0  # how long one process waits for another's transaction
DEAD_S = 30.0  # after which PostgreSQL ends a transaction whose client is silent, and holds the lock
LOCK = 0xD1C0DE  # PostgreSQL's number for the lock that its transactions take, one after the other, as in SQLite


@runtime_checkable
class Connection(Protocol):
    """Of one thread."""

    def execute(self, query: str, values: tuple[object, ...] = ()) -> Any:
        """A cursor; `?` stands for each value."""


class Sqlite:
    """The file `jobs.sqlite` of a folder."""

    begin = ("BEGIN IMMEDIATE",)
    schema = SCHEMA.format(number="INTEGER PRIMARY KEY AUTOINCREMENT")
    passing: tuple[type[Exception], ...] = (sqlite3.OperationalError,)  # errors after which another try may do

    def __init__(self, folder: Path) -> None:
        self.path = folder / "jobs.sqlite"

    def connect(self) -> Connection:
        """Whole after any crash of a process; a power cut may lose the last jobs."""
        db = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        return db

    def works(self, connection: Connection) -> bool:
        """Whether a connection can be used again."""
        return True


class Postgres:
    """A database by its address, `postgresql://user:password@host/name`."""

    begin = ("BEGIN", f"SELECT pg_advisory_xact_lock({LOCK})")
    schema = SCHEMA.format(number="BIGSERIAL PRIMARY KEY")

    def __init__(self, address: str) -> None:
        try:
            import psycopg
        except ModuleNotFoundError as error:
            raise missing_extra(error, "cluster") from error
        self.address, self.library = address, psycopg
        self.passing: tuple[type[Exception], ...] = (psycopg.OperationalError,)

    def connect(self) -> Connection:
        """Of a server that answers within a few seconds."""
        limits = {"lock_timeout": BUSY_S, "idle_in_transaction_session_timeout": DEAD_S}
        options = " ".join(f"-c {name}={1000 * limit_s:.0f}" for name, limit_s in limits.items())
        connection = self.library.connect(self.address, autocommit=True, connect_timeout=int(BUSY_S), options=options)
        return PostgresConnection(connection)

    def works(self, connection: Connection) -> bool:
        """False after the server, or the way there, was lost."""
        assert isinstance(connection, PostgresConnection)
        return not (connection.db.closed or connection.db.broken)


class PostgresConnection:
    """With SQLite's signs for values."""

    def __init__(self, db: Any) -> None:
        self.db = db

    def __del__(self) -> None:
        """Its thread has ended."""
        self.db.close()

    def execute(self, query: str, values: tuple[object, ...] = ()) -> Any:
        """A cursor."""
        return self.db.execute(query.replace("?", "%s"), values)
