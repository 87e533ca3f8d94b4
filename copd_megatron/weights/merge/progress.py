"""How far a merge is: a bar with rate and time left on a terminal, a line per shard in a log."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

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
            columns = (
                TextColumn("merging"),
                BarColumn(None),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console, expand=True)
            self._task = self._bar.add_task("merge", total=total)

    def __enter__(self) -> MergeProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._written)
            self._bar.stop()

    def add(self, count: int) -> None:
        """So many more bytes are written."""
        with self._lock:
            self._written += count
            now = time.monotonic()
            if self._bar is None or now - self._drawn < _REDRAW_SECONDS:
                return
            self._drawn = now
            self._bar.update(self._task, completed=self._written)

    def shard(self, shard: Shard, kept: bool = False) -> None:
        """A shard is on disk, or was already."""
        with self._lock:
            self._ready += 1
            if kept:
                self._total -= shard.nbytes
                if self._bar is not None:
                    self._bar.update(self._task, total=self._total)
            seconds = time.monotonic() - self._began
            rate = self._written / 1e9 / seconds if seconds > 0 else 0.0
            ready, written = self._ready, self._written
        what = "was there already" if kept else f"{shard.nbytes / 1e9:.2f} GB"
        left = (self._total - written) / 1e9 / rate if rate > 0 else 0.0
        logger.info(
            "%s: %s; %d of %d shards, %.2f GB/s, %.0f s left", shard.file, what, ready, self._shards, rate, left
        )
