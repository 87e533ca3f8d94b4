"""Of `tools/gpu_check.py`: the clock, the rate of bf16 matrix products, and what stops a part."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bench_model import Shape

L2_BYTES = 128 << 20
"""More than any GPU's L2 cache: inputs are changed in turn until so much has been read."""


class NotRun(Exception):
    """A part that this machine cannot run; the message says why."""


@dataclass(frozen=True)
class Sizes:
    """How much each part computes. `sequences` of `length` tokens make a step; `steps` are compared with bf16, those
    after `warm_up` are timed; `repeats` time a single operation; `square` is the side of a plain matrix product."""

    shape: Shape
    sequences: int
    length: int
    steps: int
    warm_up: int
    repeats: int
    square: int


def seconds_of(run: Callable[[int], Any], repeats: int, warm_up: int, device: torch.device) -> float:
    """Median seconds of `run(number)`, by CUDA events where there is a GPU."""
    times = []
    for number in range(warm_up + repeats):
        spent = one(lambda number=number: run(number), device)  # type: ignore[misc]
        if number >= warm_up:
            times.append(spent)
    return statistics.median(times)


def one(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()  # type: ignore[no-untyped-call]
    run()
    end.record()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def matmul_rate(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """TFLOP/s of bf16 products of random matrices: a square, and the two of the MLP with a step's tokens."""
    shape, tokens = sizes.shape, sizes.sequences * sizes.length
    products = {
        "square": (sizes.square, sizes.square, sizes.square),
        "mlp_up": (tokens, shape.hidden, 2 * shape.mlp),
        "mlp_down": (tokens, shape.mlp, shape.hidden),
    }
    rates: dict[str, Any] = {}
    for name, (rows, inner, columns) in products.items():
        copies = max(2, -(-L2_BYTES // (2 * (rows * inner + inner * columns)))) if device.type == "cuda" else 2
        pairs = [
            (
                torch.randn(rows, inner, device=device, dtype=torch.bfloat16),
                torch.randn(inner, columns, device=device, dtype=torch.bfloat16),
            )
            for _ in range(min(copies, 64))
        ]
        error = _relative_error(pairs[0])
        if not error < 0.02:
            raise RuntimeError(f"bf16 product {name} is off by {error:.1e} from float32")

        def product(number: int, pairs: list[tuple[torch.Tensor, torch.Tensor]] = pairs) -> None:
            left, right = pairs[number % len(pairs)]
            torch.mm(left, right)

        spent = seconds_of(product, sizes.repeats, sizes.warm_up, device)
        rates[name] = {"shape": [rows, inner, columns], "tflops": 2 * rows * inner * columns / spent / 1e12}
    return {"tflops": max(rate["tflops"] for rate in rates.values()), **rates}


def _relative_error(pair: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Of a few rows of the product, against float32."""
    left, right = pair
    expected = left[:64].float() @ right.float()
    return float((torch.mm(left, right)[:64].float() - expected).norm() / expected.norm())
