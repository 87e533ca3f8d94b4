"""The pitfalls of docs/method.md, by number. Each test fails if its pitfall is put back.

Pitfalls 6, 10, 11 and 12 also concern the engines and the policy, whose tests carry the same numbers; pitfall 10 (the
teacher must get the images) is theirs alone.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from batches import build, every_token_once, logprobs_of, random_batch

from copd_megatron.objectives.branch_loss import branch_loss
from copd_megatron.objectives.grpo import group_advantages
from copd_megatron.objectives.settings import LossSettings
from copd_megatron.objectives.token_stats import token_stats

TOPK = ("topk_reverse", "topk_forward", "jsd")
EVERY = ("sampled", *TOPK)


def settings_for(loss: str, **changes) -> LossSettings:
    return replace(LossSettings(opd_loss=loss, overlap_k=1, teachers=2), **changes)


def loss_of(batch, settings) -> torch.Tensor:
    return branch_loss(batch.logits, batch.targets, batch.signals, settings=settings)[0]


def stat(batch, settings, name: str) -> float:
    total, count = branch_loss(batch.logits, batch.targets, batch.signals, settings=settings)[1][name].tolist()
    return total / count


def two_distributions(vocabulary: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(2, vocabulary, generator=generator, dtype=torch.float64))


def coarse_kl(logits: torch.Tensor, teacher_logits: torch.Tensor, k: int, kind: str) -> torch.Tensor:
    """The definition once more: probabilities of the teacher's top-k and of everything else."""
    ids = teacher_logits.topk(k).indices
    p, q = torch.softmax(logits, -1), torch.softmax(teacher_logits, -1)
    p, q = (torch.cat([x[ids], 1 - x[ids].sum(0, keepdim=True)]) for x in (p, q))
    kl = lambda a, b: (a * (a / b).log()).sum()  # noqa: E731
    m = (p + q) / 2
    return {"topk_reverse": kl(p, q), "topk_forward": kl(q, p), "jsd": (kl(p, m) + kl(q, m)) / 2}[kind]


@pytest.mark.parametrize("loss", TOPK)
def test_pitfall_01_topk_divergence_is_a_loss_and_not_an_advantage(loss):
    logits, teacher_logits = two_distributions()
    state, batch = every_token_once(logits, teacher_logits, k=3)
    (found,) = torch.autograd.grad(loss_of(batch, settings_for(loss)), state)

    logits = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(coarse_kl(logits, teacher_logits, 3, loss), logits)
    assert expected.norm() > 0.01
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", TOPK)
def test_pitfall_02_draining_the_top_k_does_not_pay(loss):
    teacher_logits, _ = two_distributions()
    ids = teacher_logits.topk(3).indices
    settings = settings_for(loss)

    state, batch = every_token_once(teacher_logits, teacher_logits, k=3)
    equal = loss_of(batch, settings)
    (gradient,) = torch.autograd.grad(equal, state)
    assert equal.abs() < 1e-12
    assert gradient.abs().max() < 1e-12

    drained = teacher_logits.clone()
    drained[ids] -= 4
    p, q = torch.softmax(drained, -1)[ids], torch.softmax(teacher_logits, -1)[ids]
    assert (p * (p / q).log()).sum() < 0, "without the tail, draining would pay"
    assert loss_of(every_token_once(drained, teacher_logits, k=3)[1], settings) > 0.1


@pytest.mark.parametrize("loss", TOPK)
def test_pitfall_03_divergence_is_not_negative_where_the_student_is_surer(loss):
    teacher_logits, _ = two_distributions()
    ids = teacher_logits.topk(3).indices
    surer = teacher_logits.clone()
    surer[ids] += 4
    p, q = torch.softmax(surer, -1)[ids], torch.softmax(teacher_logits, -1)[ids]
    assert (q * (q / p).log()).sum() < 0, "without the tail, forward KL would be negative"
    assert loss_of(every_token_once(surer, teacher_logits, k=3)[1], settings_for(loss)) > 0.01


@pytest.mark.parametrize("loss", TOPK)
def test_pitfall_04_one_teacher_token_still_teaches(loss):
    logits, teacher_logits = two_distributions()
    state, batch = every_token_once(logits, teacher_logits, k=1)
    value = loss_of(batch, settings_for(loss))
    (gradient,) = torch.autograd.grad(value, state)
    assert value > 1e-3
    assert gradient.norm() > 1e-3


@pytest.mark.parametrize("loss", EVERY)
def test_pitfall_05_student_and_teacher_are_compared_at_the_rollout_temperature(loss):
    batch = random_batch(temperature=0.6)
    source = torch.zeros_like(batch.signals.source)
    same = build(batch.logits, batch.logits.detach(), batch.targets, source, k=4, temperature=0.6)
    at_rollout = settings_for(loss, temperature=0.6)
    assert loss_of(same, at_rollout).abs() < 1e-9
    assert abs(stat(same, at_rollout, "opd/delta")) < 1e-9
    assert stat(same, at_rollout, "symkl/0") < 1e-9
    assert stat(same, at_rollout, "mismatch/kl") < 1e-9
    assert loss_of(same, settings_for(loss, temperature=1.0)).abs() > 1e-3, "the temperature matters here"


