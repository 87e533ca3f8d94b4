"""From logits to numbers per token, whether this process has the logits of the whole vocabulary or of a part of it.

Under tensor parallelism every rank holds some columns of the logits. What the objectives need is [R] or [R, N]
(R response tokens, N ids of interest, V vocabulary, Vp this rank's columns), and only tensors of that size travel: no
rank ever sees another's columns. Everything downstream is computed alike on all ranks, so what goes back into the
logits is the gradient with respect to the rank's own columns, without communication.

Arithmetic is float32 whatever the logits are (float64 stays float64). Of [R, Vp] there are the logits themselves and,
in the backward pass, their gradient, never a float32 copy: on a GPU `copd_kernels` read them tile by tile, elsewhere
torch proceeds in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from copd_kernels import reference
from copd_kernels.choice import on_triton
from copd_kernels.logprobs import MAX_LISTED, partition
from copd_kernels.vocabulary import Vocabulary, split_of

BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Logits that are widened at a time, by device: on a CPU what fits its cache, on a GPU what keeps it busy."""


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float, vocabulary: Vocabulary | None = None) -> Tensor:
    """Log-probabilities [R] of `targets` int64 [R] under `logits` [R, Vp] at `temperature`; see `logprobs_at`."""
    return logprobs_at(logits, targets[:, None], temperature, vocabulary, entropy=False)[0][:, 0]


