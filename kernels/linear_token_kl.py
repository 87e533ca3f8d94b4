"""Output layer and divergence together, by chunks of tokens: the logits of a sequence are never whole.

    x = h Wᵀ,  loss = Σ_t w_t D(x_t ‖ teacher_t),  d loss / d h = G W,  d loss / d W = Gᵀ h,  G = d loss / d x

The gradient needs nothing from above but one number, so it is formed chunk by chunk with the loss: a chunk's logits are
computed, turned into G in their own memory, multiplied twice and dropped. Operations: 6 T V H, those of three matrix
products. Memory beyond inputs and results: one chunk of logits (two with a teacher's output layer), and the gradient of
W in float32 until it is rounded once at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from copd_kernels.arguments import FLOATS, check_device, check_kind, check_logits, check_per_token, check_top
from copd_kernels.reference import Divergence, Tail
from copd_kernels.token_kl import token_kl
from copd_kernels.topk_kl import topk_kl
from copd_kernels.vocabulary import Vocabulary

CHUNK_BYTES = {"cuda": 640 << 20, "cpu": 8 << 20}
"""Logits of a chunk, by device: on a GPU 2,200 tokens of 151,936 in bfloat16, enough to fill it with a matrix
product."""


@dataclass(frozen=True)
class TopK:
    """A teacher's top-k: `ids` and `logprobs` [T, K] at the student's temperature; the loss is `topk_kl`."""

    ids: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class Logits:
    """A teacher's whole logits [T, Vp]; the loss is `token_kl`."""

    logits: Tensor


@dataclass(frozen=True)
class Head:
    """A teacher's last hidden states [T, H'] and its output layer [Vp, H']: its logits, too, are never whole."""

    hidden: Tensor
    lm_head: Tensor


Teacher = TopK | Logits | Head


@dataclass(frozen=True)
class LinearTokenKl:
    """`total`, Σ of the weighted losses, a scalar with gradient; `loss` [T], its summands, without. float32, nats."""

    total: Tensor
    loss: Tensor


@dataclass(frozen=True)
class _Call:
    teacher: Teacher
    kind: Divergence
    jsd_beta: float
    tail: Tail
    temperature: float
    weights: Tensor | None
    chunk: int
    vocabulary: Vocabulary | None


