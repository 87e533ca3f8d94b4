"""A row of logits as K listed outcomes and one tail: its sums, and the gradient of anything formed from them.

    M, log Z      shift and log of Σ_v exp(x_v − M)            (x: logits times `scale`, 1/temperature)
    log p_i       x_i − M − log Z at the listed ids
    tail          log Σ_{v not listed} exp(x_v − M) − log Z, summed without the listed, so that nothing cancels

Listed ids come in ascending order, padded to a power of two; one that comes twice counts once. Bytes: the sums read the
row once, the gradient reads and writes it once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from copd_kernels.device.rows import FLOOR, STAGES, finite_or_zero, first_shift, in_range, largest, write_zeros

NO_ID: tl.constexpr = tl.constexpr(2147483647)


@triton.jit
def tail_sums(x_ptr, ids_ptr, V, start, K, scale, shift, BLOCK: tl.constexpr):
    """Σ w and Σ w·(x − shift), w = exp(x − shift), over the columns that are not listed.

    Columns are the ids from `start` on. A walk through the ascending list takes each listed id out of its tile.
    """
    lane = tl.arange(0, BLOCK)
    z = tl.zeros([BLOCK], tl.float32)
    spread = tl.zeros([BLOCK], tl.float32)
    position = 0
    listed = tl.load(ids_ptr)
    # The compiler does not read ahead in a loop with a loop inside: the next tile is asked for by hand.
    ahead = tl.load(x_ptr + lane, mask=lane < V, other=-float("inf"))
    for first in range(0, V, BLOCK):
        below = ahead.to(tl.float32) * scale - shift
        at = first + BLOCK + lane
        ahead = tl.load(x_ptr + at, mask=at < V, other=-float("inf"))
        while listed < first + BLOCK + start:
            below = tl.where(first + lane == listed - start, -float("inf"), below)
            position += 1
            listed = tl.load(ids_ptr + position, mask=position < K, other=NO_ID)
        w = tl.exp(below)
        z += w
        spread += w * tl.maximum(below, -1e30)
    return tl.sum(z, 0), tl.sum(spread, 0)


@triton.jit
def safe_tail_sums(x_ptr, ids_ptr, V, start, K, scale, BLOCK: tl.constexpr):
    """`tail_sums` with a shift for which they are in range if any is: shift, Σ w, Σ w·(x − shift)."""
    shift = first_shift(x_ptr, V, scale, BLOCK)
    z, spread = tail_sums(x_ptr, ids_ptr, V, start, K, scale, shift, BLOCK)
    if not in_range(z):
        shift = largest(x_ptr, V, scale, BLOCK)
        z, spread = tail_sums(x_ptr, ids_ptr, V, start, K, scale, shift, BLOCK)
    return shift, z, spread


@triton.jit
def listed_logits(x_ptr, ids_ptr, V, start, size, K, scale, KP: tl.constexpr):
    """Logits of the listed ids: 0 where another rank has the column, NaN where no rank has it, −∞ in the padding."""
    slot = tl.arange(0, KP)
    ids = tl.load(ids_ptr + slot, mask=slot < K, other=NO_ID)
    column = ids - start
    owned = (slot < K) & (column >= 0) & (column < V)
    x = tl.load(x_ptr + column, mask=owned, other=0.0).to(tl.float32) * scale
    x = tl.where(owned | ((ids >= 0) & (ids < size)), x, float("nan"))
    return tl.where(slot < K, x, -float("inf")), column, owned


@triton.jit
def partition_sums_kernel(
    x_ptr, ids_ptr, weight_ptr, sums_ptr, listed_ptr, V, x_stride, start, size, K, scale,
    KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per row: shift, Σ w, Σ w·(x − shift) of the tail into `sums` [T, 3], listed logits into `listed` [T, K].

    Rows whose `weight` is 0 are not read, and their outputs not written.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    ids_ptr += row * K
    if tl.load(weight_ptr + row) == 0.0:
        return
    shift, z, spread = safe_tail_sums(x_ptr, ids_ptr, V, start, K, scale, BLOCK)
    x, _, _ = listed_logits(x_ptr, ids_ptr, V, start, size, K, scale, KP)
    tl.store(sums_ptr + row * 3, shift)
    tl.store(sums_ptr + row * 3 + 1, z)
    tl.store(sums_ptr + row * 3 + 2, spread)
    slot = tl.arange(0, KP)
    tl.store(listed_ptr + row * K + slot, x, mask=slot < K)


@triton.jit
def write_gradient(x_ptr, g_ptr, V, scale, peak, log_z, tail, column, at_listed, owned, BLOCK: tl.constexpr):
    """g_v = tail · p_v, and `at_listed` at the listed columns; the row is read from its end, which is freshest in L2.

    `g` may be `x`: the listed columns are written after everybody has read.
    """
    lane = tl.arange(0, BLOCK)
    tiles = tl.cdiv(V, BLOCK)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        at = (tiles - 1 - tile) * BLOCK + lane
        x = tl.load(x_ptr + at, mask=at < V, other=-float("inf")).to(tl.float32)
        g = tail * tl.exp(x * scale - peak - log_z)
        tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty), mask=at < V)
    tl.debug_barrier()
    tl.store(g_ptr + column, at_listed.to(g_ptr.dtype.element_ty), mask=owned)


@triton.jit
def partition_gradient_kernel(
    x_ptr, g_ptr, ids_ptr, at_ids_ptr, row_ptr, V, x_stride, g_stride, start, K, scale,
    KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """g_v = c · p_v with (M, log Z, c) in `row` [T, 3], except at the listed ids, where it is `at_ids` [T, K].

    A row with c = 0 and zeros at its ids, such as padding, is not read. At the listed ids the values are complete:
    ids that come twice have the same one.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    g_ptr += row * g_stride
    slot = tl.arange(0, KP)
    ids = tl.load(ids_ptr + row * K + slot, mask=slot < K, other=NO_ID)
    at_listed = tl.load(at_ids_ptr + row * K + slot, mask=slot < K, other=0.0)
    column = ids - start
    owned = (slot < K) & (column >= 0) & (column < V)
    peak = tl.load(row_ptr + row * 3)
    log_z = tl.load(row_ptr + row * 3 + 1)
    tail = tl.load(row_ptr + row * 3 + 2)
    if tail == 0.0:
        write_zeros(g_ptr, V, BLOCK)
        tl.debug_barrier()
        tl.store(g_ptr + column, at_listed.to(g_ptr.dtype.element_ty), mask=owned)
    else:
        write_gradient(x_ptr, g_ptr, V, scale, peak, log_z, tail, column, at_listed, owned, BLOCK)


