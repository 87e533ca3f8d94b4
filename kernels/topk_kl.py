"""Divergence between student and teacher on the teacher's top-k and a tail bucket, from the student's logits.

    Z = Σ_v exp(x_v − M),  log p_i = x_i − M − log Z,  log p_tail = log Σ_{v not listed} exp(x_v − M) − log Z
    loss = D(p_1 … p_K, p_tail ‖ q_1 … q_K, 1 − Σ q)                                  (`reference.divergence`)
    d loss / d x_v = p_v (e_b / p_b − Σ_b e_b),  e_b = d loss / d log p_b, b the outcome that v belongs to

Bytes per logit in bfloat16: 2 read and 2 written where loss and gradient are formed in one launch, as far as the row is
still in L2 when it is read again; 6 where the gradient waits for the backward pass.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from copd_kernels import reference, reference_parallel
from copd_kernels.arguments import FLOATS, check_kind, check_logits, check_per_token, check_top
from copd_kernels.choice import on_triton
from copd_kernels.finished import with_gradient
from copd_kernels.logprobs import partition, with_unit_columns
from copd_kernels.reference import Divergence, Tail, kind_at
from copd_kernels.vocabulary import Vocabulary, split_of, total

When = Literal["later", "now", "overwrite"]
"""When the gradient is formed: in the backward pass; together with the loss; and then in the logits' own memory."""

LOG_TAIL_FLOOR = math.log(reference.TAIL_FLOOR)

KINDS: dict[Divergence, int] = {"reverse": 0, "forward": 1, "jsd": 2}


def topk_kl(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    kind: Divergence,
    jsd_beta: float = 0.5,
    tail: Tail = "bucket",
    temperature: float = 1.0,
    *,
    weights: Tensor | None = None,
    gradient: When = "later",
    vocabulary: Vocabulary | None = None,
) -> Tensor:
    """`reference.topk_kl` times `weights`, float32 [T] in nats; see there for `kind`, `jsd_beta` and `tail`.

    `student_logits` [T, Vp] (columns of `vocabulary`, by default all), teacher's `teacher_ids` and `teacher_logprobs`
    [T, K] at the same `temperature`, distinct ids, K ≤ 128. Rows whose `weights` [T] are 0, such as padding, are not
    read. An id outside the vocabulary, or NaN, makes the loss of its token NaN. With `gradient` "now" the gradient is
    formed with the loss, in one launch where the vocabulary is whole; "overwrite" does so in the memory of
    `student_logits`, which then hold it. Rows need not be next to each other.

    Collective over the vocabulary's group. Raises ValueError or TypeError naming the argument that is wrong.
    """
    check_logits("student_logits", student_logits)
    check_top(student_logits, teacher_ids, teacher_logprobs)
    check_kind(kind, jsd_beta, temperature, tail)
    if weights is not None:
        check_per_token("weights", weights, ("student_logits", student_logits), formats=(*FLOATS, torch.bool))
        weights = weights.detach().float().contiguous()
    kind, part = kind_at(kind, jsd_beta), split_of(student_logits, vocabulary)
    arguments = (student_logits, teacher_ids.long(), teacher_logprobs.detach(), kind, jsd_beta, temperature)
    if tail == "renormalise":
        return _renormalised(*arguments, weights, part)
    if not on_triton(student_logits):
        return _by_reference(*arguments, weights, part)
    if gradient == "later" or part is not None or not student_logits.requires_grad:
        return _by_partition(*arguments, weights, gradient, part)
    loss, result = loss_and_gradient(
        student_logits.detach(), *arguments[1:], weights, overwrite=gradient == "overwrite"
    )
    return with_gradient(student_logits, loss, result)


