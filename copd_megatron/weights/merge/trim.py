"""The largest changes of a tensor, found without holding it: exact selection over the bits of float32 magnitudes.

A non-negative float32 is ordered like the integer that its 31 bits make. One pass counts the upper 15 bits of all
magnitudes, which tells where the k-th largest lies; a second one counts the lower 16 bits of those that share its
upper ones.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from copd_megatron.weights.merge.stream import Chunk, NotFinite, Stream

_LOWER = 16
_UPPER_BINS = 2**15
_NOT_FINITE = 0x7F80  # upper bits of infinity; those of NaN are larger


@dataclass
class Cut:
    """Keeps magnitudes above `threshold`, and of the `equals` that equal it the first `equals_left`.

    What remains of either is counted while slices are gone through.
    """

    threshold: float
    equals_left: int
    equals: int

    def apply(self, delta: Tensor) -> None:
        """Zero what is not kept of `delta` float32 [n], the next slice of the tensor."""
        if self.threshold == 0.0:
            return  # only zeros are to go
        if 0 < self.equals_left < self.equals:
            equal = delta.abs() == self.threshold
            here = int(equal.count_nonzero())
            kept = min(here, self.equals_left)
            if 0 < kept < here:  # in one slice of the tensor at most
                delta[equal.nonzero()[kept:, 0]] = 0.0
            self.equals -= here
            self.equals_left -= kept
        else:
            kept = self.equals_left
        torch.hardshrink(delta, _below(self.threshold) if kept else self.threshold, out=delta)


def cuts(stream: Stream, density: float) -> list[Cut]:
    """Per input, what keeps exactly max(1, int(density · n)) of its n differences from the base: the largest, and among
    equal ones those that come first.

    Raises NotFinite if a difference is not finite.
    """
    keep = max(1, int(density * stream.numel))
    count = len(stream.inputs)
    upper = torch.zeros(count, _UPPER_BINS, dtype=torch.int64)
    for chunk in stream:
        base = chunk.base()
        for index in range(count):
            bits = _magnitude_bits(stream, chunk, base, index).bitwise_right_shift_(_LOWER)
            upper[index] += torch.bincount(bits, minlength=_UPPER_BINS)
    if bool(upper[:, _NOT_FINITE:].any()):
        raise NotFinite(f"tensor {stream.name}: a difference from the base is not finite")
    places = [_place(upper[index], keep) for index in range(count)]
    lower = torch.zeros(count, 2**_LOWER + 2, dtype=torch.int64)
    for chunk in stream:
        base = chunk.base()
        for index, (bin_, _) in enumerate(places):
            # Magnitudes below and above the bin are counted in the first and the last place, which are not looked at.
            bits = _magnitude_bits(stream, chunk, base, index)
            bits.sub_((bin_ << _LOWER) - 1).clamp_(0, 2**_LOWER + 1)
            lower[index] += torch.bincount(bits, minlength=lower.shape[1])
    found = []
    for index, (bin_, above) in enumerate(places):
        rest, above_in_bin = _place(lower[index, 1:-1], keep - above)
        threshold = _from_bits((bin_ << _LOWER) | rest)
        found.append(Cut(threshold, keep - above - above_in_bin, int(lower[index, 1 + rest])))
    return found


def _magnitude_bits(stream: Stream, chunk: Chunk, base: Tensor, index: int) -> Tensor:
    delta = chunk.delta(index, base)
    bits = stream.buffer("bits", chunk.size, torch.int32)
    return torch.bitwise_and(delta.view(torch.int32), 0x7FFFFFFF, out=bits)


def _place(counts: Tensor, keep: int) -> tuple[int, int]:
    """(bin of the `keep`-th largest, how many lie in bins above it)."""
    from_above = counts.flip(0).cumsum(0)
    steps = int(torch.searchsorted(from_above, keep))
    return len(counts) - 1 - steps, int(from_above[steps - 1]) if steps else 0


def _below(value: float) -> float:
    """The next smaller positive float32."""
    return _from_bits(struct.unpack("<i", struct.pack("<f", value))[0] - 1)


def _from_bits(bits: int) -> float:
    value: float = struct.unpack("<f", struct.pack("<i", bits))[0]
    if not math.isfinite(value):
        raise ValueError(f"{bits:#x} are not the bits of a finite float32")
    return value