def linear_token_kl(
    hidden: Tensor,
    lm_head: Tensor,
    teacher: Teacher,
    kind: Divergence,
    jsd_beta: float = 0.5,
    tail: Tail = "bucket",
    temperature: float = 1.0,
    *,
    weights: Tensor | None = None,
    chunk: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> LinearTokenKl:
    """`topk_kl` or `token_kl`, as the `teacher` is, of the logits `hidden` · `lm_head`ᵀ, summed over tokens.

    `hidden` [T, H], `lm_head` [Vp, H] (rows are the columns of `vocabulary`, by default all), both of one format.
    `weights` [T] multiply the losses. `chunk` is the number of tokens whose logits exist at a time, by default as many
    as `CHUNK_BYTES` allows. Gradients of both `hidden` and `lm_head` are formed at once, for those that require one;
    with a split vocabulary that of `hidden` is added up over the group. The backward pass can run once.

    Collective over the vocabulary's group. Raises ValueError or TypeError naming the argument that is wrong.
    """
    _check(hidden, lm_head, teacher, weights)
    check_kind(kind, jsd_beta, temperature, tail)
    if chunk is None:
        budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
        widest = len(lm_head) if vocabulary is None else vocabulary.size
        chunk = max(1, budget // (max(1, widest) * hidden.element_size()))
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least one token")
    call = _Call(teacher, kind, jsd_beta, tail, temperature, weights, chunk, vocabulary)
    return LinearTokenKl(*_LinearTokenKl.apply(hidden, lm_head, call))


class _LinearTokenKl(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, lm_head: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(lm_head, dtype=wide) if ctx.needs_input_grad[1] else None
        for first in range(0, len(hidden), call.chunk):
            rows = slice(first, first + call.chunk)
            logits = hidden[rows] @ lm_head.t()
            loss[rows], gradient = _loss_and_gradient(logits, rows, call, any(ctx.needs_input_grad))
            del logits
            if grad_hidden is not None:
                torch.mm(gradient, lm_head, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, gradient, hidden[rows])
            del gradient
        if grad_hidden is not None and call.vocabulary is not None and call.vocabulary.group is not None:
            call.vocabulary.add(grad_hidden)
        ctx.gradients = [grad_hidden, None if grad_weight is None else grad_weight.to(lm_head.dtype)]
        ctx.mark_non_differentiable(loss)
        return loss.sum(), loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None]:
        if not ctx.gradients:
            raise RuntimeError("the gradients were formed with the loss and used up by the first backward pass")
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = []
        for gradient in (grad_hidden, grad_weight):
            if gradient is not None:
                gradient.mul_(grad)
        return grad_hidden, grad_weight, None


def _loss_and_gradient(logits: Tensor, rows: slice, call: _Call, want_gradient: bool) -> tuple[Tensor, Tensor]:
    """Weighted losses of a chunk and their gradient with respect to its logits, which it may overwrite."""
    teacher = call.teacher
    weights = None if call.weights is None else call.weights[rows]
    options: dict[str, Any] = {"weights": weights, "gradient": "overwrite", "vocabulary": call.vocabulary}
    with torch.enable_grad():
        logits.requires_grad_(want_gradient)
        if isinstance(teacher, TopK):
            loss = topk_kl(
                logits, teacher.ids[rows], teacher.logprobs[rows], call.kind, call.jsd_beta, call.tail,
                call.temperature, **options,
            )  # fmt: skip
        else:
            other = teacher.logits[rows] if isinstance(teacher, Logits) else teacher.hidden[rows] @ teacher.lm_head.t()
            loss = token_kl(logits, other.detach(), call.kind, call.jsd_beta, call.temperature, **options).loss
        (gradient,) = torch.autograd.grad(loss.sum(), logits) if want_gradient else (logits,)
    return loss.detach(), gradient


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """`total` [V, H] += `gradient`ᵀ [V, T] · `hidden` [T, H], accumulated in the format of `total`."""
    if gradient.is_cuda and gradient.dtype != total.dtype:
        torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(gradient.t().to(total.dtype), hidden.to(total.dtype))


def _check(hidden: Tensor, lm_head: Tensor, teacher: Teacher, weights: Tensor | None) -> None:
    _check_layer("hidden", hidden, "lm_head", lm_head)
    beside = ("hidden", hidden)
    if weights is not None:
        check_per_token("weights", weights, beside, formats=(*FLOATS, torch.bool))
    if isinstance(teacher, TopK):
        check_top(hidden, teacher.ids, teacher.logprobs, "hidden")
    elif isinstance(teacher, Logits):
        check_logits("teacher.logits", teacher.logits)
        check_device("teacher.logits", teacher.logits, beside)
        if teacher.logits.shape != (len(hidden), len(lm_head)):
            raise ValueError(
                f"teacher.logits has shape {list(teacher.logits.shape)}, expected {[len(hidden), len(lm_head)]}"
            )
    else:
        _check_layer("teacher.hidden", teacher.hidden, "teacher.lm_head", teacher.lm_head)
        check_device("teacher.hidden", teacher.hidden, beside)
        if (len(teacher.hidden), len(teacher.lm_head)) != (len(hidden), len(lm_head)):
            raise ValueError(
                f"the teacher has {len(teacher.hidden)} tokens and {len(teacher.lm_head)} ids, expected "
                f"{len(hidden)} and {len(lm_head)}, the student's"
            )


def _check_layer(name: str, hidden: Tensor, other: str, lm_head: Tensor) -> None:
    check_logits(name, hidden)
    check_logits(other, lm_head)
    check_device(other, lm_head, (name, hidden))
    if hidden.dtype != lm_head.dtype:
        raise TypeError(f"{other} is {lm_head.dtype}, but {name} is {hidden.dtype}; expected one format")
    if hidden.shape[1] != lm_head.shape[1]:
        raise ValueError(f"{other} has shape {list(lm_head.shape)}, expected [vocabulary, {hidden.shape[1]}]")
