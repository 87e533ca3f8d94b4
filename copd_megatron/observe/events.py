"""What happened to a run: failures, what was done about them, and other turns, in `events.jsonl`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from copd_megatron.observe.jsonl import encode

log = logging.getLogger(__name__)

EVENTS_FILE = "events.jsonl"

Kind = Literal["start", "warning", "failure", "recovery", "stop", "turn", "end"]


class EventLog:
    """Appends events to a run's file. One that cannot be written (a full disk) is in the log alone."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / EVENTS_FILE

    def __call__(self, source: str, kind: Kind, text: str) -> None:
        """`text` is what happened to `source`: a branch, or CoPD for the run as a whole."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = encode({"time": time, "kind": kind, "source": source, "text": text})
        try:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            log.warning("%s cannot be written: %s; lost: %s", self._file, error, line)


def read_events(run_dir: Path) -> list[dict[str, str]]:
    """All events of a run in order; a line that was cut off by a crash is left out."""
    return list(_lines(run_dir / EVENTS_FILE))


def _lines(file: Path) -> Iterator[dict[str, str]]:
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.keys() >= {"time", "kind", "source", "text"}:
            yield event
