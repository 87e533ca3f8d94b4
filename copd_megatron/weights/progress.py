"""How far a conversion or a merge is: a bar with rate and time left on a terminal; lines in the log."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from copd_megatron.weights.crew import ALONE, Crew

logger = logging.getLogger(__name__)

EVERY_SECONDS = 30.0
_REDRAW_SECONDS = 0.1


class Progress:
    """Counts the bytes of `total` that this process has written, from any thread. Use as a context manager.

    The first process of `crew` shows a bar where `console` is a terminal, and elsewhere says now and then how far it
    is. `files`: how many of them this process writes.
    """

    def __init__(
        self, what: str, total: int, crew: Crew = ALONE, console: Console | None = None, files: int = 0
    ) -> None:
        self._what = what if crew.size == 1 else f"{what}, process 1 of {crew.size}"
        self._total = total
        self._files = files
        self._shown = crew.rank == 0
        self._lock = threading.Lock()
        self._written = self._ready = 0
        self._started = self._told = self._drawn = time.monotonic()
        self._bar: Bar | None = None
        if self._shown and console is not None and console.is_terminal:
            rate = TextColumn("{task.fields[rate]}", justify="right")
            columns = (BarColumn(None), DownloadColumn(), rate, TimeRemainingColumn())
            self._bar = Bar(TextColumn("{task.description}"), *columns, console=console, expand=True)
            self._task = self._bar.add_task(self._what, total=total, rate="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._draw()
            self._bar.stop()

    def done(self, nbytes: int) -> None:
        """`nbytes` more have been written."""
        with self._lock:
            self._written += nbytes
            now = time.monotonic()
            if self._bar is not None:
                if now - self._drawn >= _REDRAW_SECONDS:
                    self._drawn = now
                    self._draw()
            elif self._shown and now - self._told >= EVERY_SECONDS:
                self._told = now
                logger.info("%s: %s of %s%s", self._what, decimal(self._written), decimal(self._total), self._pace(now))

    def file(self, name: str, nbytes: int, kept: bool = False) -> None:
        """The file `name` with `nbytes` of tensors is on disk, or (`kept`) was already."""
        with self._lock:
            self._ready += 1
            if kept:
                self._total -= nbytes
                self._draw()
            what = "was there already" if kept else decimal(nbytes)
            pace = self._pace(time.monotonic())
            logger.info("%s: %s; %d of %d files%s", name, what, self._ready, self._files, pace)

    def _pace(self, now: float) -> str:
        rate = self._written / max(now - self._started, 1e-9)
        return f", {decimal(int(rate))}/s, {(self._total - self._written) / rate:.0f} s left" if rate else ""

    def _draw(self) -> None:
        if self._bar is not None:
            rate = f"{decimal(int(self._written / max(time.monotonic() - self._started, 1e-9)))}/s"
            self._bar.update(self._task, completed=self._written, total=self._total, rate=rate)
