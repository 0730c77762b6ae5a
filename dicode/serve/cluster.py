"""The server on many machines: endpoints and workers as deployments of Ray Serve.

Jobs are in PostgreSQL, files in a folder that all machines share. Workers claim jobs as those of one machine do; a
replica that dies is begun again by Ray, and its job is given to another once it has been silent for a while.
"""

import signal
import threading
import uuid
from pathlib import Path
from typing import Any

from dicode.data.parallel_map import ray_cluster
from dicode.serve.app import make_app
from dicode.serve.request import models_of
from dicode.serve.server import Server
from dicode.serve.store import Store

CHECK_S = 2.0  # between looks at the health of replicas


def application(
    folder: str, database: str, models: list[str], device: str, workers: int, endpoints: int = 1, **limits: Any
) -> Any:
    """What `ray.serve.run` takes: so many replicas of endpoints and of workers; `limits` are fields of `Server`."""
    from ray import serve

    def build() -> Any:
        store = Store(Path(folder), database)
        return make_app(Server(Path(folder), models_of(models), store, **limits))

    class Worker:
        """A thread that claims and renders, in a process of its own."""

        def __init__(self) -> None:
            import torch

            from dicode.device import pick_device
            from dicode.serve.worker import Loaded, work_on

            store, self.draining = Store(Path(folder), database), threading.Event()
            loaded = Loaded(models_of(models), torch.device(pick_device(device)))
            loaded.get(next(iter(loaded.known)))
            own = (store, loaded, f"replica:{uuid.uuid4().hex}", self.draining)
            self.thread = threading.Thread(target=work_on, args=own, daemon=True)
            self.thread.start()

        def check_health(self) -> None:
            """Ray begins a replica anew whose check fails."""
            if not self.thread.is_alive():
                raise RuntimeError("the worker has ended")

        def __del__(self) -> None:
            """Before a replica is removed: the clip at hand is finished, its job queued again."""
            self.draining.set()
            self.thread.join()

    gpus = 1.0 if device.startswith("cuda") else 0.0
    deployed: dict[str, Any] = {"health_check_period_s": CHECK_S, "graceful_shutdown_timeout_s": 30.0}
    rendering = serve.deployment(
        name="worker", num_replicas=workers, ray_actor_options={"num_cpus": 1, "num_gpus": gpus}, **deployed
    )(Worker)
    answering = serve.deployment(
        name="endpoints", num_replicas=endpoints, ray_actor_options={"num_cpus": 0.1}, **deployed
    )
    return answering(serve.ingress(build)()).bind(rendering.bind())


def run(address: str, listens: tuple[str, int], workers: int, options: dict[str, Any]) -> None:
    """Serve on a Ray cluster (see `ray_cluster`) under a host and port until a signal; `options` of `application`."""
    with ray_cluster(address, workers + 2):
        from ray import serve

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray Serve ends as on Ctrl-C
        serve.start(http_options={"host": listens[0], "port": listens[1]})
        serve.run(application(workers=workers, **options), name="dicode", route_prefix="/", blocking=True)
