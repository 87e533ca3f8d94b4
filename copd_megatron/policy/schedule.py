"""One pass over micro-batches with megatron-core's pipeline schedule: plain, or 1F1B where there are stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from copd_megatron.policy import platform
from copd_megatron.policy.packed import MicroBatch, Signals

platform.prepare()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

Stats = Mapping[str, torch.Tensor]
"""Name to [2]: sum and count, so that micro-batches and ranks can be added."""
Loss = Callable[[torch.Tensor, torch.Tensor, Signals], tuple[torch.Tensor, Stats]]
"""(logits [R, V], targets int64 [R], signals) to (scalar, stats). Scalars of micro-batches and ranks are added, never
averaged: `signals.weight` carries the mean."""
Measure = Callable[[torch.Tensor, torch.Tensor, Signals], Stats]
"""A loss without the loss."""

Value = TypeVar("Value")
Dataclass = TypeVar("Dataclass", MicroBatch, Signals)


def sum_gradients(config: TransformerConfig) -> None:
    """Make schedule and data parallelism add gradients up, exactly, in place of averaging them.

    megatron-core divides a loss by the number of micro-batches and gradients by the number of replicas, unless losses
    are sums over tokens, whose gradients it adds and then divides by the number of tokens. The second way without that
    division is the plain sum, whatever the layout.
    """
    config.calculate_per_token_loss = True
    config.finalize_model_grads_func = lambda model, num_tokens=None, **options: finalize_model_grads(model, **options)


def train_pass(
    model: DistributedDataParallel, batches: Sequence[MicroBatch], loss: Loss
) -> tuple[float, dict[str, Any]]:
    """Forward and backward over `batches`; gradients of all ranks are added into the model's buffers.

    Returns the sum of all losses and, per statistic, its sum and count, over all micro-batches and replicas; the same
    on every rank. Collective; a replica without micro-batches contributes zeros.
    """

    def score(batch: MicroBatch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        value, stats = loss(logits, batch.targets, batch.signals)
        named = {name: pair.detach().double() for name, pair in stats.items()}
        named["loss"] = torch.stack([value.detach().double(), value.new_ones((), dtype=torch.float64)])
        return value, torch.zeros((), dtype=torch.int, device=value.device), named

    totals = _over_replicas(_run(model, batches, score, forward_only=False))
    total_loss, _ = totals.pop("loss", (0.0, 0.0))
    return total_loss, totals


def measure_pass(model: DistributedDataParallel, batches: Sequence[MicroBatch], measure: Measure) -> dict[str, Any]:
    """Forward only; sum and count per statistic over all micro-batches and replicas, the same on every rank."""

    def score(batch: MicroBatch, logits: torch.Tensor, non_loss_data: bool = True) -> dict[str, torch.Tensor]:
        return {name: pair.double() for name, pair in measure(logits, batch.targets, batch.signals).items()}

    with torch.no_grad():
        return _over_replicas(_run(model, batches, score, forward_only=True))


def logprob_pass(
    model: DistributedDataParallel, batches: Sequence[MicroBatch], temperature: float
) -> list[torch.Tensor]:
    """Forward only; log-probabilities float32 [R] of each micro-batch's targets, on every stage of the replica."""

    def score(batch: MicroBatch, logits: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
        scaled = logits.float() / temperature
        return (scaled.gather(1, batch.targets[:, None])[:, 0] - scaled.logsumexp(1)).cpu()

    with torch.no_grad():
        return from_last_stage(_run(model, batches, score, forward_only=True))


def from_last_stage(value: Value) -> Value:
    """The last pipeline stage's `value` on every stage."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(
        box,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return box[0]


def over_replicas(value: Value) -> list[Value]:
    """The `value`s of all data-parallel ranks, in their order."""
    size = parallel_state.get_data_parallel_world_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=parallel_state.get_data_parallel_group())
    return values


def _run(
    model: DistributedDataParallel, batches: Sequence[MicroBatch], score: Callable[..., Any], forward_only: bool
) -> list[Any]:
    """What `score` returned for each micro-batch; nothing on stages that have no logits."""
    if not batches:
        if not forward_only:  # the other replicas wait for this one's gradients
            model.config.finalize_model_grads_func([model])
        return []

    def forward(iterator: Iterator[MicroBatch], module: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = _on_device(next(iterator))
        return module(batch), partial(score, batch)

    results: list[Any] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=1,  # shapes between stages differ per micro-batch and are sent along (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return results


def _over_replicas(results: Sequence[Stats]) -> dict[str, Any]:
    """Sums and counts of `results`, added over micro-batches and replicas, on every stage."""
    local: dict[str, list[float]] = {}
    if results:
        names = list(results[0])
        sums = torch.stack([torch.stack([result[name] for name in names]) for result in results]).sum(0)
        local = dict(zip(names, sums.tolist(), strict=True))
    totals: dict[str, Any] = {}
    for part in over_replicas(from_last_stage(local)):
        for name, (value, count) in part.items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + value, before[1] + count)
    return totals


def _on_device(value: Dataclass) -> Dataclass:
    """`value` with its tensors on this process's device; segments stay on the CPU, where they are planned with."""
    device = platform.device()
    if device.type == "cpu":
        return value
    moved: dict[str, Any] = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, torch.Tensor):
            moved[field.name] = item.to(device, non_blocking=True)
        elif isinstance(item, Signals):
            moved[field.name] = _on_device(item)
    return replace(value, **moved)
