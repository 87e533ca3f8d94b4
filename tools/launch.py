"""Processes with torchrun's environment, for tools that start gangs of their own."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from copd_megatron.exchange import address, serve
from copd_megatron.supervision.processes import seats

THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(command: Sequence[str], world: int, folder: Path, timeout: float) -> list[int | None]:
    """Exit statuses of `world` processes of `command`, whose output goes to `folder`/RANK.out and RANK.err.

    When one fails the others, which would wait for it, are killed; so are all that take longer than `timeout` seconds,
    whose status then is None.
    """
    store = serve()
    shared = {**os.environ, **THREADS, **address(store.host, store.port)}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, seat in enumerate(seats(world)):
            environment = {**shared, **seat}
            with (folder / f"{rank}.out").open("w") as stdout, (folder / f"{rank}.err").open("w") as stderr:
                processes.append(subprocess.Popen(command, env=environment, stdout=stdout, stderr=stderr))
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return [process.returncode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
