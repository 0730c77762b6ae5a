"""What several test files share. `dicode` is imported inside: the shape checks hook its import after this file's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _quiet_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line of progress on a machine where something takes seconds: what commands print is compared."""
    monkeypatch.setattr("dicode.stopwatch.FIRST_AFTER_S", 3600.0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a whole model with random weights: 32×32 pixels, 4 tokens of 6, up to 16 s."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def write_tiny_model(folder: Path, **changes: object) -> Path:
    """Such a folder, with changes of the tokenizer's configuration."""
    from fuzz.models import write_tiny

    return write_tiny(folder, **changes)


@pytest.fixture(scope="session")
def drawn_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of six drawn clips of 20 frames at 8 fps, mp4 and gif, with captions; for reading only."""
    from synthetic import write_dataset

    return write_dataset(tmp_path_factory.mktemp("drawn"), count=6, num_frames=20, size=40)


@pytest.fixture
def server(tmp_path: Path, tiny_model: Path) -> Any:
    """The `Server` of an empty folder, for `dicode serve`, without workers."""
    from dicode.serve.request import models_of
    from dicode.serve.server import LOCAL, Server
    from dicode.serve.store import Store

    hosts = (*LOCAL, "testserver")
    return Server(tmp_path, models_of([str(tiny_model)]), Store(tmp_path), queue=4, most_s=30.0, hosts=hosts)


@pytest.fixture
def client(server: Any) -> Iterator[Any]:
    """A `TestClient` of that server."""
    from starlette.testclient import TestClient

    from dicode.serve.app import make_app

    with TestClient(make_app(server), raise_server_exceptions=False) as client:
        yield client
