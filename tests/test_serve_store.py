"""The jobs of `dicode serve` in SQLite and PostgreSQL: claims, deaths, keys, silence."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from postgres import PROGRAMS, postgres

from dicode.serve.database import Postgres
from dicode.serve.server import Server
from dicode.serve.store import Job, LostClaimError, QueueFullError, Store

REQUEST = {
    "prompt": "a spark",
    "model": None,
    "size": None,
    "shots": None,
    "seconds": 2.0,
    "reconstructs": False,
    "live": False,
}


def add(store: Store, key: str | None = None, most: int = 8) -> Job:
    return store.add(Store.new_id(), REQUEST, most, key)


@pytest.fixture(scope="session")
def database() -> Iterator[str]:
    if not PROGRAMS and not os.environ.get("DICODE_POSTGRES"):
        pytest.skip("no PostgreSQL")
    with postgres() as address:
        yield address


@pytest.fixture(params=["sqlite", "postgres"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Store]]:
    """Makes stores of the same empty tables, as several processes have them."""
    if request.param == "sqlite":
        yield lambda: Store(tmp_path)
        return
    address = request.getfixturevalue("database")
    yield lambda: Store(tmp_path, address)
    connection = Postgres(address).connect()
    connection.execute("DROP TABLE jobs")
    connection.execute("DROP TABLE events")


def test_jobs_are_claimed_in_order_and_once(stores: Callable[[], Store]) -> None:
    store, other = stores(), stores()
    first, second = add(store), add(store)
    assert store.waiting() == [first.id, second.id]
    claimed = [store.claim("a"), other.claim("b"), store.claim("a")]
    assert [job.id if job else None for job in claimed] == [first.id, second.id, None]
    assert store.get(first.id).status == "in_progress"
    assert [event.kind for event in store.events(first.id)] == ["queued", "started"]


def test_many_claimants_share_jobs_without_doubles(stores: Callable[[], Store]) -> None:
    store, found = stores(), list[str]()
    jobs = [add(store, most=100).id for _ in range(40)]

    def claim_all(name: str) -> None:
        while (job := store.claim(name)) is not None:
            found.append(job.id)
            store.complete(job)

    threads = [threading.Thread(target=claim_all, args=(str(i),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(jobs)
    assert store.counts() == {"completed": 40}


def test_a_key_queues_once_and_a_full_queue_refuses(stores: Callable[[], Store]) -> None:
    store = stores()
    assert add(store, "k").id == add(store, "k").id != add(store, "other").id
    with pytest.raises(QueueFullError):
        add(store, most=2)
    assert add(store, "k", most=2)  # known: it takes no place


def test_a_claim_that_was_lost_changes_nothing(stores: Callable[[], Store]) -> None:
    store = stores()
    add(store)
    old = store.claim("a")
    assert old is not None
    assert [job.id for job in store.release(worker="a")] == [old.id]
    new = store.claim("b")
    assert new is not None and new.attempts == 2
    for change in (store.beat, store.complete, lambda job: store.advance(job, 0.5, "clip", {})):
        with pytest.raises(LostClaimError):
            change(old)
    store.fail(old, "server_error", "late")
    assert store.get(new.id).status == "in_progress"
    store.complete(new)
    assert store.get(new.id).status == "completed"


def test_a_job_that_kills_its_workers_fails_in_the_end(stores: Callable[[], Store]) -> None:
    store = stores()
    job = add(store)
    for name in ("a", "b"):
        assert store.claim(name)
        store.release(worker=name)
    assert (store.get(job.id).status, store.get(job.id).code) == ("failed", "worker_died")
    assert store.claim("c") is None


def test_silent_jobs_are_given_to_others(stores: Callable[[], Store]) -> None:
    store = stores()
    add(store)
    job = store.claim("a")
    assert job is not None
    time.sleep(0.01)
    store.beat(job)  # it lives
    assert store.release(silent=[job]) == []
    assert [own.id for own in store.release(silent=store.running())] == [job.id]


def test_cancelling(stores: Callable[[], Store]) -> None:
    store = stores()
    waiting, running = add(store), add(store)
    assert store.cancel(waiting.id).code == "cancelled"
    claimed = store.claim("a")
    assert claimed is not None and claimed.id == running.id
    assert store.cancel(running.id).status == "in_progress"
    with pytest.raises(LostClaimError):
        store.beat(claimed)
    store.fail(claimed, "cancelled", "cancelled")
    assert (store.get(running.id).status, store.get(running.id).code) == ("failed", "cancelled")
    assert store.cancel(running.id).status == "failed"  # as it is


def test_a_transaction_that_cannot_be_stored_is_rolled_back(tmp_path: Path) -> None:
    """In a process whose files may not grow, as on a full disk, and then may again."""
    code = """
import resource, sys
from pathlib import Path
from dicode.serve.server import Server
from dicode.serve.store import Store
store, request = Store(Path(sys.argv[1])), {"prompt": "x" * 3000, "reconstructs": False, "live": False}
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
refused = 0
for _ in range(60):
    try:
        store.add(store.new_id(), request, 1000)
    except store.passing:
        refused += 1
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
before = store.counts()["queued"]
store.add(store.new_id(), request, 1000)
print(refused, before, Store(Path(sys.argv[1])).counts()["queued"])
"""
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    refused, before, after = map(int, found.stdout.split())
    assert refused > 0 and before + refused == 60 and after == before + 1


def test_a_silent_client_of_the_database_does_not_hold_the_others_up(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicode.serve.database.BUSY_S", 3.0)
    monkeypatch.setattr("dicode.serve.database.DEAD_S", 1.0)
    store, lost = Store(tmp_path, database), Postgres(database).connect()
    for statement in Postgres.begin:
        lost.execute(statement)  # and nothing more, as of a machine that was unplugged
    assert add(store).status == "queued"
    monkeypatch.setattr("dicode.serve.database.BUSY_S", 1.0)
    monkeypatch.setattr("dicode.serve.database.DEAD_S", 60.0)
    other, busy = Store(tmp_path, database), Postgres(database).connect()
    for statement in Postgres.begin:
        busy.execute(statement)
    with pytest.raises(other.passing):
        add(other)
    busy.execute("ROLLBACK")
    assert add(other).status == "queued"
    for table in ("jobs", "events"):
        other._connection().execute(f"DROP TABLE {table}")


def test_a_worker_is_silent_by_the_steady_clock_alone(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, now_s = server.store, [0.0]
    monkeypatch.setattr("dicode.serve.server.time.monotonic", lambda: now_s[0])
    add(store)
    job = store.claim("a")
    assert job is not None
    server.release_silent()
    with pytest.MonkeyPatch.context() as clock:
        clock.setattr("dicode.serve.store.time.time", lambda: job.beat_at + 3600.0)  # type: ignore[operator]
        server.release_silent()
    assert store.get(job.id).status == "in_progress"  # the clock was set, no time went by
    now_s[0] = server.silent_s - 1
    store.beat(job)
    server.release_silent()
    now_s[0] += server.silent_s - 1
    server.release_silent()
    assert store.get(job.id).status == "in_progress"
    now_s[0] += 1
    server.release_silent()
    assert store.get(job.id).status == "queued"
