"""How long responses are: a log-normal distribution, cut at the longest response that sampling allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np

_POINTS = 2000


@dataclass(frozen=True)
class Lengths:
    """Lengths with `mean` before the cut, `spread` of their logarithm, none above `longest`; all in tokens."""

    mean: float
    spread: float
    longest: int

    def draw(self, generator: np.random.Generator, shape: int | Sequence[int]) -> np.ndarray:
        """Independent lengths of this shape."""
        return self._cut(generator.standard_normal(shape))

    @cached_property
    def quantiles(self) -> np.ndarray:
        """Lengths at evenly spaced probabilities, ascending."""
        normal = NormalDist()
        return self._cut(np.array([normal.inv_cdf((place + 0.5) / _POINTS) for place in range(_POINTS)]))

    @property
    def average(self) -> float:
        """The mean after the cut."""
        return float(self.quantiles.mean())

    @property
    def mean_square(self) -> float:
        """The mean of the square, after the cut."""
        return float((self.quantiles**2).mean())

    @property
    def cut_share(self) -> float:
        """Share of the responses that are cut."""
        return float((self.quantiles >= self.longest).mean())

    def _cut(self, normal: np.ndarray) -> np.ndarray:
        # The mean of exp(m + s·z) is exp(m + s²/2).
        middle = math.log(self.mean) - self.spread**2 / 2
        return np.clip(np.exp(middle + self.spread * normal), 1.0, float(self.longest))
