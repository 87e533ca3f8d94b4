"""The weights of a Hugging Face folder: which tensor lies in which file, and how several processes write them.

Which tensor lies in which file depends on their order and sizes alone, so any number of processes writes the same
bytes. A file begins with its header, for which names, formats and shapes are enough: no more than one tensor is in
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Shard:
    """A file of a model, and the tensors in it."""

    file: str
    forms: Mapping[str, Form]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(form.nbytes for form in self.forms.values())


def forms_of(source: Tensors) -> dict[str, Form]:
    """The form of each tensor, in the order of `source`."""
    return {name: Form(source.dtype(name), tuple(source.shape(name))) for name in source.names()}


def plan_shards(forms: Mapping[str, Form], max_bytes: int) -> list[Shard]:
    """The files of a model: tensors in their order, at most `max_bytes` or a single larger tensor in each."""
    groups: list[dict[str, Form]] = []
    filled = 0
    for name, form in forms.items():
        if not groups or filled + form.nbytes > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = form
        filled += form.nbytes
    if len(groups) == 1:
        return [Shard(SINGLE, groups[0])]
    return [Shard(shard_file(number, len(groups)), group) for number, group in enumerate(groups, 1)]


def write_shards(
    source: Tensors, shards: Sequence[Shard], folder: Path, crew: Crew, done: Callable[[int], None]
) -> None:
    """Write this process's share of the files, and then the index. Collective.

    `done` is told the bytes of each tensor that has been written. WeightsError in every process if one cannot.
    """
    share = crew.share([shard.nbytes for shard in shards])
    crew.together(lambda: _write_share(source, [shards[number] for number in share], folder, crew, done))
    crew.together(lambda: name_shards(folder, shards) if crew.rank == 0 else None)


def name_shards(folder: Path, shards: Sequence[Shard]) -> None:
    """Write the index that says which file of `folder` holds which tensor, if there are several."""
    if len(shards) > 1:
        write_index(folder, [list(shard.forms) for shard in shards], sum(shard.nbytes for shard in shards))


def _write_share(
    source: Tensors, shards: Sequence[Shard], folder: Path, crew: Crew, done: Callable[[int], None]
) -> None:
    for shard in shards:
        writer = TensorWriter(folder / shard.file, shard.forms)
        try:
            for name in shard.forms:
                crew.check()
                tensor = source.tensor(name).contiguous()
                writer.write(name, 0, tensor.view(-1))
                done(tensor.nbytes)
        except BaseException:
            writer.close(sync=False)
            raise
        writer.close()
