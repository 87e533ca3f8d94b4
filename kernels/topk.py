"""The student's top-k and its overlap with a teacher's, in one read of the logits.

Exactly the set that a stable descending sort gives: among equal logits the lower id ranks first. `device/topk.py` says
how. Bytes per logit: one read (2 in bfloat16); a row that its fast path cannot certify is read again from L2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from copd_kernels import reference
from copd_kernels.arguments import INTEGERS, check_k, check_logits, check_per_token, check_temperature
from copd_kernels.choice import on_triton
from copd_kernels.logprobs import with_unit_columns
from copd_kernels.vocabulary import Vocabulary, split_of


@dataclass(frozen=True)
class Top:
    """The k likeliest tokens: `ids` int64 [R, k] best first, `logprobs` [R, k], and the row's log Σ exp [R],
    float32."""

    ids: Tensor
    logprobs: Tensor
    logsumexp: Tensor


@torch.no_grad()
def topk(
    logits: Tensor,
    k: int,
    temperature: float = 1.0,
    *,
    vocabulary: Vocabulary | None = None,
    rows: Tensor | None = None,
) -> Top:
    """`reference.topk` of `logits` [T, Vp], 1 ≤ k ≤ 128, without gradient; the same on every rank.

    With `rows` int64 [R], those rows are meant, else all. Collective over the vocabulary's group: one all-gather of 3k
    numbers per token. Raises ValueError or TypeError naming the argument that is wrong.
    """
    part = split_of(logits, vocabulary)
    _check(logits, k, part, rows)
    check_temperature(temperature)
    if part is not None:
        return _merged(logits, k, temperature, part, rows)
    return _of_columns(logits, k, temperature, rows)


@torch.no_grad()
def topk_overlap(
    student_logits: Tensor,
    teacher: Tensor,
    k: int,
    *,
    vocabulary: Vocabulary | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """`reference.topk_overlap`: overlap@k float32 [R], 1 ≤ k ≤ 128, without gradient; the same on every rank.

    `student_logits` [T, Vp]; `teacher` is its ids int [R, K] best first, K ≥ k, or its logits of the student's shape.
    With `rows` int64 [R], those rows of the logits are meant, else all. NaN in a row makes its overlap NaN. Collective
    over the vocabulary's group: one all-gather of 3k numbers per token. Raises ValueError or TypeError naming the
    argument that is wrong.
    """
    part = split_of(student_logits, vocabulary)
    _check(student_logits, k, part, rows)
    unknown = None
    if teacher.is_floating_point():
        check_logits("teacher", teacher, ("student_logits", student_logits))
        best = topk(teacher, k, vocabulary=vocabulary, rows=rows)
        teacher, unknown = best.ids, best.logsumexp.isnan()
    else:
        beside = ("student_logits", student_logits) if rows is None else ("rows", rows)
        check_per_token("teacher", teacher, beside, formats=INTEGERS, width=True)
        reference.check_overlap(k, teacher)
    if part is not None:
        own = _merged(student_logits, k, 1.0, part, rows)
        share = _common(own.ids, teacher[:, :k]).masked_fill(own.logsumexp.isnan(), torch.nan)
    elif on_triton(student_logits):
        share = _launch(student_logits, k, 1.0, rows, teacher=teacher)[0]
    else:
        share = reference.topk_overlap(_chosen(student_logits, rows), teacher, k)
    return share if unknown is None else share.masked_fill(unknown, torch.nan)


@torch.no_grad()
def topk_and_overlap(
    student_logits: Tensor, teacher: Tensor, k: int, temperature: float = 1.0, *, rows: Tensor | None = None
) -> tuple[Top, Tensor]:
    """`topk` of the student and `topk_overlap` with a teacher's ids [R, K], from one read of the logits."""
    _check(student_logits, k, None, rows)
    check_temperature(temperature)
    beside = ("student_logits", student_logits) if rows is None else ("rows", rows)
    check_per_token("teacher", teacher, beside, formats=INTEGERS, width=True)
    reference.check_overlap(k, teacher)
    if not on_triton(student_logits):
        chosen = _chosen(student_logits, rows)
        return Top(*reference.topk(chosen, k, temperature)), reference.topk_overlap(chosen, teacher, k)
    share, ids, logsumexp = _launch(student_logits, k, temperature, rows, teacher=teacher, want_top=True)
    return _ordered(student_logits, ids, logsumexp, temperature, rows), share


def _of_columns(logits: Tensor, k: int, temperature: float, rows: Tensor | None) -> Top:
    if not on_triton(logits):
        return Top(*reference.topk(_chosen(logits, rows), k, temperature))
    _, ids, logsumexp = _launch(logits, k, temperature, rows, want_top=True)
    return _ordered(logits, ids, logsumexp, temperature, rows)


