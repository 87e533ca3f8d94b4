"""Peak memory of the references on a CPU, each in a process of its own; times there say nothing and are not
measured."""

from __future__ import annotations

import multiprocessing
import os
import re
from pathlib import Path
from typing import Any

import torch

from copd_kernels.benchmarks.operations import build


def measure(name: str, tokens: int, vocabulary: int, hidden: int) -> list[dict[str, Any]]:
    """One row per implementation: peak bytes beyond the inputs, in float32."""
    peers = list(build(name, 1, 256, 8, "cpu", torch.float32).peers)
    context = multiprocessing.get_context("spawn")
    # Read by glibc at a process's start: tensors get pages of their own and give them back, so that peaks are theirs.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
    rows = []
    for who in ("copd_kernels", *peers):
        with context.Pool(1) as pool:
            peak = pool.apply(_peak, (name, tokens, vocabulary, hidden, who))
        rows.append({"operation": name, "tokens": tokens, "by": who, "peak_bytes": peak})
    return rows


def _peak(name: str, tokens: int, vocabulary: int, hidden: int, who: str) -> int:
    torch.set_num_threads(1)
    small = build(name, 2, 256, 8, "cpu", torch.float32)
    (small.ours if who == "copd_kernels" else small.peers[who])()  # what is loaded at first use does not count
    operation = build(name, tokens, vocabulary, hidden, "cpu", torch.float32)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    result = (operation.ours if who == "copd_kernels" else operation.peers[who])()
    peak = _memory("VmHWM") - before
    del result
    return peak


def _memory(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}: peak memory can be measured on Linux only")
    return int(found[1]) * 1024
