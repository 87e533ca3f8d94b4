"""Log-probabilities at listed ids and of the tail, by the kernels: what objectives on [T, K] need of the logits.

The forward pass reads the logits once, the backward pass reads them once and writes their gradient. Between the two
the logits themselves are kept, and a few numbers per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from copd_kernels.vocabulary import Vocabulary, split_of

MAX_LISTED = 256
"""Ids per token: a top-k and the sampled token."""


@dataclass(frozen=True)
class Partition:
    """A distribution over the vocabulary as N listed tokens and everything else; float32.

    `logprobs` [T, N] at the ids and `tail` [T], the log-probability of all others together, carry a gradient;
    `entropy` [T] in nats and `logsumexp` [T] do not.
    """

    logprobs: Tensor
    tail: Tensor
    entropy: Tensor
    logsumexp: Tensor


def partition(
    logits: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    vocabulary: Vocabulary | None = None,
    weights: Tensor | None = None,
    overwrite: bool = False,
) -> Partition:
    """`Partition` of `logits` [T, Vp] at `ids` [T, N] (1 ≤ N ≤ 256), as `reference.logprobs_at` and
    `reference.tail_logprob`.

    An id may come twice in a row of `ids`; one outside the vocabulary makes its row NaN. Rows whose `weights` [T] are 0
    are not read: they hold finite numbers of no meaning and get a gradient of 0. With `overwrite` the gradient takes
    the logits' place. Collective over the vocabulary's group: one all-gather of N + 3 numbers per token.
    """
    part = split_of(logits, vocabulary)
    return Partition(*_Partition.apply(logits, ids, temperature, part, weights, overwrite))


class _Partition(Function):
    """d log p_i / d x_v = [v = i] − p_v,  d tail / d x_v = [v not listed] p_v / p_tail − p_v, divided by
    temperature."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        temperature: float,
        part: Vocabulary | None,
        weights: Tensor | None,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        listed, order = ids.to(torch.int32).contiguous().sort(dim=-1)
        sums, x = _sums(logits, listed, temperature, part, weights)
        again = torch.zeros_like(listed, dtype=torch.bool)
        again[:, 1:] = listed[:, 1:] == listed[:, :-1]
        peak, log_z, tail, entropy = _whole(sums, x, again)
        logprobs = x - peak - log_z
        ctx.save_for_backward(logits, listed, order, logprobs, tail, peak, log_z)
        ctx.temperature, ctx.part, ctx.overwrite = temperature, part, overwrite
        logsumexp = (peak + log_z)[:, 0]
        ctx.mark_non_differentiable(entropy, logsumexp)
        return torch.empty_like(logprobs).scatter_(-1, order, logprobs), tail, entropy, logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_tail: Tensor, *_: Any) -> tuple[Tensor, None, None, None, None, None]:
        from copd_kernels.device import launch
        from copd_kernels.device.partition import partition_gradient_kernel

        logits, listed, order, logprobs, tail, peak, log_z = ctx.saved_tensors
        grad = grad.gather(-1, order)
        common = -(grad.sum(-1) + grad_tail)
        # A tail without mass has no column that could move it; of less than exp(−80), 1 / mass would overflow.
        slope = common + torch.where(tail > -torch.inf, grad_tail * (-tail.clamp(min=-80.0)).exp(), 0.0)
        first = torch.searchsorted(listed, listed)
        per_id = torch.zeros_like(grad).scatter_add_(-1, first, grad).gather(-1, first)
        scale = 1 / ctx.temperature
        at_ids = (logprobs.exp() * common[:, None] + per_id) * scale
        rows = torch.cat([peak, log_z, slope[:, None] * scale], dim=-1)
        source = with_unit_columns(logits)
        result = source if ctx.overwrite else torch.empty_like(logits, memory_format=torch.contiguous_format)
        launch.run(
            partition_gradient_kernel, "partition", len(logits),
            source, result, listed, at_ids.contiguous(), rows,
            logits.shape[1], source.stride(0), result.stride(0), 0 if ctx.part is None else ctx.part.start,
            listed.shape[1], scale,
            widths=(logits.shape[1], source.stride(0), result.stride(0)), KP=launch.SLOTS, BLOCK=launch.BLOCK,
        )  # fmt: skip
        return (logits.copy_(result) if ctx.overwrite else result), None, None, None, None, None


def with_unit_columns(logits: Tensor) -> Tensor:
    """`logits` itself if its columns are next to each other, whatever its rows are; else a copy."""
    return logits if logits.stride(1) == 1 or logits.shape[1] < 2 else logits.contiguous()


def _sums(
    logits: Tensor, listed: Tensor, temperature: float, part: Vocabulary | None, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of every rank: shift, Σ w, Σ w·(x − shift) of the tail, [ranks, T, 3]; and the listed logits [T, N]."""
    from copd_kernels.device import launch
    from copd_kernels.device.partition import partition_sums_kernel

    source = with_unit_columns(logits)
    sums = torch.zeros(len(logits), 3, device=logits.device)
    at_ids = torch.zeros(listed.shape, device=logits.device)
    ones = torch.ones(len(logits), device=logits.device)
    start, size = (0, logits.shape[1]) if part is None else (part.start, part.size)
    launch.run(
        partition_sums_kernel, "partition", len(logits),
        source, listed, ones if weights is None else weights, sums, at_ids,
        logits.shape[1], source.stride(0), start, size, listed.shape[1], 1 / temperature,
        widths=(logits.shape[1], source.stride(0)), KP=launch.SLOTS, BLOCK=launch.BLOCK,
    )  # fmt: skip
    if part is None:
        return sums[None], at_ids
    everyone = part.gather(torch.cat([sums, at_ids], dim=-1))
    return everyone[..., :3], everyone[..., 3:].sum(0)


def _whole(sums: Tensor, x: Tensor, again: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Peak [T, 1], log Z [T, 1], log-probability of the tail [T] and entropy [T], from the sums of every rank."""
    shift, z, spread = sums.unbind(-1)
    highest = torch.where(z > 0, shift, -torch.inf).amax(0)
    peak = torch.maximum(highest, x.amax(-1))
    peak = torch.where(peak.isfinite(), peak, 0.0)
    below = torch.where(z > 0, shift - peak, 0.0)
    spread = (below.exp() * (spread + z * below)).sum(0)
    z_tail = (below.exp() * z).sum(0)
    listed = (x - peak[:, None]).masked_fill(again, -torch.inf)
    w = listed.exp()
    z = z_tail + w.sum(-1)
    log_z = z.log()
    spread = spread + (w * listed.masked_fill(listed == -torch.inf, 0.0)).sum(-1)
    entropy = (log_z - spread / z).clamp(min=0.0)  # rounding can take it below
    return peak[:, None], log_z[:, None], z_tail.log() - log_z, entropy
