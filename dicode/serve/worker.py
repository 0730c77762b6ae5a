"""The process that renders: it claims jobs of a store one after the other, and ends when its parent does.

    python -m dicode.serve.worker FOLDER NAME --device cpu --models blocks sprites

A job is looked after at every key frame and denoising step: there it stops where it was cancelled, deleted, or given to
another worker, and there it shows that it is alive.
"""

import argparse
import gc
import os
import shutil
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dicode.device import available_bytes, pick_device
from dicode.pipeline import DiCoDe
from dicode.serve.render import Work, reconstruct, render, render_live
from dicode.serve.request import Model, RequestError, models_of, parse
from dicode.serve.store import Job, LostClaimError, Store

POLL_S = 0.02  # between looks for a job
SPARE_BYTES = 3 * 2**30  # that are to be left before another model is loaded
LOOK_S = 0.1  # between looks at the job that is being rendered


class DrainingError(Exception):
    """The server ends: a clip is finished, and the rest is left."""


class Watched:
    """A job while it is rendered; calling it raises `LostClaimError` once the job is no longer to be."""

    def __init__(self, store: Store, job: Job, draining: threading.Event) -> None:
        self.store, self.job, self.draining = store, job, draining
        self.looked_s = 0.0

    def __call__(self, *_: Any) -> None:
        now = time.monotonic()
        if now - self.looked_s >= LOOK_S:
            self.store.beat(self.job)
            self.looked_s = now

    def report(self, progress: float, kind: str, data: dict[str, Any]) -> None:
        """As `render` asks for it. Raises `DrainingError` after a clip where the server is ending."""
        if kind:
            self.store.advance(self.job, progress, kind, data)
        else:
            self()
        if self.draining.is_set():
            raise DrainingError

    def directed(self) -> tuple[str, bool]:
        """As `render_live` asks for it: the last prompt that was sent, and whether the video is to end."""
        sent = [event for event in self.store.events(self.job.id) if event.kind in ("prompt", "end")]
        prompts = [event.data["prompt"] for event in sent if event.kind == "prompt"]
        return [self.job.request["prompt"], *prompts][-1], any(event.kind == "end" for event in sent)


class Loaded:
    """Models in memory: loaded when a job asks for one, let go, the longest unused first, when memory is short."""

    def __init__(self, known: dict[str, Model], device: torch.device) -> None:
        self.known, self.device = known, device
        self.models: OrderedDict[str, DiCoDe] = OrderedDict()

    def get(self, name: str) -> DiCoDe:
        """The model of this name."""
        if name not in self.models:
            while self.models and available_bytes(self.device) < SPARE_BYTES:
                self.models.popitem(last=False)
                gc.collect()
            self.models[name] = DiCoDe.from_pretrained(self.known[name].folder, device=str(self.device))
        self.models.move_to_end(name)
        return self.models[name]


def work(store: Store, loaded: Loaded, job: Job, draining: threading.Event) -> None:
    """Render one job, and note how it ended; of a job that was lost no file is left."""
    job_folder = store.path.parent / "jobs" / job.id
    folder, watched = job_folder / str(job.claim), Watched(store, job, draining)
    hooks = []
    try:
        request = parse(job.request)
        name = request.model or next(iter(loaded.known))
        model = loaded.get(name)
        parts = (model.tokenizer.denoiser, model.tokenizer.first_stage, model.lm.backbone)
        hooks = [part.register_forward_pre_hook(watched) for part in parts]
        seconds: float | None = None
        own = Work(model, loaded.known[name], request, job_folder, folder, watched.report)
        if request.live:
            render_live(own, watched.directed, request.seconds)
        elif request.reconstructs:
            seconds = reconstruct(own)
        else:
            render(own)
        store.complete(job, seconds)
        return
    except LostClaimError:
        store.fail(job, "cancelled", "cancelled")
    except DrainingError:
        store.give_back(job)
    except (RequestError, ValueError) as error:
        store.fail(job, "invalid_request", one_line(error))
    except (MemoryError, torch.OutOfMemoryError):
        loaded.models.clear()
        store.fail(job, "out_of_memory", "not enough memory for a video of this size and length")
    except Exception as error:
        print(f"{job.id}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        store.fail(job, "server_error", "the server could not render this video")
    finally:
        for hook in hooks:
            hook.remove()
    shutil.rmtree(folder, ignore_errors=True)


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
    store = Store(asked.folder)
    loaded = Loaded(models_of(asked.models), torch.device(pick_device(asked.device)))
    loaded.get(next(iter(loaded.known)))  # before the first job asks for it
    print("ready", flush=True)
    while not draining.is_set():
        if (job := store.claim(asked.name)) is None:
            time.sleep(POLL_S)
        else:
            work(store, loaded, job, draining)


if __name__ == "__main__":
    main()
