"""How far a merge is: a bar with rate and time left on a terminal, a line per shard in a log."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from copd_megatron.weights.merge.plan import Shard

logger = logging.getLogger(__name__)

_REDRAW_SECONDS = 0.1


class MergeProgress:
    """Counts the bytes of `total` that this process has written, from any thread. `console`: where to draw a bar."""

    def __init__(self, total: int, shards: int, console: Console | None) -> None:
        self._total = total
        self._shards = shards
        self._lock = threading.Lock()
        self._written = self._ready = 0
        self._began = self._drawn = time.monotonic()
        self._bar: Progress | None = None
        if console is not None and console.is_terminal:
            rate = TextColumn("{task.fields[rate]}", justify="right")
            columns = (TextColumn("merging"), BarColumn(None), DownloadColumn(), rate, TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, expand=True)
            self._task = self._bar.add_task("merge", total=total, rate="")

    def __enter__(self) -> MergeProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._draw()
            self._bar.stop()

    def add(self, count: int) -> None:
        """So many more bytes are written."""
        with self._lock:
            self._written += count
            now = time.monotonic()
            if now - self._drawn >= _REDRAW_SECONDS:
                self._drawn = now
                self._draw()

    def shard(self, shard: Shard, kept: bool = False) -> None:
        """A shard is on disk, or was already."""
        with self._lock:
            self._ready += 1
            if kept:
                self._total -= shard.nbytes
                self._draw()
            rate, ready, to_come = self._rate(), self._ready, self._total - self._written
        what = "was there already" if kept else decimal(shard.nbytes)
        left = "" if not rate else f", {decimal(int(rate))}/s, {to_come / rate:.0f} s left"
        logger.info("%s: %s; %d of %d shards%s", shard.file, what, ready, self._shards, left)

    def _rate(self) -> float:
        """Bytes per second so far."""
        return self._written / max(time.monotonic() - self._began, 1e-9)

    def _draw(self) -> None:
        if self._bar is not None:
            rate = f"{decimal(int(self._rate()))}/s"
            self._bar.update(self._task, completed=self._written, total=self._total, rate=rate)
