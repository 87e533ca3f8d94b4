"""The vocabulary over the ranks of a process group: who has which columns, and sums over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, once_differentiable


@dataclass(frozen=True)
class Vocabulary:
    """The part of the vocabulary that this process's logits cover.

    Columns are the ids `start`, `start` + 1, …; `size` is that of the whole vocabulary without padding. The ranks of
    `group` hold consecutive parts, which may be of different width, or empty. Without a group it is the whole.
    """

    start: int
    size: int
    group: dist.ProcessGroup | None

    def columns_of(self, ids: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Columns of `ids` among this rank's `width`, and bool which of them it has; the others point to column 0.

        Ids outside the vocabulary stay out of range on every rank, so that they are refused as they are unsplit.
        """
        columns = ids - self.start
        owned = (columns >= 0) & (columns < width)
        elsewhere = ~owned & (ids >= 0) & (ids < self.size)
        return columns.masked_fill(elsewhere, 0), owned

    def add(self, values: Tensor, owned: Tensor | None = None) -> Tensor:
        """Σ over ranks of `values`, only of those that are `owned` if given; in place where it can be."""
        values = values if owned is None else torch.where(owned, values, 0.0)
        dist.all_reduce(values, group=self.group)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """The largest over ranks of each of `values`."""
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """`values` of every rank, [ranks, …], in order of rank."""
        ranks = dist.get_world_size(self.group)
        result = [torch.empty_like(values) for _ in range(ranks)]
        dist.all_gather(result, values.contiguous(), group=self.group)
        return torch.stack(result)


def split_of(logits: Tensor, vocabulary: Vocabulary | None) -> Vocabulary | None:
    """`vocabulary` if other ranks hold parts of it, else None.

    Raises ValueError if the width of `logits` [T, Vp] is not what it says.
    """
    if vocabulary is None:
        return None
    width, end = logits.shape[1], vocabulary.start + logits.shape[1]
    if width and end > vocabulary.size:
        raise ValueError(
            f"logits have {width} columns from id {vocabulary.start} on, but the vocabulary has {vocabulary.size} ids; "
            "cut off the padding"
        )
    if vocabulary.group is None and width != vocabulary.size:
        raise ValueError(
            f"logits have {width} columns of {vocabulary.size}, and no group to ask for the others; "
            "pass the tensor-parallel group"
        )
    return None if vocabulary.group is None else vocabulary


def total(values: Tensor, part: Vocabulary) -> Tensor:
    """Σ over ranks, used alike by all of them: its gradient is that of every rank's summand."""
    return _Total.apply(values, part)  # type: ignore[no-any-return]


def shared(values: Tensor, part: Vocabulary) -> Tensor:
    """Σ over ranks, used by each for its own columns: the gradients of all ranks add up."""
    return _Shared.apply(values, part)  # type: ignore[no-any-return]


class _Total(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, part: Vocabulary) -> Tensor:
        return part.add(values.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Shared(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, part: Vocabulary) -> Tensor:
        ctx.part = part
        return part.add(values.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.part.add(grad.clone()), None
