"""How an update of the policy grows: tokens per second of a process and its peak memory, by processes and by length.

    make bench-growth     (python tools/bench_growth.py --json docs/benchmarks/growth.json --doc docs/performance.md)

The first table adds processes as data, tensor, pipeline or context parallelism, with the same number of tokens for
each process; the second lengthens the sequences of one process, with the same number of tokens for each update. Every
process has one thread. Before anything is timed, each layout makes one update on the same sequences, and its loss and
gradient norm have to be those of a single process. Layouts that the model does not allow are listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from copd_megatron.files import write_atomic

sys.path.insert(0, str(Path(__file__).parent))
import launch
from bench_growth_worker import KINDS, REST, Case
from bench_model import Shape, write_model

BEGIN, END = "<!-- growth: begin -->", "<!-- growth: end -->"
WORKER = Path(__file__).with_name("bench_growth_worker.py")
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest relative difference of loss and gradient norm between layouts, by precision."""


def run(case: Case, timeout: float) -> dict[str, Any]:
    """What the case's first process reports, with the largest `peak_mib` of all; {"skipped"} or {"failed"}: reason."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codes = launch.run([sys.executable, str(WORKER), case.text()], case.world, folder, timeout)
        for rank, code in enumerate(codes):
            if code:
                words = (folder / f"{rank}.err").read_text().strip().splitlines()
                return {"failed": (words or ["no message"])[-1]}
        if None in codes:
            return {"failed": f"no result after {timeout:g} s"}
        results = [json.loads((folder / f"{rank}.out").read_text().splitlines()[-1]) for rank in range(case.world)]
    for result in results:
        if "skipped" in result:
            return dict(result)
    return {**results[0], "peak_mib": max(result["peak_mib"] for result in results)}


def layouts(worlds: Sequence[int]) -> list[tuple[str, dict[str, int]]]:
    """Every way to use so many processes for one kind of parallelism."""
    found: list[tuple[str, dict[str, int]]] = []
    for world in worlds:
        if world == 1:
            found.append(("one process", {}))
            continue
        found.append((f"data parallel, dp = {world}", {"world": world}))
        for kind, name in (("tp", "tensor"), ("pp", "pipeline"), ("cp", "context")):
            found.append((f"{name} parallel, {kind} = {world}", {"world": world, kind: world}))
    return found


def by_processes(folder: Path, shape: Shape, given: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per layout; SystemExit if one computes something else than a single process."""
    rows: list[dict[str, Any]] = []
    for name, degrees in layouts(given.worlds):
        case = Case(str(folder), shape.vocabulary, given.sequences, given.length, given.sequences * given.length,
                    given.steps, given.precision, degrees)  # fmt: skip
        row = {"name": name, "processes": case.world, **run(case, given.timeout)}
        _say(name, row)
        check_same(rows, row, TOLERANCE[given.precision])
        rows.append(row)
    return rows


