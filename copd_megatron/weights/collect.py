"""Full tensors on each replica's leader, from the parts that the processes of a gang hold.

A parameter's parts are joined within its pipeline stage, by the process that is first there in tensor and context
parallelism, which hands it to the first stage. The experts of a stage are spread over blocks of etp × ep processes,
each of which holds all of them once; a block may reach over several replicas, or be a part of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from copd_megatron.weights.families.row import Row


@dataclass(frozen=True)
class Entry:
    """A row with its section's number filled in."""

    row: Row
    number: int
    megatron: tuple[str, ...]
    hf: tuple[str, ...]

    @staticmethod
    def of(row: Row, number: int) -> Entry:
        """The entry of `row` in the section's repetition `number`."""
        names = (row.megatron,) if isinstance(row.megatron, str) else row.megatron
        megatron, hf = (tuple(name.replace("*", str(number)) for name in group) for group in (names, row.hf))
        return Entry(row, number, megatron, hf)

    def held(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of a rank's `parameters` that belong to the entry: none, one, or one per expert in their order."""
        if not self.row.experts:
            return {name: parameters[name] for name in self.megatron if name in parameters}
        local = range(self.row.experts // parallel_state.get_expert_model_parallel_world_size())
        names = (name.replace("#", str(number)) for name in self.megatron for number in local)
        return {name: parameters[name] for name in names if name in parameters}


def place_in_tensor(row: Row) -> tuple[int, int]:
    """This process's rank among those that share a parameter of `row`, and their number."""
    if row.experts:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def first_expert(held: int) -> int:
    """The number of this process's first expert, where each process has `held`."""
    return held * int(parallel_state.get_expert_model_parallel_rank())


@dataclass(frozen=True)
class _Whole:
    """Which pipeline stage holds an entry, and its full Megatron tensor's shape and type."""

    stage: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def collected(
    table: Sequence[Entry], parameters: Mapping[str, Tensor], device: torch.device
) -> Iterator[tuple[Entry, Tensor]]:
    """Each entry of `table` with its full Megatron tensor, on the leaders of replicas; elsewhere nothing.

    Every process of the gang must iterate to the end.
    """
    stages = parallel_state.get_pipeline_model_parallel_group()
    stage = dist.get_rank(stages)
    joins = _joins()
    block = _Block.of(joins)
    for entry, whole in zip(table, _wholes(table, parameters, stages), strict=True):
        full = None
        if whole.stage == stage:
            held = [parameter.detach() for parameter in entry.held(parameters).values()]
            full = block.stacked(held, entry.row) if entry.row.experts else _joined(held[0], entry.row)
        if not joins:
            continue
        if whole.stage != 0 and full is not None:
            dist.send(full.contiguous(), group=stages, group_dst=0)
        elif whole.stage != 0 and stage == 0:
            full = torch.empty(whole.shape, dtype=whole.dtype, device=device)
            dist.recv(full, group=stages, group_src=whole.stage)
        if stage == 0 and full is not None:
            yield entry, full


def _joins() -> bool:
    """Whether this process speaks for its stage of its replica."""
    return parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_context_parallel_rank() == 0


def _joined(local: Tensor, row: Row) -> Tensor | None:
    """The full tensor on the process that joins its stage; None on others."""
    group = parallel_state.get_tensor_model_parallel_group()
    if parallel_state.get_context_parallel_rank() != 0:
        return None
    if row.shard is None or dist.get_world_size(group) == 1:
        return local if dist.get_rank(group) == 0 else None
    shards = _gathered(local.contiguous(), 0, group)
    return None if shards is None else _along(shards, row.blocks, row.shard)


@dataclass(frozen=True)
class _Block:
    """The processes that hold all experts of a stage once: where in expert and expert tensor parallelism each is, and
    which of them need the full tensors."""

    group: dist.ProcessGroup
    places: tuple[tuple[int, int], ...]
    needy: tuple[int, ...]

    @staticmethod
    def of(needs: bool) -> _Block:
        group = parallel_state.get_expert_tensor_and_model_parallel_group()
        mine = (
            int(parallel_state.get_expert_model_parallel_rank()),
            int(parallel_state.get_expert_tensor_parallel_rank()),
            needs,
        )
        everyone = [mine] * dist.get_world_size(group)
        if len(everyone) > 1:
            dist.all_gather_object(everyone, mine, group=group)
        places = tuple((expert, tensor) for expert, tensor, _ in everyone)
        return _Block(group, places, tuple(rank for rank, (_, _, needy) in enumerate(everyone) if needy))

    def stacked(self, held: Sequence[Tensor], row: Row) -> Tensor | None:
        """All experts' parameters as one full tensor [experts, …], on the processes that need it."""
        if not self.needy:
            return None
        local, full = torch.stack(list(held)), None
        for rank in self.needy:
            shards = _gathered(local, rank, self.group)
            if shards is not None:
                full = self._whole(shards, row)
        return full

    def _whole(self, shards: Sequence[Tensor], row: Row) -> Tensor:
        by_place = dict(zip(self.places, shards, strict=True))
        experts = []
        for expert in sorted({expert for expert, _ in by_place}):
            parts = [part for (owner, _), part in sorted(by_place.items()) if owner == expert]
            experts.append(parts[0] if row.shard is None else _along(parts, row.blocks, row.shard + 1))
        return experts[0] if len(experts) == 1 else torch.cat(experts)


def _gathered(local: Tensor, to: int, group: dist.ProcessGroup) -> list[Tensor] | None:
    """The `local` of every process of `group`, on its process `to`; None on the others."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if world == 1:
        return [local]
    shards = [torch.empty_like(local) for _ in range(world)] if rank == to else None
    dist.gather(local, shards, group=group, group_dst=to)
    return shards


def _along(shards: Sequence[Tensor], blocks: int, dimension: int) -> Tensor:
    """Shards, each of whose `blocks` parts was divided on its own, put together again."""
    if len(shards) == 1:
        return shards[0]
    by_block = zip(*(shard.chunk(blocks, dimension) for shard in shards), strict=True)
    return torch.cat([part for block in by_block for part in block], dimension)


def _wholes(table: Sequence[Entry], parameters: Mapping[str, Tensor], stages: dist.ProcessGroup) -> list[_Whole]:
    """For each entry who holds it and what it is."""
    stage = dist.get_rank(stages)
    mine: dict[int, _Whole] = {}
    for index, entry in enumerate(table):
        held = list(entry.held(parameters).values())
        if held:
            shape = list(held[0].shape)
            if entry.row.shard is not None:
                shape[entry.row.shard] *= place_in_tensor(entry.row)[1]
            stack = (entry.row.experts,) if entry.row.experts else ()
            mine[index] = _Whole(stage, (*stack, *shape), held[0].dtype)
    everyone = [mine] * dist.get_world_size(stages)
    if len(everyone) > 1:
        dist.all_gather_object(everyone, mine, group=stages)
    return [next(held[index] for held in everyone if index in held) for index in range(len(table))]
