"""A tensor of several models as a stream of slices that fit into the processor's cache, read as often as asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from copd_megatron.errors import WeightsError
from copd_megatron.weights.merge.sources import Source

CHUNK = 2**18
"""Elements of a slice: 1 MiB in float32. Smaller slices pay more for calls, larger ones fall out of the cache."""
BLOCK = 2**15
"""Elements summed up at once where sums are taken over a tensor. A slice is a whole number of them, so that no sum
depends on the size of slices."""
_ORDERED_BY = 4096
"""First elements by which inputs of one weight are told apart."""


class NotFinite(WeightsError):
    """A tensor's values, or what is computed from them, are NaN or infinite."""


class Workspace:
    """A thread's buffers, made once and used for every tensor."""

    def __init__(self, chunk: int = CHUNK) -> None:
        if chunk <= 0 or chunk % BLOCK:
            raise ValueError(f"slices of {chunk} elements; expected a multiple of {BLOCK}")
        self.chunk = chunk
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def buffer(self, use: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[chunk], the same memory whenever asked for this `use`."""
        if (use, dtype) not in self._buffers:
            self._buffers[use, dtype] = torch.empty(self.chunk, dtype=dtype)
        return self._buffers[use, dtype]


class Chunk:
    """Elements start … start + size of a tensor in the base and in each input, read when asked for."""

    def __init__(self, stream: Stream, start: int, size: int) -> None:
        self.start, self.size = start, size
        self._stream = stream

    def base(self, use: str = "base") -> torch.Tensor:
        """The base's elements, float32 [size], in the buffer `use`."""
        return self._read(self._stream.base, use)

    def input(self, index: int, use: str = "input") -> torch.Tensor:
        """Input `index`, float32 [size], in the buffer `use`."""
        return self._read(self._stream.inputs[index], use)

    def delta(self, index: int, base: torch.Tensor, use: str = "input") -> torch.Tensor:
        """Input `index` minus `base`, float32 [size], in the buffer `use`."""
        return self.input(index, use).sub_(base)

    def _read(self, source: Source, use: str) -> torch.Tensor:
        stream = self._stream
        values = stream.workspace.buffer(use)[: self.size]
        dtype = source.form(stream.name).dtype
        if dtype == torch.float32:
            source.read(stream.name, self.start, values)
        else:
            stored = stream.workspace.buffer("stored", dtype)[: self.size]
            source.read(stream.name, self.start, stored)
            values.copy_(stored)
        return values


class Stream:
    """The tensor `name` of `base` and `inputs`, to be gone through any number of times.

    `go_on` is called before each slice, and raises to stop the work.
    """

    def __init__(
        self,
        name: str,
        base: Source,
        inputs: Sequence[Source],
        workspace: Workspace,
        go_on: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.base = base
        self.inputs = inputs
        self.workspace = workspace
        self.go_on = go_on
        self.numel = base.form(name).numel

    def __iter__(self) -> Iterator[Chunk]:
        for start in range(0, self.numel, self.workspace.chunk):
            self.go_on()
            yield Chunk(self, start, min(self.workspace.chunk, self.numel - start))

    def buffer(self, use: str, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Scratch [size], at most a slice."""
        return self.workspace.buffer(use, dtype)[:size]


def order_of(stream: Stream, weights: Sequence[float]) -> list[int]:
    """Inputs in an order that depends on weights and values alone: sums then do not depend on the order given.

    (Addition of floats is commutative but not associative.) Inputs with the same weight and the same first elements
    stay in the order given.
    """
    if len(set(weights)) == len(weights):
        return sorted(range(len(weights)), key=lambda index: weights[index])
    first = Chunk(stream, 0, min(_ORDERED_BY, stream.numel))
    keys = [(weight, first.input(index).tolist()) for index, weight in enumerate(weights)]
    return sorted(range(len(weights)), key=lambda index: keys[index])
