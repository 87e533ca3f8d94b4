"""On-policy distillation losses: what a teacher's opinion of the student's own tokens contributes.

A new loss of a teacher's log-probabilities is a function here and a line in `OPD_LOSSES`; one of its logits, over the
whole vocabulary, a line in `FULL_LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from copd_kernels.reference import Divergence
from copd_kernels.token_kl import token_kl
from copd_kernels.vocabulary import Vocabulary
from copd_megatron.objectives.buckets import Buckets
from copd_megatron.objectives.grpo import clipped_surrogate
from copd_megatron.objectives.settings import LossSettings


@dataclass(frozen=True)
class CrossTokens:
    """Tokens that a teacher has scored, `N` of them.

    Of the sampled tokens: the student's `logprobs` [N] with gradient, its `old_logprobs` [N] before the first update on
    this batch, `importance` [N] (`correction.importance_weights`) and the teacher's `teacher_logprobs` [N]. `buckets`
    are both on the teacher's top-k and a tail.
    """

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    importance: torch.Tensor
    teacher_logprobs: torch.Tensor
    buckets: Buckets


def sampled_advantage(
    teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor, beta: float = 1.0, clip: float = 5.0
) -> torch.Tensor:
    """Â = β·clip(δ, ±clip), δ = log π_teacher − log π_student of the sampled token; a constant [N].

    It is used as it is: whitening it over the batch would take away its mean, which is the very distance to the
    teacher (docs/method.md, pitfalls 8 and 9).
    """
    return beta * (teacher_logprobs - student_logprobs).detach().clamp(-clip, clip)


def sampled(tokens: CrossTokens, settings: LossSettings) -> torch.Tensor:
    """The paper's loss [N]: δ as the advantage in GRPO's surrogate, in expectation the gradient of reverse KL."""
    advantages = sampled_advantage(tokens.teacher_logprobs, tokens.old_logprobs, settings.beta, settings.delta_clip)
    loss, _ = clipped_surrogate(tokens.logprobs, tokens.old_logprobs, advantages, settings.clip_low, settings.clip_high)
    return tokens.importance * loss


def topk_reverse(tokens: CrossTokens, settings: LossSettings) -> torch.Tensor:
    """β KL(student ‖ teacher) [N] on the teacher's top-k and a tail bucket."""
    return _divergence(tokens, settings, "reverse")


def topk_forward(tokens: CrossTokens, settings: LossSettings) -> torch.Tensor:
    """β KL(teacher ‖ student) [N] on the teacher's top-k and a tail bucket."""
    return _divergence(tokens, settings, "forward")


def jsd(tokens: CrossTokens, settings: LossSettings) -> torch.Tensor:
    """β times the generalised Jensen-Shannon divergence [N] on the teacher's top-k and a tail bucket."""
    return _divergence(tokens, settings, "jsd")


def _divergence(tokens: CrossTokens, settings: LossSettings, kind: Divergence) -> torch.Tensor:
    """A divergence is a loss and no advantage: it does not depend on the sampled token, so as an advantage its
    expected gradient would be zero (docs/method.md, pitfall 1). For the same reason it has no importance weight."""
    if tokens.buckets.k == 0:
        raise ValueError(
            f"opd.loss {settings.opd_loss} needs the teacher's top-k, and the teacher was not asked for it"
        )
    return settings.beta * tokens.buckets.kl(kind, settings.jsd_beta)


def full_vocabulary(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    weights: torch.Tensor,
    vocabulary: Vocabulary | None,
    settings: LossSettings,
    overwrite: bool,
) -> torch.Tensor:
    """Σ_r weight_r · β · D(student_r, teacher_r) over the whole vocabulary, a scalar with gradient.

    D is `FULL_LOSSES[settings.opd_loss]`. Logits of both sides [R, Vp], the columns of `vocabulary`; rows of `weights`
    [R] 0 are not read. With `overwrite` kernels put the gradient in the place of the student's logits, which nobody may
    need any more. Collective over the vocabulary's group.
    """
    result = token_kl(
        logits,
        teacher_logits,
        FULL_LOSSES[settings.opd_loss],
        settings.jsd_beta,
        settings.temperature,
        weights=weights,
        gradient="overwrite" if overwrite else "later",
        vocabulary=vocabulary,
    )
    return settings.beta * result.loss.sum()


OPD_LOSSES: Mapping[str, Callable[[CrossTokens, LossSettings], torch.Tensor]] = {
    "sampled": sampled,
    "topk_reverse": topk_reverse,
    "topk_forward": topk_forward,
    "jsd": jsd,
}

FULL_LOSSES: Mapping[str, Divergence] = {"full_reverse": "reverse", "full_forward": "forward", "full_jsd": "jsd"}