def _ordered(logits: Tensor, ids: Tensor, logsumexp: Tensor, temperature: float, rows: Tensor | None) -> Top:
    """Best first: by id, then stably by logit, on [R, k]."""
    ids = ids.long().sort(dim=-1).values
    x = logits.gather(-1, ids) if rows is None else logits[rows[:, None], ids]
    order = x.sort(dim=-1, descending=True, stable=True).indices
    shift, log_z = logsumexp.split(1, dim=-1)
    logprobs = x.gather(-1, order).float() / temperature - shift - log_z
    return Top(ids.gather(-1, order), logprobs, (shift + log_z)[:, 0])


def _merged(logits: Tensor, k: int, temperature: float, part: Vocabulary, rows: Tensor | None) -> Top:
    """The best of every rank's best: ranks hold ascending ids, so a stable sort of their lists in order breaks ties."""
    count, own_k = len(logits) if rows is None else len(rows), min(k, logits.shape[1])
    # Columns: k logits, k ids (exact in float64), log Σ exp. A rank with fewer columns than k leaves its places at −∞,
    # whose ids, beyond the vocabulary, lose every tie.
    mine = torch.full((count, 2 * k + 1), -torch.inf, dtype=torch.float64, device=logits.device)
    mine[:, k : 2 * k] = part.size
    if own_k:
        top = _of_columns(logits, own_k, temperature, rows)
        chosen = logits.gather(-1, top.ids) if rows is None else logits[rows[:, None], top.ids]
        mine[:, :own_k] = chosen.double()
        mine[:, k : k + own_k] = (top.ids + part.start).double()
        mine[:, -1] = top.logsumexp.double().masked_fill(chosen[:, 0] == -torch.inf, -torch.inf)
    everyone = part.gather(mine)
    logsumexp = torch.logsumexp(everyone[..., -1], dim=0)
    x = everyone[..., :k].movedim(0, 1).flatten(1)
    ids = everyone[..., k : 2 * k].movedim(0, 1).flatten(1)
    by_id = ids.sort(dim=-1).indices
    order = by_id.gather(-1, x.gather(-1, by_id).sort(dim=-1, descending=True, stable=True).indices)[:, :k]
    logprobs = x.gather(-1, order) / temperature - logsumexp[:, None]
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return Top(ids.gather(-1, order).long(), logprobs.to(wide), logsumexp.to(wide))


def _common(ids: Tensor, others: Tensor) -> Tensor:
    """|a ∩ b| / k of two sets of ids [R, k]."""
    return (others[:, :, None] == ids[:, None, :]).any(-1).float().sum(-1) / ids.shape[1]


def _chosen(logits: Tensor, rows: Tensor | None) -> Tensor:
    return logits if rows is None else logits[rows]


def _check(logits: Tensor, k: int, part: Vocabulary | None, rows: Tensor | None) -> None:
    check_logits("student_logits", logits)
    check_k(k, logits.shape[1] if part is None else part.size)
    if rows is not None and (rows.ndim != 1 or rows.dtype != torch.int64 or rows.device != logits.device):
        raise ValueError(
            f"rows is {rows.dtype} {list(rows.shape)} on {rows.device}, expected int64 [R] beside the logits"
        )


def _launch(
    logits: Tensor,
    k: int,
    temperature: float,
    rows: Tensor | None,
    *,
    teacher: Tensor | None = None,
    want_top: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Overlap [R] with `teacher` [R, K]; ids int32 [R, k] in no order; shift and log Σ exp below it, [R, 2].

    What was not asked is empty.
    """
    from copd_kernels.device import launch
    from copd_kernels.device.topk import topk_kernel

    source = with_unit_columns(logits)
    count = len(logits) if rows is None else len(rows)
    device = logits.device
    share = torch.empty(count if teacher is not None else 0, device=device)
    ids = torch.empty(count if want_top else 0, k, dtype=torch.int32, device=device)
    logsumexp = torch.empty(count if want_top else 0, 2, device=device)
    teacher_ids = ids if teacher is None else teacher.to(torch.int32).contiguous()
    widths = (logits.shape[1], source.stride(0))
    launch.run(
        topk_kernel, "topk" if want_top else "topk overlap", count,
        source, ids if rows is None else rows.contiguous(), teacher_ids, ids, share, logsumexp,
        logits.shape[1], source.stride(0), k, teacher_ids.shape[1], 1 / temperature,
        widths=widths, G=launch.lanes(logits.dtype, widths), TP=launch.SLOTS, ROWS=rows is not None,
        OVERLAP=teacher is not None, IDS=want_top, LOGSUMEXP=want_top,
    )  # fmt: skip
    return share, ids, logsumexp
