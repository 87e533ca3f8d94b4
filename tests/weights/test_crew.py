"""Processes that work together end together, whatever ends one of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from copd_megatron.weights.crew import Crew

MEMBER = """
import os, signal, sys, time
from copd_megatron.errors import ConfigError, WeightsError
from copd_megatron.weights.crew import Stopped, started_crew

how = sys.argv[1]
with started_crew() as crew:
    print(crew.gathered(crew.rank), flush=True)

    def work():
        if crew.rank == 1:
            time.sleep(0.2)
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "refused":
                raise ConfigError("no such method")
            raise {"failed": OSError(28, "No space left on device"), "interrupted": KeyboardInterrupt()}[how]
        if how == "killed":
            return
        for _ in range(600):
            time.sleep(0.1)
            crew.check()
        print("was not stopped", flush=True)

    try:
        crew.together(work)
    except (ConfigError, WeightsError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    if how in ("refused", "failed"):
        crew.together(lambda: None)  # an error does not outlive its work
        crew.check()
        print("goes on", flush=True)
"""


def run(how: str) -> list[list[str]]:
    """What two processes print, of which the second ends in this way."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "WORLD_SIZE": "2", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, how],
            env={**shared, "MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        return [process.communicate(timeout=100)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(
    ("how", "error"),
    [("refused", "ConfigError: {}no such method"), ("failed", "Failed: {}OSError: [Errno 28] No space left on device")],
)
def test_error_of_one_stops_the_others_at_their_work_with_its_kind_and_its_rank(how: str, error: str) -> None:
    first, second = run(how)
    assert first == ["[0, 1]", error.format("process 1: "), "goes on"]
    assert second == ["[0, 1]", error.format(""), "goes on"]


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_process_that_is_gone_is_noticed(how: str) -> None:
    first, _ = run(how)
    assert first[0] == "[0, 1]"
    assert first[1].startswith("WeightsError: the processes have lost each other (")
    assert len(first) == 2


def test_a_process_alone_needs_nobody() -> None:
    crew = Crew()
    assert crew.gathered(3) == [3]
    assert crew.together(lambda: 4) == 4
    crew.check()
