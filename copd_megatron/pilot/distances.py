"""How far two models are apart, rollout by rollout: what the probes measure (docs/method.md, "Overlap"), from engines.

Every value is a pair (sum over the rollout's tokens, tokens), so that those of several rollouts add up to a mean per
token, as in the probes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from copd_megatron.objectives.buckets import Buckets
from copd_megatron.objectives.drift import LOW_SUPPORT
from copd_megatron.objectives.token_stats import overlap, token_stats
from copd_megatron.rollout.embedded import EmbeddedEngine
from copd_megatron.rollout.types import Prompt, Rollout, Sampling
from copd_megatron.worker.actor import attach

Pairs = list[tuple[float, float]]
Read = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Asking:
    """How models are asked: the prompts, how responses are sampled (one per prompt) and their seed, and how many of its
    likeliest tokens a model tells."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    seed: int
    top_k: int


def seen_by_student(
    student: EmbeddedEngine, teacher: EmbeddedEngine, overlaps: Sequence[int], asking: Asking
) -> dict[str, Pairs]:
    """`overlap@k` for each k of `overlaps` and `symkl`, on the student's own rollouts."""
    rollouts = _scored(teacher, student.generate(asking.prompts, asking.sampling, asking.seed), asking)
    temperature = asking.sampling.temperature

    def read(
        logits: torch.Tensor, ids: torch.Tensor, top_ids: torch.Tensor, top_logprobs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        buckets, _ = _compared(logits, ids, top_ids, top_logprobs, temperature)
        shares = (overlap(logits, top_ids, k) for k in overlaps)
        return (*shares, buckets.kl("reverse") + buckets.kl("forward"))

    found = student.values(rollouts, read)
    names = [*(f"overlap@{k}" for k in overlaps), "symkl"]
    return {name: [_sum(values[place]) for values in found] for place, name in enumerate(names)}


def seen_by_teacher(student: EmbeddedEngine, teacher: EmbeddedEngine, asking: Asking) -> dict[str, Pairs]:
    """`kl`, KL(teacher ‖ student), and `low_support` (1 or 0, of 1), on the teacher's own rollouts."""
    rollouts = _scored(teacher, teacher.generate(asking.prompts, asking.sampling, asking.seed), asking)
    temperature = asking.sampling.temperature

    def read(
        logits: torch.Tensor, ids: torch.Tensor, top_ids: torch.Tensor, top_logprobs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        buckets, logprobs = _compared(logits, ids, top_ids, top_logprobs, temperature)
        return buckets.kl("forward"), logprobs

    found = student.values(rollouts, read)
    ratios = [
        float((own.double() - rollout.teacher.logprobs.double()).sum())
        for rollout, (_, own) in zip(rollouts, found, strict=True)
        if rollout.teacher is not None
    ]
    return {
        "kl": [_sum(kl) for kl, _ in found],
        "low_support": [(float(ratio < LOW_SUPPORT), 1.0) for ratio in ratios],
    }


def _scored(teacher: EmbeddedEngine, rollouts: Sequence[Rollout], asking: Asking) -> list[Rollout]:
    return attach(rollouts, teacher.score(rollouts, asking.top_k, asking.sampling.temperature))


def _compared(
    logits: torch.Tensor, ids: torch.Tensor, top_ids: torch.Tensor, top_logprobs: torch.Tensor, temperature: float
) -> tuple[Buckets, torch.Tensor]:
    """Both sides on the teacher's top-k and a tail bucket, and the student's log-probabilities of `ids`."""
    stats = token_stats(logits, ids, temperature, top_ids, entropy=False)
    return Buckets(stats.top_logprobs, stats.tail, top_logprobs), stats.logprob


def _sum(values: torch.Tensor) -> tuple[float, float]:
    return float(values.double().sum()), float(len(values))
