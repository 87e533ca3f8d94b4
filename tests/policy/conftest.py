"""Fixtures that several of the policy's tests share; a file's own of the same name comes first."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_policy import base_folder

from copd_megatron.policy import layout as layouts
from copd_megatron.policy.layout import Layout


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model's folder, and process groups for a process of its own."""
    folder = base_folder(tmp_path_factory.mktemp("policy") / "base")
    layouts.initialize(Layout())
    yield folder
    layouts.shutdown()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Checkpoint writers wait until it is set."""
    from copd_megatron.policy import async_writer

    event = threading.Event()
    original = async_writer.FileSystemWriter.write_data

    def slow(self: Any, *arguments: Any) -> Any:
        assert event.wait(timeout=60)
        return original(self, *arguments)

    monkeypatch.setattr(async_writer.FileSystemWriter, "write_data", slow)
    return event
