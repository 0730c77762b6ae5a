"""The process that renders: it claims jobs of a store one after the other, and ends when its parent does.

    python -m dicode.serve.worker FOLDER NAME --device cpu --models blocks sprites

A job stops at the next key frame or denoising step once it was cancelled, deleted, or given to another worker.
"""

import argparse
import errno
import gc
import os
import re
import shutil
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dicode.config import CheckpointError
from dicode.device import available_bytes, pick_device
from dicode.pipeline import DiCoDe
from dicode.serve.names import ALONE_S
from dicode.serve.render import Work, reconstruct, render, render_live
from dicode.serve.request import Model, RequestError, VideoRequest, models_of, parse
from dicode.serve.store import DATABASE, Job, LostClaimError, Store, UnknownJobError

POLL_S = 0.02  # between looks for a job
AWAY_S = 1.0  # before another look at a database that does not answer
SPARE_BYTES = 3 * 2**30  # that are to be left before another model is loaded
LOOK_S = 0.1  # between signs of life, and looks at the job that is being rendered


class DrainingError(Exception):
    """The server ends: a clip is finished, and the rest is left."""


class Watched:
    """A job while it is rendered: a thread shows that its worker is alive, and looks whether it is still to be.

    Calling it raises `LostClaimError` once the job is not.
    """

    def __init__(self, store: Store, job: Job, draining: threading.Event) -> None:
        self.store, self.job, self.draining = store, job, draining
        self.lost, self._over, self._clip_began_s = False, threading.Event(), time.monotonic()
        self._watched: tuple[int, float] | None = None  # the last event that says so, and when it was first seen
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Watched":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        while not (self.lost or self._over.wait(LOOK_S)):
            with suppress(*self.store.passing):  # busy: the next look will do
                try:
                    self.store.beat(self.job)
                except LostClaimError:
                    self.lost = True

    def __call__(self, *_: Any) -> None:
        if self.lost:
            raise LostClaimError(self.job.id)

    def report(self, progress: float, kind: str, data: dict[str, Any]) -> None:
        """As `render` asks for it. Raises `DrainingError` after a clip where the server is ending."""
        if kind:
            now_s = time.monotonic()
            took = {"ms": round(1000 * (now_s - self._clip_began_s))} if kind == "clip" else {}
            self.store.advance(self.job, progress, kind, {**data, **took})
            self._clip_began_s = now_s
        else:
            self()
        if self.draining.is_set():
            raise DrainingError

    def directed(self) -> tuple[str, bool]:
        """As `render_live` asks for it: the last prompt that was sent, and whether the video is to end.

        It ends too once it was watched and is no longer, so that a closed page does not keep a worker for an hour.
        """
        sent, now_s = self.store.events(self.job.id), time.monotonic()
        prompts = [event.data["prompt"] for event in sent if event.kind == "prompt"]
        for event in sent:
            if event.kind == "watched" and (self._watched is None or event.number > self._watched[0]):
                self._watched = (event.number, now_s)
        alone = self._watched is not None and now_s - self._watched[1] > ALONE_S
        return [self.job.request["prompt"], *prompts][-1], alone or any(event.kind == "end" for event in sent)


