"""The loss of one branch's update: GRPO on its own capability and distillation from its teachers, added together.

    loss = Σ_r weight_r · (native: w_r · surrogate(Â = group advantage) | teacher: the loss called opd_loss, times β)

over response tokens r, where w_r corrects for the sampling engine. In Phase I every token is native; in Phase II both
kinds come in one update; a student without own data has only the second (docs/method.md, "Algorithm").
"""

from __future__ import annotations

import torch

from copd_megatron.objectives.buckets import buckets_of, is_scored, teacher_ids
from copd_megatron.objectives.correction import importance_weights, mismatch_kl, sampled_kl
from copd_megatron.objectives.distill import FULL_LOSSES, OPD_LOSSES, CrossTokens, full_vocabulary
from copd_megatron.objectives.drift import pair_stats
from copd_megatron.objectives.grpo import clipped_surrogate
from copd_megatron.objectives.settings import LossSettings
from copd_megatron.objectives.token_stats import token_stats
from copd_megatron.objectives.totals import Stats, total
from copd_megatron.objectives.vocabulary import Vocabulary
from copd_megatron.policy.packed import Signals


def branch_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    signals: Signals,
    vocabulary: Vocabulary | None = None,
    *,
    settings: LossSettings,
) -> tuple[torch.Tensor, Stats]:
    """Loss (a scalar with gradient) and statistics of one micro-batch; `logits` [R, Vp], `targets` int64 [R].

    Columns of the logits are those of `vocabulary`, by default all. Where it is split over the ranks of a group, each
    of them calls this with the same targets and signals, gets the same loss and statistics, and its backward pass
    yields the gradient with respect to the rank's own columns.

    Because `signals.weight` already carries the mean, losses of micro-batches and ranks add up to the batch's. Rows of
    weight 0 take part in nothing, whatever their other entries are. Statistics are (sum, count) over tokens:

        entropy            of the student, in nats; every token
        mismatch/kl        KL(engine ‖ trainer); every token
        mismatch/clipped   share of tokens whose ratio of trainer to engine was truncated or masked; every token
        rl/surrogate       the clipped surrogate without importance weights; native tokens
        rl/clipped         share of tokens that clipping has left without gradient; native tokens
        opd/delta          δ = log π_teacher − log π_student of the sampled token, before its clipping
        opd/kl             KL(student ‖ teacher): on top-k and tail, or from samples (k3) without a top-k
        overlap/t symkl/t kl_forward/t
                           for teacher index t, as in `drift_stats`; (0, 0) without a top-k

    Raises ValueError if scored rows lack what `settings.opd_loss` or `settings.overlap_k` needs.
    """
    native = ((signals.source < 0) & (signals.weight != 0)).nonzero()[:, 0]
    cross = is_scored(signals).nonzero()[:, 0]
    top_ids = teacher_ids(signals)
    student = token_stats(logits, targets, settings.temperature, top_ids, vocabulary)
    old = student.logprob.detach() if signals.old_logprobs is None else signals.old_logprobs
    importance, corrected = importance_weights(
        old, signals.engine_logprobs, settings.importance_cap, settings.two_sided_mask
    )
    surrogate, clipped = clipped_surrogate(
        student.logprob[native], old[native], signals.advantage[native], settings.clip_low, settings.clip_high
    )
    if cross.numel() and signals.teacher_logprobs is None:
        raise ValueError(f"{cross.numel()} tokens belong to a teacher, but the batch has no teacher_logprobs")
    tokens = CrossTokens(
        logprobs=student.logprob[cross],
        old_logprobs=old[cross],
        importance=importance[cross],
        teacher_logprobs=old[cross] if signals.teacher_logprobs is None else signals.teacher_logprobs[cross],
        buckets=buckets_of(student, signals, cross),
    )
    counted = torch.cat([native, cross])
    stats = {
        "entropy": total(student.entropy[counted]),
        "mismatch/kl": total(mismatch_kl(old[counted], signals.engine_logprobs[counted])),
        "mismatch/clipped": total(corrected[counted]),
        "rl/surrogate": total(surrogate),
        "rl/clipped": total(clipped),
        **_teacher_stats(tokens),
        **pair_stats(
            logits.detach(), cross, top_ids[cross], tokens.buckets, signals.source[cross], settings, vocabulary
        ),
    }
    parts = []
    if native.numel() or not cross.numel():  # where all tokens are a teacher's, no gradient goes this way
        parts.append((signals.weight[native] * importance[native] * surrogate).sum())
    if cross.numel() and settings.opd_loss in FULL_LOSSES:
        parts.append(_full_loss(logits, signals, vocabulary, settings, alone=not parts))
    elif cross.numel():
        parts.append((signals.weight[cross] * OPD_LOSSES[settings.opd_loss](tokens, settings)).sum())
    return sum(parts[1:], parts[0]), stats


def _full_loss(
    logits: torch.Tensor, signals: Signals, vocabulary: Vocabulary | None, settings: LossSettings, alone: bool
) -> torch.Tensor:
    """The teachers' part of the loss over the whole vocabulary; `alone` if nothing else has a gradient."""
    if signals.teacher_logits is None:
        raise ValueError(
            f"opd.loss {settings.opd_loss} needs the teacher's logits, which only a resident one has: "
            "set teacher.where to resident"
        )
    weights = signals.weight.masked_fill(signals.source < 0, 0.0)
    return full_vocabulary(logits, signals.teacher_logits(), weights, vocabulary, settings, overwrite=alone)


@torch.no_grad()
def _teacher_stats(tokens: CrossTokens) -> Stats:
    kl = tokens.buckets.kl("reverse") if tokens.buckets.k else sampled_kl(tokens.old_logprobs, tokens.teacher_logprobs)
    return {"opd/delta": total(tokens.teacher_logprobs - tokens.old_logprobs), "opd/kl": total(kl)}
