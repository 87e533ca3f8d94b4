"""Where megatron-core keeps the parameters of a weight table in a distributed checkpoint ("torch_dist").

A checkpoint does not depend on the layout that saved it. Its entries are named like the parameters, but
- a transformer block whose layers all have the same parameters is stacked: one entry per kind, its first axis counts
  the layers; otherwise each layer has entries of its own, with its number in their names;
- the experts of a layer are stacked too, along the axis behind that of the layers;
- norms have the names that Transformer Engine's layers give them;
- each layer that tensor parallelism divides has an object called `_extra_state` beside its weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from copd_megatron.weights.collect import Entry
from copd_megatron.weights.families.row import Row

BLOCK = "layers.*."
"""How the parameters of a transformer block are written in a table."""


@dataclass(frozen=True)
class Place:
    """The tensor of `entry` in a checkpoint: the element `index` (all of it if empty) of the stack called `key`, whose
    first axes are `stack` long."""

    entry: Entry
    key: str
    index: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()

    def chunks(self, full: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(offsets, sizes) of the parts in which megatron-core keeps a full tensor of the shape `full`: expert by
        expert, gate and up projection on their own. Any layout can load its part of them."""
        row = self.entry.row
        cuts = [1] * len(full)
        if row.experts:
            cuts[0] = row.experts
        if row.shard is not None:
            cuts[row.shard + (1 if row.experts else 0)] = row.blocks
        sizes = tuple(size // cut for size, cut in zip(full, cuts, strict=True))
        for numbers in product(*map(range, cuts)):
            yield tuple(number * size for number, size in zip(numbers, sizes, strict=True)), sizes

    def objects(self) -> Iterator[str]:
        """Names of the objects that stand beside this tensor."""
        row = self.entry.row
        if row.shard is None or not self.key.endswith(".weight") or "embedding" in self.key:
            return
        name = f"{self.key.removesuffix('weight')}_extra_state/shard_"
        stack = (*self.stack, *((row.experts,) if row.experts else ())) or (1,)
        for expert in range(max(1, row.experts)):
            index = (*self.index, *((expert,) if row.experts else ())) or (0,)
            yield f"{name}{'.'.join(map(str, index))}_{'.'.join(map(str, stack))}"


def places(table: Sequence[Entry]) -> list[Place]:
    """Where each entry of `table` is, in the order of the table."""
    kinds: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for entry in table:
        block, found, rest = _pattern(entry.row).partition(BLOCK)
        if found:
            kinds[block][entry.number].add(rest)
    alike = {block: len(layers) for block, layers in kinds.items() if len(set(map(frozenset, layers.values()))) == 1}
    return [_stacked(entry, alike) or numbered(entry) for entry in table]


def numbered(entry: Entry) -> Place:
    """Where `entry` is if the layers of its block are not stacked."""
    return Place(entry, _pattern(entry.row).replace("*", str(entry.number)))


def _stacked(entry: Entry, blocks: dict[str, int]) -> Place | None:
    block, found, rest = _pattern(entry.row).partition(BLOCK)
    if not found or block not in blocks:
        return None
    return Place(entry, f"{block}layers.{rest}", (entry.number,), (blocks[block],))


def _pattern(row: Row) -> str:
    """The entry's name, with `*` for the number of the section."""
    names = (row.megatron,) if isinstance(row.megatron, str) else row.megatron
    return names[0].replace("local_experts.#", "experts") if row.experts else names[-1]
