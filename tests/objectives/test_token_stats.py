from __future__ import annotations

import pytest
import torch
from batches import random_batch

from copd_megatron.objectives.token_stats import overlap, token_stats


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_numbers_are_those_of_log_softmax(dtype, temperature):
    batch = random_batch()
    logits = batch.logits.detach().to(dtype)
    top_ids = logits.topk(3, dim=-1).indices
    stats = token_stats(logits, batch.targets, temperature, top_ids)
    expected = torch.log_softmax(logits.double() / temperature, dim=-1)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    for found, wanted in {
        stats.logprob: expected.gather(-1, batch.targets[:, None])[:, 0],
        stats.top_logprobs: expected.gather(-1, top_ids),
        stats.entropy: torch.distributions.Categorical(logits=expected).entropy(),
        stats.logsumexp: (logits.double() / temperature).logsumexp(-1),
    }.items():
        assert found.dtype == accumulated
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6)


def test_gradients_are_those_of_log_softmax():
    batch = random_batch()
    top_ids = batch.logits.topk(3, dim=-1).indices
    stats = token_stats(batch.logits, batch.targets, 0.7, top_ids)
    (found,) = torch.autograd.grad(stats.logprob.sum() + 2 * stats.top_logprobs.sum(), batch.logits)
    expected = torch.log_softmax(batch.logits / 0.7, dim=-1)
    chosen = expected.gather(-1, batch.targets[:, None]).sum() + 2 * expected.gather(-1, top_ids).sum()
    torch.testing.assert_close(found, torch.autograd.grad(chosen, batch.logits)[0])


def test_large_logits_keep_a_small_tail():
    """Against log-probabilities formed as logit − logsumexp, which float32 rounds to 4e-6 at 60."""
    logits = torch.full((1, 9), 60.0 - 10.5)
    logits[0, 0] = 60.0
    stats = token_stats(logits, torch.tensor([0]), 1.0)
    exact = torch.log_softmax(logits.double(), -1)[0, 0]
    assert stats.logprob.item() == pytest.approx(exact.item(), rel=1e-3)


def test_excluded_tokens_have_no_part_in_the_entropy():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert token_stats(logits, torch.tensor([0]), 1.0).entropy.item() == pytest.approx(0.693147, abs=1e-5)


def test_without_ids_there_are_no_top_logprobs():
    batch = random_batch()
    assert token_stats(batch.logits, batch.targets, 1.0).top_logprobs.shape == (12, 0)


def test_an_empty_micro_batch_is_allowed():
    stats = token_stats(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 1.0)
    assert stats.logprob.shape == stats.entropy.shape == (0,)


def test_temperature_zero_is_refused():
    with pytest.raises(ValueError, match="temperature is 0"):
        token_stats(torch.zeros(1, 5), torch.tensor([0]), 0)


def test_overlap_has_no_gradient():
    batch = random_batch()
    assert not overlap(batch.logits, batch.signals.teacher_top_ids, 2).requires_grad