def test_pitfall_06_trainer_logprobs_are_of_the_full_vocabulary():
    logits = random_batch().logits.detach()[:1].expand(11, -1)
    top_ids = logits.topk(2, dim=-1).indices
    stats = token_stats(logits, torch.arange(11), 1.0, top_ids)
    assert stats.logprob.exp().sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(stats.top_logprobs, torch.log_softmax(logits, -1).gather(-1, top_ids))


def test_pitfall_06_renormalised_engine_logprobs_show_as_mismatch():
    batch = random_batch()
    nucleus_mass = 0.5
    renormalised = batch.but(engine_logprobs=batch.signals.engine_logprobs - math.log(nucleus_mass))
    settings = settings_for("sampled", two_sided_mask=(0.6, 2.0))
    assert stat(batch, settings, "mismatch/kl") < 1e-9
    assert stat(renormalised, settings, "mismatch/kl") == pytest.approx(0.5 - 1 + math.log(2))
    assert stat(renormalised, settings, "mismatch/clipped") == 1.0


@pytest.mark.parametrize("loss", EVERY)
def test_pitfall_07_student_equal_to_teacher_gives_about_no_loss_despite_engine_noise(loss):
    batch = random_batch()
    source = torch.zeros_like(batch.signals.source)
    same = build(batch.logits, batch.logits.detach(), batch.targets, source, k=4)
    noise = torch.randn(len(source), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3
    noisy = same.but(
        engine_logprobs=same.signals.engine_logprobs + noise,
        teacher_logprobs=same.signals.teacher_logprobs - noise,
    )
    assert loss_of(noisy, settings_for(loss)).abs() < 2e-3
    assert 0 < stat(noisy, settings_for(loss), "mismatch/kl") < 1e-5


def test_pitfall_07_importance_weights_turn_the_engine_s_samples_into_the_trainer_s():
    logits, teacher_logits = two_distributions()
    engine = logits + torch.tensor([0.3, -0.3, 0.2, 0.0, -0.1, 0.1, -0.2], dtype=torch.float64)
    settings = settings_for("sampled", importance_cap=100.0)

    state, exact = every_token_once(logits, teacher_logits, k=3)
    (expected,) = torch.autograd.grad(loss_of(exact, settings), state)
    state, by_engine = every_token_once(logits, teacher_logits, k=3, sampler=engine)
    (corrected,) = torch.autograd.grad(loss_of(by_engine, settings), state)
    state, by_engine = every_token_once(logits, teacher_logits, k=3, sampler=engine)
    (uncorrected,) = torch.autograd.grad(loss_of(by_engine, replace(settings, importance_cap=None)), state)

    torch.testing.assert_close(corrected, expected)
    assert (uncorrected - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("cap", "mask", "weights"),
    [(2.0, None, [0.25, 1.5, 2.0]), (None, (0.5, 2.0), [0.0, 1.0, 0.0]), (1.2, (0.5, 2.0), [0.0, 1.2, 0.0])],
)
@pytest.mark.parametrize("native", [True, False])
def test_pitfall_07_tokens_that_engine_and_trainer_see_differently_are_bounded(cap, mask, weights, native):
    """Three tokens whose ratio trainer / engine is 0.25, 1.5 and 8."""
    batch = random_batch(rows=3).but(source=torch.full((3,), -1 if native else 0))
    ratio = torch.tensor([0.25, 1.5, 8.0], dtype=torch.float64)
    current = logprobs_of(batch.logits, batch.targets)
    batch = batch.but(
        engine_logprobs=current - ratio.log(),
        advantage=torch.ones(3, dtype=torch.float64),
        teacher_logprobs=current + 1.0,
    )
    settings = settings_for("sampled", importance_cap=cap, two_sided_mask=mask)
    for row, weight in enumerate(weights):
        alone = batch.rows(torch.tensor([row]))
        assert loss_of(alone, settings).item() == pytest.approx(-weight / 3)
        assert stat(alone, settings, "mismatch/clipped") == (weight not in (ratio[row], 1.0))


def test_pitfall_08_delta_keeps_its_mean_and_scale():
    """A teacher that prefers every sampled token by the same δ: whitened, nothing would be left of it."""
    batch = random_batch()
    current = logprobs_of(batch.logits, batch.targets)
    batch = batch.but(source=torch.zeros_like(batch.signals.source))
    for delta in (1.0, 0.25):
        preferred = batch.but(teacher_logprobs=current + delta)
        assert loss_of(preferred, settings_for("sampled", beta=2.0)).item() == pytest.approx(-2.0 * delta)


@pytest.mark.parametrize("sign", [1, -1])
def test_pitfall_09_delta_is_clipped(sign):
    batch = random_batch()
    current = logprobs_of(batch.logits, batch.targets)
    extreme = batch.but(source=torch.zeros_like(batch.signals.source), teacher_logprobs=current + sign * 50.0)
    assert loss_of(extreme, settings_for("sampled")).item() == pytest.approx(-sign * 5.0)
    assert loss_of(extreme, settings_for("sampled", delta_clip=2.0, beta=0.5)).item() == pytest.approx(-sign * 1.0)
    assert stat(extreme, settings_for("sampled"), "opd/delta") == pytest.approx(sign * 50.0)


@pytest.mark.parametrize("loss", EVERY)
def test_pitfall_11_slicing_everything_alike_changes_nothing(loss):
    batch, settings = random_batch(), settings_for(loss)
    whole, whole_stats = branch_loss(batch.logits, batch.targets, batch.signals, settings=settings)
    (whole_gradient,) = torch.autograd.grad(whole, batch.logits)
    # A context-parallel rank r of 2 gets chunks r and 3 − r of 4.
    chunks = torch.arange(12).chunk(4)
    slices = [torch.cat([chunks[0], chunks[3]]), torch.cat([chunks[1], chunks[2]])]
    ranks = [batch.rows(rows) for rows in slices]
    parts = [branch_loss(rank.logits, rank.targets, rank.signals, settings=settings) for rank in ranks]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    for rows, rank, (part, _) in zip(slices, ranks, parts, strict=True):
        torch.testing.assert_close(torch.autograd.grad(part, rank.logits)[0], whole_gradient[rows])
    for name, pair in whole_stats.items():
        torch.testing.assert_close(sum(stats[name] for _, stats in parts), pair)


@pytest.mark.parametrize("loss", EVERY)
def test_pitfall_11_another_row_s_teacher_values_change_the_gradient(loss):
    """So the test above cannot pass by chance. The value of `sampled` alone would not show it: it is −Σ weight · Â."""
    batch, settings = random_batch(), settings_for(loss)
    shifted = batch.but(
        teacher_logprobs=batch.signals.teacher_logprobs.roll(3),
        teacher_top_ids=batch.signals.teacher_top_ids.roll(3, 0),
        teacher_top_logprobs=batch.signals.teacher_top_logprobs.roll(3, 0),
    )
    (aligned,) = torch.autograd.grad(loss_of(batch, settings), batch.logits)
    (misaligned,) = torch.autograd.grad(loss_of(shifted, settings), batch.logits)
    assert (misaligned - aligned).norm() > 0.1 * aligned.norm()


@pytest.mark.parametrize("loss", EVERY)
def test_pitfall_12_masked_rows_take_part_in_nothing_on_either_side(loss):
    batch = random_batch()
    masked = torch.tensor([1, 2, 5, 6, 9, 11])  # native and both teachers'
    kept = torch.tensor([row for row in range(12) if row not in masked])
    spoil = lambda values: values.index_fill(0, masked, math.nan)  # noqa: E731
    signals = batch.signals
    padded = batch.but(
        weight=signals.weight.index_fill(0, masked, 0.0),
        advantage=spoil(signals.advantage),
        engine_logprobs=spoil(signals.engine_logprobs),
        teacher_logprobs=spoil(signals.teacher_logprobs),
        teacher_top_logprobs=spoil(signals.teacher_top_logprobs),
        teacher_top_ids=signals.teacher_top_ids.index_fill(0, masked, -1),
    )
    settings = settings_for(loss)
    found, found_stats = branch_loss(padded.logits, padded.targets, padded.signals, settings=settings)
    (gradient,) = torch.autograd.grad(found, padded.logits)
    alone = batch.rows(kept)
    expected, expected_stats = branch_loss(alone.logits, alone.targets, alone.signals, settings=settings)
    (expected_gradient,) = torch.autograd.grad(expected, alone.logits)

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient[kept], expected_gradient)
    assert gradient[masked].abs().max() == 0
    torch.testing.assert_close(found_stats, expected_stats)


def test_pitfall_13_groups_without_variance_are_counted_and_give_no_gradient():
    """The float32 mean of three rewards of 0.9 is not 0.9: divided by a vanishing spread, the rest would be 0.06."""
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.9, 0.9, 0.9, 0.7, 0.7, 0.7])
    advantages, flat = group_advantages(rewards, group_size=3)
    assert flat.tolist() == [False, True, True]
    assert advantages[3:].tolist() == [0.0] * 6

    batch = random_batch(rows=9, teachers=0).but(advantage=advantages.double())
    (gradient,) = torch.autograd.grad(loss_of(batch, settings_for("sampled")), batch.logits)
    assert gradient[3:].abs().max() == 0
    assert gradient[:3].abs().max() > 0
