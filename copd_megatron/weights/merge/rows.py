"""Merged tensors as a Megatron checkpoint takes them: row by row, some of them ahead, each in memory until written."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch

from copd_megatron.weights.crew import Stopped
from copd_megatron.weights.merge.stream import Workspace
from copd_megatron.weights.merge.work import Merge, merge_tensor, merging_threads

if TYPE_CHECKING:
    from copd_megatron.weights.megatron_writer import Record

AHEAD_BYTES = 2**28
"""Rows are merged ahead of the one that is written as long as together they are no larger."""


class MergedRows:
    """Rows (megatron_writer.py) whose tensors are merged by `jobs` threads. `go_on` raises to stop them."""

    def __init__(self, merge: Merge, jobs: int, go_on: Callable[[], None]) -> None:
        self.written: dict[str, dict[str, Any]] = {}
        """What `merge_tensor` told of each tensor."""
        self._merge = merge
        self._jobs = jobs
        self._go_on = go_on

    def __call__(self, records: Sequence[Record]) -> Iterator[tuple[Record, list[torch.Tensor]]]:
        """Each record with its tensors."""
        coming = deque(records)
        ahead: deque[tuple[Record, list[Future[torch.Tensor]]]] = deque()
        size = 0
        stop = threading.Event()

        def work(name: str) -> torch.Tensor:
            return self._tensor(name, workspace(), stop)

        with merging_threads(self._jobs, self._merge.chunk) as (pool, workspace):
            try:
                while coming or ahead:
                    while coming and (not ahead or size + coming[0].nbytes <= AHEAD_BYTES):
                        record = coming.popleft()
                        size += record.nbytes
                        ahead.append((record, [pool.submit(work, name) for name in record.names]))
                    record, made = ahead.popleft()
                    size -= record.nbytes
                    row = record, [future.result() for future in made]
                    made.clear()
                    yield row
                    del row  # its memory is needed for the next
            finally:
                stop.set()

    def _tensor(self, name: str, workspace: Workspace, stop: threading.Event) -> torch.Tensor:
        form = self._merge.base.form(name)
        whole = torch.empty(form.numel, dtype=form.dtype)

        def put(start: int, values: torch.Tensor) -> None:
            whole[start : start + len(values)] = values

        def go_on() -> None:
            if stop.is_set():
                raise Stopped(f"tensor {name} is not needed any more")
            self._go_on()

        self.written[name] = merge_tensor(self._merge, name, workspace, put, go_on)
        return whole.view(form.shape)
