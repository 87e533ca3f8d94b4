"""The references over a vocabulary in parts: this rank's columns in, the same result on every rank.

Only [T] and [T, K] travel. The backward pass gives the gradient with respect to the rank's own columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from copd_kernels import reference
from copd_kernels.reference import Divergence
from copd_kernels.vocabulary import Vocabulary, shared, total


def log_softmax(logits: Tensor, temperature: float, part: Vocabulary) -> Tensor:
    """Log-probabilities [T, Vp] of this rank's columns, under the softmax over all ranks' columns."""
    scaled = reference.at_temperature(logits, temperature)
    none = scaled.new_full((len(scaled), 1), -math.inf)
    peak = part.largest(torch.cat([scaled.detach(), none], dim=-1).amax(dim=-1, keepdim=True))
    below = scaled - peak
    return below - shared(below.exp().sum(-1, keepdim=True), part).log()


def logprobs_at(logprobs: Tensor, ids: Tensor, part: Vocabulary) -> Tensor:
    """Of `logprobs` [T, Vp], those at `ids` int64 [T, N]; the same [T, N] on every rank."""
    width = logprobs.shape[1]
    column, owned = part.columns_of(ids, width)
    # One more column, of another rank's tokens. It keeps ranks without any part of the graph, whose collectives meet.
    padded = torch.cat([logprobs, logprobs.new_zeros(len(logprobs), 1)], dim=-1)
    elsewhere = torch.where((ids >= 0) & (ids < part.size), width, width + 1)  # beyond the vocabulary, it is refused
    return total(padded.gather(-1, torch.where(owned, column, elsewhere)), part)


def tail_logprob(logprobs: Tensor, ids: Tensor, part: Vocabulary) -> Tensor:
    """`reference.tail_logprob` of `logprobs` [T, Vp]."""
    column, owned = part.columns_of(ids, logprobs.shape[1])
    listed = torch.zeros(len(logprobs), logprobs.shape[1] + 1, dtype=torch.bool, device=logprobs.device)
    listed.scatter_(-1, column.masked_fill(~owned, logprobs.shape[1]), True)
    mass = total(logprobs.exp().masked_fill(listed[:, :-1], 0.0).sum(-1), part)
    return mass.clamp(min=torch.finfo(mass.dtype).tiny).log()  # log 0 would make NaN of a gradient of 0


def token_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: Divergence,
    jsd_beta: float,
    temperature: float,
    part: Vocabulary,
) -> Tensor:
    """`reference.token_kl` of logits [T, Vp]."""
    student = log_softmax(student_logits, temperature, part)
    teacher = log_softmax(teacher_logits, temperature, part).detach().to(student.dtype)
    return total(reference.divergence_terms(student, teacher, kind, jsd_beta).sum(-1), part)


def topk_kl(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    kind: Divergence,
    jsd_beta: float,
    temperature: float,
    part: Vocabulary,
) -> Tensor:
    """`reference.topk_kl` with a tail bucket, of logits [T, Vp]."""
    student = log_softmax(student_logits, temperature, part)
    top = logprobs_at(student, teacher_ids, part)
    return reference.partition_kl(top, tail_logprob(student, teacher_ids, part), teacher_logprobs, kind, jsd_beta)
