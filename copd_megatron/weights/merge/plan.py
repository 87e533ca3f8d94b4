"""Which tensor goes into which file, and which process writes it: known before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from copd_megatron.weights.hf import SINGLE, shard_file
from copd_megatron.weights.tensor_files import Form


@dataclass(frozen=True)
class Shard:
    """A file of the merged model."""

    file: str
    forms: Mapping[str, Form]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(form.nbytes for form in self.forms.values())


def shards_of(forms: Mapping[str, Form], max_bytes: int) -> list[Shard]:
    """Tensors sorted by name, in files of at most `max_bytes` (or one larger tensor), numbered as transformers does."""
    groups: list[dict[str, Form]] = []
    size = 0
    for name in sorted(forms):
        if not groups or (groups[-1] and size + forms[name].nbytes > max_bytes):
            groups.append({})
            size = 0
        groups[-1][name] = forms[name]
        size += forms[name].nbytes
    if len(groups) == 1:
        return [Shard(SINGLE, groups[0])]
    count = len(groups)
    return [Shard(shard_file(number, count), group) for number, group in enumerate(groups, 1)]


def share(shards: list[Shard], rank: int, world: int) -> list[Shard]:
    """The shards that process `rank` of `world` writes: the largest first, each to whoever has the fewest bytes."""
    loads = [0] * world
    owners: dict[str, int] = {}
    for shard in sorted(shards, key=lambda shard: (-shard.nbytes, shard.file)):
        owner = loads.index(min(loads))
        owners[shard.file] = owner
        loads[owner] += shard.nbytes
    return [shard for shard in shards if owners[shard.file] == rank]
