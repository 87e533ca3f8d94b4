from __future__ import annotations

import math

import pytest
import torch

from copd_megatron.objectives.correction import importance_weights, mismatch_kl, sampled_kl


def test_equal_logprobs_need_no_correction():
    logprobs = torch.tensor([-0.1, -3.0])
    weights, touched = importance_weights(logprobs, logprobs, 2.0, (0.5, 2.0))
    assert weights.tolist() == [1.0, 1.0]
    assert not touched.any()
    assert mismatch_kl(logprobs, logprobs).tolist() == [0.0, 0.0]


def test_weights_are_constants():
    weights, _ = importance_weights(torch.tensor([-1.0], requires_grad=True), torch.tensor([-1.1]), 2.0, None)
    assert not weights.requires_grad


def test_ratio_is_trainer_over_engine():
    weights, touched = importance_weights(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0]), 2.0, None)
    assert weights.tolist() == pytest.approx([2.0, math.exp(-1)])
    assert touched.tolist() == [True, False]


def test_expected_mismatch_is_the_exact_divergence():
    generator = torch.Generator().manual_seed(0)
    engine, trainer = torch.log_softmax(torch.randn(2, 20, generator=generator, dtype=torch.float64), dim=-1)
    exact = (engine.exp() * (engine - trainer)).sum()
    torch.testing.assert_close((engine.exp() * mismatch_kl(trainer, engine)).sum(), exact)
    reverse = (trainer.exp() * (trainer - engine)).sum()
    assert (exact - reverse).abs() > 0.05, "the direction matters here"


def test_estimate_is_never_negative_and_finite():
    sampler = torch.tensor([-1.0, -1.0, -1.0, -1e4])
    other = torch.tensor([-1.5, -0.5, -1e4, -0.1])
    estimate = sampled_kl(sampler, other)
    assert (estimate > 0).all()
    assert torch.isfinite(estimate).all()
