"""Where a branch's servers are: a private file in the run directory that the conductor writes and the ranks read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from copd_megatron.errors import CopdError
from copd_megatron.files import write_atomic

STARTING_WEIGHTS = "default"
"""What a server calls the weights that it was started with."""


@dataclass(frozen=True)
class Endpoints:
    """One group of servers (`RunConfig.server_groups`). `run` sets the weights of this run apart from those of any
    other with the same numbers."""

    branch: str
    run: str
    urls: tuple[str, ...]
    key: str | None = None
    fixed: bool = False
    """The servers keep the weights that they were started with (the base)."""

    def label(self, version: int) -> str:
        """What the servers call the weights after `version` updates."""
        return STARTING_WEIGHTS if self.fixed else f"{self.run}/{self.branch}/{version}"

    def __repr__(self) -> str:  # the key stays out of logs and tracebacks
        return f"Endpoints({self.branch!r}, {', '.join(self.urls)})"


def write_endpoints(file: Path, endpoints: Sequence[Endpoints]) -> None:
    """Write the servers of all branches; only this user may read the file, because the keys are in it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    mask = os.umask(0o077)
    try:
        write_atomic(file, json.dumps([asdict(entry) for entry in endpoints], indent=2))
    finally:
        os.umask(mask)


def read_endpoints(file: Path) -> dict[str, Endpoints]:
    """Servers by branch. Raises CopdError if the conductor has not written them."""
    try:
        entries = json.loads(file.read_text())
        return {entry["branch"]: Endpoints(**{**entry, "urls": tuple(entry["urls"])}) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CopdError(f"{file}: cannot be read as the list of the run's servers: {error}") from error