def by_length(folder: Path, shape: Shape, given: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per length of sequence."""
    rows = []
    for length in given.lengths:
        count = max(1, given.tokens // length)
        case = Case(str(folder), shape.vocabulary, count, length, count * length, given.steps, given.precision)
        row: dict[str, Any] = {"length": length, "sequences": count, **run(case, given.timeout)}
        if "seconds" in row:
            row["gflops_per_second"] = shape.flops([length] * count) / statistics.median(row["seconds"]) / 1e9
        _say(f"length {length}", row)
        rows.append(row)
    return rows


def check_same(rows: Sequence[dict[str, Any]], row: dict[str, Any], tolerance: float) -> None:
    """SystemExit if a layout's first loss or gradient norm is not that of the first row that ran."""
    reference = next((other for other in rows if "loss" in other), None)
    if reference is None or "loss" not in row:
        return
    for what in ("loss", "grad_norm"):
        difference = abs(row[what] - reference[what]) / abs(reference[what])
        if not difference <= tolerance:
            raise SystemExit(
                f"bench_growth: {row['name']} has {what} {row[what]}, {reference['name']} has {reference[what]}; "
                f"expected a relative difference of at most {tolerance:g}"
            )


def _say(name: str, row: dict[str, Any]) -> None:
    reason = row.get("skipped") or row.get("failed")
    result = f"not run: {reason}" if reason else f"{row['tokens_per_second_per_process']:,.0f} tokens/s per process"
    print(f"{name}: {result}", flush=True)


def tables(result: dict[str, Any]) -> str:
    """The Markdown between the markers."""
    shares = [*KINDS, REST]
    measured = [row for row in (*result["processes"], *result["lengths"]) if "memory" in row]
    memory = f"peak MiB ({measured[0]['memory']})" if measured else "peak MiB"
    lines = [
        f"{result['model']}; {result['precision']}; {result['machine']}; torch {result['torch']}; {result['date']}. "
        f"Medians of {result['steps']} updates.",
        "",
        f"**Processes**: {result['sequences']} sequences of {result['length']} tokens for each process and update.",
        "",
        _row("layout", "tokens/s per process", "of one process", memory, "before the model", *shares, "largest share"),
        "|---" + "|---:" * (len(shares) + 4) + "|---|",
    ]
    alone = next((row for row in result["processes"] if row["processes"] == 1 and "seconds" in row), None)
    for row in result["processes"]:
        if "seconds" not in row:
            lines.append(
                _row(row["name"], f"not run: {row.get('skipped') or row['failed']}", *[""] * (len(shares) + 4))
            )
            continue
        rate = row["tokens_per_second_per_process"]
        share = f"{100 * rate / alone['tokens_per_second_per_process']:.0f} %" if alone else ""
        lines.append(_row(row["name"], f"{rate:,.0f}", share, *_memory_and_split(row, shares)))
    crowded = [row["name"] for row in result["processes"] if row["processes"] > result["cores"]]
    if crowded:
        lines += ["", f"More processes than the {result['cores']} cores, which they share: {'; '.join(crowded)}."]
    lines += [
        "",
        f"**Length of a sequence**: one process, about {result['tokens']:,} tokens for each update.",
        "",
        _row("tokens", "sequences", "tokens/s", "GFLOP/s", memory, "before the model", *shares, "largest share"),
        "|---:" * (len(shares) + 6) + "|---|",
    ]
    for row in result["lengths"]:
        size = (f"{row['length']:,}", str(row["sequences"]))
        if "seconds" not in row:
            reason = f"not run: {row.get('skipped') or row['failed']}"
            lines.append(_row(*size, reason, *[""] * (len(shares) + 4)))
            continue
        rates = (f"{row['tokens_per_second_per_process']:,.0f}", f"{row['gflops_per_second']:.1f}")
        lines.append(_row(*size, *rates, *_memory_and_split(row, shares)))
    return "\n".join(lines) + "\n"


def _memory_and_split(row: dict[str, Any], shares: Sequence[str]) -> list[str]:
    split = row["split"]
    parts = [f"{100 * split[share]:.0f} %" for share in shares]
    return [f"{row['peak_mib']:,.0f}", f"{row['before_model_mib']:,.0f}", *parts, max(shares, key=lambda s: split[s])]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def write_tables(doc: Path, text: str) -> None:
    """Put `text` between the markers of `doc`; SystemExit if they are not there."""
    content = doc.read_text()
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise SystemExit(f"bench_growth: {doc} must have {BEGIN!r} and {END!r} once each")
    before, rest = content.split(BEGIN)
    write_atomic(doc, f"{before}{BEGIN}\n{text}{END}{rest.split(END)[1]}")


def main() -> None:
    """Run every case, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="*", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--sequences", type=int, default=4, help="for each process, in the first table")
    parser.add_argument("--length", type=int, default=256, help="of a sequence, in the first table")
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--tokens", type=int, default=4096, help="of an update, in the second table")
    parser.add_argument("--steps", type=int, default=10, help="timed updates of a case")
    parser.add_argument("--precision", choices=sorted(TOLERANCE), default="fp32")
    parser.add_argument("--hidden", type=int, default=Shape.hidden)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that one case may take")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--doc", type=Path, help="write the tables here, between the markers")
    given = parser.parse_args()
    shape = Shape(hidden=given.hidden, layers=given.layers)
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), shape)
        processes = by_processes(Path(name), shape, given)
        lengths = by_length(Path(name), shape, given)
    import torch

    parameters = shape.matrix_parameters + shape.hidden * shape.vocabulary
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    result: dict[str, Any] = {
        "model": f"language model of {parameters / 1e6:.2f} M parameters",
        "precision": given.precision,
        "machine": f"{machine.machine()}, {cores} cores"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "cores": cores,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "steps": given.steps,
        "sequences": given.sequences,
        "length": given.length,
        "tokens": given.tokens,
        "processes": processes,
        "lengths": lengths,
    }
    text = tables(result)
    print(f"\n{text}")
    if given.json:
        write_atomic(given.json, json.dumps(result, indent=1) + "\n")
    if given.doc:
        write_tables(given.doc, text)


if __name__ == "__main__":
    main()
