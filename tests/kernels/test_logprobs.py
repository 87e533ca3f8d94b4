"""Log-probabilities and tail by the kernels, and the objectives that take them from there on a GPU."""

from __future__ import annotations

import inspect
import math
import sys
from pathlib import Path

import pytest
import torch
from cases import EXAMPLES, assert_close, assert_gradient, cases
from hypothesis import given
from hypothesis import strategies as st

from copd_kernels import reference
from copd_kernels.choice import VARIABLE
from copd_kernels.logprobs import Partition, partition
from copd_megatron.objectives import token_stats as dispatch
from copd_megatron.objectives import vocabulary
from copd_megatron.objectives.branch_loss import branch_loss
from copd_megatron.objectives.distill import FULL_LOSSES, OPD_LOSSES
from copd_megatron.objectives.settings import LossSettings

sys.path.append(str(Path(__file__).parents[1] / "objectives"))
from batches import in_format, random_batch, sharp_batch


@pytest.mark.usefixtures("interpreted")
@EXAMPLES
@given(case=cases(), n=st.integers(1, 20), seed=st.integers(0, 1000))
def test_logprobs_tail_and_entropy_are_the_reference_s(case, n, seed):
    generator = torch.Generator().manual_seed(seed)
    student = case.student.detach().requires_grad_()
    exact = student.detach().double().requires_grad_()
    ids = torch.randint(student.shape[1], (len(student), n), generator=generator)  # some come twice
    ids = torch.where(student.detach().gather(-1, ids) == -math.inf, student.shape[1] - 1, ids)
    logprobs, entropy, logsumexp = reference.logprobs_at(exact, ids, case.temperature)
    tail = reference.tail_logprob(torch.log_softmax(exact / case.temperature, dim=-1), ids)
    found = partition(student, ids, case.temperature)
    assert_close(found.logprobs.detach(), logprobs.detach(), case)
    assert_close(found.entropy, entropy, case)
    assert_close(found.logsumexp, logsumexp, case)
    known = tail.detach() > -80
    assert_close(found.tail.detach()[known], tail.detach()[known], case)
    slope = torch.randn(logprobs.shape, generator=generator)
    slope_tail = torch.randn(tail.shape, generator=generator) * known
    losses = [(a * slope.to(a.dtype)).sum() + (b.nan_to_num(neginf=0) * slope_tail.to(b.dtype)).sum()
              for a, b in ((found.logprobs, found.tail), (logprobs, tail))]  # fmt: skip
    expected = torch.autograd.grad(losses[1], exact)[0].nan_to_num()
    assert_gradient(torch.autograd.grad(losses[0], student)[0], expected, case)


@pytest.mark.usefixtures("interpreted")
def test_a_tail_whose_inverse_float32_does_not_have_gives_no_nan():
    logits = torch.tensor([[0.0, -95.0, -96.0]], requires_grad=True)
    found = partition(logits, torch.tensor([[0]]))
    assert found.tail.item() == pytest.approx(-94.687, abs=1e-2)
    (gradient,) = torch.autograd.grad(found.logprobs.sum() + 0 * found.tail.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros(1, 3))


SETTINGS = [LossSettings(opd_loss=loss, temperature=0.7, overlap_k=3, teachers=2)
            for loss in (*OPD_LOSSES, *FULL_LOSSES)]  # fmt: skip


@pytest.mark.parametrize("batch", [random_batch(), sharp_batch(1e-5)], ids=["plain", "small tails"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.opd_loss)
def test_the_kernels_give_a_branch_s_loss_gradient_and_statistics(settings, batch, interpreted, monkeypatch):
    batch = in_format(batch, torch.float32)
    logits = batch.logits.detach()
    results = {}
    for run in ("reference", "triton"):
        monkeypatch.setenv(VARIABLE, run)
        leaf = logits.clone().requires_grad_()
        loss, stats = branch_loss(leaf, batch.targets, batch.signals, settings=settings)
        results[run] = {**stats, "loss": loss.detach(), "gradient": torch.autograd.grad(loss, leaf)[0]}
    for name, expected in results["reference"].items():
        torch.testing.assert_close(results["triton"][name], expected, rtol=1e-5, atol=1e-5, msg=name)


def test_the_main_job_s_losses_on_a_cpu_are_those_of_the_references(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    called = []
    monkeypatch.setattr(vocabulary, "partition", lambda *arguments: called.append(arguments))
    monkeypatch.setattr(dispatch.topk, "topk_overlap", lambda *arguments, **_: called.append(arguments))
    batch = random_batch()
    logits = batch.logits.detach().float()
    stats = dispatch.token_stats(logits, batch.targets, 0.7, batch.signals.teacher_top_ids)
    expected = reference.logprobs_at(logits, batch.signals.teacher_top_ids, 0.7)
    assert torch.equal(stats.top_logprobs, expected[0])
    assert torch.equal(stats.entropy, expected[1])
    share = dispatch.overlap(logits, batch.signals.teacher_top_ids, 2)
    assert torch.equal(share, reference.topk_overlap(logits, batch.signals.teacher_top_ids, 2))
    assert called == []


def test_a_gpu_s_logits_go_to_the_kernels_with_the_same_arguments(monkeypatch):
    """What CUDA tensors would do: the calls fit the kernels' signatures, and their results are what is returned."""
    calls = []

    def record(function, result):
        def called(*arguments, **keywords):
            calls.append((function.__name__, inspect.signature(function).bind(*arguments, **keywords).arguments))
            return result

        return called

    batch = random_batch()
    logits, ids = batch.logits.detach().float(), batch.signals.teacher_top_ids
    logprobs, entropy, logsumexp = reference.logprobs_at(logits, torch.cat([batch.targets[:, None], ids], -1))
    fake = Partition(logprobs, torch.full((12,), -3.0), entropy, logsumexp)
    monkeypatch.setattr(vocabulary, "on_triton", lambda tensor: True)
    monkeypatch.setattr(dispatch, "on_triton", lambda tensor: True)
    monkeypatch.setattr(vocabulary, "partition", record(partition, fake))
    share = torch.full((2,), 0.25)
    monkeypatch.setattr(dispatch.topk, "topk_overlap", record(dispatch.topk.topk_overlap, share))
    stats = dispatch.token_stats(logits, batch.targets, 0.7, ids)
    assert stats.entropy is fake.entropy
    assert torch.equal(stats.top_logprobs, fake.logprobs[:, 1:])
    among = (ids == batch.targets[:, None]).any(-1)
    assert torch.equal(stats.tail == -3.0, among)
    assert 0 < among.sum() < 12
    rows = torch.tensor([3, 1])
    assert dispatch.overlap(logits, ids[rows], 2, rows=rows) is share
    (first, given), (second, also) = calls
    assert (first, second) == ("partition", "topk_overlap")
    assert given["logits"] is logits
    assert given["temperature"] == 0.7
    assert also["student_logits"] is logits
    assert also["k"] == 2
    assert also["rows"] is rows
