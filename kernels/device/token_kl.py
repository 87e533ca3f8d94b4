"""Divergence of two rows of logits over the whole vocabulary, and its gradient, in one launch.

With x' = x − M a row's logits below its shift, Z = Σ exp x', the divergence of "from" (student for reverse KL, teacher
for forward) against "to" is

    KL = 1/Z_f Σ exp(f') (f' − t') − log Z_f + log Z_t

so one sweep over both rows gives the sums, and a second, from the end of the rows, the gradient. JSD needs both Z
before its terms, hence one more sweep. Where a logit is −∞ on one side its log-probability counts as
`reference.LOGPROB_FLOOR` (the sum of such weights is `lost`), and there it has no gradient.

Per row, `sums` float32 [T, 8]: 0 M_s, 1 M_t, 2 Z_s, 3 Z_t, 4 Σ exp(f')(f' − t'), 5 Σ exp(s') s' (for the entropy),
6 lost, 7 the target's logit. For JSD 4 and 6 are Σ p (log p − log m) and Σ q (log q − log m), of the middle sweep.
"""

from __future__ import annotations

import triton
import triton.language as tl

from copd_kernels.device.rows import FLOOR, STAGES, first_shift, in_range, largest, write_zeros

REVERSE: tl.constexpr = tl.constexpr(0)
FORWARD: tl.constexpr = tl.constexpr(1)
JSD: tl.constexpr = tl.constexpr(2)

ALL: tl.constexpr = tl.constexpr(0)
"""Everything in one launch."""
SUMS: tl.constexpr = tl.constexpr(1)
"""Of these columns alone, into `sums`."""
MIDDLE: tl.constexpr = tl.constexpr(2)
"""JSD's terms of these columns, with `sums` of all columns."""
FINISH: tl.constexpr = tl.constexpr(3)
"""Loss and gradient, with `sums` of all columns."""

TINY: tl.constexpr = tl.constexpr(1e-30)
"""Probabilities below this take no part in a mixture: their terms are far below rounding."""


@triton.jit
def load(ptr, at, V, scale):
    return tl.load(ptr + at, mask=at < V, other=-float("inf")).to(tl.float32) * scale


@triton.jit
def row_sums(s_ptr, t_ptr, V, scale, ms, mt, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Z_s, Z_t, Σ exp(f')(f' − t'), Σ exp(s') s', lost."""
    lane = tl.arange(0, BLOCK)
    zs = tl.zeros([BLOCK], tl.float32)
    zt = tl.zeros([BLOCK], tl.float32)
    apart = tl.zeros([BLOCK], tl.float32)
    spread = tl.zeros([BLOCK], tl.float32)
    lost = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, V, BLOCK, num_stages=STAGES):
        s = load(s_ptr, first + lane, V, scale) - ms
        t = load(t_ptr, first + lane, V, scale) - mt
        ws = tl.exp(s)
        wt = tl.exp(t)
        zs += ws
        zt += wt
        s_never = s == -float("inf")
        t_never = t == -float("inf")
        s = tl.where(s_never, 0.0, s)
        t = tl.where(t_never, 0.0, t)
        spread += ws * s
        if KIND == REVERSE:
            apart += ws * (s - t)
            lost += tl.where(t_never, ws, 0.0)
        elif KIND == FORWARD:
            apart += wt * (t - s)
            lost += tl.where(s_never, wt, 0.0)
    return tl.sum(zs, 0), tl.sum(zt, 0), tl.sum(apart, 0), tl.sum(spread, 0), tl.sum(lost, 0)


@triton.jit
def log_mixture(p, q, beta):
    return tl.log(tl.maximum(beta * q + (1.0 - beta) * p, TINY))


@triton.jit
def jsd_sums(s_ptr, t_ptr, V, scale, ms, mt, log_zs, log_zt, beta, BLOCK: tl.constexpr):
    """Σ p (log p − log m) and Σ q (log q − log m) of these columns."""
    lane = tl.arange(0, BLOCK)
    tiles = tl.cdiv(V, BLOCK)
    student = tl.zeros([BLOCK], tl.float32)
    teacher = tl.zeros([BLOCK], tl.float32)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        at = (tiles - 1 - tile) * BLOCK + lane
        lp = load(s_ptr, at, V, scale) - ms - log_zs
        lq = load(t_ptr, at, V, scale) - mt - log_zt
        p = tl.exp(lp)
        q = tl.exp(lq)
        lm = log_mixture(p, q, beta)
        student += tl.where(p > TINY, p * (lp - lm), 0.0)
        teacher += tl.where(q > TINY, q * (lq - lm), 0.0)
    return tl.sum(student, 0), tl.sum(teacher, 0)


