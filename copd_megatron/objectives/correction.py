"""Engine and trainer disagree on the log-probability of the same token under the same weights (other kernels, other
rounding). This measures the disagreement and corrects for it (docs/method.md, pitfall 7)."""

from __future__ import annotations

import torch

from copd_megatron.objectives.grpo import MAX_LOG_RATIO


def importance_weights(
    trainer_logprobs: torch.Tensor,
    engine_logprobs: torch.Tensor,
    cap: float | None,
    mask: tuple[float, float] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight of each token's policy gradient, since the engine and not the trainer has sampled it; arguments [R].

    With the ratio r = exp(trainer − engine): truncated importance sampling gives min(r, cap), or 1 where `cap` is
    None; the two-sided `mask` (low, high) makes it 0 where r lies outside. Returns the weights [R], constants, and a
    mask bool [R] of the tokens that were truncated or left out.
    """
    ratio = (trainer_logprobs - engine_logprobs).detach().clamp(max=MAX_LOG_RATIO).exp()
    weights = torch.ones_like(ratio) if cap is None else ratio.clamp(max=cap)
    touched = torch.zeros_like(ratio, dtype=torch.bool) if cap is None else ratio > cap
    if mask is not None:
        outside = (ratio < mask[0]) | (ratio > mask[1])
        weights, touched = weights.masked_fill(outside, 0.0), touched | outside
    return weights, touched


def sampled_kl(sampler_logprobs: torch.Tensor, other_logprobs: torch.Tensor) -> torch.Tensor:
    """Estimate of KL(sampler ‖ other) from tokens that the sampler has drawn; arguments and result [R], no gradient.

    The k3 estimator of Schulman ("Approximating KL divergence", 2020): r − 1 − log r with r = other / sampler. Unbiased
    as the mean of log(1/r) is, but never negative and of far lower variance when the two are close.
    """
    log_ratio = (other_logprobs - sampler_logprobs).detach().clamp(max=MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


def mismatch_kl(trainer_logprobs: torch.Tensor, engine_logprobs: torch.Tensor) -> torch.Tensor:
    """k3 estimate of KL(engine ‖ trainer) at each token [R]; the engine has sampled."""
    return sampled_kl(engine_logprobs, trainer_logprobs)
