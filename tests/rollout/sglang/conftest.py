"""Servers with the random models of tests/rollout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import RunningServer, running


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., object]:
    """`with start_server(model_folder) as server: …`."""

    def start(model: Path, *arguments: str) -> object:
        return running(model, tmp_path_factory.mktemp("server") / "log.txt", *arguments)

    return start


@pytest.fixture(scope="session")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server of the model with separate embeddings, for all tests of a file's process."""
    with running(folder, tmp_path_factory.mktemp("server") / "log.txt") as started:
        yield started
