"""How far a tensor's inputs are from the base and from each other, in one pass over its slices."""

from __future__ import annotations

from typing import Any

import torch

from copd_megatron.weights.merge.sphere import InnerProducts
from copd_megatron.weights.merge.stream import Stream


def measure(stream: Stream) -> dict[str, Any]:
    """`elements`; `base`: squared length; `products` [n][n]: inner products of the n changes from the base;
    `conflicts`: elements that one input has raised and another lowered. As JSON, to be added up over tensors.

    Raises NotFinite if a value is not.
    """
    products = InnerProducts(len(stream.inputs) + 1)
    conflicts = 0
    for chunk in stream:
        base = chunk.base()
        deltas = [chunk.delta(index, base, f"input {index}") for index in range(len(stream.inputs))]
        products.add([base, *deltas])
        highest, lowest = (stream.buffer(use, chunk.size).copy_(deltas[0]) for use in ("highest", "lowest"))
        for delta in deltas[1:]:
            torch.maximum(highest, delta, out=highest)
            torch.minimum(lowest, delta, out=lowest)
        conflicts += int(((highest > 0) & (lowest < 0)).sum())
    total = products.total(stream.name)
    return {
        "elements": stream.numel,
        "base": float(total[0, 0]),
        "products": total[1:, 1:].tolist(),
        "conflicts": conflicts,
    }
