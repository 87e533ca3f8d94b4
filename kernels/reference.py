"""What every kernel computes, in plain torch: one function per quantity, written to be read and to be compared with.

Notation: p is the student's distribution at a token, q the teacher's. Shapes: `T` tokens, `V` vocabulary, `K` top-k,
`N` outcomes of any distribution. Arithmetic is float32 whatever the logits are (float64 stays float64). Everything is
differentiable with respect to the student; teachers are constants.

Logits of −∞ (a masked vocabulary) are allowed: such a token is never said, and where its log-probability is needed it
counts as `LOGPROB_FLOOR`, without gradient. NaN, or +∞, anywhere in a row makes that row's results NaN, and no other's.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

Divergence = Literal["reverse", "forward", "jsd"]
Tail = Literal["bucket", "renormalise"]

TAIL_FLOOR = 1e-6
"""Smallest mass of a tail bucket. A teacher's is 1 − Σ of float32 probabilities, whose rounding is a tenth of this."""

LOGPROB_FLOOR = -100.0
"""Teachers may report −inf for a token that they never say; 0·inf is not a number, 0·100 is 0."""


def topk(logits: torch.Tensor, k: int, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k largest of `logits` [T, V]: ids int64 [T, k] best first, log-probabilities [T, k], log Σ exp [T].

    Among equal logits the lower id ranks first, as in a stable descending sort; NaN ranks above all. No gradient.
    """
    with torch.no_grad():
        ids = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        logprobs, _, logsumexp = logprobs_at(logits, ids, temperature)
    return ids, logprobs, logsumexp


def topk_overlap(student_logits: torch.Tensor, teacher: torch.Tensor, k: int) -> torch.Tensor:
    """|TopK(student) ∩ TopK(teacher)| / k at every token (docs/method.md, "Overlap").

    `student_logits` [T, V]; `teacher` is its ids int64 [T, K] best first, K ≥ k, or its logits [T, V]. Returns float32
    [T] in [0, 1]. Among equal logits the lower id ranks first, as in a stable descending sort. A teacher's token i is
    in the student's top-k if fewer than k tokens rank before it:

        rank(i) = |{v : x_v > x_i}| + |{v < i : x_v = x_i}|

    Raises ValueError if the teacher gave fewer than k tokens.
    """
    teacher_ids = topk(teacher, k)[0] if teacher.is_floating_point() else teacher
    check_overlap(k, teacher_ids)
    share = (ranks_of(student_logits, teacher_ids[..., :k]) < k).float().sum(-1) / k
    unknown = student_logits.isnan().any(-1)
    if teacher.is_floating_point():
        unknown |= teacher.isnan().any(-1)
    return share.masked_fill(unknown, math.nan)


def check_overlap(k: int, teacher_ids: torch.Tensor) -> None:
    """Raises ValueError if the teacher gave fewer than k tokens [T, K]."""
    if not 1 <= k <= teacher_ids.shape[-1]:
        raise ValueError(
            f"overlap@{k}: k must lie between 1 and {teacher_ids.shape[-1]}, the number of tokens the teacher gave; "
            "lower k or ask it for more"
        )


def ranks_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """How many tokens of `logits` [T, V] rank before each of `ids` int64 [T, N]; int64 [T, N], as in `topk_overlap`."""
    vocabulary = torch.arange(logits.shape[-1], device=logits.device)
    ranks = []
    for column in ids.split(1, dim=-1):
        logit = logits.gather(-1, column)
        ranks.append(((logits > logit) | ((logits == logit) & (vocabulary < column))).sum(-1))
    return torch.stack(ranks, dim=-1)


def logprobs_at(
    logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities [T, N] of `ids` int64 [T, N], and without gradient entropy [T] in nats and log Σ exp [T], of
    `logits` [T, V] at `temperature`.

    The row's largest logit is taken off first and log-probabilities are formed from the remainders: log Z is then
    small, and a mass close to 1 keeps its distance from 1 (the tail bucket depends on it).
    """
    scaled = at_temperature(logits, temperature)
    peak = scaled.detach().amax(dim=-1, keepdim=True)
    below = scaled - peak
    weights = below.exp()
    z = weights.sum(dim=-1, keepdim=True)
    logprobs = below.gather(-1, ids) - z.log()
    with torch.no_grad():
        entropy = torch.special.entr(weights / z).sum(dim=-1)
        logsumexp = (peak + z.log())[..., 0]
    return logprobs, entropy, logsumexp


def divergence(
    student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, kind: Divergence, jsd_beta: float = 0.5
) -> torch.Tensor:
    """Divergence of two complete distributions, log-probabilities [..., N] each; returns [...], in nats.

        reverse   KL(p‖q) = Σ p (log p − log q)
        forward   KL(q‖p) = Σ q (log q − log p)
        jsd       β KL(q‖m) + (1 − β) KL(p‖m),  m = βq + (1 − β)p

    `jsd_beta` 0 and 1 give forward and reverse, as in Agarwal et al., arXiv 2306.13649, whose generalised
    Jensen-Shannon divergence this is; strictly between, it is not rescaled and goes to 0 with β or 1 − β.
    """
    teacher = teacher_logprobs.detach().to(student_logprobs.dtype).clamp(min=LOGPROB_FLOOR)
    return divergence_terms(student_logprobs, teacher, kind, jsd_beta).sum(-1)


def divergence_terms(
    student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, kind: Divergence, jsd_beta: float
) -> torch.Tensor:
    """The terms [..., N] whose sum is `divergence`; the teacher's may be of some of the outcomes."""
    log_p, log_q = floor_never(student_logprobs), floor_never(teacher_logprobs)
    kind = kind_at(kind, jsd_beta)
    if kind == "reverse":
        return log_p.exp() * (log_p - log_q)
    if kind == "forward":
        return log_q.exp() * (log_q - log_p)
    log_m = torch.logaddexp(log_q + math.log(jsd_beta), log_p + math.log1p(-jsd_beta))
    teacher_part = log_q.exp() * (log_q - log_m)
    student_part = log_p.exp() * (log_p - log_m)
    return jsd_beta * teacher_part + (1 - jsd_beta) * student_part


def kind_at(kind: Divergence, jsd_beta: float) -> Divergence:
    """JSD at its ends is forward (β = 0) or reverse (β = 1)."""
    if kind == "jsd" and jsd_beta in (0.0, 1.0):
        return "forward" if jsd_beta == 0.0 else "reverse"
    return kind


def floor_never(logprobs: torch.Tensor) -> torch.Tensor:
    """−∞ becomes `LOGPROB_FLOOR`, a constant."""
    return logprobs.masked_fill(logprobs == -math.inf, LOGPROB_FLOOR)


def token_kl(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    kind: Divergence,
    jsd_beta: float = 0.5,
    temperature: float = 1.0,
) -> torch.Tensor:
    """`divergence` over the whole vocabulary: logits [T, V] of both sides, at the same temperature; returns [T]."""
    student = torch.log_softmax(at_temperature(student_logits, temperature), dim=-1)
    teacher = torch.log_softmax(at_temperature(teacher_logits, temperature), dim=-1).detach().to(student.dtype)
    return divergence_terms(student, teacher, kind, jsd_beta).sum(-1)


def with_tail(top_logprobs: torch.Tensor) -> torch.Tensor:
    """Complete a distribution of which only some outcomes are known: [..., K] → [..., K + 1], all in logs.

    The last entry, the tail bucket, is log(1 − Σ exp(top)), floored at `TAIL_FLOOR`; computed as log(−expm1(Σ)),
    which is log1p(−exp(Σ)) with better rounding where the top holds nearly everything. Below the floor the tail is
    a constant without gradient. It is for teachers, of whom no more is known: where the logits are there, the tail is
    `tail_logprob`.
    """
    total = torch.logsumexp(top_logprobs, dim=-1, keepdim=True).clamp(max=math.log1p(-TAIL_FLOOR))
    return torch.cat([top_logprobs, torch.log(-torch.expm1(total))], dim=-1)


def floor_tail(tail_logprob: torch.Tensor) -> torch.Tensor:
    """A tail bucket is no less than `TAIL_FLOOR`; below it is a constant. NaN stays."""
    return tail_logprob.masked_fill(tail_logprob < math.log(TAIL_FLOOR), math.log(TAIL_FLOOR))


def partition_kl(
    student_top_logprobs: torch.Tensor,
    student_tail: torch.Tensor,
    teacher_top_logprobs: torch.Tensor,
    kind: Divergence,
    jsd_beta: float = 0.5,
    teacher_tail: torch.Tensor | None = None,
) -> torch.Tensor:
    """`divergence` over K outcomes and one bucket for all others; [T, K] log-probabilities at the same ids → [T].

    It is a divergence of two whole distributions, so up to `TAIL_FLOOR` it is never negative, zero only where they
    agree on every bucket, and never above the divergence over the whole vocabulary, which it equals when the K outcomes
    are all there are. Without the bucket this does not hold (docs/method.md, pitfalls 2, 3 and 4). `student_tail` [T]
    is the log-probability of the student's bucket, summed from the logits; so is `teacher_tail` [T] if given, else the
    teacher's is 1 − Σ.
    """
    student = _with_known_tail(student_top_logprobs, student_tail)
    if teacher_tail is None:
        return divergence(student, with_tail(widen(teacher_top_logprobs)), kind, jsd_beta)
    return divergence(student, _with_known_tail(teacher_top_logprobs, teacher_tail), kind, jsd_beta)


def _with_known_tail(top_logprobs: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
    return torch.cat([widen(top_logprobs), floor_tail(widen(tail))[..., None]], dim=-1)


def topk_kl(
    student_logits: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    kind: Divergence,
    jsd_beta: float = 0.5,
    tail: Tail = "bucket",
    temperature: float = 1.0,
) -> torch.Tensor:
    """`partition_kl` on the teacher's top-k: `student_logits` [T, V], teacher's [T, K] distinct ids and logprobs → [T].

    The student's logits at `temperature` are at that of the teacher's log-probabilities. With `tail` "renormalise"
    there is no bucket, and both sides are renormalised over the K tokens. Gradient with respect to the student's
    logits, away from the floor: reverse p_v(log(p_b/q_b) − KL), forward p_v(1 − q_b/p_b), where b is the bucket of v.
    """
    if tail == "renormalise":
        top = at_temperature(student_logits.gather(-1, teacher_ids), temperature)
        return renormalised_kl(top, teacher_logprobs, kind, jsd_beta)
    student = torch.log_softmax(at_temperature(student_logits, temperature), dim=-1)
    top = student.gather(-1, teacher_ids)
    return partition_kl(top, tail_logprob(student, teacher_ids), teacher_logprobs, kind, jsd_beta)


def renormalised_kl(
    student_top: torch.Tensor, teacher_top: torch.Tensor, kind: Divergence, jsd_beta: float = 0.5
) -> torch.Tensor:
    """`divergence` of both sides renormalised over K outcomes, logits or log-probabilities [T, K]; returns [T]."""
    student, teacher = (torch.log_softmax(widen(side), dim=-1) for side in (student_top, teacher_top))
    return divergence(student, teacher, kind, jsd_beta)


def tail_logprob(logprobs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log Σ exp [T] of `logprobs` [T, V] over all tokens but `ids` int64 [T, K]: summed, not 1 − Σ, which cancels."""
    listed = torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, ids, True)
    return torch.logsumexp(floor_never(logprobs).masked_fill(listed, -math.inf), dim=-1)


def at_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Widened logits, divided by the temperature unless it is 1."""
    return widen(logits) if temperature == 1 else widen(logits) / temperature


def widen(values: torch.Tensor) -> torch.Tensor:
    """float32, or float64 if that is what came."""
    return values if values.dtype == torch.float64 else values.float()
