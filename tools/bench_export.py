"""How fast a live policy's weights are handed to its rollout engine, and what memory that takes on each rank.

    make bench-export     (python tools/bench_export.py --json docs/benchmarks/export.json --doc docs/performance.md)

A random model is trained nowhere and served nowhere: `Policy.named_weights` yields every tensor under its Hugging Face
name, as after each update, and the replica's leader copies each into one buffer of the size of the largest, as a sender
to an engine does. After a first hand-over all tensors are compared with the folder that the policy was loaded from;
then `--repeats` hand-overs are timed, from a barrier to a barrier. Every process has one thread.

Memory is counted from just before the first hand-over to its peak (resident; on a GPU: allocated), beyond that buffer,
on the rank where it grows most. What a rank needs are a few rows and the transport's buffers, however large the model:
the benchmark fails if from the smallest to the largest of `--layers` memory grows by `LIMIT` of what the model does. A
copy of the model would be 1, that of a rank's half of it 0.5.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform as machine
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import doc_table
import from_checkout  # noqa: F401 - makes the project importable
import launch
from bench_growth_worker import MIB, resident_peak_mib
from bench_model import Shape, write_model

from copd_megatron.files import write_atomic

LAYOUTS: tuple[tuple[str, dict[str, int]], ...] = (
    ("one process", {}),
    ("tensor parallel, tp = 2", {"world": 2, "tp": 2}),
    ("pipeline parallel, pp = 2", {"world": 2, "pp": 2}),
)
LIMIT = 0.25
"""Bytes that a hand-over may take more on a rank for each byte that the model has more."""


@dataclass(frozen=True)
class Case:
    """A hand-over of the model in `folder`, `repeats` times, from a policy of the degrees `layout` (of `Layout`)."""

    folder: str
    repeats: int
    precision: str = "bf16"
    layout: dict[str, int] = field(default_factory=dict)


def measure(case: Case) -> dict[str, Any]:
    """What one process of the case sees; `bytes` and `largest` are 0 where it leads no replica."""
    import torch
    import torch.distributed as dist

    from copd_megatron.policy import layout, platform
    from copd_megatron.policy.optimizer import OptimizerSettings
    from copd_megatron.policy.trainer import Policy

    torch.set_num_threads(1)
    degrees = layout.Layout(**case.layout)  # type: ignore[arg-type]
    layout.initialize(degrees)
    policy = Policy(case.folder, degrees, OptimizerSettings(), case.precision, 1024)  # type: ignore[arg-type]
    on_gpu = platform.on_gpu()
    largest = _largest(case) if layout.is_replica_leader() else 0
    bucket = torch.zeros(largest, dtype=torch.uint8, device="cuda" if on_gpu else "cpu")

    def hand_over() -> float:
        dist.barrier()
        began = time.perf_counter()
        for _, tensor in policy.named_weights():
            bucket[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        if on_gpu:
            torch.cuda.synchronize()
        dist.barrier()
        return time.perf_counter() - began

    def peak(reset: bool = False) -> float:
        if not on_gpu:
            return resident_peak_mib(reset)
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / MIB

    _trim()
    before = peak(reset=True)
    hand_over()
    grown = peak() - before
    total = check(policy, case.folder)
    seconds = [hand_over() for _ in range(case.repeats)]
    layout.shutdown()
    return {"seconds": seconds, "bytes": total, "largest": largest, "grown_mib": grown}


def _largest(case: Case) -> int:
    """Bytes of the largest tensor."""
    from copd_megatron.weights.hf import HfFolder

    source = HfFolder(case.folder)
    return max(source.shape(name).numel() for name in source.names()) * (2 if case.precision == "bf16" else 4)


def _trim() -> None:
    """Give back memory that was let go: a hand-over would else use it, and not be seen to."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def check(policy: Any, folder: str) -> int:
    """Bytes of the tensors that this process is given; SystemExit if one is not what `folder` holds."""
    import torch

    from copd_megatron.weights.hf import HfFolder

    source, sizes = HfFolder(folder), {}
    for name, tensor in policy.named_weights():
        if not torch.equal(tensor.cpu(), source.tensor(name).to(tensor.dtype)):
            raise SystemExit(f"bench_export: {name} is not what {folder} holds")
        sizes[name] = tensor.nbytes
    if sizes and sorted(sizes) != source.names():
        raise SystemExit(f"bench_export: {len(sizes)} tensors were handed over, {folder} has {len(source.names())}")
    return sum(sizes.values())


