"""Divergence between student and teacher over the whole vocabulary, from the logits of both.

    d loss / d s_v:   reverse  p_v (log p_v/q_v − KL)
                      forward  p_v − q_v
                      jsd      (1 − β) p_v (log p_v/m_v − KL(p ‖ m))

`device/token_kl.py` says how one sweep gives the sums. Bytes per logit in bfloat16: 4 read and 2 written where loss and
gradient are formed in one launch, as far as the rows are still in L2 when they are read again (JSD reads them a third
time); 10 where the gradient waits for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from copd_kernels import reference, reference_parallel
from copd_kernels.arguments import FLOATS, check_kind, check_logits, check_per_token
from copd_kernels.choice import on_triton
from copd_kernels.finished import with_gradient
from copd_kernels.logprobs import with_unit_columns
from copd_kernels.reference import Divergence, kind_at
from copd_kernels.topk_kl import KINDS, When
from copd_kernels.vocabulary import Vocabulary, split_of

ALL, SUMS, MIDDLE, FINISH = range(4)
"""Phases of `device.token_kl.token_kl_kernel`."""


@dataclass(frozen=True)
class TokenKl:
    """Per token, float32 [T]: weighted `loss` with gradient; without one the student's `entropy` in nats and the
    log-probability `logprob` of the targets, 0 if none were given. In rows of weight 0 all are 0."""

    loss: Tensor
    entropy: Tensor
    logprob: Tensor

    @property
    def flagged(self) -> Tensor:
        """bool [T]: tokens whose loss is NaN, because NaN or +∞ is among their logits."""
        return self.loss.detach().isnan()


@dataclass(frozen=True)
class _Call:
    """What does not change between the phases."""

    kind: Divergence
    jsd_beta: float
    temperature: float
    targets: Tensor | None
    part: Vocabulary | None


def token_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: Divergence,
    jsd_beta: float = 0.5,
    temperature: float = 1.0,
    *,
    targets: Tensor | None = None,
    weights: Tensor | None = None,
    gradient: When = "later",
    vocabulary: Vocabulary | None = None,
) -> TokenKl:
    """`reference.token_kl` times `weights`, with entropy and log-probabilities of `targets` int64 [T].

    Logits of both sides [T, Vp] (columns of `vocabulary`, by default all), at the same `temperature`. Rows whose
    `weights` [T] are 0, such as padding, are not read. With `gradient` "now" the gradient is formed with the loss, in
    one launch where the vocabulary is whole; "overwrite" does so in the memory of `student_logits`. No other [T, V] is
    ever made. Rows need not be next to each other.

    Collective over the vocabulary's group: one all-gather of 8 numbers per token, for JSD one more of 2. Raises
    ValueError or TypeError naming the argument that is wrong.
    """
    check_logits("student_logits", student_logits)
    check_logits("teacher_logits", teacher_logits, ("student_logits", student_logits))
    check_kind(kind, jsd_beta, temperature)
    beside = ("student_logits", student_logits)
    if targets is not None:
        check_per_token("targets", targets, beside, formats=(torch.int64,))
    if weights is not None:
        check_per_token("weights", weights, beside, formats=(*FLOATS, torch.bool))
    weights = student_logits.new_ones(len(student_logits), dtype=torch.float32) if weights is None else weights
    weights = weights.detach().float().contiguous()
    targets = None if targets is None else targets.contiguous()
    call = _Call(kind_at(kind, jsd_beta), jsd_beta, temperature, targets, split_of(student_logits, vocabulary))
    if not on_triton(student_logits):
        return _by_reference(student_logits, teacher_logits, weights, call)
    teacher_logits = teacher_logits.detach()
    if gradient == "later" or not student_logits.requires_grad:
        return TokenKl(*_TokenKl.apply(student_logits, teacher_logits, weights, call))
    out, result = loss_and_gradient(student_logits.detach(), teacher_logits, weights, call, gradient == "overwrite")
    return TokenKl(with_gradient(student_logits, out[:, 0], result), out[:, 1], out[:, 2])


def _by_reference(student: Tensor, teacher: Tensor, weights: Tensor, call: _Call) -> TokenKl:
    rows = weights.nonzero()[:, 0]
    ids = torch.zeros_like(rows) if call.targets is None else call.targets[rows]
    chosen, part = student[rows], call.part
    if part is None:
        loss = reference.token_kl(chosen, teacher[rows], call.kind, call.jsd_beta, call.temperature)
        logprob, entropy, _ = reference.logprobs_at(chosen.detach(), ids[:, None], call.temperature)
    else:
        loss = reference_parallel.token_kl(
            chosen, teacher[rows], call.kind, call.jsd_beta, call.temperature, part
        )  # fmt: skip
        with torch.no_grad():
            logprobs = reference_parallel.log_softmax(chosen, call.temperature, part)
            logprob = reference_parallel.logprobs_at(logprobs, ids[:, None], part)
            entropy = part.add(torch.special.entr(logprobs.exp()).sum(-1))
    nothing = loss.detach().new_zeros(len(student))
    loss = nothing.index_put((rows,), loss * weights[rows].to(loss.dtype))
    logprob = logprob[:, 0] if call.targets is not None else torch.zeros_like(entropy)
    return TokenKl(loss, nothing.index_put((rows,), entropy), nothing.index_put((rows,), logprob))


class _TokenKl(Function):
    """Sums in the forward pass, gradient in the backward pass; between them the logits and 8 numbers per row."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, call: _Call) -> tuple[Tensor, ...]:
        sums = _sums(student, teacher, weights, call)
        out = _launch(FINISH, student, teacher, weights, sums, call)
        ctx.save_for_backward(student, teacher, weights, sums)
        ctx.call = call
        loss, entropy, logprob = out.unbind(-1)
        ctx.mark_non_differentiable(entropy, logprob)
        return loss.clone(), entropy.clone(), logprob.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
        student, teacher, weights, sums = ctx.saved_tensors
        result = torch.empty_like(student, memory_format=torch.contiguous_format)
        _launch(FINISH, student, teacher, weights * grad, sums, ctx.call, result)
        return result, None, None, None