@triton.jit
def topk_kl_kernel(
    x_ptr, g_ptr, ids_ptr, teacher_ptr, teacher_tail_ptr, weight_ptr, loss_ptr,
    V, x_stride, g_stride, K, scale, beta, floor,
    KIND: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of `topk_kl` in one launch; see `copd_kernels.topk_kl` for the formulas.

    `teacher` [T, K] and `teacher_tail` [T] are log-probabilities, floored; `floor` is the least log mass of a tail.
    KIND 0 reverse, 1 forward, 2 jsd.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    g_ptr += row * g_stride
    ids_ptr += row * K
    weight = tl.load(weight_ptr + row)
    if weight == 0.0:
        tl.store(loss_ptr + row, 0.0)
        write_zeros(g_ptr, V, BLOCK)
        return
    slot = tl.arange(0, KP)
    x, column, owned = listed_logits(x_ptr, ids_ptr, V, 0, V, K, scale, KP)
    lq = tl.load(teacher_ptr + row * K + slot, mask=slot < K, other=0.0)
    peak = finite_or_zero(tl.max(x, 0))
    shift, z, _ = safe_tail_sums(x_ptr, ids_ptr, V, 0, K, scale, BLOCK)
    highest = tl.maximum(peak, tl.where(z > 0.0, shift, peak))
    z = z * tl.exp(shift - highest)
    peak = highest
    log_z = tl.log(z + tl.sum(tl.exp(x - peak), 0))
    said = x != -float("inf")
    lp = tl.where(said, x - peak - log_z, FLOOR)
    p = tl.where(said, tl.exp(lp), 0.0)
    q = tl.where(slot < K, tl.exp(lq), 0.0)
    term, e = divergence_terms(p, q, lp, lq, beta, KIND)
    loss = tl.sum(tl.where(slot < K, term, 0.0), 0)
    e = tl.where(said, e, 0.0)
    log_tail = tl.log(z) - log_z
    kept = log_tail >= floor
    log_tail = tl.where(kept, log_tail, floor)
    lqt = tl.load(teacher_tail_ptr + row)
    tail_term, tail_e = divergence_terms(tl.exp(log_tail), tl.exp(lqt), log_tail, lqt, beta, KIND)
    loss += tail_term
    tail_e = tl.where(kept, tail_e, 0.0)
    total = tl.sum(e, 0) + tail_e
    tail = tl.where(kept, tail_e / tl.exp(log_tail), 0.0) - total
    factor = weight * scale
    at_listed = (e - p * total) * factor
    # NaN anywhere in the row makes Z, and so the loss, NaN.
    tl.store(loss_ptr + row, (loss + 0.0 * log_z) * weight)
    write_gradient(x_ptr, g_ptr, V, scale, peak, log_z, tail * factor, column, at_listed, owned, BLOCK)


@triton.jit
def divergence_terms(p, q, lp, lq, beta, KIND: tl.constexpr):
    """Of each outcome: its term of the divergence, and d loss / d log p, the mixture's own change cancelled."""
    if KIND == 0:
        term = p * (lp - lq)
        e = term + p
    elif KIND == 1:
        term = q * (lq - lp)
        e = -q
    else:
        highest = tl.maximum(lp, lq)
        lm = highest + tl.log(beta * tl.exp(lq - highest) + (1.0 - beta) * tl.exp(lp - highest))
        term = beta * q * (lq - lm) + (1.0 - beta) * p * (lp - lm)
        e = (1.0 - beta) * p * (lp - lm)
    return term, e
