"""Student and teacher on the teacher's top-k and one bucket for all other tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from copd_kernels.reference import Divergence, partition_kl
from copd_megatron.objectives.token_stats import TokenStats
from copd_megatron.policy.packed import Signals


@dataclass(frozen=True)
class Buckets:
    """Log-probabilities of N tokens: of the teacher's top-k [N, K], and of all other tokens together, the tails [N].

    The student's carry a gradient. K = 0 if the teacher was not asked for a top-k. `teacher_tail` is None where no more
    is known than that the teacher's probabilities add up to 1.
    """

    student: torch.Tensor
    student_tail: torch.Tensor
    teacher: torch.Tensor
    teacher_tail: torch.Tensor | None = None

    @property
    def k(self) -> int:
        """K."""
        return self.teacher.shape[-1]

    def kl(self, kind: Divergence, jsd_beta: float = 0.5) -> torch.Tensor:
        """The divergence [N] in nats (`reference.partition_kl`)."""
        return partition_kl(self.student, self.student_tail, self.teacher, kind, jsd_beta, self.teacher_tail)


def is_scored(signals: Signals) -> torch.Tensor:
    """bool [R]: rows that a teacher has scored; rows of weight 0 take part in nothing."""
    return (signals.source >= 0) & (signals.weight != 0)


def teacher_ids(signals: Signals) -> torch.Tensor:
    """The teachers' top-k int64 [R, K]; K = 0 if they were not asked.

    Rows that no teacher has scored hold id 0, which every vocabulary has.
    """
    if signals.teacher_top_ids is None:
        return signals.source.new_zeros(len(signals.source), 0)
    return torch.where(is_scored(signals)[:, None], signals.teacher_top_ids, 0)


def buckets_of(student: TokenStats, signals: Signals, rows: torch.Tensor) -> Buckets:
    """Of the `rows` int64 [N], where `student` is at `teacher_ids`."""
    logprobs, tail = signals.teacher_top_logprobs, signals.teacher_tail
    return Buckets(
        student=student.top_logprobs[rows],
        student_tail=student.tail[rows],
        teacher=student.top_logprobs.detach()[rows] if logprobs is None else logprobs[rows],
        teacher_tail=None if tail is None else tail[rows],
    )
