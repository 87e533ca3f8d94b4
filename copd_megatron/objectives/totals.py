"""Statistics as (sum, count) pairs, which micro-batches and data-parallel ranks can simply add.

A function that returns statistics returns the same keys on every call with the same settings, with (0, 0) where there
was nothing to measure, so that ranks can reduce them without asking each other for their keys.
"""

from __future__ import annotations

import torch

Stats = dict[str, torch.Tensor]
"""Name to float64 [2]: sum, count."""


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum and count of `values` [N] (numbers or a mask) as float64 [2]."""
    values = values.detach().double()
    return torch.stack([values.sum(), values.new_tensor(float(values.numel()))])


def totals_by(index: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    """`total` of `values` [N] for each value 0 … size − 1 of `index` int64 [N], as float64 [size, 2]."""
    values = values.detach().double()
    pairs = torch.stack([values, torch.ones_like(values)], dim=-1)
    return values.new_zeros(size, 2).index_add_(0, index, pairs)