def _renormalised(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    kind: Divergence,
    jsd_beta: float,
    temperature: float,
    weights: Tensor | None,
    part: Vocabulary | None,
) -> Tensor:
    """Of the logits, only those at the ids have a part in it: the rest is not read, its gradient 0."""
    width = logits.shape[1]
    start, size = (0, width) if part is None else (part.start, part.size)
    column = ids - start
    owned = (column >= 0) & (column < width)
    # A rank without columns keeps its part of the graph through one that is nobody's.
    source = logits if width else torch.nn.functional.pad(logits, (0, 1))
    top = reference.at_temperature(source.gather(-1, column.masked_fill(~owned, 0)), temperature)
    top = top.masked_fill(~owned, 0.0)
    if part is not None:
        top = total(top, part)
    top = top.masked_fill((ids < 0) | (ids >= size), torch.nan)
    if weights is None:
        return reference.renormalised_kl(top, logprobs, kind, jsd_beta)
    unread = weights == 0
    logprobs = logprobs.masked_fill(unread[:, None], 0.0)
    loss = reference.renormalised_kl(top.masked_fill(unread[:, None], 0.0), logprobs, kind, jsd_beta)
    return loss * weights.to(loss.dtype)


def _by_reference(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    kind: Divergence,
    jsd_beta: float,
    temperature: float,
    weights: Tensor | None,
    part: Vocabulary | None,
) -> Tensor:
    def of(logits: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
        if part is None:
            return reference.topk_kl(logits, ids, logprobs, kind, jsd_beta, temperature=temperature)
        return reference_parallel.topk_kl(logits, ids, logprobs, kind, jsd_beta, temperature, part)

    if weights is None:
        return of(logits, ids, logprobs)
    rows = weights.nonzero()[:, 0]
    loss = of(logits[rows], ids[rows], logprobs[rows])
    return loss.new_zeros(len(logits)).index_put((rows,), loss * weights[rows].to(loss.dtype))


def _by_partition(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    kind: Divergence,
    jsd_beta: float,
    temperature: float,
    weights: Tensor | None,
    gradient: When,
    part: Vocabulary | None,
) -> Tensor:
    """The arithmetic on [T, K] in torch, between the two sweeps over the logits."""
    now = gradient != "later" and logits.requires_grad
    leaf = logits.detach().requires_grad_() if now else logits
    with torch.set_grad_enabled(now or torch.is_grad_enabled()):
        student = partition(leaf, ids, temperature, part, weights, overwrite=gradient == "overwrite")
        loss = reference.partition_kl(student.logprobs, student.tail, logprobs, kind, jsd_beta)
        if weights is not None:
            loss = loss.masked_fill(weights == 0, 0.0) * weights
    if not now:
        return loss
    (result,) = torch.autograd.grad(loss.sum(), leaf)
    return with_gradient(logits, loss.detach(), result)


def loss_and_gradient(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    kind: Divergence,
    jsd_beta: float,
    temperature: float,
    weights: Tensor | None,
    overwrite: bool,
) -> tuple[Tensor, Tensor]:
    """Weighted loss [T] and its gradient [T, V] by the kernel, as in `topk_kl`; `ids` int64 and `kind` as checked."""
    from copd_kernels.device import launch
    from copd_kernels.device.partition import topk_kl_kernel

    source = with_unit_columns(logits)
    result = source if overwrite else torch.empty_like(source, memory_format=torch.contiguous_format)
    listed, order = ids.to(torch.int32).contiguous().sort(dim=-1)
    teacher = logprobs.float().gather(-1, order)
    teacher_tail = reference.with_tail(teacher)[:, -1].contiguous()
    k = ids.shape[1]
    loss = torch.empty(len(logits), device=logits.device)
    weights = torch.ones_like(loss) if weights is None else weights
    launch.run(
        topk_kl_kernel, "topk_kl", len(logits),
        source, result, listed, teacher.clamp(min=reference.LOGPROB_FLOOR), teacher_tail, weights, loss,
        logits.shape[1], source.stride(0), result.stride(0), k, 1 / temperature, jsd_beta, LOG_TAIL_FLOOR,
        widths=(logits.shape[1], source.stride(0), result.stride(0)),
        KIND=KINDS[kind], KP=launch.SLOTS, BLOCK=launch.BLOCK,
    )  # fmt: skip
    return loss, logits.copy_(result) if overwrite else result