def run(case: Case, timeout: float) -> dict[str, Any]:
    """The case in processes of its own; SystemExit with the last words of one that fails."""
    world = case.layout.get("world", 1)
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(asdict(case))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codes = launch.run(command, world, folder, timeout)
        for rank, code in enumerate(codes):
            if code != 0:
                words = (folder / f"{rank}.err").read_text().strip().splitlines() or ["no message"]
                raise SystemExit(f"bench_export: {case.layout or 'one process'}, rank {rank} ({code}): {words[-1]}")
        results = [json.loads((folder / f"{rank}.out").read_text().splitlines()[-1]) for rank in range(world)]
    return summary(results)


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row from what the ranks saw."""
    total = max(result["bytes"] for result in results)
    grown = [result["grown_mib"] for result in results]
    seconds = [max(times) for times in zip(*(result["seconds"] for result in results), strict=True)]
    return {
        "seconds": seconds,
        "bytes": total,
        "largest": max(result["largest"] for result in results),
        "bytes_per_second": total / statistics.median(seconds),
        "grown_mib": grown,
    }


def check_memory(rows: Sequence[dict[str, Any]]) -> None:
    """SystemExit if a layout's memory grows with the model."""
    for name in {row["name"] for row in rows}:
        small, *_, large = sorted((row for row in rows if row["name"] == name), key=lambda row: row["bytes"])
        grown = (max(large["grown_mib"]) - max(small["grown_mib"])) * MIB / (large["bytes"] - small["bytes"])
        if grown >= LIMIT:
            raise SystemExit(
                f"bench_export: {name}: a rank takes {grown:.2f} bytes more for each byte that the model has more; "
                f"expected less than {LIMIT}"
            )


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = result["layouts"]
    lines = [
        f"{result['precision']}; largest tensor {rows[0]['largest'] / MIB:.0f} MiB; {result['machine']}; "
        f"torch {result['torch']}; {result['date']}. Medians of {result['repeats']} hand-overs.",
        "",
        "| layout | model, MiB | GB/s | seconds | memory on the rank that needs most, MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        rate, seconds = row["bytes_per_second"] / 1e9, statistics.median(row["seconds"])
        size, grown = row["bytes"] / MIB, max(row["grown_mib"])
        lines.append(f"| {row['name']} | {size:,.0f} | {rate:.2f} | {seconds:.2f} | {grown:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 28], help="of each model")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that one layout may take")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--doc", type=Path, help="write the table here, between the markers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(measure(Case(**json.loads(given.worker)))))
        return
    # Of glibc: what is freed goes back at once. Else memory that a hand-over has let go counts as its peak.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(MIB))
    rows = []
    for layers in given.layers:
        shape = Shape(given.hidden, layers, heads=8, groups=4, head_dim=128, mlp=3 * given.hidden, vocabulary=8192)
        with tempfile.TemporaryDirectory() as name:
            write_model(Path(name), shape)
            for what, degrees in LAYOUTS:
                rows.append({"name": what, **run(Case(name, given.repeats, given.precision, degrees), given.timeout)})
                print(f"{layers} layers, {what}: {rows[-1]['bytes_per_second'] / 1e9:.2f} GB/s", flush=True)
    if len(given.layers) > 1:
        check_memory(rows)
    import torch

    result = {
        "date": date.today().isoformat(),
        "machine": f"{machine.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "precision": given.precision,
        "repeats": given.repeats,
        "layouts": rows,
    }
    print(f"\n{table(result)}")
    if given.json is not None:
        write_atomic(given.json, json.dumps(result, indent=1) + "\n")
    if given.doc is not None:
        doc_table.put(given.doc, "export", table(result))


if __name__ == "__main__":
    main()
