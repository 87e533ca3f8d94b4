from __future__ import annotations

import pytest
import torch
from batches import random_batch

from copd_megatron.objectives.supervised import supervised_loss

WEIGHT = torch.linspace(0, 1, 12, dtype=torch.float64)


def test_loss_is_the_weighted_cross_entropy_and_masked_rows_do_not_count():
    batch = random_batch().but(weight=WEIGHT)
    loss, stats = supervised_loss(batch.logits, batch.targets, batch.signals)
    losses = torch.nn.functional.cross_entropy(batch.logits, batch.targets, reduction="none")
    torch.testing.assert_close(loss, (WEIGHT * losses).sum())
    assert stats["sft/loss"].tolist() == pytest.approx([losses[1:].sum().item(), 11])
    correct = (batch.logits.argmax(-1) == batch.targets)[1:].sum().item()
    assert stats["sft/accuracy"].tolist() == [correct, 11]


def test_gradient_is_that_of_the_weighted_cross_entropy():
    batch = random_batch().but(weight=WEIGHT)
    loss, _ = supervised_loss(batch.logits, batch.targets, batch.signals)
    losses = torch.nn.functional.cross_entropy(batch.logits, batch.targets, reduction="none")
    expected = torch.autograd.grad((WEIGHT * losses).sum(), batch.logits)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, batch.logits)[0], expected)


def test_micro_batches_add_up():
    batch = random_batch().but(weight=WEIGHT)
    whole, whole_stats = supervised_loss(batch.logits, batch.targets, batch.signals)
    parts = [batch.rows(rows) for rows in torch.arange(12).split([5, 7])]
    parts = [supervised_loss(part.logits, part.targets, part.signals) for part in parts]
    torch.testing.assert_close(sum(part for part, _ in parts), whole)
    for name, pair in whole_stats.items():
        torch.testing.assert_close(sum(stats[name] for _, stats in parts), pair)
