"""The servers that a run starts itself: a process and a log each, started again when they die, gone with the run."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from copd_megatron.cluster.site import Site
from copd_megatron.config import RunConfig
from copd_megatron.config.engines import BASE, KEY_VARIABLE, RUN_VARIABLE
from copd_megatron.errors import CopdError
from copd_megatron.rollout.sglang.endpoints import Endpoints, write_endpoints
from copd_megatron.run_folder import RunFolder

log = logging.getLogger(__name__)

_STOP_SECONDS = 10.0

_ON_CPU: dict[str, str | int | float | bool] = {
    "device": "cpu",
    "attention-backend": "torch_native",
    "enable-deterministic-inference": True,
    "max-total-tokens": 32_768,
    "sleep-on-idle": True,
}
"""Without the bound the key-value cache takes most of the memory; without sleep each idle server takes half a core."""


@dataclass
class ServerProcess:
    """One server; `starts` counts how often it has been started. A `remote` one is an srun, which ends its task."""

    branch: str
    url: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    remote: bool = False
    starts: int = 0
    started: float = 0.0
    """When it was last started (`time.monotonic`)."""
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start it (again); it is not ready before it answers."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as output:
            self._process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                start_new_session=True,
            )
        self.starts += 1
        self.started = time.monotonic()

    def ended(self) -> int | None:
        """Exit status, None while it runs."""
        return None if self._process is None else self._process.poll()

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to it and to all that it has started; a remote one is killed by any."""
        if self.remote:  # srun cannot pass SIGKILL on, and its task would live on; at SIGTERM it kills it
            number = signal.SIGTERM
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def wait(self) -> None:
        """Return when it has ended."""
        if self._process is not None:
            self._process.wait()

    def stop(self) -> None:
        """End it, with force if it takes long."""
        if self._process is None:
            return
        self.kill(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        self.kill(signal.SIGKILL)
        self._process.wait()

    def last_words(self, lines: int = 15) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Fleet:
    """All servers of a run: its own, or those that its configuration names."""

    def __init__(self, config: RunConfig, folder: RunFolder, site: Site) -> None:
        self._settings = config.rollout.sglang
        self._folder = folder
        self._site = site
        run = secrets.token_hex(4)
        key = self._settings.api_key()
        self.processes: list[ServerProcess] = []
        endpoints = []
        for name in config.server_groups:
            if self._settings.urls:
                urls = self._settings.urls[name]
            else:
                key = key or secrets.token_urlsafe(32)
                urls = tuple(self._prepare(config, name, number, key) for number in range(self._settings.servers))
            endpoints.append(Endpoints(name, run, urls, key, fixed=name == BASE))
        write_endpoints(folder.endpoints, endpoints)

    def start(self) -> None:
        """Start the run's own servers."""
        for process in self.processes:
            process.start()

    def watch(self, hung: Iterable[str] = ()) -> list[str]:
        """Start again what has died, and what is said to be `hung` (addresses); one line for each. Raises CopdError
        if one dies too often."""
        accused = [process for url in hung for process in self.processes if process.url == url]
        events = [f"a server of branch {process.branch} hangs; killed" for process in accused if self._end(process)]
        for process in self.processes:
            status = process.ended()
            if status is None:
                continue
            if process.starts > self._settings.max_restarts:
                raise CopdError(
                    f"a server of branch {process.branch!r} has died {process.starts} times, at last with exit status "
                    f"{status} (log: {process.log}; rollout.sglang.max_restarts = {self._settings.max_restarts})\n"
                    f"--- end of {process.log}\n{process.last_words()}"
                )
            process.kill(signal.SIGKILL)  # what it has started may have outlived it
            process.start()
            events.append(f"a server of branch {process.branch} died (exit status {status}); started again")
            log.warning("%s; log: %s", events[-1], process.log)
        return events

    def _end(self, process: ServerProcess) -> bool:
        """Make an end of a server that is said to hang, if it can be true: several branches may tell of the same one,
        and one that was started since is left alone."""
        if process.ended() is not None or time.monotonic() - process.started < 2 * self._settings.hang_seconds:
            return False
        process.kill(signal.SIGKILL)
        process.wait()
        return True

    def stop(self) -> None:
        """End all of the run's own servers."""
        for process in self.processes:
            process.kill(signal.SIGTERM)
        for process in self.processes:
            process.stop()
        self._folder.endpoints.unlink(missing_ok=True)

    def _prepare(self, config: RunConfig, branch: str, number: int, key: str) -> str:
        settings = self._settings
        spot = self._site.server(branch, number)
        arguments: dict[str, str | int | float | bool] = {
            **({} if torch.cuda.is_available() else _ON_CPU),
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[config.precision.params],
            "tp-size": settings.tensor_parallel,
            "random-seed": config.seed,
            "skip-server-warmup": True,
            "log-level-http": "warning",
            **spot.arguments,
            **settings.args,
            "model-path": config.base,
            "host": spot.host,
            "port": spot.port,
        }
        command = [*spot.launcher, "-m", "copd_megatron.rollout.sglang.serve"]
        for name, value in arguments.items():
            if value is not False:
                command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        environment = {
            "OMP_NUM_THREADS": "1",
            **spot.environment,
            "SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE": "copd_megatron.rollout.sglang.processors",
            KEY_VARIABLE: key,
            RUN_VARIABLE: str(self._folder.path.absolute()),
        }
        log = (self._folder.path if branch == BASE else self._folder.branches) / branch / f"server_{number}.log"
        process = ServerProcess(branch, f"http://{spot.host}:{spot.port}", command, environment, log, spot.remote)
        self.processes.append(process)
        return process.url
