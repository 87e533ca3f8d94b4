"""What the objectives know of the logits; everything after it is arithmetic on [R] and [R, K]."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from copd_kernels import reference, topk
from copd_kernels.arguments import MAX_K
from copd_kernels.choice import on_triton
from copd_megatron.objectives.vocabulary import Vocabulary, partition_at, ranks_of


@dataclass(frozen=True)
class TokenStats:
    """What the objectives know about the student at each response token, float32.

    `logprob` [R] of the target, `top_logprobs` [R, K] of given ids (K = 0 without any) and `tail` [R] of all tokens but
    those ids together, summed from the logits, carry a gradient; `entropy` [R] in nats and `logsumexp` [R] do not. All
    are of the full vocabulary at the temperature (docs/method.md, pitfall 6).
    """

    logprob: torch.Tensor
    entropy: torch.Tensor
    logsumexp: torch.Tensor
    top_logprobs: torch.Tensor
    tail: torch.Tensor


def token_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    top_ids: torch.Tensor | None = None,
    vocabulary: Vocabulary | None = None,
    *,
    entropy: bool = True,
) -> TokenStats:
    """Statistics of `logits` [R, Vp] at `targets` int64 [R] and, if given, at `top_ids` int64 [R, K].

    Without `entropy` that may be any numbers.
    Raises ValueError unless `temperature` > 0.
    """
    top_ids = targets.new_empty(len(targets), 0) if top_ids is None else top_ids
    wanted = torch.cat([targets[:, None], top_ids], dim=-1)
    found = partition_at(logits, wanted, temperature, vocabulary, tail=top_ids.shape[1] > 0, entropy=entropy)
    logprob, top_logprobs = found.logprobs[:, 0], found.logprobs[:, 1:]
    # The target is listed too; unless it is one of the ids, it belongs to their tail.
    tail = torch.logaddexp(found.tail, reference.floor_never(logprob))
    tail = torch.where((top_ids == targets[:, None]).any(-1), found.tail, tail)
    return TokenStats(logprob, found.entropy, found.logsumexp, top_logprobs, tail)


def overlap(
    logits: torch.Tensor,
    top_ids: torch.Tensor,
    k: int,
    vocabulary: Vocabulary | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """overlap@k (`reference.topk_overlap`) of the student's `logits` [R, Vp] with a teacher's `top_ids` [R, K].

    float32 [R], without gradient. With `rows` int64 [R], those rows of the logits are meant.
    """
    reference.check_overlap(k, top_ids)
    size = logits.shape[1] if vocabulary is None else vocabulary.size
    if on_triton(logits) and k <= min(MAX_K, size):
        return topk.topk_overlap(logits, top_ids, k, vocabulary=vocabulary, rows=rows)
    return (ranks_of(logits, top_ids[:, :k], vocabulary, rows) < k).float().sum(-1) / k
