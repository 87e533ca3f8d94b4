"""The one place that turns logits into numbers; everything after it is arithmetic on [R] and [R, K]."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from copd_kernels import reference


@dataclass(frozen=True)
class TokenStats:
    """What the objectives know about the student at each response token, float32.

    `logprob` [R] of the target and `top_logprobs` [R, K] of given ids (K = 0 without any) carry a gradient; `entropy`
    [R] in nats and `logsumexp` [R] do not. All are of the full vocabulary at the temperature (docs/method.md,
    pitfall 6).
    """

    logprob: torch.Tensor
    entropy: torch.Tensor
    logsumexp: torch.Tensor
    top_logprobs: torch.Tensor


def token_stats(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float, top_ids: torch.Tensor | None = None
) -> TokenStats:
    """Statistics of `logits` [R, V] at `targets` int64 [R] and, if given, at `top_ids` int64 [R, K].

    The row's largest logit is taken off first and log-probabilities are formed from the remainders: log Z is then
    small, and a mass close to 1 keeps its distance from 1 (the tail bucket depends on it).
    Raises ValueError unless `temperature` > 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: log-probabilities of greedy sampling do not exist; use > 0")
    scaled = reference.widen(logits)
    if temperature != 1:
        scaled = scaled / temperature
    peak = scaled.detach().amax(dim=-1, keepdim=True)
    below = scaled - peak
    weights = below.exp()
    z = weights.sum(dim=-1, keepdim=True)

    wanted = targets[:, None] if top_ids is None else torch.cat([targets[:, None], top_ids], dim=-1)
    logprobs = below.gather(-1, wanted) - z.log()
    with torch.no_grad():
        entropy = torch.special.entr(weights / z).sum(dim=-1)
        logsumexp = (peak + z.log())[:, 0]
    return TokenStats(
        logprob=logprobs[:, 0],
        entropy=entropy,
        logsumexp=logsumexp,
        top_logprobs=logprobs[:, 1:],
    )


def overlap(logits: torch.Tensor, top_ids: torch.Tensor, k: int) -> torch.Tensor:
    """overlap@k of the student's `logits` [R, V] with a teacher's `top_ids` [R, K]; float32 [R], without gradient."""
    return reference.topk_overlap(logits.detach(), top_ids, k)
