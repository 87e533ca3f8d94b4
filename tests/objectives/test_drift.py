from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batches import random_batch

from copd_kernels import reference
from copd_megatron.objectives.branch_loss import branch_loss
from copd_megatron.objectives.drift import drift_stats, kl_on_rollouts, low_support
from copd_megatron.objectives.settings import LossSettings

SETTINGS = LossSettings(overlap_k=3, teachers=2)


def test_drift_is_measured_per_teacher_and_exactly_when_the_top_k_is_everything():
    batch = random_batch(k=11)
    stats = drift_stats(batch.logits, batch.targets, batch.signals, settings=SETTINGS)
    for teacher in range(2):
        rows = batch.signals.source == teacher
        student, other = batch.logits.detach()[rows], batch.teacher_logits[rows]
        forward = reference.token_kl(student, other, "forward")
        symmetric = forward + reference.token_kl(student, other, "reverse")
        common = [
            len(set(mine) & set(theirs)) / 3
            for mine, theirs in zip(student.topk(3).indices.tolist(), other.topk(3).indices.tolist(), strict=True)
        ]
        for name, values in {"symkl": symmetric, "kl_forward": forward, "overlap": torch.tensor(common)}.items():
            assert stats[f"{name}/{teacher}"].tolist() == pytest.approx([values.sum().item(), 4], abs=1e-4)
            squares = values.double().square().sum().item()
            assert stats[f"{name}_square/{teacher}"].tolist() == pytest.approx([squares, 4], abs=1e-4)
    assert stats["symkl/0"][0] != stats["symkl/1"][0]


def test_drift_is_zero_between_equals():
    batch = random_batch()
    signals = batch.signals
    top = torch.log_softmax(batch.logits.detach(), -1).topk(4)
    same = batch.but(teacher_top_ids=top.indices, teacher_top_logprobs=top.values, source=signals.source.clamp(min=0))
    stats = drift_stats(same.logits, same.targets, same.signals, settings=SETTINGS)
    assert stats["overlap/0"].tolist() == [8.0, 8.0]
    assert stats["symkl/0"][0].item() == pytest.approx(0.0, abs=1e-9)


def test_measuring_alone_and_while_training_agree():
    batch = random_batch(temperature=0.7)
    settings = replace(SETTINGS, temperature=0.7)
    _, training = branch_loss(batch.logits, batch.targets, batch.signals, settings=settings)
    alone = drift_stats(batch.logits, batch.targets, batch.signals, settings=settings)
    for name in ("overlap", "symkl", "kl_forward"):
        for teacher in (0, 1):
            torch.testing.assert_close(training[f"{name}/{teacher}"], alone[f"{name}/{teacher}"])


def test_nothing_scored_is_nothing_measured():
    batch = random_batch(teachers=0).but(teacher_logprobs=None, teacher_top_ids=None, teacher_top_logprobs=None)
    stats = drift_stats(batch.logits, batch.targets, batch.signals, settings=SETTINGS)
    names = ("overlap", "symkl", "kl_forward", "overlap_square", "symkl_square", "kl_forward_square")
    assert set(stats) == {f"{name}/{teacher}" for name in names for teacher in (0, 1)}
    assert all(pair.tolist() == [0.0, 0.0] for pair in stats.values())


def test_drift_without_a_top_k_says_so():
    batch = random_batch().but(teacher_top_ids=None, teacher_top_logprobs=None)
    with pytest.raises(ValueError, match="drift needs the teacher's top-k"):
        drift_stats(batch.logits, batch.targets, batch.signals, settings=SETTINGS)


def test_low_support_counts_rollouts_by_the_ratio_of_whole_sequences():
    teacher = [torch.tensor([-0.5, -0.5]), torch.tensor([-1.0]), torch.tensor([-1.0, -1.0, -1.0])]
    student = [torch.tensor([-3.0, -3.1]), torch.tensor([-5.9]), torch.tensor([-2.6, -2.7, -2.8])]
    assert low_support(student, teacher).tolist() == [2.0, 3.0]
    assert low_support(student, teacher, threshold=-5.05).tolist() == [2.0, 3.0]
    assert low_support(student, teacher, threshold=-5.11).tolist() == [0.0, 3.0]
    assert low_support(teacher, student).tolist() == [0.0, 3.0]
    assert low_support([], []).tolist() == [0.0, 0.0]


def test_kl_on_rollouts_converges_to_the_divergence_from_the_sampler():
    generator = torch.Generator().manual_seed(0)
    sampler, other = torch.log_softmax(torch.randn(2, 8, generator=generator, dtype=torch.float64), dim=-1)
    drawn = torch.multinomial(sampler.exp(), 40_000, replacement=True, generator=generator)
    rollouts = drawn.split([3, 10_000, 29_997])
    total, count = kl_on_rollouts([sampler[ids] for ids in rollouts], [other[ids] for ids in rollouts]).tolist()
    exact = (sampler.exp() * (sampler - other)).sum().item()
    assert count == 40_000
    assert total / count == pytest.approx(exact, rel=0.03)
    assert kl_on_rollouts([], []).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("measure", [low_support, kl_on_rollouts])
def test_logprobs_of_other_tokens_are_refused(measure):
    with pytest.raises(ValueError, match="different tokens"):
        measure([torch.zeros(2)], [torch.zeros(3)])
