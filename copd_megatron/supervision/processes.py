"""Processes on this machine that are one thing: when one fails the others, which would wait for it, are ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

RANK_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""What ranks are given unless the user's environment says otherwise."""

_GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL, which alone ends a process that is stopped."""


def seats(world: int) -> list[dict[str, str]]:
    """Who each rank of a world on this machine is, in the names that torch reads from its environment."""
    return [{"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)} for rank in range(world)]


class Processes:
    """`command`, once with each of `environments`.

    Each is in a session of its own: a Ctrl-C in the terminal does not reach it, and with it those end that it has
    started. All append to `log`; without one they have this process's output. `before` runs in each at its start.
    """

    def __init__(
        self,
        command: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        log: Path | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self._log = log
        self._failure: int | None = None
        self._kill_at = float("inf")
        with nullcontext() if log is None else open(log, "ab") as output:
            self._processes = [
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**RANK_ENVIRONMENT, **environment},
                    start_new_session=True,
                    preexec_fn=before,
                )
                for environment in environments
            ]

    def poll(self) -> int | None:
        """Exit status, None while one of them runs: zero, or the status of one that has failed by itself."""
        statuses = [process.poll() for process in self._processes]
        if self._failure is None and any(statuses):
            # A signal's, which is negative, first: others fail because they have lost the one that was killed.
            self._failure = min(status for status in statuses if status)
            self._kill_at = time.monotonic() + _GRACE_SECONDS
            self._tell(statuses)
            self._send(signal.SIGTERM)
        if time.monotonic() > self._kill_at:
            self._send(signal.SIGKILL)
        return None if None in statuses else self._failure or 0

    def kill(self) -> None:
        """End all of them now."""
        self._send(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
            time.sleep(0.02)
        self._send(signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, number)

    def _tell(self, statuses: Sequence[int | None]) -> None:
        """Say who has failed, where others are there that may have failed for that reason alone."""
        if len(statuses) == 1:
            return
        fates = [f"rank {rank} {_fate(status)}" for rank, status in enumerate(statuses) if status]
        with nullcontext(sys.stderr) if self._log is None else open(self._log, "a") as output:
            print(f"{', '.join(fates)}; all ranks are ended", file=output, flush=True)


def _fate(status: int) -> str:
    return f"has failed with exit status {status}" if status > 0 else f"was ended by {signal.strsignal(-status)!r}"