def loss_and_gradient(
    student: Tensor, teacher: Tensor, weights: Tensor, call: _Call, overwrite: bool
) -> tuple[Tensor, Tensor]:
    """`out` [T, 3] (weighted loss, entropy, log-probability) and the gradient [T, Vp] of the loss."""
    source = with_unit_columns(student)
    result = source if overwrite else torch.empty_like(student, memory_format=torch.contiguous_format)
    if call.part is None:
        out = _launch(ALL, source, teacher, weights, None, call, result)
    else:
        out = _launch(FINISH, source, teacher, weights, _sums(source, teacher, weights, call), call, result)
    return out, student.copy_(result) if overwrite else result


def _sums(student: Tensor, teacher: Tensor, weights: Tensor, call: _Call) -> Tensor:
    """The row's sums [T, 8] over all columns; see `device/token_kl.py`."""
    sums = torch.empty(len(student), 8, device=student.device)
    _launch(SUMS, student, teacher, weights, sums, call)
    if call.part is not None:
        sums = _whole(call.part.gather(sums), call.kind)
    if call.kind == "jsd":
        _launch(MIDDLE, student, teacher, weights, sums, call)
        if call.part is not None:
            sums[:, [4, 6]] = call.part.gather(sums[:, [4, 6]]).sum(0)
    return sums


def _whole(sums: Tensor, kind: Divergence) -> Tensor:
    """[T, 8] of all columns from every rank's, [ranks, T, 8]: each sum is brought to the largest shift first."""
    shift_s, shift_t, zs, zt, apart, spread, lost, said = sums.unbind(-1)
    peak_s, below_s, ws = _to_largest(shift_s, zs)
    peak_t, below_t, wt = _to_largest(shift_t, zt)
    spread = ws * (spread + zs * below_s)
    if kind == "reverse":  # Σ exp(s')(s' − t'), of which the share `lost` has no t'
        apart, lost = ws * (apart + zs * below_s - (zs - lost) * below_t), ws * lost
    elif kind == "forward":
        apart, lost = wt * (apart + zt * below_t - (zt - lost) * below_s), wt * lost
    sums = torch.stack([ws * zs, wt * zt, apart, spread, lost, said], dim=-1).sum(0)
    return torch.cat([torch.stack([peak_s, peak_t], dim=-1), sums], dim=-1)


def _to_largest(shift: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest shift [T] of ranks [ranks, T] with any mass; how far each is below it, and exp of that."""
    peak = torch.where(z > 0, shift, -torch.inf).amax(0)
    peak = torch.where(peak.isfinite(), peak, 0.0)
    below = torch.where(z > 0, shift - peak, 0.0)
    return peak, below, below.exp()


def _launch(
    phase: int,
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    sums: Tensor | None,
    call: _Call,
    result: Tensor | None = None,
) -> Tensor:
    """One phase of the kernel; returns `out` [T, 3], which phases ALL and FINISH fill."""
    from copd_kernels.device import launch
    from copd_kernels.device.token_kl import token_kl_kernel

    student, teacher = with_unit_columns(student), with_unit_columns(teacher)
    out = torch.empty(len(student), 3, device=student.device)
    strides = (student.stride(0), teacher.stride(0), 0 if result is None else result.stride(0))
    launch.run(
        token_kl_kernel, "token_kl", len(student),
        student, teacher, student if result is None else result,
        weights if call.targets is None else call.targets, weights, out if sums is None else sums, out,
        student.shape[1], *strides, 0 if call.part is None else call.part.start, 1 / call.temperature, call.jsd_beta,
        widths=(student.shape[1], *strides),
        KIND=KINDS[call.kind], PHASE=phase, TARGETS=call.targets is not None, GRADIENT=result is not None,
        BLOCK=launch.BLOCK,
    )  # fmt: skip
    return out
