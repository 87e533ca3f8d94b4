"""The weights of a Hugging Face folder, written by one process or several: each its own files, tensor by tensor.

Which tensor lies in which file depends on their sizes alone, so any number of processes writes the same bytes. A file
begins with its header, for which names, formats and shapes are enough: no more than one tensor is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Protocol

import torch

from copd_megatron.weights.crew import Crew
from copd_megatron.weights.hf import SINGLE, shard_file, write_index
from copd_megatron.weights.tensor_files import Form, TensorWriter


class Tensors(Protocol):
    """Tensors that are made when they are asked for."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> torch.Size: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def tensor(self, name: str) -> torch.Tensor: ...


def bytes_of(source: Tensors, name: str) -> int:
    """The size of a tensor in memory and on disk."""
    return prod(source.shape(name)) * source.dtype(name).itemsize


def plan_shards(source: Tensors, max_shard_bytes: int) -> list[list[str]]:
    """The names in each file: in their order, at most `max_shard_bytes` or a single larger tensor."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in source.names():
        size = bytes_of(source, name)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_shards(
    source: Tensors, shards: Sequence[Sequence[str]], folder: Path, crew: Crew, done: Callable[[int], None]
) -> None:
    """Write this process's share of the files, and then the index. Collective.

    `done` is told the bytes of each tensor that has been written. WeightsError in every process if one cannot.
    """
    sizes = [sum(bytes_of(source, name) for name in names) for names in shards]
    crew.together(lambda: _write_share(source, shards, folder, crew.share(sizes), done))
    if len(shards) > 1:
        crew.together(lambda: write_index(folder, shards, sum(sizes)) if crew.rank == 0 else None)


def _write_share(
    source: Tensors, shards: Sequence[Sequence[str]], folder: Path, share: range, done: Callable[[int], None]
) -> None:
    for number in share:
        file = SINGLE if len(shards) == 1 else shard_file(number + 1, len(shards))
        _write(source, shards[number], folder / file, done)


def _write(source: Tensors, names: Sequence[str], file: Path, done: Callable[[int], None]) -> None:
    writer = TensorWriter(file, {name: Form(source.dtype(name), tuple(source.shape(name))) for name in names})
    try:
        for name in names:
            tensor = source.tensor(name).contiguous()
            writer.write(name, 0, tensor.view(-1))
            done(tensor.nbytes)
    except BaseException:
        writer.close(sync=False)
        raise
    writer.close()
