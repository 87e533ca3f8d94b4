"""Supervised learning on demonstrations, for the cold start of a base."""

from __future__ import annotations

import torch

from copd_megatron.objectives.totals import Stats, total
from copd_megatron.objectives.vocabulary import Vocabulary, greedy, token_logprobs
from copd_megatron.policy.packed import Signals


def supervised_loss(
    logits: torch.Tensor, targets: torch.Tensor, signals: Signals, vocabulary: Vocabulary | None = None
) -> tuple[torch.Tensor, Stats]:
    """Cross-entropy weighted with `signals.weight`; arguments as for `branch_loss`, whose other signals do not matter.

    Returns Σ weight · (−log π(target)), a scalar with gradient, and statistics as (sum, count) over the tokens whose
    weight is not 0: `sft/loss`, the mean cross-entropy in nats, and `sft/accuracy`, the share of targets that are the
    model's first choice.
    """
    weight = signals.weight
    rows = weight.nonzero()[:, 0]
    loss = -token_logprobs(logits, targets, 1.0, vocabulary)[rows]
    correct = (greedy(logits, vocabulary) == targets)[rows]
    return (weight[rows] * loss).sum(), {"sft/loss": total(loss), "sft/accuracy": total(correct)}
