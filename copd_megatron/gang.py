"""The processes of one branch: started by torchrun or srun in a session of their own, their output in logs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

RANK_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""What ranks are given unless the user's environment says otherwise."""


def torchrun(branch: str, world: int) -> list[str]:
    """The command that runs a Python module as `world` ranks on this machine, through torch.distributed.elastic."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--rdzv-id", f"copd-{branch}"]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--max-restarts", "0"]
    return [*agent, *rendezvous]


class Gang:
    """The ranks of `copd_megatron.worker` that `launcher` (torchrun, or an srun with its Python) starts.

    Each gang has its own rendezvous and so its own world: a branch can fail without a collective of another noticing.
    The new session keeps a Ctrl-C in the terminal from reaching the ranks; the conductor tells them to stop instead.
    A conductor that is killed leaves the gang to make a checkpoint and end (switchboard.py). `rank_logs` has a
    file rank_<n>.txt for each rank where they do not all write to `log`.
    """

    def __init__(
        self,
        branch: str,
        launcher: Sequence[str],
        arguments: Sequence[str],
        log: Path,
        rank_logs: Path | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self.branch = branch
        self.log = log
        self._rank_logs = rank_logs
        log.parent.mkdir(parents=True, exist_ok=True)
        if rank_logs is not None:
            rank_logs.mkdir(exist_ok=True)
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [*launcher, "-m", "copd_megatron.worker", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**RANK_ENVIRONMENT, **environment},
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Exit status of the gang, None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """End the gang now, without a checkpoint."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def last_words(self, lines: int = 15) -> str:
        """The end of the gang's log, and of that of the first rank that it says has failed."""
        words = _end(self.log, lines)
        failed = re.search(r"error: \S+: tasks? (\d+)", words) if self._rank_logs is not None else None
        if self._rank_logs is not None and failed is not None:
            log = self._rank_logs / f"rank_{failed[1]}.txt"
            words += f"\n--- end of {log}\n{_end(log, lines)}"
        return words


def _end(log: Path, lines: int) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return "(empty)"
