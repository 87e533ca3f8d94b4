"""The k largest of a row, exactly as a stable descending sort has them, in one read of the row.

Columns are dealt to G lanes; column v is in lane v mod G, block v div G. Each lane keeps its two best. A logit and its
block form one integer key, larger for a larger logit and, among equals, for the lower block:

    key = order(x) · blocks + (blocks − 1 − block)

so that keeping the best is two integer operations, and few keys lie between any two. The k-th largest key τ of the 2G
candidates, found by bisection, is that of the row unless some lane's third best is as large: then (for k = 64 and 4,096
lanes of random logits, three rows of a thousand; and in heavy ties) bisection goes on with counts over the whole row,
which is in L2.

Equal keys are equal logits of one block, so only block(τ) can hold ties at the edge, and there lower lanes are lower
ids.
"""

from __future__ import annotations

import triton
import triton.language as tl

from copd_kernels.device.rows import STAGES, first_shift, in_range, largest

LOWEST_32: tl.constexpr = tl.constexpr(-2147483648)
LOWEST_64: tl.constexpr = tl.constexpr(-9223372036854775808)


@triton.jit
def keys_of(x, block, blocks, inside):
    """Keys of logits `x` in `block`; those not `inside` are below all others.

    int32 for bfloat16 and float16, whose order has 16 bits, int64 for float32. −0 equals 0; NaN is above +∞.
    """
    # One return: the compiler reads on after a return in a branch, even where the branch is certain.
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        order = tl.where(size == 0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
        order = tl.where(size > 0x7F800000, 0x7FFFFFFE, order).to(tl.int64)
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        size = bits & 0x7FFF
        order = tl.where(size == 0, 0, bits ^ ((bits >> 31) & 0x7FFF))
        order = tl.where(size > (0x7F80 if x.dtype == tl.bfloat16 else 0x7C00), 0x7FFE, order)
    return tl.where(inside, order * blocks + (blocks - 1 - block), LOWEST_64 if x.dtype == tl.float32 else LOWEST_32)


@triton.jit
def block_of(key, blocks):
    left = key % blocks  # of the sign of the key, as in C
    return (blocks - 1 - tl.where(left < 0, left + blocks, left)).to(tl.int32)


@triton.jit
def is_nan(key, blocks):
    lowest = tl.full([], 0x7FFFFFFE if key.dtype == tl.int64 else 0x7FFE, key.dtype)
    return key >= lowest * blocks


@triton.jit
def keys_at(x_ptr, block, blocks, V, G: tl.constexpr):
    at = block * G + tl.arange(0, G)
    inside = at < V
    return keys_of(tl.load(x_ptr + at, mask=inside, other=0.0), block, blocks, inside)


@triton.jit
def middle(low, high):
    """Rounded down, without overflow."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


@triton.jit
def narrow(low, high, mid, count, K):
    """The next interval: at least K keys are ≥ low, fewer than K are ≥ high, or both are one cut with exactly K."""
    return tl.where(count >= K, mid, low), tl.where(count <= K, mid, high)


@triton.jit
def count_row(x_ptr, V, key, G: tl.constexpr):
    """How many keys of the row are ≥ `key`."""
    count = tl.zeros([G], tl.int32)
    blocks = tl.cdiv(V, G)
    for block in tl.range(0, blocks, num_stages=STAGES):
        count += (keys_at(x_ptr, block, blocks, V, G) >= key).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def exponentials(x_ptr, V, scale, shift, G: tl.constexpr):
    lane = tl.arange(0, G)
    z = tl.zeros([G], tl.float32)
    for first in tl.range(0, V, G, num_stages=STAGES):
        x = tl.load(x_ptr + first + lane, mask=first + lane < V, other=-float("inf")).to(tl.float32)
        z += tl.exp(x * scale - shift)
    return tl.sum(z, 0)


@triton.jit
def topk_kernel(
    x_ptr, rows_ptr, teacher_ptr, ids_ptr, overlap_ptr, logsumexp_ptr,
    V, x_stride, K, TEACHER, scale,
    G: tl.constexpr, TP: tl.constexpr, ROWS: tl.constexpr,
    OVERLAP: tl.constexpr, IDS: tl.constexpr, LOGSUMEXP: tl.constexpr,
):  # fmt: skip
    """`ids` int32 [R, K] in no particular order; `overlap` float32 [R], of the first K of `teacher` int32 [R, TEACHER].

    `logsumexp` float32 [R, 2] holds shift and log Σ exp(x − shift). With ROWS, `rows` int64 [R] says which rows of the
    logits are meant. NaN in a row: overlap and log Σ exp are NaN, and NaN ranks first among its ids.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program
    if ROWS:
        row = tl.load(rows_ptr + program)
    x_ptr += row * x_stride
    lane = tl.arange(0, G)
    blocks = tl.cdiv(V, G)
    first = keys_at(x_ptr, 0, blocks, V, G)
    lowest = LOWEST_64 if first.dtype == tl.int64 else LOWEST_32
    best = tl.full([G], lowest, first.dtype)
    second = best
    third = best
    shift = 0.0
    z = tl.zeros([G], tl.float32)
    if LOGSUMEXP:
        shift = first_shift(x_ptr, V, scale, G)
    for block in tl.range(0, blocks, num_stages=STAGES):
        at = block * G + lane
        inside = at < V
        x = tl.load(x_ptr + at, mask=inside, other=-float("inf"))
        key = keys_of(x, block, blocks, inside)
        lesser = tl.minimum(key, best)
        best = tl.maximum(key, best)
        least = tl.minimum(lesser, second)
        second = tl.maximum(lesser, second)
        third = tl.maximum(least, third)
        if LOGSUMEXP:
            z += tl.exp(x.to(tl.float32) * scale - shift)
    if LOGSUMEXP:
        total = tl.sum(z, 0)
        if not in_range(total):
            shift = largest(x_ptr, V, scale, G)
            total = exponentials(x_ptr, V, scale, shift, G)
        tl.store(logsumexp_ptr + program * 2, shift)
        tl.store(logsumexp_ptr + program * 2 + 1, tl.log(total))

    top = tl.max(best, 0)
    high = top + 1
    low = tl.min(best, 0)  # at least G keys are no less, and G is no less than K
    while (low < high) & (low + 1 != high):
        mid = middle(low, high)
        count = tl.sum((best >= mid).to(tl.int32) + (second >= mid).to(tl.int32), 0)
        low, high = narrow(low, high, mid, count, K)
    certified = tl.max(third, 0) < low
    if not certified:
        high = top + 1
        while (low < high) & (low + 1 != high):
            mid = middle(low, high)
            low, high = narrow(low, high, mid, count_row(x_ptr, V, mid, G), K)

    # Ties at the edge: those of block(τ), from its lowest lane on, as many as are missing.
    above = tl.sum((best >= high).to(tl.int32) + (second >= high).to(tl.int32), 0)
    if not certified:
        above = count_row(x_ptr, V, high, G)
    tied = low < high
    edge_block = tl.where(tied, block_of(low, blocks), 0)  # a cut between keys belongs to no block
    edge = (keys_at(x_ptr, edge_block, blocks, V, G) == low) & tied
    place = tl.cumsum(edge.to(tl.int32), 0)
    edge = edge & (place <= K - above)

    if IDS:
        ids_ptr += program * K
        if certified:
            taken = (best >= high).to(tl.int32) + (second >= high).to(tl.int32)
            at = tl.cumsum(taken, 0) - taken
            tl.store(ids_ptr + at, block_of(best, blocks) * G + lane, mask=best >= high)
            tl.store(ids_ptr + at + 1, block_of(second, blocks) * G + lane, mask=second >= high)
        else:
            done = 0
            for block in range(0, blocks):
                taken = (keys_at(x_ptr, block, blocks, V, G) >= high).to(tl.int32)
                tl.store(ids_ptr + done + tl.cumsum(taken, 0) - 1, block * G + lane, mask=taken == 1)
                done += tl.sum(taken, 0)
        tl.store(ids_ptr + above + place - 1, edge_block * G + lane, mask=edge)
    if OVERLAP:
        slot = tl.arange(0, TP)
        ids = tl.load(teacher_ptr + program * TEACHER + slot, mask=slot < K, other=-1)
        listed = (ids >= 0) & (ids < V)
        keys = keys_of(tl.load(x_ptr + ids, mask=listed, other=0.0), ids // G, blocks, listed)
        last = tl.max(tl.where(edge, lane, -1), 0)
        member = listed & ((keys >= high) | ((keys == low) & (ids % G <= last)))
        share = tl.sum(member.to(tl.int32), 0).to(tl.float32) / K
        share = tl.where(is_nan(top, blocks), float("nan"), share)
        tl.store(overlap_ptr + program, share)
