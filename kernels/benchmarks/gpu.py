"""Times on a GPU: medians of repeated runs between CUDA events, beside what a copy and a matrix product reach there."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from copd_kernels.benchmarks.operations import build

REPEATS = 20
COPY_BYTES = 4 << 30
PRODUCT = 8192


def ceilings() -> dict[str, float]:
    """Bytes per second of a copy (read and written both count), operations per second of a bfloat16 matrix product."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copying = 2 * COPY_BYTES / seconds(lambda: target.copy_(source))
    factor = torch.randn(PRODUCT, PRODUCT, dtype=torch.bfloat16, device="cuda")
    return {"bytes_per_second": copying, "operations_per_second": 2 * PRODUCT**3 / seconds(lambda: factor @ factor)}


def seconds(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median time of `run`, after three runs that compile and warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def measure(name: str, tokens: int, vocabulary: int, hidden: int, ceiling: dict[str, float]) -> list[dict[str, Any]]:
    """One row per implementation: seconds, peak bytes beyond the inputs, and the ratio to the operation's floor."""
    operation = build(name, tokens, vocabulary, hidden, "cuda", torch.bfloat16)
    floor = operation.bytes / ceiling["bytes_per_second"] + operation.operations / ceiling["operations_per_second"]
    rows = []
    for who, run in {"copd_kernels": operation.ours, **operation.peers}.items():
        row: dict[str, Any] = {"operation": name, "tokens": tokens, "by": who, "floor_seconds": floor}
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            row["seconds"] = seconds(run)
            row["ratio_to_floor"] = row["seconds"] / floor
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
        rows.append(row)
    return rows
