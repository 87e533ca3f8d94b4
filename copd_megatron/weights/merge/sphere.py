"""Means on a sphere: weighted sums whose coefficients depend on nothing but the inputs' inner products.

`gram` float64 [n, n] holds the inner products of the n inputs, `weights` [n] sum to 1. Each function returns the
coefficients [n] of the inputs as they are, not as unit vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from copd_megatron.weights.merge.stream import BLOCK, NotFinite, Stream

_PARALLEL = 0.9995  # cosine beyond which an arc is taken for a straight line
_TINY = 1e-8
_ITERATIONS = 100
_CONVERGED = 1e-12


class InnerProducts:
    """Inner products float64 [n, n] of n long vectors that come in slices: of rows that BLOCK divides, the last apart.

    They are taken block by block, so that they do not depend on the size of slices.
    """

    def __init__(self, count: int) -> None:
        self._total = torch.zeros(count, count, dtype=torch.float64)
        self._wide = torch.empty(count, BLOCK, dtype=torch.float64)

    def add(self, rows: Sequence[Tensor]) -> None:
        """The next slices, one of each vector, float32 [size]."""
        size = len(rows[0])
        for start in range(0, size, BLOCK):
            block = self._wide[:, : min(BLOCK, size - start)]
            for index, row in enumerate(rows):
                block[index] = row[start : start + BLOCK]
            self._total += block @ block.T

    def total(self, name: str) -> Tensor:
        """Of all that came. Raises NotFinite, about the tensor `name`, if they are not."""
        if not bool(self._total.isfinite().all()):
            raise NotFinite(f"tensor {name}: its inner products are not finite")
        return self._total


def gram(stream: Stream, from_base: bool) -> Tensor:
    """Inner products float64 [n, n] of the inputs, or of their changes from the base, in one pass."""
    products = InnerProducts(len(stream.inputs))
    numbers = range(len(stream.inputs))
    for chunk in stream:
        base = chunk.base() if from_base else None
        products.add(
            [
                chunk.input(index, f"input {index}") if base is None else chunk.delta(index, base, f"input {index}")
                for index in numbers
            ]
        )
    return products.total(stream.name)


def slerp(gram: Tensor, weights: Sequence[float]) -> list[float]:
    """Along the great circle from the first input to the second, as far as the second's weight says (Shoemake 1985).

    Inputs of (nearly) the same or opposite direction are averaged.
    """
    first, second = weights
    lengths = [math.sqrt(max(float(gram[index, index]), 0.0)) or 1.0 for index in range(2)]
    cosine = max(-1.0, min(1.0, float(gram[0, 1]) / lengths[0] / lengths[1]))
    if abs(cosine) > _PARALLEL:
        return [first, second]
    angle = math.acos(cosine)
    return [math.sin(first * angle) / math.sin(angle), math.sin(second * angle) / math.sin(angle)]


def multislerp(gram: Tensor, weights: Sequence[float]) -> list[float]:
    """The weighted mean of the directions, made as long as the inputs are in the weighted mean.

    Inputs of length 0 have no direction and count for the length alone. Directions that cancel out have no mean; then
    the inputs are averaged.
    """
    alpha = torch.tensor(weights, dtype=torch.float64)
    lengths = gram.diagonal().clamp(min=0).sqrt()
    units = torch.where(lengths > 0, alpha / lengths, 0.0)
    mean_length = math.sqrt(max(float(units @ gram @ units), 0.0))
    if mean_length < _TINY:
        return list(weights)
    coefficients: list[float] = (units * (float(alpha @ lengths) / mean_length)).tolist()
    return coefficients


def karcher(gram: Tensor, weights: Sequence[float]) -> list[float]:
    """The point of the sphere with the least weighted sum of squared arcs to the directions (Karcher 1977), made as
    long as the inputs are in the weighted mean; by steps along the mean tangent until they are shorter than 1e-12.

    Inputs of length 0 have no direction and count for the length alone.
    """
    alpha = torch.tensor(weights, dtype=torch.float64)
    lengths = gram.diagonal().clamp(min=0).sqrt()
    there = lengths > 0
    share = torch.where(there, alpha, 0.0)
    if float(share.sum()) == 0.0:
        return list(weights)
    share = share / share.sum()
    scale = torch.where(there, 1 / lengths.where(there, torch.ones_like(lengths)), 0.0)
    cosines = (gram * scale[:, None] * scale).clamp(-1.0, 1.0)  # between directions
    mean = share.clone()  # in coordinates of the directions
    if _length(mean, cosines) < _TINY:
        mean = torch.zeros_like(share)
        mean[int(there.nonzero()[0])] = 1.0
    mean = mean / _length(mean, cosines)
    for _ in range(_ITERATIONS):
        toward = (cosines @ mean).clamp(-1.0, 1.0)
        angle = toward.acos()
        stretch = share * torch.where(angle > _TINY, angle / angle.sin().clamp(min=1e-300), 1.0)
        tangent = stretch - float(stretch @ toward) * mean
        step = _length(tangent, cosines)
        if step < _CONVERGED:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / _length(mean, cosines)
    coefficients: list[float] = (mean * scale * float(alpha @ lengths)).tolist()
    return coefficients


def _length(coordinates: Tensor, products: Tensor) -> float:
    return math.sqrt(max(float(coordinates @ products @ coordinates), 0.0))
