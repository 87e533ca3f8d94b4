"""Weights between a Hugging Face checkpoint and the Megatron model in memory, tensor by tensor.

A family's table says which Hugging Face tensors make which parameter; here its rows are read and divided among tensor
and expert parallel ranks, pipeline stages and their chunks, and collected again (collect.py). No rank ever holds a
second copy of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from copd_megatron.errors import WeightsError
from copd_megatron.policy import platform
from copd_megatron.weights.families import qwen2_5_vl, qwen3, qwen3_moe, qwen3_vl, qwen3_vl_moe

platform.prepare()

from copd_megatron.weights.collect import Entry, collected, first_expert, place_in_tensor  # noqa: E402

TABLES = {
    "qwen3_vl": qwen3_vl.table,
    "qwen3_vl_moe": qwen3_vl_moe.table,
    "qwen3": qwen3.table,
    "qwen3_moe": qwen3_moe.table,
    "qwen2_5_vl": qwen2_5_vl.table,
}
"""Families by the name in a model's `family`."""

LISTED = 5
"""Names an error message spells out."""


def entries(model: nn.Module) -> list[Entry]:
    """The table of the whole model that `model` is, or is a part of."""
    return entries_of(_bare(model).settings)


def entries_of(settings: Any) -> list[Entry]:
    """The table of the whole model with these settings, which name its `family`."""
    return [
        Entry.of(row, number)
        for section in TABLES[settings.family](settings)
        for number in range(section.first, section.first + section.count)
        for row in section.rows
    ]


def hf_names(model: nn.Module) -> list[str]:
    """The Hugging Face names of the whole model, in the order of `to_hf`."""
    return [name for entry in entries(model) if entry.row.exported for name in entry.hf]


def to_megatron(source: Mapping[str, Tensor], model: Sequence[nn.Module]) -> None:
    """Copy this rank's part of `source` into the parameters of `model`, casting to their type.

    `model` are this rank's chunks. `source` holds the whole model under Hugging Face names; only what this rank needs
    is looked up, one row at a time. WeightsError names tensors that are missing, unexpected or of the wrong shape;
    parameters may then be partly loaded. `lm_head.weight` is ignored where the embeddings are tied.
    """
    table = entries(model[0])
    check_names(source, table)
    parameters = _parameters(model)
    with torch.no_grad():
        for entry in table:
            if held := entry.held(parameters):
                shards = _shards(entry, [source[hf] for hf in entry.hf], [tuple(each.shape) for each in held.values()])
                for name, shard in zip(held, shards, strict=True):
                    parameters.pop(name).copy_(shard)
    if parameters:
        raise WeightsError(f"no row of the weight table gives {listed(parameters)}")


def to_hf(model: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full tensor) of every weight, in a fixed order, on each replica's leader.

    Every process of the gang must iterate to the end, since the experts of a replica may be spread over others; those
    that do not lead a replica contribute and yield nothing. One row at a time is in memory: in a layer with experts,
    the matrices of one kind of all of them. A tensor may be a view, of the live parameters too, and need not be
    contiguous: copy what must outlast the next update.
    """
    parameters = _parameters(model)
    exported = [entry for entry in entries(model[0]) if entry.row.exported]
    device = next(iter(parameters.values())).device
    for entry, full in collected(exported, parameters, device):
        yield from zip(entry.hf, entry.row.joint.split(full), strict=True)


def _bare(model: nn.Module) -> Any:
    """The model inside megatron-core's wrappers: it has its `settings` and a `decoder`."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def _parameters(model: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """Parameters of all chunks under names that count decoder layers over all pipeline stages."""
    prefix = "decoder.layers."
    found = {}
    for chunk in map(_bare, model):
        first = chunk.decoder.layers[0].layer_number - 1
        for name, parameter in chunk.named_parameters():
            if name.startswith(prefix):
                number, _, rest = name.removeprefix(prefix).partition(".")
                name = f"{prefix}{int(number) + first}.{rest}"
            found[name] = parameter
    return found


def check_names(names: Iterable[str], table: Sequence[Entry]) -> None:
    """WeightsError unless the Hugging Face tensors called `names` are those of `table`, none less and none more.

    `lm_head.weight` may be there without need where the embeddings are tied.
    """
    expected = {name for entry in table for name in entry.hf}
    found = set(names) - ({"lm_head.weight"} - expected)
    if missing := sorted(expected - found):
        raise WeightsError(f"the weights lack {listed(missing)}; they belong to another model or are incomplete")
    if unexpected := sorted(found - expected):
        raise WeightsError(f"the model has no place for {listed(unexpected)}; its config.json is another model's")


def listed(names: Sequence[str] | Mapping[str, object]) -> str:
    """A few of `names` for a message, and how many there are."""
    shown = ", ".join(list(names)[:LISTED])
    return f"{len(names)} tensors: {shown}{', …' if len(names) > LISTED else ''}" if len(names) > 1 else shown


def _shards(entry: Entry, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
    """What this rank keeps of the joined `parts`, one tensor per parameter; WeightsError if it is not of its shape."""
    row = entry.row
    rank, world = place_in_tensor(row)
    try:
        full = row.joint.join(parts)
        found: object = full.shape[:1] if row.experts else ()
    except RuntimeError:
        found = None
    if found != ((row.experts,) if row.experts else ()):
        raise _misfit(entry, parts, shapes[0], world)
    first = first_expert(len(shapes))
    for number, shape in enumerate(shapes):
        local = full[first + number] if row.experts else full
        if row.shard is not None and world > 1 and local.dim() > row.shard:
            blocks = local.chunk(row.blocks, row.shard)
            local = torch.cat([block.tensor_split(world, row.shard)[rank] for block in blocks], row.shard)
        if tuple(local.shape) != shape:
            raise _misfit(entry, parts, shape, world)
        yield local


def _misfit(entry: Entry, parts: Sequence[Tensor], shape: tuple[int, ...], world: int) -> WeightsError:
    alike = Counter(part.shape for part in parts)
    named = sorted(zip(entry.hf, parts, strict=True), key=lambda found: alike[found[1].shape])  # the odd ones first
    shapes = listed([f"{name} {list(part.shape)}" for name, part in named])
    whose = f"each of {entry.row.experts} experts'" if entry.row.experts else "whose"
    return WeightsError(
        f"{shapes}: does not fit the model, {whose} {entry.megatron[0]} is {list(shape)} "
        f"on each of {world} tensor parallel ranks; weights and config.json belong to different models"
    )
