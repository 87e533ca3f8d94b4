"""Log-probabilities at listed ids and of all other tokens together, in blocks of rows, with their gradient: what
`copd_kernels.logprobs` computes on a GPU, for every other device and format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from copd_kernels import reference
from copd_kernels.vocabulary import Vocabulary

BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Logits that are widened at a time, by device: on a CPU what fits its cache, on a GPU what keeps it busy."""

SMALLEST_TAIL = 1e-30
"""Mass below which a tail's gradient is no longer divided by it, so that it stays finite."""


class PartitionAt(Function):
    """With x the logits at the temperature, M the row's largest, w_v = exp(x_v − M), Z = Σ w_v, and Z' the part of it
    that is not listed:

        log π(i) = (x_i − M) − log Z     d log π(i) / d x_v = [v = i] − w_v / Z
        tail = log Z' − log Z            d tail / d x_v = [v not listed] w_v / Z' − w_v / Z

    With M, Z, Z' and its own columns a rank knows its whole gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        temperature: float,
        part: Vocabulary | None,
        with_tail: bool,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        index, owned = (ids, None) if part is None else part.columns_of(ids, logits.shape[1])
        sums, at_ids = _local_sums(logits, index, owned, temperature, with_tail, with_entropy)
        if part is not None and owned is not None:
            sums, at_ids = _whole_sums(sums, torch.where(owned, at_ids, 0.0), part)
        log_z = sums.z.log()
        logprobs, tail = at_ids - sums.peak - log_z, (sums.z_tail.log() - log_z)[:, 0]
        entropy, logsumexp = sums.entropy[:, 0], (sums.peak + log_z)[:, 0]
        ctx.mark_non_differentiable(entropy, logsumexp)
        ctx.set_materialize_grads(False)  # a tail that no loss uses costs nothing
        ctx.save_for_backward(logits, ids, sums.peak, sums.z, sums.z_tail)
        ctx.temperature, ctx.part = temperature, part
        return logprobs, tail, entropy, logsumexp

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_tail: Tensor | None, *_: Any
    ) -> tuple[Tensor, None, None, None, None, None]:
        logits, ids, peak, z, z_tail = ctx.saved_tensors
        grad = z.new_zeros(ids.shape) if grad is None else grad
        common, rest = -grad.sum(-1, keepdim=True), None
        if grad_tail is not None:
            common -= grad_tail[:, None]
            rest = grad_tail[:, None] / z_tail.clamp(min=SMALLEST_TAIL)
        slope = common / z
        (index, owned), at_ids = (ids, None), _once_per_id(grad, ids)
        if ctx.part is not None:
            index, owned = ctx.part.columns_of(ids, logits.shape[1])
            at_ids = torch.where(owned, at_ids, 0.0)
        result = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for block in blocks(len(logits), logits):
            scaled = _scaled(logits[block], ctx.temperature)
            values = result[block] if result.dtype == scaled.dtype else torch.empty_like(scaled)
            torch.sub(scaled, peak[block], out=values).exp_()
            tail = None if rest is None else _unlisted(values, index[block], _of(owned, block)).mul_(rest[block])
            values.mul_(slope[block])
            if tail is not None:
                values.add_(tail)
            values.scatter_add_(-1, index[block], at_ids[block])
            if ctx.temperature != 1:
                values.div_(ctx.temperature)
            if result.dtype != values.dtype:
                result[block] = values
        return result, None, None, None, None, None


@dataclass(frozen=True)
class _Sums:
    """Of some columns, all [R, 1]: largest logit M, Z = Σ exp(x − M), the same of those not listed, and the entropy if
    these columns were everything. Without columns they are −∞, 0, 0 and 0."""

    peak: Tensor
    z: Tensor
    z_tail: Tensor
    entropy: Tensor


def _local_sums(
    logits: Tensor, index: Tensor, owned: Tensor | None, temperature: float, with_tail: bool, with_entropy: bool
) -> tuple[_Sums, Tensor]:
    """Of these columns alone, and the logits [R, N] at `index`, of which those count that are `owned` (None: all)."""
    one = reference.widen(logits.new_empty(0))
    sums = _Sums(one.new_full((len(logits), 1), -torch.inf), *(one.new_zeros(3, len(logits), 1)))
    at_ids = one.new_zeros(index.shape)
    for block in blocks(len(logits), logits):
        scaled = _scaled(logits[block], temperature)
        sums.peak[block] = scaled.amax(-1, keepdim=True)
        at_ids[block] = scaled.gather(-1, index[block])
        weights = (scaled - sums.peak[block]).exp_()
        sums.z[block] = weights.sum(-1, keepdim=True)
        if with_tail:
            unlisted = _unlisted(weights, index[block], _of(owned, block))
            sums.z_tail[block] = unlisted.sum(-1, keepdim=True)
        if with_entropy:
            weights.div_(sums.z[block])
            sums.entropy[block] = torch.special.entr(weights, out=weights).sum(-1, keepdim=True)
    return sums, at_ids


def _whole_sums(sums: _Sums, at_ids: Tensor, part: Vocabulary) -> tuple[_Sums, Tensor]:
    """`_local_sums` of all columns from those of every rank; `at_ids` is 0 where another rank has the column.

    Entropy by the chain rule: with Z_r the ranks' shares of Z = Σ_r Z_r and H_r their entropies,

        H = Σ_r Z_r/Z (H_r − log Z_r/Z) = 1/Z Σ_r (Z_r H_r − Z_r log Z_r) + log Z
    """
    peak = part.largest(sums.peak)
    scale = (sums.peak - peak).exp()
    z = sums.z * scale
    spread = z * sums.entropy + torch.special.entr(z)
    everyone = part.add(torch.cat([z, sums.z_tail * scale, spread, at_ids], dim=-1))
    z, z_tail, spread, at_ids = everyone.split([1, 1, 1, at_ids.shape[1]], dim=-1)
    entropy = (spread / z + z.log()).clamp(min=0.0)  # rounding can take it below
    return _Sums(peak, z, z_tail, entropy), at_ids


def _unlisted(weights: Tensor, index: Tensor, owned: Tensor | None) -> Tensor:
    """A copy of `weights` [R, Vp] with 0 at the columns `index` [R, N] that are `owned` (None: all)."""
    if owned is None:
        return weights.scatter(-1, index, 0.0)
    return weights.scatter_reduce(-1, index, (~owned).to(weights.dtype), "prod")


def _of(owned: Tensor | None, block: slice) -> Tensor | None:
    return None if owned is None else owned[block]


def _once_per_id(grad: Tensor, ids: Tensor) -> Tensor:
    """`grad` [R, N] with the first id's entry moved to where the same id comes again, if it does.

    Often the sampled token is one of the teacher's top-k. Where no id comes twice, nothing depends on the order in
    which `scatter_add_` adds, and results are the same on every run.
    """
    again = ids[:, 1:] == ids[:, :1]
    again &= again.cumsum(-1) == 1
    first = grad[:, :1]
    others = grad[:, 1:] + torch.where(again, first, 0.0)
    return torch.cat([first.masked_fill(again.any(-1, keepdim=True), 0.0), others], dim=-1)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    scaled = reference.widen(logits)
    return scaled if temperature == 1 else scaled / temperature


def blocks(rows: int, logits: Tensor) -> Iterator[slice]:
    """The first `rows` rows, in blocks; none if there are no columns."""
    width = logits.shape[1]
    step = max(1, BLOCK_ELEMENTS.get(logits.device.type, 1 << 24) // max(1, width))
    return (slice(first, first + step) for first in range(0, rows if width else 0, step))
