from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batches import logprobs_of, random_batch

from copd_megatron.objectives.branch_loss import branch_loss
from copd_megatron.objectives.distill import FULL_LOSSES, OPD_LOSSES
from copd_megatron.objectives.settings import LossSettings

SETTINGS = LossSettings(overlap_k=3, teachers=2)


def evaluate(batch, settings=SETTINGS):
    return branch_loss(batch.logits, batch.targets, batch.signals, settings=settings)


def test_native_tokens_get_the_group_advantage_and_cross_tokens_the_teacher_s():
    batch = random_batch()
    loss, _ = evaluate(batch)
    (gradient,) = torch.autograd.grad(loss, batch.logits)
    signals = batch.signals
    delta = (signals.teacher_logprobs - logprobs_of(batch.logits, batch.targets)).clamp(-5, 5)
    advantage = torch.where(signals.source < 0, signals.advantage, delta)
    logprobs = torch.log_softmax(batch.logits, -1).gather(-1, batch.targets[:, None])[:, 0]
    (expected,) = torch.autograd.grad(-(signals.weight * advantage * logprobs).sum(), batch.logits)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("loss", [*OPD_LOSSES, *FULL_LOSSES])
@pytest.mark.parametrize("cuts", [[6, 6], [1, 11], [5, 3, 4], [1] * 12])
def test_losses_and_statistics_of_micro_batches_add_up(loss, cuts):
    batch, settings = random_batch(), replace(SETTINGS, opd_loss=loss)
    whole, whole_stats = evaluate(batch, settings)
    parts = [evaluate(batch.rows(rows), settings) for rows in torch.arange(12).split(cuts)]
    torch.testing.assert_close(sum(part for part, _ in parts), whole)
    for _, stats in parts:
        assert set(stats) == set(whole_stats)
    for name, pair in whole_stats.items():
        torch.testing.assert_close(sum(stats[name] for _, stats in parts), pair, msg=name)


def test_keys_do_not_depend_on_what_a_micro_batch_holds():
    batch = random_batch()
    native_only = batch.rows((batch.signals.source < 0).nonzero()[:, 0])
    bare = native_only.but(teacher_logprobs=None, teacher_top_ids=None, teacher_top_logprobs=None)
    empty = batch.rows(torch.zeros(0, dtype=torch.int64))
    keys = set(evaluate(batch)[1])
    for other in (native_only, bare, empty):
        loss, stats = evaluate(other)
        assert set(stats) == keys
        assert all(pair.shape == (2,) and pair.dtype == torch.float64 for pair in stats.values())
        assert stats["opd/delta"].tolist() == stats["overlap/1"].tolist() == [0.0, 0.0]
        loss.backward()


def test_counts_are_those_of_the_tokens_concerned():
    _, stats = evaluate(random_batch())
    counts = {name: int(pair[1]) for name, pair in stats.items()}
    assert counts == {
        **dict.fromkeys(["entropy", "mismatch/kl", "mismatch/clipped"], 12),
        **dict.fromkeys(["rl/surrogate", "rl/clipped"], 4),
        **dict.fromkeys(["opd/delta", "opd/kl"], 8),
        **{f"{name}/{teacher}": 4 for name in ("overlap", "symkl", "kl_forward") for teacher in (0, 1)},
    }


def test_statistics_are_what_they_are_called():
    batch = random_batch()
    batch = batch.but(engine_logprobs=batch.signals.engine_logprobs + 0.1)
    _, stats = evaluate(batch)
    distribution = torch.distributions.Categorical(logits=batch.logits.detach())
    assert stats["entropy"][0].item() == pytest.approx(distribution.entropy().sum().item())
    ratio = torch.tensor(-0.1, dtype=torch.float64)
    assert stats["mismatch/kl"][0].item() == pytest.approx(12 * (ratio.exp() - 1 - ratio).item())
    native = batch.signals.source < 0
    assert stats["rl/surrogate"][0].item() == pytest.approx(-batch.signals.advantage[native].sum().item())
    delta = (batch.signals.teacher_logprobs - logprobs_of(batch.logits, batch.targets))[~native]
    assert stats["opd/delta"][0].item() == pytest.approx(delta.sum().item())
    reverse = sum((stats[f"symkl/{teacher}"] - stats[f"kl_forward/{teacher}"])[0].item() for teacher in (0, 1))
    assert stats["opd/kl"][0].item() == pytest.approx(reverse)


def test_without_a_top_k_the_divergence_is_estimated_from_samples():
    batch = random_batch().but(teacher_top_ids=None, teacher_top_logprobs=None)
    _, stats = evaluate(batch)
    native = batch.signals.source < 0
    delta = (batch.signals.teacher_logprobs - logprobs_of(batch.logits, batch.targets))[~native]
    assert stats["opd/kl"][0].item() == pytest.approx((delta.exp() - 1 - delta).sum().item())
    assert stats["overlap/0"].tolist() == [0.0, 0.0]


def test_clipping_acts_from_the_second_update_on():
    batch = random_batch(teachers=0).but(advantage=torch.ones(12, dtype=torch.float64))
    assert evaluate(batch)[1]["rl/clipped"].tolist() == [0.0, 12.0]
    moved = batch.but(old_logprobs=logprobs_of(batch.logits, batch.targets) - 0.5)
    loss, stats = evaluate(moved)
    assert stats["rl/clipped"].tolist() == [12.0, 12.0]
    assert torch.autograd.grad(loss, batch.logits)[0].abs().max() == 0


def test_engine_mismatch_is_no_policy_change():
    """The clipped ratio is trainer against trainer; the engine enters through importance weights alone."""
    batch = random_batch(teachers=0).but(advantage=torch.ones(12, dtype=torch.float64))
    shifted = batch.but(engine_logprobs=batch.signals.engine_logprobs - 0.5)
    loss, stats = evaluate(shifted)
    assert stats["rl/clipped"].tolist() == [0.0, 12.0]
    assert loss.item() == pytest.approx(-torch.tensor(0.5).exp().item())


@pytest.mark.parametrize("loss", [*OPD_LOSSES, *FULL_LOSSES])
def test_bfloat16_logits_are_computed_in_float32(loss):
    batch, settings = random_batch(), replace(SETTINGS, opd_loss=loss)
    low = replace(batch, logits=batch.logits.detach().bfloat16().requires_grad_())
    high = replace(batch, logits=low.logits.detach().double().requires_grad_())
    found, found_stats = evaluate(low, settings)
    expected, expected_stats = evaluate(high, settings)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    for name in ("opd/delta", "symkl/0", "entropy"):
        torch.testing.assert_close(found_stats[name], expected_stats[name], rtol=1e-5, atol=1e-5)
    found.backward()
    expected.backward()
    assert low.logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(low.logits.grad.double(), high.logits.grad, rtol=1e-2, atol=1e-5)


def test_scored_rows_without_scores_are_refused():
    batch = random_batch().but(teacher_logprobs=None)
    with pytest.raises(ValueError, match="8 tokens belong to a teacher"):
        evaluate(batch)
