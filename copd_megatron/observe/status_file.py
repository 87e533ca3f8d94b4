"""The conductor's note about a running run, `status.json`: how `copd status` knows, from another machine, what goes on.

All times in it are by the conductor's clock, so that no difference between clocks makes a branch look dead.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from copd_megatron.errors import CopdError, Interrupted
from copd_megatron.files import write_atomic
from copd_megatron.observe.status import BranchStatus

log = logging.getLogger(__name__)

Stage = Literal["starting", "training", "merging", "evaluating", "done", "stopped", "failed"]

EVERY_SECONDS = 5.0
"""How often the note is made new in training: the file system is shared by many."""


@dataclass(frozen=True)
class BranchNote:
    """A branch's latest status; `age` seconds before the note it has changed, and its latest step took
    `step_seconds`."""

    status: BranchStatus
    age: float
    step_seconds: float | None


@dataclass(frozen=True)
class Note:
    """`time` in seconds since 1970; `reason` why a run was stopped or has failed; `job` Slurm's number."""

    stage: Stage
    time: float
    host: str
    job: str | None
    reason: str | None
    seconds_left: float | None
    branches: Mapping[str, BranchNote]


class StatusFile:
    """The conductor's side."""

    def __init__(self, file: Path, clock: Callable[[], float] = time.time) -> None:
        self._file = file
        self._clock = clock
        self._stage: Stage = "starting"
        self._written = 0.0
        self._left: float | None = None
        self._branches: dict[str, BranchStatus] = {}
        self._changed: dict[str, float] = {}
        self._stepped: dict[str, float] = {}
        self._step_seconds: dict[str, float] = {}

    @contextmanager
    def told(self) -> Iterator[StatusFile]:
        """Note how the `with` block ends."""
        try:
            yield self
        except BaseException as error:
            self._enter("stopped" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed", str(error))
            raise
        self.enter("done")

    def enter(self, stage: Stage) -> None:
        """From now on the run is in this stage."""
        self._enter(stage, None)

    def observe(self, branches: Mapping[str, BranchStatus], seconds_left: float | None) -> None:
        """What branches say; it is written down when the last note is old enough."""
        now = self._clock()
        for name, status in branches.items():
            before = self._branches.get(name)
            if status == before:
                continue
            if before is not None and status.step > before.step:
                if name in self._stepped:
                    self._step_seconds[name] = (now - self._stepped[name]) / (status.step - before.step)
                self._stepped[name] = now
            self._branches[name] = status
            self._changed[name] = now
        self._left = seconds_left
        if now - self._written >= EVERY_SECONDS:
            self._write(None)

    def _enter(self, stage: Stage, reason: str | None) -> None:
        self._stage = stage
        self._write(reason)

    def _write(self, reason: str | None) -> None:
        self._written = now = self._clock()
        content = {
            "stage": self._stage,
            "time": round(now, 3),
            "host": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
            "job": os.environ.get("SLURM_JOB_ID"),
            "reason": reason,
            "seconds_left": self._left if self._stage == "training" else None,
            "branches": {
                name: {
                    "status": json.loads(status.to_json()),
                    "age": round(now - self._changed[name], 3),
                    "step_seconds": self._step_seconds.get(name),
                }
                for name, status in self._branches.items()
            },
        }
        try:
            write_atomic(self._file, json.dumps(content, indent=1) + "\n")
        except OSError as error:  # a note is never a reason to stop, nor to hide one
            log.warning("%s cannot be written: %s", self._file, error)


def read_status(file: Path) -> Note | None:
    """The note; None where there is none yet. Raises CopdError for anything else."""
    try:
        values: dict[str, Any] = json.loads(file.read_text())
        if values["stage"] not in get_args(Stage):
            raise ValueError(f"unknown stage {values['stage']!r}")
        branches = {
            name: BranchNote(**{**entry, "status": BranchStatus.from_json(json.dumps(entry["status"]))})
            for name, entry in values.pop("branches").items()
        }
        return Note(**values, branches=branches)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CopdError(
            f"{file}: cannot be read as a run's status ({error}); was it written by another version?"
        ) from error
