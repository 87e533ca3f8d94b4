"""What the kernels share: a shift that keeps exponentials in range, and scaling of a finished gradient."""

from __future__ import annotations

import triton
import triton.language as tl

STAGES: tl.constexpr = tl.constexpr(4)
"""Tiles of a sweep on their way at a time, one of them at work."""
LARGE: tl.constexpr = tl.constexpr(1e30)
"""Sums of exponentials beyond this, or below its inverse, are formed once more with the row's true maximum."""
FLOOR: tl.constexpr = tl.constexpr(-100.0)
"""`reference.LOGPROB_FLOOR`."""


@triton.jit
def finite_or_zero(value):
    return tl.where((value > -float("inf")) & (value < float("inf")), value, 0.0)


@triton.jit
def first_shift(x_ptr, V, scale, BLOCK: tl.constexpr):
    """The largest logit of the row's first tile.

    Any shift within 69 nats of the row's maximum gives sums that float32 holds without loss, and the maximum of
    thousands of logits is such a shift. So sweeps need no running maximum, whose reduction over the block at every tile
    costs more than the exponentials.
    """
    lane = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane, mask=lane < V, other=-float("inf")).to(tl.float32)
    return finite_or_zero(tl.max(x * scale, 0))


@triton.jit
def largest(x_ptr, V, scale, BLOCK: tl.constexpr):
    """The largest logit of the row, 0 if it is infinite."""
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    for first in range(0, V, BLOCK):
        x = tl.load(x_ptr + first + lane, mask=first + lane < V, other=-float("inf")).to(tl.float32)
        best = tl.maximum(best, x * scale)
    return finite_or_zero(tl.max(best, 0))


@triton.jit
def in_range(z):
    """Whether a sum of exponentials is neither near overflow nor near underflow; false for NaN."""
    return (z < LARGE) & (z * LARGE > 1.0)


@triton.jit
def write_zeros(g_ptr, V, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    for first in range(0, V, BLOCK):
        zeros = tl.zeros([BLOCK], tl.float32).to(g_ptr.dtype.element_ty)
        tl.store(g_ptr + first + lane, zeros, mask=first + lane < V)


@triton.jit
def scale_rows_kernel(g_ptr, factor_ptr, V, g_stride, BLOCK: tl.constexpr):
    """g_v ← factor · g_v; a row whose factor is 1, the usual case, is not touched."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row)
    if factor == 1.0:
        return
    g_ptr += row * g_stride
    lane = tl.arange(0, BLOCK)
    for first in range(0, V, BLOCK):
        inside = first + lane < V
        g = tl.load(g_ptr + first + lane, mask=inside, other=0.0).to(tl.float32)
        tl.store(g_ptr + first + lane, (g * factor).to(g_ptr.dtype.element_ty), mask=inside)