@triton.jit
def write_gradient(
    s_ptr, t_ptr, g_ptr, V, scale, factor, ms, mt, log_zs, log_zt, centre, beta,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`centre` is KL for reverse, KL(p ‖ m) for JSD, and the teacher's mass on what the student can say for forward."""
    lane = tl.arange(0, BLOCK)
    tiles = tl.cdiv(V, BLOCK)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        # JSD's middle sweep ended at the row's start.
        at = (tile if KIND == JSD else tiles - 1 - tile) * BLOCK + lane
        lp = load(s_ptr, at, V, scale) - ms - log_zs
        lq = load(t_ptr, at, V, scale) - mt - log_zt
        p = tl.exp(lp)
        never = lp == -float("inf")
        if KIND == REVERSE:
            lq = tl.where(lq == -float("inf"), FLOOR, lq)
            g = p * (tl.where(never, 0.0, lp) - lq - centre)
        elif KIND == FORWARD:
            g = tl.where(never, 0.0, p * centre - tl.exp(lq))
        else:
            lm = log_mixture(p, tl.exp(lq), beta)
            g = tl.where(p <= TINY, 0.0, (1.0 - beta) * p * (lp - lm - centre))
        tl.store(g_ptr + at, (g * factor).to(g_ptr.dtype.element_ty), mask=at < V)


@triton.jit
def token_kl_kernel(
    s_ptr, t_ptr, g_ptr, targets_ptr, weight_ptr, sums_ptr, out_ptr,
    V, s_stride, t_stride, g_stride, start, scale, beta,
    KIND: tl.constexpr, PHASE: tl.constexpr, TARGETS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`out` float32 [T, 3]: weight · loss, entropy, log-probability of the target; `g`, if GRADIENT, [T, V].

    Rows of weight 0 are not read: their outputs are 0. Phases as above; what another rank's column holds is 0 in
    `sums` until they are added up.
    """
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * s_stride
    t_ptr += row * t_stride
    g_ptr += row * g_stride
    sums_ptr += row * 8
    out_ptr += row * 3
    weight = tl.load(weight_ptr + row)
    if weight == 0.0:
        if PHASE == ALL or PHASE == FINISH:
            tl.store(out_ptr, 0.0)
            tl.store(out_ptr + 1, 0.0)
            tl.store(out_ptr + 2, 0.0)
            if GRADIENT:
                write_zeros(g_ptr, V, BLOCK)
        else:
            tl.store(sums_ptr + tl.arange(0, 8), tl.zeros([8], tl.float32))
        return

    if PHASE == ALL or PHASE == SUMS:
        ms = first_shift(s_ptr, V, scale, BLOCK)
        mt = first_shift(t_ptr, V, scale, BLOCK)
        zs, zt, apart, spread, lost = row_sums(s_ptr, t_ptr, V, scale, ms, mt, KIND, BLOCK)
        if not (in_range(zs) & in_range(zt)):
            ms = largest(s_ptr, V, scale, BLOCK)
            mt = largest(t_ptr, V, scale, BLOCK)
            zs, zt, apart, spread, lost = row_sums(s_ptr, t_ptr, V, scale, ms, mt, KIND, BLOCK)
        said = 0.0
        if TARGETS:
            column = tl.load(targets_ptr + row) - start
            said = tl.load(s_ptr + column, mask=(column >= 0) & (column < V), other=0.0).to(tl.float32) * scale
    else:
        ms = tl.load(sums_ptr)
        mt = tl.load(sums_ptr + 1)
        zs = tl.load(sums_ptr + 2)
        zt = tl.load(sums_ptr + 3)
        apart = tl.load(sums_ptr + 4)
        spread = tl.load(sums_ptr + 5)
        lost = tl.load(sums_ptr + 6)
        said = tl.load(sums_ptr + 7)
    log_zs = tl.log(zs)
    log_zt = tl.log(zt)
    if KIND == JSD and (PHASE == ALL or PHASE == MIDDLE):
        apart, lost = jsd_sums(s_ptr, t_ptr, V, scale, ms, mt, log_zs, log_zt, beta, BLOCK)

    if PHASE == SUMS or PHASE == MIDDLE:
        tl.store(sums_ptr, ms)
        tl.store(sums_ptr + 1, mt)
        tl.store(sums_ptr + 2, zs)
        tl.store(sums_ptr + 3, zt)
        tl.store(sums_ptr + 4, apart)
        tl.store(sums_ptr + 5, spread)
        tl.store(sums_ptr + 6, lost)
        tl.store(sums_ptr + 7, said)
    else:
        if KIND == REVERSE:
            never = lost / zs
            loss = apart / zs - log_zs + (1.0 - never) * log_zt - FLOOR * never
            centre = loss
        elif KIND == FORWARD:
            never = lost / zt
            loss = apart / zt - log_zt + (1.0 - never) * log_zs - FLOOR * never
            centre = 1.0 - never
        else:
            loss = beta * lost + (1.0 - beta) * apart
            centre = apart
        # NaN in either row makes its Z NaN, and so the loss.
        tl.store(out_ptr, weight * (loss + 0.0 * (log_zs + log_zt)))
        tl.store(out_ptr + 1, log_zs - spread / zs)
        tl.store(out_ptr + 2, said - ms - log_zs)
        if GRADIENT:
            write_gradient(
                s_ptr, t_ptr, g_ptr, V, scale, weight * scale, ms, mt, log_zs, log_zt, centre, beta, KIND, BLOCK
            )  # fmt: skip
