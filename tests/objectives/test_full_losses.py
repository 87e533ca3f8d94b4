"""Losses over the whole vocabulary, from the logits of a resident teacher."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batches import Batch, random_batch

from copd_kernels import reference
from copd_megatron.objectives import distill
from copd_megatron.objectives.branch_loss import branch_loss
from copd_megatron.objectives.distill import FULL_LOSSES
from copd_megatron.objectives.partition import PartitionAt
from copd_megatron.objectives.settings import LossSettings

SETTINGS = LossSettings(overlap_k=3, teachers=2, temperature=0.7, jsd_beta=0.3, beta=2.0)
TOPK = {"full_reverse": "topk_reverse", "full_forward": "topk_forward", "full_jsd": "jsd"}


def loss_and_gradient(batch: Batch, settings: LossSettings) -> tuple[torch.Tensor, torch.Tensor]:
    loss, _ = branch_loss(batch.logits, batch.targets, batch.signals, settings=settings)
    return loss.detach(), torch.autograd.grad(loss, batch.logits)[0]


def cross_only(batch: Batch) -> Batch:
    return batch.rows((batch.signals.source >= 0).nonzero()[:, 0])


@pytest.mark.parametrize("loss", FULL_LOSSES)
def test_the_loss_is_the_divergence_of_both_softmaxes(loss):
    batch = cross_only(random_batch(temperature=0.7))
    found, gradient = loss_and_gradient(batch, replace(SETTINGS, opd_loss=loss))
    logits = batch.logits.detach().requires_grad_()
    p, q = torch.softmax(logits / 0.7, -1), torch.softmax(batch.teacher_logits / 0.7, -1)
    m = 0.3 * q + 0.7 * p
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    values = {"full_reverse": kl(p, q), "full_forward": kl(q, p), "full_jsd": 0.3 * kl(q, m) + 0.7 * kl(p, m)}[loss]
    expected = 2.0 * (batch.signals.weight * values).sum()
    assert expected > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # weights are float32
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", FULL_LOSSES)
def test_it_is_the_top_k_loss_where_the_top_k_is_everything(loss):
    batch = random_batch(k=11, temperature=0.7)
    found = loss_and_gradient(batch, replace(SETTINGS, opd_loss=loss))
    expected = loss_and_gradient(batch, replace(SETTINGS, opd_loss=TOPK[loss]))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", FULL_LOSSES)
def test_student_and_teacher_alike_have_no_loss_and_no_gradient(loss):
    batch = cross_only(random_batch())
    same = batch.but(teacher_logits=batch.logits.detach)
    found, gradient = loss_and_gradient(same, replace(SETTINGS, opd_loss=loss))
    assert found.abs() < 1e-12
    assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize("loss", FULL_LOSSES)
def test_native_rows_get_their_own_gradient_and_nothing_of_the_teacher_s(loss):
    batch = random_batch(temperature=0.7)
    native = batch.signals.source < 0
    _, gradient = loss_and_gradient(batch, replace(SETTINGS, opd_loss=loss))
    _, alone = loss_and_gradient(batch.rows(native.nonzero()[:, 0]), SETTINGS)
    torch.testing.assert_close(gradient[native], alone)
    _, teachers = loss_and_gradient(cross_only(batch), replace(SETTINGS, opd_loss=loss))
    torch.testing.assert_close(gradient[~native], teachers)


@pytest.mark.parametrize("loss", FULL_LOSSES)
def test_where_all_rows_are_a_teacher_s_there_is_one_gradient_in_the_logits_place(loss, monkeypatch):
    """A second gradient of the logits' size, of zeros, would come through their log-probabilities."""
    backward, asked = [], []
    original, kernel = PartitionAt.backward, distill.token_kl
    monkeypatch.setattr(PartitionAt, "backward", staticmethod(lambda *a: backward.append(1) or original(*a)))
    monkeypatch.setattr(distill, "token_kl", lambda *a, **k: asked.append(k["gradient"]) or kernel(*a, **k))
    settings = replace(SETTINGS, opd_loss=loss)
    loss_and_gradient(cross_only(random_batch()), settings)
    assert (len(backward), asked) == (0, ["overwrite"])
    loss_and_gradient(random_batch(), settings)
    assert (len(backward), asked) == (1, ["overwrite", "later"])


def test_statistics_are_those_of_the_top_k_and_use_the_teacher_s_own_tail():
    batch = random_batch(temperature=0.7)
    exact = reference.tail_logprob(torch.log_softmax(batch.teacher_logits / 0.7, -1), batch.signals.teacher_top_ids)
    settings = replace(SETTINGS, opd_loss="full_forward")
    statistics = [
        branch_loss(each.logits, each.targets, each.signals, settings=settings)[1]
        for each in (batch, batch.but(teacher_tail=exact), batch.but(teacher_tail=exact - 1))
    ]
    for name, pair in statistics[0].items():
        torch.testing.assert_close(statistics[1][name], pair, rtol=1e-5, atol=1e-7)
    assert (statistics[2]["opd/kl"] - statistics[0]["opd/kl"]).abs().max() > 0.01


@pytest.mark.parametrize("loss", FULL_LOSSES)
def test_a_teacher_without_logits_is_refused(loss):
    batch = random_batch().but(teacher_logits=None)
    with pytest.raises(ValueError, match=f"{loss} needs the teacher's logits.*set teacher.where to resident"):
        loss_and_gradient(batch, replace(SETTINGS, opd_loss=loss))
