"""The processes of one branch: its ranks, or the srun that has them elsewhere; their output in logs."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from copd_megatron.supervision.processes import Processes


class Gang(Processes):
    """The ranks of `copd_megatron.worker` that `launcher` (a Python, or an srun with its Python) starts, once with each
    of `environments`.

    The ranks meet at a store that rank 0 opens at `host` (cluster/rendezvous.py), and so each gang is a world of its
    own: a branch can fail without a collective of another noticing. Only the conductor tells them to stop, and one that
    is killed leaves them to make a checkpoint and end (switchboard.py). `rank_logs` has a file rank_<n>.txt for each
    rank where they do not all write to `log`.
    """

    def __init__(
        self,
        branch: str,
        launcher: Sequence[str],
        arguments: Sequence[str],
        host: str,
        environments: Sequence[Mapping[str, str]],
        log: Path,
        rank_logs: Path | None = None,
    ) -> None:
        self.log = log
        self._rank_logs = rank_logs
        log.parent.mkdir(parents=True, exist_ok=True)
        if rank_logs is not None:
            rank_logs.mkdir(exist_ok=True)
        meeting = ["--rank0-host", host, "--gang", f"{branch}/{secrets.token_hex(4)}"]
        super().__init__([*launcher, "-m", "copd_megatron.worker", *arguments, *meeting], environments, log)

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
