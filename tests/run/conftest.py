"""Fixtures of whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import Command

from copd_megatron.data.mini.model import build


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """An untrained mini model."""
    folder = tmp_path_factory.mktemp("mini") / "base"
    build(folder, seed=0)
    return folder


@pytest.fixture
def command(tmp_path, base) -> Command:
    """The tiny run of this test."""
    return Command(tmp_path, base)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, base) -> Command:
    """The tiny run, never stopped."""
    run = Command(tmp_path_factory.mktemp("undisturbed"), base)
    status, output = run.finish()
    assert status == 0, output
    return run
