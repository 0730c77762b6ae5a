"""What `dicode serve` stands: requests of every kind, load, deaths, cancelled jobs, hostile uploads, an hour live.

    python tools/serve_trials.py requests load kills cancels uploads page live

Each trial begins servers of its own, in folders that it removes, and writes its figures into results/serve.json.
"""

import argparse
import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from dicode.files import read_json
from dicode.provenance import write_result
from dicode.serve.store import Store

RESULTS = Path("results/serve.json")
PATIENCE_S = 120.0
LEAKS = re.compile(r"Traceback|/dicode/|/site-packages/|/tmp/|\b0x[0-9a-f]{8,}|File \"")
SHORT = {"prompt": "a red ball jumps", "seconds": 2}


class Begun:
    """A server as users start it, on a free port; `kill` and `begin` as often as a trial likes."""

    def __init__(self, folder: Path, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{port}"
        flags = ("--port", str(port), "--data-folder", str(folder), "--model", "blocks", *flags)
        self.command = [sys.executable, "-m", "dicode", "serve", *flags]
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_S)
        self.process: subprocess.Popen[bytes] | None = None

    def begin(self) -> float:
        """Seconds until a worker is ready."""
        began_s = time.monotonic()
        with open(os.devnull, "wb") as nowhere:
            self.process = subprocess.Popen(self.command, stdout=nowhere)
        wait_for(self.ready)
        return time.monotonic() - began_s

    def ready(self) -> bool:
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """As `kill -9`."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def workers(self) -> list[int]:
        """Process numbers of workers."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        numbers = [int(number) for path in children for number in path.read_text().split()]
        return [number for number in numbers if b"dicode.serve.worker" in commands_of(number)]

    def memory_mib(self) -> float:
        """Memory of the server's own process now."""
        assert self.process is not None
        return resident_mib(self.process.pid)

    def add(self, **request: Any) -> httpx.Response:
        return self.client.post("/v1/videos", json={**SHORT, **request})

    def status(self, video_id: str) -> dict[str, Any]:
        return self.client.get(f"/v1/videos/{video_id}").json()


@contextlib.contextmanager
def server(*flags: str) -> Iterator[Begun]:
    """A server in a folder of its own, both gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="serve-trial-"))
    begun = Begun(folder, *flags)
    try:
        begun.begin()
        yield begun
    finally:
        begun.kill()
        shutil.rmtree(folder, ignore_errors=True)


def commands_of(number: int) -> bytes:
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes()
    except OSError:
        return b""


def resident_mib(number: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{number}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def wait_for(true: Callable[[], bool], most_s: float = PATIENCE_S) -> float:
    """Seconds until something holds. Raises `TimeoutError`."""
    began_s = time.monotonic()
    while not true():
        if time.monotonic() - began_s > most_s:
            raise TimeoutError
        time.sleep(0.01)
    return time.monotonic() - began_s


def many(count: int, one: Callable[[int], None]) -> None:
    """Run a function in so many threads, and wait for them all."""
    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def requests(cases: int = 10_000) -> dict[str, Any]:
    """Requests that schemathesis makes of the server's own OpenAPI description, right ones and wrong ones."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis.errors import Unsatisfiable

    counts: Counter[int] = Counter()
    unsent: Counter[str] = Counter()
    leaks: list[str] = []
    failures: list[str] = []
    chance = random.Random(0)  # hypothesis resets the common one before every example
    once = settings(
        max_examples=40, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
    )

    def asking(own: Begun, name: str, known: str) -> Callable[[Any], None]:
        def ask_one(case: Any) -> None:
            ask(own, name, known, case)

        return ask_one

    def ask(own: Begun, name: str, known: str, case: Any) -> None:
        if "{video_id}" in name and chance.random() < 0.7:  # one that is there; of those that wait none is followed
            kept = not name.startswith(("DELETE", "POST"))
            video = known if kept else own.add().json()["id"]
            case.path_parameters = {**case.path_parameters, "video_id": video}
        try:
            response = case.call(timeout=30)
        except Exception as error:  # what no client can send
            unsent[type(error).__name__] += 1
            return
        counts[response.status_code] += 1
        if response.status_code >= 500:
            failures.append(f"{name}: {response.status_code}")
        kind = response.headers.get("content-type", "")
        if ("text" in kind or "json" in kind) and (found := LEAKS.search(response.text)):
            leaks.append(f"{name}: {found[0]} in {response.text[:200]}")

    with server("--queue", "1000000", "--max-seconds", "2") as own:
        known, store = own.add().json()["id"], Store(own.folder)
        wait_for(lambda: store.get(known).status == "completed")
        schema: Any = schemathesis.openapi.from_url(f"{own.url}/openapi.json")
        operations: list[Any] = [found.ok() for found in schema.get_all_operations()]
        modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
        for number in count():
            for operation in operations:
                for mode in modes:
                    test = given(case=operation.as_strategy(generation_mode=mode))(asking(own, operation.label, known))
                    with contextlib.suppress(Unsatisfiable, schemathesis.errors.SchemathesisError):  # never wrong
                        seed(number)(once(test))()
            if counts.total() >= cases:
                break
        alive = own.client.get("/healthz").status_code
    return {
        "cases": counts.total(), "by_status": dict(sorted(counts.items())), "server_errors": failures[:20],
        "leaks": leaks[:20], "not_sent": dict(unsent), "answers_afterwards": alive,
    }  # fmt: skip


