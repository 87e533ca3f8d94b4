"""One pass over micro-batches with megatron-core's pipeline schedule: plain, 1F1B, or interleaved 1F1B."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from copd_megatron.objectives.vocabulary import Vocabulary, token_logprobs
from copd_megatron.policy import platform
from copd_megatron.policy.context import Stripe, share
from copd_megatron.policy.fp8 import token_multiple
from copd_megatron.policy.packed import MicroBatch, Signals, idle

platform.prepare()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import finalize_model_grads  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

Stats = Mapping[str, torch.Tensor]
"""Name to [2]: sum and count, so that micro-batches and ranks can be added."""
Loss = Callable[[torch.Tensor, torch.Tensor, Signals, Vocabulary | None], tuple[torch.Tensor, Stats]]
"""(logits [R, V], targets int64 [R], signals, vocabulary) to (scalar, stats). Scalars of micro-batches and ranks are
added, never averaged: `signals.weight` carries the mean. V is the part of the vocabulary that `vocabulary` names, None
for all of it; ranks that share a vocabulary compute the same."""
Measure = Callable[[torch.Tensor, torch.Tensor, Signals, Vocabulary | None], Stats]
"""A loss without the loss."""
Chunks = Sequence[torch.nn.Module]
"""A rank's part of a model, as it is or in megatron-core's wrapper: one chunk per virtual pipeline stage."""

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


def train_pass(model: Chunks, batches: Sequence[MicroBatch], loss: Loss) -> tuple[float, dict[str, Any]]:
    """Forward and backward over `batches`; gradients of all ranks are added into the model's buffers.

    Returns the sum of all losses and, per statistic, its sum and count, over all micro-batches and replicas; the same
    on every rank. Collective; a replica without micro-batches contributes zeros.
    """
    vocabulary = bare(model[-1]).vocabulary

    def score(batch: MicroBatch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        value, stats = loss(logits, batch.targets, batch.signals, vocabulary)
        named = {name: pair.detach().double() for name, pair in stats.items()}
        named["loss"] = torch.stack([value.detach().double(), value.new_ones((), dtype=torch.float64)])
        return value, torch.zeros((), dtype=torch.int, device=value.device), named

    totals = _totals(_run(model, batches, score, forward_only=False))
    total_loss, _ = totals.pop("loss", (0.0, 0.0))
    return total_loss, totals


def measure_pass(model: Chunks, batches: Sequence[MicroBatch], measure: Measure) -> dict[str, Any]:
    """Forward only; sum and count per statistic over all micro-batches and replicas, the same on every rank."""
    vocabulary = bare(model[-1]).vocabulary

    def score(batch: MicroBatch, logits: torch.Tensor, non_loss_data: bool = True) -> dict[str, torch.Tensor]:
        stats = measure(logits, batch.targets, batch.signals, vocabulary)
        return {name: pair.double() for name, pair in stats.items()}

    with torch.no_grad():
        return _totals(_run(model, batches, score, forward_only=True))


def logprob_pass(model: Chunks, batches: Sequence[MicroBatch], temperature: float) -> list[torch.Tensor]:
    """Forward only; log-probabilities float32 [R] of each micro-batch's targets, on every rank of the replica."""
    vocabulary = bare(model[-1]).vocabulary

    def logprobs(batch: MicroBatch, logits: torch.Tensor) -> torch.Tensor:
        return token_logprobs(logits, batch.targets, temperature, vocabulary).cpu()

    return from_last_stage(_whole(forward_pass(model, batches, logprobs), batches))


def forward_pass(
    model: Chunks, batches: Sequence[MicroBatch], use: Callable[[MicroBatch, torch.Tensor], Value]
) -> list[Value]:
    """What `use` makes of this rank's share of each micro-batch and the model's output; nothing on earlier stages.

    Forward only, without gradients. Collective over the replica; with expert parallelism, over the gang.
    """

    def score(batch: MicroBatch, output: torch.Tensor, non_loss_data: bool = True) -> Value:
        return use(batch, output)

    with torch.no_grad():
        return _run(model, batches, score, forward_only=True)[: len(batches)]


