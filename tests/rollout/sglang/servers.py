"""Real servers: stock sglang on this machine's CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from copd_megatron.config.engines import KEY_VARIABLE
from copd_megatron.rollout.sglang.endpoints import Endpoints
from copd_megatron.supervision.ports import free_ports

KEY = "a key of the tests"
START_SECONDS = 240.0


class RunningServer:
    """A server process that answers."""

    def __init__(self, model: Path, log: Path, port: int | None = None, *arguments: str) -> None:
        self.model = model
        self.log = log
        self.port = port or free_ports("127.0.0.1", 1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        self._arguments = arguments
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with open(self.log, "ab") as output:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "copd_megatron.rollout.sglang.serve"),
                    *("--model-path", str(self.model), "--host", "127.0.0.1", "--port", str(self.port)),
                    *("--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32"),
                    *("--max-total-tokens", "8192", "--skip-server-warmup", "--enable-deterministic-inference"),
                    "--sleep-on-idle",
                    *self._arguments,
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={
                    **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
                    KEY_VARIABLE: KEY,
                    "SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE": "copd_megatron.rollout.sglang.processors",
                },
                start_new_session=True,
            )

    def wait(self) -> None:
        """Return when it answers; fail with the end of its log if it does not.

        sglang ends itself when a call of its own takes more than ten seconds while it starts, as on a busy machine; the
        run's fleet starts such a server again (fleet.py), and so does this, once.
        """
        deadline = time.monotonic() + START_SECONDS
        started_again = False
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                if started_again:
                    break
                self.process, started_again = self._start(), True
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=20) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        pytest.fail("the server does not answer:\n" + self.log.read_text(errors="replace")[-3000:])

    def kill(self) -> None:
        """kill -9, with everything that it has started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def restart(self) -> None:
        """The same again, with the weights that it starts with."""
        self.process = self._start()
        self.wait()

    def endpoints(self, branch: str, run: str = "test") -> Endpoints:
        """As the conductor would write them."""
        return Endpoints(branch, run, (self.url,), KEY)


@contextmanager
def running(model: Path, log: Path, *arguments: str) -> Iterator[RunningServer]:
    """A server that ends with the block."""
    server = RunningServer(model, log, None, *arguments)
    try:
        server.wait()
        yield server
    finally:
        server.kill()