def logprobs_at(
    logits: Tensor, ids: Tensor, temperature: float, vocabulary: Vocabulary | None = None, *, entropy: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.logprobs_at` of `logits` [R, Vp], whose columns are those of `vocabulary` (None: all there are).

    Returns the log-probabilities [R, N] at `ids` int64 [R, N], with gradient, and without one the entropy [R] in nats
    (unless asked for, it may be 0) and log Σ exp [R]; the same on every rank. For the backward pass it keeps the logits
    as they came (no copy), the ids, and two numbers per row; exponentials are computed again.

    Collective over the group. Raises ValueError unless `temperature` > 0 and the logits are what `vocabulary` says.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: log-probabilities of greedy sampling do not exist; use > 0")
    if on_triton(logits) and 1 <= ids.shape[1] <= MAX_LISTED:
        found = partition(logits, ids, temperature, vocabulary)
        return found.logprobs, found.entropy, found.logsumexp
    part = split_of(logits, vocabulary)
    return _LogprobsAt.apply(logits, ids, temperature, part, entropy)  # type: ignore[no-any-return]


@torch.no_grad()
def ranks_of(logits: Tensor, ids: Tensor, vocabulary: Vocabulary | None = None, rows: Tensor | None = None) -> Tensor:
    """`reference.ranks_of`: how many tokens rank before each of `ids` int64 [R, N]; int64 [R, N], equal on all ranks.

    With `rows` int64 [R], `logits` has more than R rows and these are the ones meant. Collective.
    """
    part, width = split_of(logits, vocabulary), logits.shape[1]
    start = 0 if part is None else part.start
    index, owned = (ids, None) if part is None else part.columns_of(ids, width)
    columns = torch.arange(start, start + width, device=logits.device)
    before, values = torch.zeros_like(ids), logits.new_zeros(ids.shape)
    if width:
        row = torch.arange(len(ids), device=ids.device) if rows is None else rows
        values = logits[row[:, None], index.masked_fill(index < 0, width)]  # a negative index would count from the end
    if part is not None:
        values = part.add(reference.widen(values), owned).to(logits.dtype)  # exact: all ranks but one add 0
    for block in _blocks(len(ids), logits):
        these = logits[block] if rows is None else logits[rows[block]]
        for n in range(ids.shape[1]):
            value = values[block, n : n + 1]
            first = (these > value) | ((these == value) & (columns < ids[block, n : n + 1]))
            before[block, n] = first.sum(-1)
    return before if part is None else part.add(before)


@torch.no_grad()
def greedy(logits: Tensor, vocabulary: Vocabulary | None = None) -> Tensor:
    """The id int64 [R] of each row's largest logit, the lowest among equals; the same on every rank. Collective."""
    part = split_of(logits, vocabulary)
    if part is None:
        return logits.argmax(-1)
    first = torch.full((len(logits),), part.size, device=logits.device)
    best = reference.widen(logits.new_full((len(logits),), -torch.inf))
    if logits.shape[1]:
        best, column = (values.to(kept.dtype) for values, kept in zip(logits.max(-1), (best, first), strict=True))
        first = column + part.start
    first = first.masked_fill(best != part.largest(best), part.size)
    return -part.largest(-first)


class _LogprobsAt(Function):
    """log π(i) = (x_i − M) − log Z, with x the logits at the temperature, M the row's largest, Z = Σ_v exp(x_v − M).

    d log π(i) / d x_v = [v = i] − exp(x_v − M) / Z: with M, Z and its own columns a rank knows its whole gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, temperature: float, part: Vocabulary | None, with_entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        index, owned = (ids, None) if part is None else part.columns_of(ids, logits.shape[1])
        peak, z, entropy, at_ids = _local_sums(logits, index, temperature, with_entropy)
        if part is not None and owned is not None:
            peak, z, entropy, at_ids = _whole_sums(peak, z, entropy, torch.where(owned, at_ids, 0.0), part)
        log_z = z.log()
        logprobs, logsumexp = at_ids - peak - log_z, (peak + log_z)[:, 0]
        ctx.mark_non_differentiable(entropy, logsumexp)
        ctx.save_for_backward(logits, ids, peak, z)
        ctx.temperature, ctx.part = temperature, part
        return logprobs, entropy, logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None, None, None]:
        logits, ids, peak, z = ctx.saved_tensors
        slope = -grad.sum(-1, keepdim=True) / z
        index, at_ids = ids, _once_per_id(grad, ids)
        if ctx.part is not None:
            index, owned = ctx.part.columns_of(ids, logits.shape[1])
            at_ids = torch.where(owned, at_ids, 0.0)
        result = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for block in _blocks(len(logits), logits):
            scaled = _scaled(logits[block], ctx.temperature)
            values = result[block] if result.dtype == scaled.dtype else torch.empty_like(scaled)
            torch.sub(scaled, peak[block], out=values)
            values.exp_().mul_(slope[block]).scatter_add_(-1, index[block], at_ids[block])
            if ctx.temperature != 1:
                values.div_(ctx.temperature)
            if result.dtype != values.dtype:
                result[block] = values
        return result, None, None, None, None


def _local_sums(
    logits: Tensor, index: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of these columns alone: largest logit M [R, 1], Z [R, 1], entropy [R] if they were everything, logits [R, N] at
    `index`. Without columns they are −∞, 0, 0 and 0."""
    one = reference.widen(logits.new_empty(0))
    peak, z = one.new_full((len(logits), 1), -torch.inf), one.new_zeros(len(logits), 1)
    entropy, at_ids = one.new_zeros(len(logits)), one.new_zeros(index.shape)
    for block in _blocks(len(logits), logits):
        scaled = _scaled(logits[block], temperature)
        peak[block] = scaled.amax(-1, keepdim=True)
        at_ids[block] = scaled.gather(-1, index[block])
        weights = (scaled - peak[block]).exp_()
        z[block] = weights.sum(-1, keepdim=True)
        if with_entropy:
            weights.div_(z[block])
            entropy[block] = torch.special.entr(weights, out=weights).sum(-1)
    return peak, z, entropy, at_ids


def _whole_sums(
    peak: Tensor, z: Tensor, entropy: Tensor, at_ids: Tensor, part: Vocabulary
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_local_sums` of all columns from those of every rank; `at_ids` is 0 where another rank has the column.

    Entropy by the chain rule: with Z_r the ranks' shares of Z = Σ_r Z_r and H_r their entropies,

        H = Σ_r Z_r/Z (H_r − log Z_r/Z) = 1/Z Σ_r (Z_r H_r − Z_r log Z_r) + log Z
    """
    top = part.largest(peak)
    z = z * (peak - top).exp()
    spread = z * entropy[:, None] + torch.special.entr(z)
    sums = part.add(torch.cat([z, spread, at_ids], dim=-1))
    z, spread, at_ids = sums[:, :1], sums[:, 1:2], sums[:, 2:]
    entropy = (spread / z + z.log())[:, 0].clamp(min=0.0)  # rounding can take it below
    return top, z, entropy, at_ids


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


def _blocks(rows: int, logits: Tensor) -> Iterator[slice]:
    """The first `rows` rows, in blocks; none if there are no columns."""
    width = logits.shape[1]
    step = max(1, BLOCK_ELEMENTS.get(logits.device.type, 1 << 24) // max(1, width))
    return (slice(first, first + step) for first in range(0, rows if width else 0, step))
