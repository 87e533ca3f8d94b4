"""Values that are not finite: the update is skipped without a trace, and too many in a row end the run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_policy import make_samples, new_policy, toy_loss, weights_of, worst_difference

from copd_megatron.errors import TrainingDiverged
from copd_megatron.objectives.vocabulary import Vocabulary
from copd_megatron.policy.packed import Signals

LossResult = tuple[torch.Tensor, dict[str, torch.Tensor]]


def nan_loss(logits: torch.Tensor, targets: torch.Tensor, signals: Signals, _: Vocabulary | None) -> LossResult:
    """Loss and gradient are NaN."""
    loss, stats = toy_loss(logits, targets, signals, None)
    return loss * float("nan"), {**stats, "entropy": stats["entropy"] * float("nan")}


class _Explode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return grad * float("inf")


def infinite_gradient(
    logits: torch.Tensor, targets: torch.Tensor, signals: Signals, _: Vocabulary | None
) -> LossResult:
    """The loss is finite, its gradient is not."""
    return toy_loss(_Explode.apply(logits), targets, signals)


def infinite_loss(logits: torch.Tensor, targets: torch.Tensor, signals: Signals, _: Vocabulary | None) -> LossResult:
    """The gradient is finite, the loss is not."""
    loss, stats = toy_loss(logits, targets, signals, None)
    return loss + float("inf"), stats


@pytest.mark.parametrize("bad", [nan_loss, infinite_gradient, infinite_loss])
@pytest.mark.parametrize("distributed", [False, True])
def test_bad_update_leaves_no_trace_but_counts(
    base: Path, bad: Callable[..., LossResult], distributed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (make_samples(base, prompts=3, group=2, seed=seed) for seed in (1, 2))
    policy, undisturbed = (new_policy(base, max_tokens=30, distributed=distributed) for _ in range(2))
    for one in (policy, undisturbed):
        one.update(first, toy_loss)
    with caplog.at_level(logging.WARNING):
        metrics = policy.update(second, bad)
    assert (metrics["skipped"], policy.version, undisturbed.version) == (1, 2, 1)
    assert "update 2 is skipped" in caplog.text
    assert not any(parameter.main_grad.any() for parameter in policy.model.module.parameters())
    assert worst_difference(weights_of(policy), weights_of(undisturbed)) == 0
    after, expected = (one.update(second, toy_loss) for one in (policy, undisturbed))
    assert after == expected
    assert worst_difference(weights_of(policy), weights_of(undisturbed)) == 0


def test_many_bad_updates_in_a_row_end_the_run_with_the_reason(base: Path) -> None:
    samples = make_samples(base, prompts=2, group=2)
    policy = new_policy(base, max_skipped=3)
    for loss in (nan_loss, nan_loss, toy_loss, nan_loss, nan_loss):
        policy.update(samples, loss)
    with pytest.raises(TrainingDiverged) as raised:
        policy.update(samples, nan_loss)
    message = str(raised.value)
    assert "update 6 had to be skipped, number 3 in a row" in message
    assert "the loss is nan" in message
    assert "statistics entropy" in message
    assert "gradients are not finite (" in message
    assert "those after update 3" in message
    assert "optimizer.lr" in message
    assert policy.version == 6


def test_good_gradients_are_not_blamed(base: Path) -> None:
    policy = new_policy(base, max_skipped=1)
    with pytest.raises(TrainingDiverged) as raised:
        policy.update(make_samples(base, prompts=2, group=2), infinite_loss)
    assert "the loss is inf" in str(raised.value)
    assert "not finite" not in str(raised.value)
