"""The processes of one branch: a torchrun gang in a session of its own, its output in the branch's log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


class Gang:
    """`world` ranks of `copd_megatron.worker`, started and watched through torch.distributed.elastic's agent.

    Each gang has its own rendezvous and so its own world: a branch can fail without a collective of another noticing.
    The new session keeps a Ctrl-C in the terminal from reaching the ranks; the conductor tells them to stop instead.
    A conductor that is killed leaves the gang to make a checkpoint and end (switchboard.py).
    """

    def __init__(self, branch: str, world: int, arguments: list[str], log: Path) -> None:
        self.branch = branch
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        launcher = [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(world),
            "--max-restarts",
            "0",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "127.0.0.1:0",
            "--rdzv-id",
            f"copd-{branch}",
        ]
        environment = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "copd_megatron.worker", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**environment, **os.environ},
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
        """The end of the gang's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
