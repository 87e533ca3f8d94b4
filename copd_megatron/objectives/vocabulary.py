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

import torch
from torch import Tensor

from copd_kernels import reference
from copd_kernels.choice import on_triton
from copd_kernels.logprobs import MAX_LISTED, Partition, partition
from copd_kernels.vocabulary import Vocabulary, split_of
from copd_megatron.objectives.partition import PartitionAt, blocks


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float, vocabulary: Vocabulary | None = None) -> Tensor:
    """Log-probabilities [R] of `targets` int64 [R] under `logits` [R, Vp] at `temperature`; see `partition_at`."""
    return partition_at(logits, targets[:, None], temperature, vocabulary, tail=False, entropy=False).logprobs[:, 0]


def partition_at(
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    vocabulary: Vocabulary | None = None,
    *,
    tail: bool = True,
    entropy: bool = True,
) -> Partition:
    """`reference.logprobs_at` and `reference.tail_logprob` of `logits` [R, Vp], whose columns are those of `vocabulary`
    (None: all there are), at `ids` int64 [R, N]; the same on every rank.

    The tail is summed over the tokens that are not among `ids`: 1 − Σ of float32 probabilities would lose a tail of
    1e-7. Unless asked for, `tail` and `entropy` may be any numbers. An id may come twice. For the backward pass it
    keeps the logits as they came (no copy), the ids, and three numbers per row; exponentials are computed again.

    Collective over the group. Raises ValueError unless `temperature` > 0 and the logits are what `vocabulary` says.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: log-probabilities of greedy sampling do not exist; use > 0")
    if on_triton(logits) and 1 <= ids.shape[1] <= MAX_LISTED:
        return partition(logits, ids, temperature, vocabulary)
    part = split_of(logits, vocabulary)
    return Partition(*PartitionAt.apply(logits, ids, temperature, part, tail, entropy))


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
    for block in blocks(len(ids), logits):
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
