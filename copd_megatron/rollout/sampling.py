"""From logits to tokens: pure functions of logits and of random numbers that were drawn beforehand."""

from __future__ import annotations

import torch

from copd_megatron.randomness import generator
from copd_megatron.rollout.types import Sampling

_SORTED_VOCABULARY = 1024
"""Largest vocabulary that is sorted whole to find its top."""


def check_sampling(sampling: Sampling) -> None:
    """Raise ValueError for settings that have no meaning, naming the setting and what was expected."""
    expectations = [
        ("n", sampling.n, sampling.n >= 1, "at least 1"),
        ("max_new_tokens", sampling.max_new_tokens, sampling.max_new_tokens >= 1, "at least 1"),
        ("temperature", sampling.temperature, sampling.temperature >= 0, "0 (greedy) or more"),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("top_k", sampling.top_k, sampling.top_k >= 0, "0 (no limit) or more"),
    ]
    for name, found, fine, expected in expectations:
        if not fine:
            raise ValueError(f"sampling.{name} is {found}, expected {expected}")


def random_numbers(seed: int, rows: int, steps: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), float64 [rows, steps]: one per rollout and token.

    All are drawn before the first token, so that what a rollout draws depends on its place among the rollouts and not
    on which others share its batch or how early they end.
    """
    return torch.rand(rows, steps, dtype=torch.float64, generator=generator(seed, "tokens"))


def token_logprobs(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities over the full vocabulary, float32 [..., V], at `temperature` (0, greedy, counts as 1)."""
    logits = logits.float()
    return torch.log_softmax(logits if temperature in (0, 1) else logits / temperature, dim=-1)


def likeliest(logprobs: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` likeliest tokens of each row and their log-probabilities, likeliest first: int64 and float32 [B, k].

    On a CPU numpy sorts integers ten times faster than torch finds the top of floats. Those made here order small
    vocabularies as their logprobs do, and equals by id: minus a number that is not positive has bits that grow with it.
    """
    if logprobs.is_cuda or logprobs.shape[-1] > _SORTED_VOCABULARY:
        best = logprobs.topk(k, dim=-1)
        return best.indices, best.values
    keys = (logprobs.neg().view(torch.int32).long() << 32) | torch.arange(logprobs.shape[-1])
    keys.numpy().sort(axis=-1)
    ids = keys[:, :k] & 0xFFFFFFFF
    return ids, logprobs.gather(-1, ids)


def choose(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row and its log-probability.

    `logits` [B, V], `uniform` float64 [B]; returns int64 [B] and float32 [B]. The token is the inverse of the
    cumulative distribution at `uniform`. Top-k and top-p narrow the choice and not the log-probability, which stays
    that of the full vocabulary: the trainer's is over the full vocabulary too (docs/method.md, pitfall 6).
    """
    logprobs = token_logprobs(logits, sampling.temperature)
    if sampling.temperature == 0:
        tokens = logprobs.argmax(-1, keepdim=True)
    else:
        weights = logprobs.exp()
        if sampling.top_k or sampling.top_p < 1:
            weights = weights * _allowed(logprobs, sampling.top_k, sampling.top_p)
        cumulative = weights.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        # The product may round up to the total, which lies behind the last token.
        height = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, height, right=True)
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]


def _allowed(logprobs: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """bool [B, V]: the `top_k` likeliest tokens, and of these the fewest that hold `top_p` of their probability."""
    ranked, order = torch.sort(logprobs, dim=-1, descending=True, stable=True)
    kept = torch.ones_like(ranked, dtype=torch.bool)
    if top_k:
        kept[:, top_k:] = False
    if top_p < 1:
        probabilities = ranked.masked_fill(~kept, -torch.inf).softmax(-1, dtype=torch.float64)
        kept &= probabilities.cumsum(-1) - probabilities < top_p
    return torch.zeros_like(kept).scatter(-1, order, kept)
