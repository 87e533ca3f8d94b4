"""One run per directory, and no rank that outlives it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from copd_megatron.errors import CopdError
from copd_megatron.supervision.run_lock import conductor_lock, hold_worker_lock


def test_second_run_on_a_directory_is_refused(tmp_path: Path) -> None:
    with conductor_lock(tmp_path), pytest.raises(CopdError, match="another `copd train` is running"):
        conductor_lock(tmp_path).__enter__()
    with conductor_lock(tmp_path):
        pass


def _hold(run_dir: Path, ready: object, seconds: float) -> None:
    hold_worker_lock(run_dir)
    ready.set()
    time.sleep(seconds)


def test_run_waits_until_the_last_ones_ranks_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    worker = context.Process(target=_hold, args=(tmp_path, ready, 60.0))
    worker.start()
    assert ready.wait(30)
    monkeypatch.setattr("copd_megatron.supervision.run_lock._PATIENCE_SECONDS", 0.3)
    with pytest.raises(CopdError, match="ranks of an earlier `copd train` that is gone are still at work"):
        conductor_lock(tmp_path).__enter__()
    worker.kill()
    worker.join()
    with conductor_lock(tmp_path):
        os.close(hold_worker_lock(tmp_path))  # this run's own ranks are welcome


def test_process_ends_with_the_one_that_started_it() -> None:
    child = (
        "import time; from copd_megatron.supervision.run_lock import die_with_parent; "
        "die_with_parent(); print('up', flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert process.stdout.read() == "", "ends when the child, which has the other copy, ends"
    assert time.monotonic() - began < 20
    process.wait()
