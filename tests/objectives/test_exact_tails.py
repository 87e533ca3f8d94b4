"""The student's tail is summed from the logits: 1 − Σ of float32 probabilities does not have it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batches import Batch, sharp_batch

from copd_kernels import reference
from copd_megatron.objectives.branch_loss import branch_loss
from copd_megatron.objectives.drift import drift_stats
from copd_megatron.objectives.settings import LossSettings
from copd_megatron.objectives.token_stats import TokenStats, token_stats

KINDS = {"topk_reverse": "reverse", "topk_forward": "forward", "jsd": "jsd"}
SETTINGS = LossSettings(overlap_k=3, teachers=2, jsd_beta=0.3)
TAILS = [1e-3, 1e-5, 1e-7]


def student_of(batch: Batch) -> TokenStats:
    return token_stats(batch.logits, batch.targets, 1.0, batch.signals.teacher_top_ids)


def float64_softmax(batch: Batch) -> torch.Tensor:
    return torch.softmax(batch.logits.detach().double(), -1)


def exact_kl(batch: Batch, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the scored rows, in float64 by probabilities: divergences [N] and gradient [N, V] of their weighted sum."""
    rows = (batch.signals.source >= 0).nonzero()[:, 0]
    logits = batch.logits.detach().double()[rows].requires_grad_()
    teacher = batch.signals.teacher_top_logprobs[rows].double().exp()
    ids = batch.signals.teacher_top_ids[rows]
    p = torch.softmax(logits, -1)
    listed = torch.zeros_like(p, dtype=torch.bool).scatter(-1, ids, True)
    tails = p.masked_fill(listed, 0).sum(-1), 1 - teacher.sum(-1)
    p, q = (torch.cat([top, tail.clamp(min=reference.TAIL_FLOOR)[:, None]], -1)
            for top, tail in zip((p.gather(-1, ids), teacher), tails, strict=True))  # fmt: skip
    m = 0.3 * q + 0.7 * p
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    values = {"reverse": kl(p, q), "forward": kl(q, p), "jsd": 0.3 * kl(q, m) + 0.7 * kl(p, m)}[kind]
    (gradient,) = torch.autograd.grad((batch.signals.weight[rows] * values).sum(), logits)
    return values.detach(), gradient


@pytest.mark.parametrize("tail", TAILS)
def test_the_tail_is_that_of_a_float64_softmax(tail):
    batch = sharp_batch(tail)
    scored = batch.signals.source >= 0
    ids = batch.signals.teacher_top_ids[scored]
    exact = float64_softmax(batch)[scored].scatter(-1, ids, 0.0).sum(-1)
    assert 0.9 * tail < exact.min() <= exact.max() < 1.1 * tail
    student = student_of(batch)
    among = (ids == batch.targets[scored][:, None]).any(-1)
    assert 0 < among.sum() < len(among), "a target outside the top-k belongs to the tail"
    torch.testing.assert_close(student.tail[scored].double().exp(), exact, rtol=3e-6, atol=0)


@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize("teacher_tail", [0.01, 3e-4])
@pytest.mark.parametrize("tail", TAILS)
def test_top_k_losses_are_those_of_a_float64_softmax(tail, teacher_tail, loss):
    """1 − Σ of float32 is off by a hundredth of a tail of 1e-5, of which forward KL takes the logarithm."""
    batch = sharp_batch(tail, teacher_tail)
    scored = batch.signals.source >= 0
    cross = batch.rows(scored.nonzero()[:, 0])
    found, _ = branch_loss(cross.logits, cross.targets, cross.signals, settings=replace(SETTINGS, opd_loss=loss))
    (gradient,) = torch.autograd.grad(found, cross.logits)
    values, expected = exact_kl(batch, KINDS[loss])
    assert found.item() == pytest.approx((cross.signals.weight.double() * values).sum().item(), rel=1e-5)
    # The teacher's own tail is 1 − Σ of what it gave, good to 1e-7 of all its mass.
    unlisted = torch.ones_like(expected, dtype=torch.bool).scatter(-1, cross.signals.teacher_top_ids, False)
    rtol = 1e-5 + 1e-7 / teacher_tail
    torch.testing.assert_close(gradient.double()[unlisted], expected[unlisted], rtol=rtol, atol=1e-12)
    torch.testing.assert_close(gradient.double(), expected, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("tail", TAILS)
def test_measured_divergences_are_those_of_a_float64_softmax(tail):
    batch = sharp_batch(tail)
    forward, reverse = exact_kl(batch, "forward")[0], exact_kl(batch, "reverse")[0]
    teacher = batch.signals.source[batch.signals.source >= 0]
    stats = drift_stats(batch.logits, batch.targets, batch.signals, settings=SETTINGS)
    _, training = branch_loss(batch.logits, batch.targets, batch.signals, settings=SETTINGS)
    for index in (0, 1):
        rows = teacher == index
        for measured in (stats, training):
            assert measured[f"kl_forward/{index}"][0].item() == pytest.approx(forward[rows].sum().item(), rel=1e-5)
            symmetric = (forward + reverse)[rows].sum().item()
            assert measured[f"symkl/{index}"][0].item() == pytest.approx(symmetric, rel=1e-5)
    assert training["opd/kl"][0].item() == pytest.approx(reverse.sum().item(), rel=1e-5)


@pytest.mark.parametrize("loss", KINDS)
def test_a_tail_without_any_mass_gives_finite_gradients(loss):
    """Of exp(−95), which float32 has but not its inverse, and of nothing at all."""
    for rest in (-95.0, -200.0, -torch.inf):
        batch = sharp_batch(1e-5)
        logits = batch.logits.detach().clone()
        logits[:, 4:] = rest
        logits.requires_grad_()
        found, _ = branch_loss(logits, batch.targets % 4, batch.signals, settings=replace(SETTINGS, opd_loss=loss))
        (gradient,) = torch.autograd.grad(found, logits)
        assert found.isfinite()
        assert gradient.isfinite().all()
