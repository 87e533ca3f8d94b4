"""Supervised learning on demonstrations, for the cold start of a base."""

from __future__ import annotations

import torch

from copd_megatron.objectives.token_stats import token_stats
from copd_megatron.objectives.totals import Stats, total


def supervised_loss(logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, Stats]:
    """Weighted cross-entropy: `logits` [R, V], `targets` int64 [R], `weight` [R] as in `Signals`.

    Returns Σ weight · (−log π(target)), a scalar with gradient, and statistics as (sum, count) over the tokens whose
    weight is not 0: `sft/loss`, the mean cross-entropy in nats, and `sft/accuracy`, the share of targets that are the
    model's first choice.
    """
    rows = weight.nonzero()[:, 0]
    loss = -token_stats(logits, targets, temperature=1.0).logprob[rows]
    correct = logits.detach()[rows].argmax(dim=-1) == targets[rows]
    return (weight[rows] * loss).sum(), {"sft/loss": total(loss), "sft/accuracy": total(correct)}
