from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from batches import every_token_once, random_batch

from copd_kernels import reference
from copd_megatron.config.training import OPDConfig
from copd_megatron.objectives.branch_loss import branch_loss
from copd_megatron.objectives.distill import FULL_LOSSES, OPD_LOSSES, sampled_advantage
from copd_megatron.objectives.settings import LossSettings

SETTINGS = LossSettings(overlap_k=1, teachers=2)
KINDS = {"topk_reverse": "reverse", "topk_forward": "forward", "jsd": "jsd"}


def test_sampled_loss_has_in_expectation_the_gradient_of_reverse_kl():
    generator = torch.Generator().manual_seed(1)
    logits, teacher_logits = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    state, batch = every_token_once(logits, teacher_logits, k=1)
    loss, _ = branch_loss(batch.logits, batch.targets, batch.signals, settings=SETTINGS)
    (found,) = torch.autograd.grad(loss, state)

    logits.requires_grad_()
    exact = reference.token_kl(logits[None], teacher_logits[None], "reverse").sum()
    (expected,) = torch.autograd.grad(exact, logits)
    assert expected.norm() > 0.1
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(loss, exact, msg="at the first update −E[Â] is the divergence itself")


@pytest.mark.parametrize("loss", [*OPD_LOSSES, *FULL_LOSSES])
def test_beta_scales_the_teacher_s_part_only(loss):
    batch = random_batch()
    values = {}
    for source in (batch.signals.source, torch.zeros(12, dtype=torch.int64), torch.full((12,), -1)):
        chosen = batch.but(source=source, teacher_top_ids=batch.teacher_logits.topk(4).indices)
        for beta in (1.0, 3.0):
            settings = replace(SETTINGS, opd_loss=loss, beta=beta)
            values[beta] = branch_loss(chosen.logits, chosen.targets, chosen.signals, settings=settings)[0]
        if (source < 0).all():
            torch.testing.assert_close(values[3.0], values[1.0])
        elif (source >= 0).all():
            torch.testing.assert_close(values[3.0], 3 * values[1.0])
        else:
            assert (values[3.0] - values[1.0]).abs() > 1e-3


@pytest.mark.parametrize("loss", KINDS)
def test_topk_losses_are_those_of_the_reference(loss):
    batch = random_batch()
    rows = (batch.signals.source >= 0).nonzero()[:, 0]
    scored = batch.rows(rows)
    settings = replace(SETTINGS, opd_loss=loss, jsd_beta=0.3)
    found, _ = branch_loss(scored.logits, scored.targets, scored.signals, settings=settings)
    expected = reference.topk_kl(
        scored.logits, scored.signals.teacher_top_ids, scored.signals.teacher_top_logprobs, KINDS[loss], 0.3
    )
    torch.testing.assert_close(found, (scored.signals.weight * expected).sum())


@pytest.mark.parametrize("loss", KINDS)
def test_topk_losses_ignore_the_sampled_token_and_its_importance(loss):
    batch = random_batch()
    rows = (batch.signals.source >= 0).nonzero()[:, 0]
    scored = batch.rows(rows)
    settings = replace(SETTINGS, opd_loss=loss)
    other = scored.but(engine_logprobs=scored.signals.engine_logprobs - 3)
    found, _ = branch_loss(other.logits, (other.targets + 1) % 11, other.signals, settings=settings)
    expected, _ = branch_loss(scored.logits, scored.targets, scored.signals, settings=settings)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", KINDS)
def test_topk_losses_without_a_top_k_say_so(loss):
    batch = random_batch().but(teacher_top_ids=None, teacher_top_logprobs=None)
    with pytest.raises(ValueError, match=f"{loss} needs the teacher's top-k"):
        branch_loss(batch.logits, batch.targets, batch.signals, settings=replace(SETTINGS, opd_loss=loss))


def test_sampled_advantage_is_clipped_first_and_weighted_then():
    teacher, student = torch.tensor([-1.0, -9.0, -1.0]), torch.tensor([-2.0, -1.0, -9.0], requires_grad=True)
    advantage = sampled_advantage(teacher, student, beta=2.0, clip=5.0)
    assert advantage.tolist() == [2.0, -10.0, 10.0]
    assert not advantage.requires_grad


def test_delta_is_taken_against_the_policy_before_the_first_update():
    """In the second update on a batch the ratio moves, the advantage does not."""
    batch = random_batch()
    batch = batch.but(source=torch.zeros(12, dtype=torch.int64))
    old = batch.signals.engine_logprobs - 0.1
    teacher = old + 0.7
    later = batch.but(old_logprobs=old, engine_logprobs=old, teacher_logprobs=teacher)
    loss, stats = branch_loss(later.logits, later.targets, later.signals, settings=SETTINGS)
    ratio = torch.tensor(0.1, dtype=torch.float64).exp()
    torch.testing.assert_close(loss, -0.7 * ratio)
    assert stats["opd/delta"][0].item() == pytest.approx(12 * 0.7)


def test_every_configurable_loss_exists():
    assert set(get_args(OPDConfig.model_fields["loss"].annotation)) == {*OPD_LOSSES, *FULL_LOSSES}
