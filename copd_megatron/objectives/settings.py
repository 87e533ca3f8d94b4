"""The constants of the objectives, as plain numbers; the run's configuration fills them in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TokenLoss = Literal["sampled", "topk_reverse", "topk_forward", "jsd"]
"""Losses that need a teacher's log-probabilities of the sampled token, and of its top-k."""

FullLoss = Literal["full_reverse", "full_forward", "full_jsd"]
"""Losses over the whole vocabulary, which need the teacher's logits."""

OpdLoss = Literal[TokenLoss, FullLoss]


@dataclass(frozen=True)
class LossSettings:
    """Settings of `branch_loss` and `drift_stats`; the defaults are those of docs/method.md.

    `temperature` is the rollouts' own: the student's logits are divided by it, teachers have done so already.
    `clip_low`, `clip_high` are ε_low and ε_high of the clipped surrogate. `opd_loss` is one of `distill.OPD_LOSSES` or
    `distill.FULL_LOSSES`, `beta` its weight, `delta_clip` bounds |δ| of `sampled`, `jsd_beta` mixes `jsd` and
    `full_jsd`.
    `overlap_k` is k of overlap@k. `importance_cap` and `two_sided_mask` correct for the engine's log-probabilities
    differing from the trainer's; None leaves either out. `teachers` is the number of teachers of this branch.
    """

    temperature: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    opd_loss: OpdLoss = "sampled"
    beta: float = 1.0
    delta_clip: float = 5.0
    jsd_beta: float = 0.5
    overlap_k: int = 10
    importance_cap: float | None = 2.0
    two_sided_mask: tuple[float, float] | None = None
    teachers: int = 0
