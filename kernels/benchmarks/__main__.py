"""Benchmark of the kernels.

    python -m copd_kernels.benchmarks --json docs/benchmarks/kernels_cpu.json     what this machine can measure

With a GPU: time and peak memory of every operation at 8,192 and 32,768 tokens in bfloat16, beside torch eager,
torch.compile and Liger where it is installed, and beside its floor, the time that its bytes or operations take at the
rates of a copy and a matrix product measured in the same run. Without one: peak memory of the references at 128 and 256
tokens in float32; times are not measured. Numbers of vocabulary and hidden size are Qwen3-4B's, the latter 256 on a
CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from datetime import date
from typing import Any

import torch

from copd_kernels.benchmarks import cpu, gpu
from copd_kernels.benchmarks.operations import NAMES
from copd_megatron.files import write_atomic

VOCABULARY = 151_936


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m copd_kernels.benchmarks", description="benchmark of the kernels")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    parser.add_argument("--tokens", type=int, nargs="+", help="8192 32768 on a GPU, 128 256 on a CPU")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help=f"{VOCABULARY}")
    parser.add_argument("--hidden", type=int, help="2560 on a GPU, 256 on a CPU")
    parser.add_argument("--only", choices=NAMES, nargs="+", default=NAMES, help="these operations")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    tokens = options.tokens or ([8192, 32768] if on_gpu else [128, 256])
    hidden = options.hidden or (2560 if on_gpu else 256)
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "vocabulary": options.vocabulary,
        "hidden": hidden,
    }
    if on_gpu:
        record["ceilings"] = gpu.ceilings()
    else:
        record["times"] = "not measured: no GPU"
    record["rows"] = [
        row
        for name in options.only
        for count in tokens
        for row in (
            gpu.measure(name, count, options.vocabulary, hidden, record["ceilings"])
            if on_gpu
            else cpu.measure(name, count, options.vocabulary, hidden)
        )
    ]
    print(table(record))
    if options.json:
        write_atomic(options.json, json.dumps(record, indent=1) + "\n")
    return 0


def table(record: dict[str, Any]) -> str:
    """The rows of a record, as a Markdown table."""
    lines = ["| operation | tokens | by | time | × floor | peak memory |", "|---|---|---|---|---|---|"]
    for row in record["rows"]:
        time = f"{row['seconds'] * 1e3:.2f} ms" if "seconds" in row else row.get("failed", "not measured")
        ratio = f"{row['ratio_to_floor']:.2f}" if "ratio_to_floor" in row else ""
        peak = f"{row['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in row else ""
        lines.append(f"| {row['operation']} | {row['tokens']} | {row['by']} | {time} | {ratio} | {peak} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