class Loaded:
    """Models in memory: loaded when a job asks for one, let go, the longest unused first, when memory is short."""

    def __init__(self, known: dict[str, Model], device: torch.device) -> None:
        self.known, self.device = known, device
        self.models: OrderedDict[str, DiCoDe] = OrderedDict()

    def get(self, name: str) -> DiCoDe:
        """The model of this name. Raises `RequestError` for one that is not served, or no longer."""
        if name not in self.known:
            raise RequestError(f"model: {name} is not served any more", "model")
        if name not in self.models:
            while self.models and available_bytes(self.device) < SPARE_BYTES:
                self.models.popitem(last=False)
                self.free()
            self.models[name] = DiCoDe.from_pretrained(self.known[name].folder, device=str(self.device))
        self.models.move_to_end(name)
        return self.models[name]

    def free(self) -> None:
        """Give the memory of models that were let go back to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def work(store: Store, loaded: Loaded, job: Job, draining: threading.Event) -> None:
    """Render one job, and note how it ended; of a job that was lost no file is left.

    Raises what `store.passing` holds, and leaves the files: who finds the job silent removes them.
    """
    folder, kept = store.folder / "jobs" / job.id / str(job.claim), False
    try:
        with Watched(store, job, draining) as watched:
            seconds = rendered(loaded, parse(job.request), folder, watched)
            watched()
        store.complete(job, seconds)
        kept = True
    except LostClaimError:
        store.fail(job, "cancelled", "cancelled")
        remove_deleted(store, job)
    except DrainingError:
        store.give_back(job)
    except store.passing:
        kept = True  # the database may have noted that the job is completed
        raise
    except Exception as error:
        fail(store, loaded, job, error)
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def fail(store: Store, loaded: Loaded, job: Job, error: Exception) -> None:
    """Note why a job has failed: what its client can mend, or what is in the server's log."""
    if isinstance(error, ValueError) and not isinstance(error, CheckpointError):  # of the request
        store.fail(job, "invalid_request", one_line(error))
        return
    try:
        store.beat(job)
    except LostClaimError:  # of a deleted job the folder is gone
        remove_deleted(store, job)
    else:
        print(f"{job.id}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if isinstance(error, MemoryError) or re.search(r"out of memory|allocate memory", str(error)):
        loaded.models.clear()
        loaded.free()
        store.fail(job, "out_of_memory", "not enough memory; ask for a shorter video, a smaller size or another model")
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        store.fail(job, "disk_full", "the server's disk is full; delete videos, or try again later")
    else:
        store.fail(job, "server_error", "the server could not render this video; its log has the reason")


def remove_deleted(store: Store, job: Job) -> None:
    """Remove the folder of a job that was deleted: its worker may have written into it since."""
    try:
        store.get(job.id)
    except UnknownJobError:
        shutil.rmtree(store.folder / "jobs" / job.id, ignore_errors=True)


def rendered(loaded: Loaded, request: VideoRequest, folder: Path, watched: Watched) -> float | None:
    """Write a job's files; returns the seconds of a video whose length was not known before."""
    name = request.model or next(iter(loaded.known))
    model = loaded.get(name)
    parts = (model.tokenizer.denoiser, model.tokenizer.first_stage, model.lm.backbone)
    hooks = [part.register_forward_pre_hook(watched) for part in parts]
    own = Work(model, loaded.known[name], request, folder.parent, folder, watched.report)
    try:
        if request.reconstructs:
            return reconstruct(own)
        if request.live:
            return render_live(own, watched.directed, request.seconds)
        render(own)
        return None
    finally:
        for hook in hooks:
            hook.remove()


def one_line(error: Exception) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def end_with_parent(draining: threading.Event) -> None:
    """End this process when the other end of its standard input asks for it, and at once when it is closed."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 64):
            draining.set()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def work_on(store: Store, loaded: Loaded, name: str, draining: threading.Event) -> None:
    """Claim and render jobs under this name until the event is set."""
    while not draining.is_set():
        try:
            job = store.claim(name)
            if job is not None:
                work(store, loaded, job, draining)
        except store.passing:  # busy or away; a job whose end could not be noted is given to another, being silent
            time.sleep(AWAY_S)
            continue
        if job is None:
            time.sleep(POLL_S)


def main(argv: Sequence[str] | None = None) -> None:
    """Claim and render, until the parent ends or closes its pipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--models", nargs="+", required=True)
    asked = parser.parse_args(argv)
    draining = threading.Event()
    end_with_parent(draining)
    store = Store(asked.folder, os.environ.get(DATABASE))
    loaded = Loaded(models_of(asked.models), torch.device(pick_device(asked.device)))
    loaded.get(next(iter(loaded.known)))  # before the first job asks for it
    print("ready", flush=True)
    work_on(store, loaded, asked.name, draining)


if __name__ == "__main__":
    main()
