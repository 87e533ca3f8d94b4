"""How far a conversion is: a bar on a terminal, now and then a line in the log elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from copd_megatron.weights.crew import Crew

logger = logging.getLogger(__name__)

EVERY_SECONDS = 30.0


class Progress:
    """Shows the first process's share of `total` bytes. Use as a context manager; `done` tells of bytes written."""

    def __init__(self, what: str, total: int, crew: Crew, console: Console | None = None) -> None:
        self._what = what if crew.size == 1 else f"{what}, process 1 of {crew.size}"
        self._total = total
        self._shown = crew.rank == 0
        self._written = 0
        self._started = self._told = time.monotonic()
        self._bar: Bar | None = None
        console = console or Console(stderr=True)
        if self._shown and console.is_terminal:
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Bar(TextColumn("{task.description}"), *columns, console=console)
            self._task = self._bar.add_task(self._what, total=total)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def done(self, nbytes: int) -> None:
        """`nbytes` more have been written."""
        self._written += nbytes
        if self._bar is not None:
            self._bar.advance(self._task, nbytes)
        elif self._shown and (now := time.monotonic()) - self._told >= EVERY_SECONDS:
            self._told = now
            speed = self._written / (now - self._started)
            left = (self._total - self._written) / speed
            logger.info(
                "%s: %s of %s, %s/s, %.0f s left",
                self._what,
                decimal(self._written),
                decimal(self._total),
                decimal(int(speed)),
                left,
            )
