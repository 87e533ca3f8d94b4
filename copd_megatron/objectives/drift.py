"""How far student and teacher are apart: measured, never trained on (docs/method.md, "Overlap")."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from copd_megatron.objectives.buckets import Buckets, buckets_of, is_scored, teacher_ids
from copd_megatron.objectives.correction import sampled_kl
from copd_megatron.objectives.settings import LossSettings
from copd_megatron.objectives.token_stats import overlap, token_stats
from copd_megatron.objectives.totals import Stats, total, totals_by
from copd_megatron.objectives.vocabulary import Vocabulary
from copd_megatron.policy.packed import Signals

LOW_SUPPORT = -5.0
"""Sequence log-ratio, in nats, below which the student hardly ever says what the teacher said."""

PAIR_STATS = ("overlap", "symkl", "kl_forward")
SQUARES = "_square"
"""`overlap_square/t` and so on are the same with each token's value squared, for its variance."""


@torch.no_grad()
def pair_stats(
    logits: torch.Tensor,
    rows: torch.Tensor,
    top_ids: torch.Tensor,
    buckets: Buckets,
    teacher: torch.Tensor,
    settings: LossSettings,
    vocabulary: Vocabulary | None = None,
) -> Stats:
    """`overlap/t`, `symkl/t` and `kl_forward/t` (see `drift_stats`) for each teacher index t.

    Of `logits` [R, Vp] the `rows` int64 [N], the teachers' `top_ids` [N, K], and what both sides think of those;
    `teacher` int64 [N] says whose they are. Everything is (0, 0) if K = 0.
    """
    if buckets.k == 0:
        return _nothing(settings, logits.device)
    return _by_teacher(_pair_values(logits, rows, top_ids, buckets, settings, vocabulary), teacher, settings)


@torch.no_grad()
def drift_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    signals: Signals,
    vocabulary: Vocabulary | None = None,
    *,
    settings: LossSettings,
) -> Stats:
    """Drift without a loss, from a forward pass alone; arguments as for `branch_loss`.

    For each teacher index t: `overlap/t` at `settings.overlap_k`; `symkl/t`, KL(S‖T) + KL(T‖S) in nats per token;
    `kl_forward/t`, KL(T‖S); and of each the mean square, as `overlap_square/t`. The divergences are those on the
    teacher's top-k and a tail bucket: never above the exact ones, and exact if the top-k is the whole vocabulary. They
    are of the states in `logits`: on the student's own rollouts overlap and symmetric KL are the paper's; on the
    teacher's own rollouts `kl_forward` is the metric `kl_teacher`, and with the base as teacher, on the base's
    rollouts, it is `kl_to_base`.

    Raises ValueError if a teacher has scored tokens but its top-k is missing or shorter than `overlap_k`.
    """
    rows = is_scored(signals).nonzero()[:, 0]
    if rows.numel() == 0:
        return _nothing(settings, logits.device, squares=True)
    top_ids = teacher_ids(signals)
    if top_ids.shape[-1] == 0:
        raise ValueError("drift needs the teacher's top-k at every scored token, and the teacher was not asked for it")
    student = token_stats(logits, targets, settings.temperature, top_ids, vocabulary, entropy=False)
    values = _pair_values(logits, rows, top_ids[rows], buckets_of(student, signals, rows), settings, vocabulary)
    values |= {name + SQUARES: numbers.double().square() for name, numbers in values.items()}
    return _by_teacher(values, signals.source[rows], settings)


def low_support(
    student_logprobs: Sequence[torch.Tensor], teacher_logprobs: Sequence[torch.Tensor], threshold: float = LOW_SUPPORT
) -> torch.Tensor:
    """Share of the teacher's own rollouts that the student can hardly say any more, as (number, rollouts) float64 [2].

    Both arguments hold one tensor [R_i] per rollout, the log-probabilities of the same tokens. A rollout counts if
    Σ log π_student − Σ log π_teacher < `threshold`. This is the metric `support`.
    """
    ratios = [
        (student.double() - teacher.double()).sum()
        for student, teacher in _same_tokens(student_logprobs, teacher_logprobs)
    ]
    return total(torch.stack(ratios) < threshold) if ratios else torch.zeros(2, dtype=torch.float64)


def kl_on_rollouts(sampler_logprobs: Sequence[torch.Tensor], other_logprobs: Sequence[torch.Tensor]) -> torch.Tensor:
    """k3 estimate of KL(sampler ‖ other) per token, on the sampler's own rollouts, as (sum, tokens) float64 [2].

    Arguments as in `low_support`. With the teacher as sampler and the student as other this is the metric `kl_teacher`;
    with the base as sampler and the branch as other, on the branch's own prompts, `kl_to_base` (RL's Razor, arXiv
    2509.04259). Both need nothing but an engine that scores.
    """
    pairs = _same_tokens(sampler_logprobs, other_logprobs)
    if not pairs:
        return torch.zeros(2, dtype=torch.float64)
    return total(torch.cat([sampled_kl(sampler.double(), other.double()) for sampler, other in pairs]))


def _pair_values(
    logits: torch.Tensor,
    rows: torch.Tensor,
    top_ids: torch.Tensor,
    buckets: Buckets,
    settings: LossSettings,
    vocabulary: Vocabulary | None,
) -> dict[str, torch.Tensor]:
    """The values [N] of `PAIR_STATS`; arguments as for `pair_stats`."""
    overlaps = overlap(logits, top_ids, settings.overlap_k, vocabulary, rows)
    reverse, forward = buckets.kl("reverse"), buckets.kl("forward")
    return dict(zip(PAIR_STATS, (overlaps, reverse + forward, forward), strict=True))


def _by_teacher(values: dict[str, torch.Tensor], teacher: torch.Tensor, settings: LossSettings) -> Stats:
    return {
        f"{name}/{index}": pairs[index]
        for name, numbers in values.items()
        for pairs in [totals_by(teacher, numbers, settings.teachers)]
        for index in range(settings.teachers)
    }


def _nothing(settings: LossSettings, device: torch.device, squares: bool = False) -> Stats:
    none = torch.zeros(2, dtype=torch.float64, device=device)
    names = [*PAIR_STATS, *(name + SQUARES for name in PAIR_STATS if squares)]
    return {f"{name}/{index}": none for name in names for index in range(settings.teachers)}


def _same_tokens(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    lengths, other_lengths = [len(logprobs) for logprobs in one], [len(logprobs) for logprobs in other]
    if lengths != other_lengths:
        raise ValueError(f"log-probabilities of different tokens: lengths {lengths} against {other_lengths}")
    return list(zip(one, other, strict=True))