def _whole(own: Sequence[torch.Tensor], batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
    """Values [R] of all response tokens from those of each context parallel rank's share."""
    stripe = _stripe()
    if stripe.count == 1 or not own:
        return list(own)
    parts: list[Any] = [None] * stripe.count
    dist.all_gather_object(parts, own, group=parallel_state.get_context_parallel_group())
    whole = []
    for number, batch in enumerate(batches):
        values = torch.empty(len(batch.targets))
        for rank, part in enumerate(parts):
            values[Stripe(rank, stripe.count).holds(batch.logit_index)] = part[number]
        whole.append(values)
    return whole


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
    return _over_group(value, parallel_state.get_data_parallel_group())


def _over_group(value: Value, group: dist.ProcessGroup) -> list[Value]:
    if group.size() == 1:
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def _stripe() -> Stripe:
    return Stripe(parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size())


def computed_positions(model: Chunks, batches: Sequence[MicroBatch]) -> int:
    """Positions that a replica computes in `train_pass` on `batches`, with those that hold no token. Collective."""
    unit = _stripe().count * _multiple(model)
    return sum(-(-batch.segments.tokens // unit) * unit for batch in _with_idle(model, batches, forward_only=False))


def _own_share(model: Chunks, batches: Sequence[MicroBatch], forward_only: bool) -> list[MicroBatch]:
    """What this rank computes of `batches`, and idle ones where the schedule needs more of them."""
    needed, multiple = _with_idle(model, batches, forward_only), _multiple(model)
    own = [share(batch, _stripe(), multiple).taught() for batch in needed]
    if len(model) == 1:
        return own
    # Interleaved stages exchange too much at once to send shapes along: all messages get the size of the largest.
    frame = max((bare(model[0]).rows_between_stages(batch) for batch in own), default=0)
    return [replace(batch, frame=frame) for batch in own]


def _with_idle(model: Chunks, batches: Sequence[MicroBatch], forward_only: bool) -> list[MicroBatch]:
    # A replica without samples still takes part in the reduction of gradients.
    count = max(len(batches), 0 if forward_only else 1)
    if bare(model[0]).config.expert_model_parallel_size > 1:  # experts are exchanged in step over all replicas
        count = max(over_replicas(count))
    if len(model) > 1:  # interleaved stages pass micro-batches on in groups
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        count = -(-count // stages) * stages
    return [*batches, *(idle() for _ in range(count - len(batches)))]


def bare(chunk: torch.nn.Module) -> Any:
    """The `Qwen3VLModel` inside megatron-core's wrapper."""
    return getattr(chunk, "module", chunk)


def _multiple(model: Chunks) -> int:
    """What the tokens of each context parallel rank must be a multiple of."""
    config = bare(model[0]).config
    shared = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return shared * token_multiple(config.fp8_recipe if config.fp8 else "none")


def _run(model: Chunks, batches: Sequence[MicroBatch], score: Callable[..., Any], forward_only: bool) -> list[Any]:
    """What `score` returned for each micro-batch, idle ones at the end; nothing on stages that have no logits."""
    own = _own_share(model, batches, forward_only)
    if not own:
        return []

    def forward(iterator: Iterator[MicroBatch], module: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = _on_device(next(iterator))
        return module(batch), partial(score, batch)

    iterators = [iter(own) for _ in model]
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=list(model) if len(model) > 1 else model[0],
        num_microbatches=len(own),
        seq_length=_schedule_length(model, own[0].frame),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return results


def _schedule_length(model: Chunks, frame: int) -> int:
    """The length from which the schedule computes the rows between stages; unused where shapes are sent along."""
    config = bare(model[0]).config
    return max(
        1, frame * config.context_parallel_size * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    )


def _totals(results: Sequence[Stats]) -> dict[str, Any]:
    """Sums and counts of `results`, added over micro-batches, context parallel ranks and replicas, on every rank."""
    local: dict[str, list[float]] = {}
    if results:
        names = list(results[0])
        sums = torch.stack([torch.stack([result[name] for name in names]) for result in results]).sum(0)
        local = dict(zip(names, sums.tolist(), strict=True))
    totals: dict[str, Any] = {}
    for part in _over_group(from_last_stage(local), parallel_state.get_data_parallel_group(with_context_parallel=True)):
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
