"""What a family's table is made of: rows, and the ways in which Hugging Face tensors lie inside a Megatron parameter.

Joints only view, copy and concatenate, so that `split(join(parts))` gives back every byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Joint(Protocol):
    """Hugging Face tensors to one full (unsharded) Megatron tensor and back."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The full Megatron tensor; RuntimeError if the parts do not fit each other."""
        ...

    def split(self, full: Tensor) -> list[Tensor]:
        """The Hugging Face tensors; may be views of `full`."""
        ...


@dataclass(frozen=True)
class Plain:
    """One tensor, as it is."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]

    def split(self, full: Tensor) -> list[Tensor]:
        return [full]


@dataclass(frozen=True)
class Padded:
    """One tensor whose first dimension has `rows` rows; Megatron appends zeros up to `padded` rows."""

    rows: int
    padded: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        (part,) = parts
        if self.padded == self.rows or len(part) != self.rows:
            return part
        return torch.cat([part, part.new_zeros(self.padded - self.rows, *part.shape[1:])])

    def split(self, full: Tensor) -> list[Tensor]:
        return [full[: self.rows]]


@dataclass(frozen=True)
class Flattened:
    """One kernel [features, *shape] of a convolution whose stride is its size: a linear layer over flat patches."""

    shape: tuple[int, ...]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].flatten(1)

    def split(self, full: Tensor) -> list[Tensor]:
        return [full.unflatten(1, self.shape)]


@dataclass(frozen=True)
class Stacked:
    """Tensors of equal size above each other: gate and up projection."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def split(self, full: Tensor) -> list[Tensor]:
        return list(full.chunk(2))


@dataclass(frozen=True)
class QueryKeyValue:
    """Query, key and value projections; Megatron keeps each group's queries, key and value together."""

    heads: int
    groups: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], dim=1).flatten(0, 1)

    def split(self, full: Tensor) -> list[Tensor]:
        queries = self.heads // self.groups
        grouped = full.unflatten(0, (self.groups, queries + 2, -1))
        return [part.flatten(0, 2) for part in grouped.split([queries, 1, 1], dim=1)]


@dataclass(frozen=True)
class FusedQueryKeyValue:
    """One projection with all queries, then all keys, then all values; Megatron keeps each head's together."""

    heads: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)

    def split(self, full: Tensor) -> list[Tensor]:
        return [full.unflatten(0, (self.heads, 3, -1)).transpose(0, 1).flatten(0, 2)]


@dataclass(frozen=True)
class ExpertStack:
    """The matrices of all experts in one tensor [experts, inputs, outputs], as Qwen publishes them and rollout servers
    read them; Megatron's are [outputs, inputs] each.

    transformers 5 saves [experts, outputs, inputs]; `join` takes both.
    """

    inputs: int
    outputs: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        (stack,) = parts
        return stack.transpose(1, 2) if stack.shape[1:] == (self.inputs, self.outputs) else stack

    def split(self, full: Tensor) -> list[Tensor]:
        return [full.transpose(1, 2)]


@dataclass(frozen=True)
class EachExpert:
    """The matrices of all experts as tensors of their own, expert by expert; `matrices` of them, of equal size, stand
    above each other in one of Megatron's (gate and up projection: 2)."""

    matrices: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        experts = zip(*[iter(parts)] * self.matrices, strict=True)
        return torch.stack([torch.cat(expert) for expert in experts])

    def split(self, full: Tensor) -> list[Tensor]:
        return [part for expert in full for part in expert.chunk(self.matrices)]


@dataclass(frozen=True)
class Row:
    """One kind of parameter.

    `megatron` is its name, or its names where megatron-core's own layers and Transformer Engine's differ; `*` stands
    for the number in a repeated section. `shard` is the dimension that tensor parallelism divides (None: every rank
    has all of it), with each of `blocks` equal parts of that dimension divided on its own. A row that is not
    `exported` takes a tensor that another row already gives back (tied embeddings).

    With `experts` the row is of so many parameters: the full Megatron tensor is a stack of them, `#` in a name stands
    for the number of an expert among those of its rank, and `shard` counts the dimensions of one expert's parameter.
    """

    megatron: str | tuple[str, ...]
    hf: tuple[str, ...]
    joint: Joint = Plain()
    shard: int | None = None
    blocks: int = 1
    exported: bool = True
    experts: int = 0


@dataclass(frozen=True)
class Section:
    """Rows that stand `count` times in the model, numbered from `first`."""

    count: int
    rows: tuple[Row, ...]
    first: int = 0
