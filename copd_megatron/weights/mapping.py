"""Weights between a Hugging Face checkpoint and the Megatron model in memory, tensor by tensor.

A family's table says which Hugging Face tensors make which parameter; here its rows are read, divided among tensor
parallel ranks and pipeline stages, and collected again. No rank ever holds a second copy of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from copd_megatron.errors import WeightsError
from copd_megatron.policy import platform
from copd_megatron.weights.families import qwen3_vl
from copd_megatron.weights.families.row import Row

platform.prepare()

from megatron.core import parallel_state  # noqa: E402

TABLES = {"qwen3_vl": qwen3_vl.table}
"""Families by the name in a model's `family`."""

LISTED = 5
"""Names an error message spells out."""


@dataclass(frozen=True)
class Entry:
    """A row with its section's number filled in."""

    row: Row
    megatron: tuple[str, ...]
    hf: tuple[str, ...]


def entries(model: nn.Module) -> list[Entry]:
    """The table of the whole model that `model` is, or is a pipeline stage of."""
    bare = _bare(model)
    found = []
    for section in TABLES[bare.family](bare.settings):
        for number in range(section.count):
            for row in section.rows:
                names = (row.megatron,) if isinstance(row.megatron, str) else row.megatron
                found.append(
                    Entry(
                        row,
                        tuple(name.replace("*", str(number)) for name in names),
                        tuple(name.replace("*", str(number)) for name in row.hf),
                    )
                )
    return found


def hf_names(model: nn.Module) -> list[str]:
    """The Hugging Face names of the whole model, in the order of `to_hf`."""
    return [name for entry in entries(model) if entry.row.exported for name in entry.hf]


def to_megatron(source: Mapping[str, Tensor], model: Sequence[nn.Module]) -> None:
    """Copy this rank's part of `source` into the parameters of `model`, casting to their type.

    `source` holds the whole model under Hugging Face names; only what this rank needs is looked up, one row at a time.
    WeightsError names tensors that are missing, unexpected or of the wrong shape; parameters may then be partly
    loaded. `lm_head.weight` is ignored where the embeddings are tied.
    """
    (chunk,) = model
    table = entries(chunk)
    _check_names(source, table)
    parameters = dict(_named_parameters(chunk))
    rank, world = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        for entry in table:
            for name in entry.megatron:
                parameter = parameters.pop(name, None)
                if parameter is not None:
                    parts = [source[hf] for hf in entry.hf]
                    parameter.copy_(_local_part(entry, parts, parameter, rank, world))
    if parameters:
        raise WeightsError(f"no row of the weight table gives {_listed(parameters)}")


def to_hf(model: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full tensor) of every weight, in a fixed order, on the replica's leader.

    Every rank of the replica must iterate to the end; ranks other than the leader (first in tensor and pipeline)
    contribute and yield nothing. A tensor may be a view of the live parameters: copy what must outlast the next update.
    """
    (chunk,) = model
    parameters = dict(_named_parameters(chunk))
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    stage_group = parallel_state.get_pipeline_model_parallel_group()
    stage, first_in_tensor = dist.get_rank(stage_group), dist.get_rank(tensor_group) == 0
    exported = [entry for entry in entries(chunk) if entry.row.exported]
    owners = _owners(exported, parameters, stage_group)
    for entry, (owner, shape, dtype) in zip(exported, owners, strict=True):
        full = torch.empty(0)
        if owner == stage:
            parameter = next(parameters[name] for name in entry.megatron if name in parameters)
            full = _gathered(parameter.detach(), entry.row, tensor_group)
        if not first_in_tensor:
            continue
        if owner == stage and stage != 0:
            dist.send(full.contiguous(), group=stage_group, group_dst=0)
        elif owner != stage and stage == 0:
            full = torch.empty(shape, dtype=dtype, device=next(chunk.parameters()).device)
            dist.recv(full, group=stage_group, group_src=owner)
        if stage == 0:
            yield from zip(entry.hf, entry.row.joint.split(full), strict=True)


def _bare(model: nn.Module) -> Any:
    """The model inside megatron-core's wrappers: it has a `family`, its `settings` and a `decoder`."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters under names that count decoder layers over all pipeline stages."""
    bare = _bare(model)
    first = bare.decoder.layers[0].layer_number - 1
    prefix = "decoder.layers."
    for name, parameter in bare.named_parameters():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            name = f"{prefix}{int(number) + first}.{rest}"
        yield name, parameter