def load(jobs: int = 200, clients: int = 20) -> dict[str, Any]:
    """Clients at once, each with its share of jobs, and one that looks at a job all the time."""
    refused: list[bool] = []
    made: list[str] = []
    looks_s: list[float] = []
    over = threading.Event()
    with server("--queue", "32") as own:

        def ask(_: int) -> None:
            with httpx.Client(base_url=own.url, timeout=PATIENCE_S) as client:
                for _ in range(jobs // clients):
                    while (found := client.post("/v1/videos", json=SHORT)).status_code == 429:
                        refused.append("retry-after" in found.headers)
                        time.sleep(0.5)
                    made.append(found.json()["id"])

        def look() -> None:
            with httpx.Client(base_url=own.url, timeout=PATIENCE_S) as client:
                while not over.is_set():
                    if made:
                        began_s = time.monotonic()
                        client.get(f"/v1/videos/{made[-1]}").raise_for_status()
                        looks_s.append(time.monotonic() - began_s)
                    time.sleep(0.005)

        looking = threading.Thread(target=look)
        looking.start()
        began_s = time.monotonic()
        many(clients, ask)
        store = Store(own.folder)
        wait_for(lambda: store.counts() == {"completed": jobs}, 600.0)
        took_s = time.monotonic() - began_s
        over.set()
        looking.join()
        once = all(kinds(store, video).count("completed") == 1 for video in made)
    return {
        "jobs": len(set(made)), "all_completed_once": once, "refused": len(refused),
        "refused_with_retry_after": sum(refused), "s": took_s, "status_calls": len(looks_s),
        "status_ms": {name: 1000 * float(np.quantile(looks_s, q)) for name, q in (("p50", 0.5), ("p99", 0.99))},
    }  # fmt: skip


def idle(store: Store) -> bool:
    return not set(store.counts()) & {"queued", "in_progress"}


def moved(store: Store, waiting: list[str]) -> bool:
    return store.waiting() != waiting


def finished(store: Store, video_id: str) -> bool:
    return store.get(video_id).finished


def renewed(own: Begun, before: Sequence[int]) -> bool:
    """Whether a worker has begun that was not there before."""
    return bool(set(own.workers()) - set(before))


def kinds(store: Store, video_id: str) -> list[str]:
    return [event.kind for event in store.events(video_id)]


def kills(times: int = 20) -> dict[str, Any]:
    """`kill -9` of the worker, then of the server, at random moments while jobs are rendered."""
    random.seed(0)
    figures: dict[str, Any] = {}
    for victim in ("worker", "server"):
        with server("--queue", "1000") as own:
            store, made, again_s = Store(own.folder), [], []
            for _ in range(times):
                made += [own.add(seconds=random.choice([2, 4, 16])).json()["id"] for _ in range(3)]
                time.sleep(random.uniform(0.0, 1.5))
                if victim == "worker":
                    before = own.workers()
                    for number in before:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(number, signal.SIGKILL)
                    wait_for(partial(renewed, own, before))
                else:
                    own.kill()
                    own.begin()
                began_s, video = time.monotonic(), own.add().json()["id"]
                made.append(video)
                wait_for(partial(moved, store, store.waiting()))
                again_s.append(time.monotonic() - began_s)
            wait_for(partial(idle, store), 600.0)
            doubled = sum(kinds(store, video).count("completed") > 1 for video in made)
            finished = [store.get(video) for video in made]
            failed = [job.code for job in finished if job.status == "failed"]
            folders = {path.parent for path in (own.folder / "jobs").rglob("*") if path.is_file()}
            claims = {own.folder / "jobs" / job.id / str(job.claim) for job in finished}
            unfinished = [path.name for path in own.folder.rglob("*.part")]
            figures[victim] = {
                "kills": times, "jobs": len(made), "lost": len(made) - len(finished), "doubled": doubled,
                "failed": failed, "files_of_dead_claims": len(folders - claims), "temporary_files": len(unfinished),
                "next_job_s": {"median": float(np.median(again_s)), "longest": max(again_s)},
            }  # fmt: skip
    return figures


def cancels(times: int = 200) -> dict[str, Any]:
    """Jobs cancelled at random moments: how long until the worker is free."""
    random.seed(1)
    free_s: list[float] = []
    ended: Counter[str] = Counter()
    with server("--queue", "1000", "--max-seconds", "60") as own:
        store = Store(own.folder)
        for _ in range(times):
            video = own.add(seconds=60, steps=8).json()["id"]
            time.sleep(random.uniform(0.0, 0.8))
            own.client.post(f"/v1/videos/{video}/cancel")
            free_s.append(wait_for(partial(finished, store, video)))
            ended[store.get(video).code or "completed"] += 1
        free = own.add().json()["id"]
        wait_for(lambda: store.get(free).status == "completed")
        left = [path for path in (own.folder / "jobs").glob("*/*/*") if free not in path.parts]
    return {"cancelled": dict(ended), "free_s": {"median": float(np.median(free_s)), "longest": max(free_s)},
            "files_left": len(left)}  # fmt: skip


def uploads(payloads: int = 500) -> dict[str, Any]:
    """Names that leave the folder, files that unfold or are none, a thousand parts, writers that never end."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from hostile import bomb

    random.seed(2)
    counts: Counter[int] = Counter()
    with server("--queue", "1000000") as own:
        outside = sorted(str(path) for path in own.folder.parent.iterdir())
        before, worker = own.memory_mib(), own.workers()[0]
        worker_before = resident_mib(worker)
        for number in range(payloads):
            name = random.choice(
                ["../../../../tmp/evil.png", "/etc/cron.d/evil", "..\\..\\evil", "a" * 5000, "\x00.png"]
            )
            data = random.choice(
                [bomb(), os.urandom(10_000), b"", b"GIF89a" + b"\xff" * 1000, b"\x89PNG\r\n\x1a\n" + bytes(9)]
            )
            field = random.choice(["input_reference", "last_image", "video", "../../x"])
            path = random.choice(["/v1/videos", "/v1/videos/reconstructions", "/v1/videos/extensions"])
            asked = {"prompt": f"{number}"} if "reconstructions" not in path else {}
            counts[own.client.post(path, data=asked, files={field: (name, data)}).status_code] += 1
        parts = [("field", (None, "x")) for _ in range(1000)]
        counts[own.client.post("/v1/videos", files=parts).status_code] += 1
        slow = [slow_writer(own) for _ in range(20)]
        large = own.client.post("/v1/videos", content=bytes(64 * 2**20), headers={"content-type": "application/json"})
        counts[large.status_code] += 1
        store = Store(own.folder)
        wait_for(partial(idle, store), 600.0)
        answered = own.client.get("/healthz").status_code
        after = own.memory_mib()
        jobs = Counter(job.code for video in store.ids() for job in [store.get(video)])
        for one in slow:
            one.close()
        new = [path for path in sorted(str(p) for p in own.folder.parent.iterdir()) if path not in outside]
        alive = worker in own.workers()
        worker_after = resident_mib(worker) if alive else float("nan")
    return {
        "payloads": payloads, "by_status": dict(sorted(counts.items())),
        "jobs_by_error": {str(code): number for code, number in jobs.items()},
        "server_memory_mib": [before, after], "worker_memory_mib": [worker_before, worker_after],
        "worker_survived": alive, "answers_with_20_slow_writers": answered, "new_files_outside": new,
    }  # fmt: skip


def slow_writer(own: Begun) -> socket.socket:
    """A connection that promises a body and sends one byte of it."""
    host, port = own.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/videos HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    connection.sendall(head.encode() + b"{")
    return connection


def page(times: int = 10) -> dict[str, Any]:
    """The page in Chromium: seconds from the click to the first picture, and to the whole video of 6 s."""
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic"]
    first_s, whole_s = [], []
    with server() as own, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        shown = browser.new_page(bypass_csp=True)
        shown.goto(own.url)
        shown.wait_for_selector("#model option", state="attached")
        shown.fill("#prompt", "a red ball rolls in from the left, then it jumps")
        shown.fill("#seconds", "6")
        for _ in range(times + 1):
            began_s = time.monotonic()
            shown.click("button.main")
            shown.wait_for_function("document.querySelector('.stage video')?.readyState >= 2")
            first_s.append(time.monotonic() - began_s)
            shown.wait_for_function("document.querySelector('#state').textContent.includes('numbers')")
            whole_s.append(time.monotonic() - began_s)
            shown.evaluate(
                "document.querySelector('.stage').replaceChildren(); document.querySelector('#state').textContent = ''"
            )
        browser.close()
    found = {"first_picture_s": first_s[1:], "whole_video_of_6_s_s": whole_s[1:]}
    return {name: {"median": float(np.median(own)), "longest": max(own)} for name, own in found.items()}


def live(minutes: float = 60.0) -> dict[str, Any]:
    """An endless video that is watched, and directed every half minute."""
    prompts = ["a red ball jumps", "a blue cube falls from above", "a green cone grows", "a pink cylinder spins"]
    with server() as own:
        began = own.add(live=True, seconds=60 * minutes).json()["id"]
        store, (worker,) = Store(own.folder), own.workers()
        begun_s, sizes, behind_s, received = time.monotonic(), [], [], [0]
        over = threading.Event()

        def watch() -> None:
            address = f"{own.url}/v1/videos/{began}/stream"
            with contextlib.suppress(httpx.TransportError), httpx.stream("GET", address, timeout=None) as response:
                for part in response.iter_bytes():
                    received.append(len(part))
                    if over.is_set():
                        return

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        taken: list[float] = []
        asked: dict[str, float] = {}
        while time.monotonic() - begun_s < 60 * minutes - 15:
            time.sleep(5)
            clips = [event for event in store.events(began) if event.kind == "clip"]
            watched_s = time.monotonic() - begun_s
            behind_s.append(watched_s - 2.0 * len(clips))
            sizes.append((watched_s, resident_mib(worker), own.memory_mib()))
            if len(sizes) % 6 == 0:
                text = f"{prompts[len(asked) % len(prompts)]}{' ' * (len(asked) // len(prompts))}".strip()
                httpx.post(f"{own.url}/v1/videos/{began}/direct", json={"prompt": text}).raise_for_status()
                asked[text] = watched_s
        httpx.post(f"{own.url}/v1/videos/{began}/direct", json={"end": True})
        wait_for(lambda: store.get(began).finished)
        over.set()
        for event in store.events(began):
            if event.kind == "clip" and event.data["prompt"] in asked and event.data["number"] > 1:
                start = asked.pop(event.data["prompt"])
                taken.append(2.0 * (event.data["number"] - 1) - start)
        status, clips_made = store.get(began).status, sum(event.kind == "clip" for event in store.events(began))
    later = np.array([own for own in sizes if own[0] > 120])
    slopes = [60 * float(np.polyfit(later[:, 0], later[:, i], 1)[0]) for i in (1, 2)]
    return {
        "status": status, "minutes": minutes, "clips": clips_made, "received_mib": sum(received) / 2**20,
        "most_behind_s": max(behind_s[1:]),
        "worker_memory_mib": [sizes[0][1], sizes[-1][1]], "server_memory_mib": [sizes[0][2], sizes[-1][2]],
        "memory_slope_mib_a_minute": {"worker": slopes[0], "server": slopes[1]},
        "video_s_until_a_prompt_shows": {"median": float(np.median(taken)), "longest": max(taken)} if taken else None,
    }  # fmt: skip


TRIALS = {
    "requests": requests,
    "load": load,
    "kills": kills,
    "cancels": cancels,
    "uploads": uploads,
    "page": page,
    "live": live,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="+", choices=TRIALS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args(argv)
    for name in asked.trials:
        values = read_json(asked.output)["values"] if asked.output.exists() else {}
        values[name] = TRIALS[name]()  # type: ignore[operator]
        print(name, values[name], flush=True)
        command = shlex.join(["python", "tools/serve_trials.py", *asked.trials])
        write_result(asked.output, "what dicode serve stands", values, len(values), 0, command)


if __name__ == "__main__":
    main()