def _check_names(source: Mapping[str, Tensor], table: Sequence[Entry]) -> None:
    expected = {name for entry in table for name in entry.hf}
    found = set(source) - ({"lm_head.weight"} - expected)
    if missing := sorted(expected - found):
        raise WeightsError(f"the weights lack {_listed(missing)}; they belong to another model or are incomplete")
    if unexpected := sorted(found - expected):
        raise WeightsError(f"the model has no place for {_listed(unexpected)}; its config.json is another model's")


def _listed(names: Sequence[str] | Mapping[str, object]) -> str:
    shown = ", ".join(list(names)[:LISTED])
    return f"{len(names)} tensors: {shown}{', …' if len(names) > LISTED else ''}" if len(names) > 1 else shown


def _local_part(entry: Entry, parts: Sequence[Tensor], parameter: Tensor, rank: int, world: int) -> Tensor:
    """What this tensor parallel rank keeps of the joined `parts`; WeightsError if its shape is not the parameter's."""
    row = entry.row
    try:
        local = row.joint.join(parts)
        if row.shard is not None and world > 1:
            blocks = local.chunk(row.blocks, row.shard)
            local = torch.cat([block.tensor_split(world, row.shard)[rank] for block in blocks], row.shard)
        found: object = tuple(local.shape)
    except RuntimeError:
        found = None
    if found != tuple(parameter.shape):
        shapes = ", ".join(f"{name} {list(part.shape)}" for name, part in zip(entry.hf, parts, strict=True))
        raise WeightsError(
            f"{shapes}: does not fit the model, whose {entry.megatron[0]} is {list(parameter.shape)} "
            f"on each of {world} tensor parallel ranks; weights and config.json belong to different models"
        )
    return local


def _gathered(local: Tensor, row: Row, group: dist.ProcessGroup) -> Tensor:
    """The full tensor on the first rank of `group`; the others get their own part back."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if row.shard is None or world == 1:
        return local
    local = local.contiguous()
    shards = [torch.empty_like(local) for _ in range(world)] if rank == 0 else None
    dist.gather(local, shards, group=group, group_dst=0)
    if shards is None:
        return local
    by_block = zip(*(shard.chunk(row.blocks, row.shard) for shard in shards), strict=True)
    return torch.cat([part for block in by_block for part in block], row.shard)


def _owners(
    table: Sequence[Entry], parameters: Mapping[str, Tensor], stages: dist.ProcessGroup
) -> list[tuple[int, tuple[int, ...], torch.dtype]]:
    """For each entry the pipeline stage that holds it, and the full Megatron tensor's shape and type."""
    world = parallel_state.get_tensor_model_parallel_world_size()
    mine: dict[int, tuple[tuple[int, ...], torch.dtype]] = {}
    for index, entry in enumerate(table):
        for name in entry.megatron:
            if name in parameters:
                shape = list(parameters[name].shape)
                if entry.row.shard is not None:
                    shape[entry.row.shard] *= world
                mine[index] = tuple(shape), parameters[name].dtype
    everyone: list[dict[int, tuple[tuple[int, ...], torch.dtype]]] = [mine] * dist.get_world_size(stages)
    if len(everyone) > 1:
        everyone = [{} for _ in everyone]
        dist.all_gather_object(everyone, mine, group=stages)
    return [
        next((stage, *held[index]) for stage, held in enumerate(everyone) if index in held)
        for index in range(len(table))
    ]
