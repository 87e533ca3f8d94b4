"""Share absorbed, lines and correlations, for points and for bootstrap replicates of them. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from copd_megatron.evaluate.intervals import Z

LEAST_POINTS = 3
"""A line through two points says nothing."""


@dataclass(frozen=True)
class Line:
    """y = intercept + slope · x by least squares over `n` points; Pearson's r, and r²."""

    slope: float
    intercept: float
    r: float
    r2: float
    n: int


def share_absorbed(before: np.ndarray, after: np.ndarray, teacher: np.ndarray, least: float) -> np.ndarray:
    """(after − before) / (teacher − before) of accuracies [...]; NaN where the teacher is ahead by less than `least`:
    a share of nothing has no meaning."""
    advantage = teacher - before
    ahead = advantage >= least
    return np.where(ahead, (after - before) / np.where(ahead, advantage, 1.0), math.nan)


def fit(x: Sequence[float], y: Sequence[float]) -> Line | None:
    """The line through the points of which both x and y are numbers; None with fewer than three such points, or where
    x or y does not vary."""
    xs, ys = np.asarray(x, dtype=np.float64)[None], np.asarray(y, dtype=np.float64)[None]
    slope, intercept, r = (float(value[0]) for value in fit_rows(xs, ys))
    n = int((np.isfinite(xs) & np.isfinite(ys)).sum())
    return Line(slope, intercept, r, r * r, n) if math.isfinite(r) else None


def fit_rows(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slope, intercept and r [B] of every row of x and y [B, n]; all NaN where `fit` gives None."""
    both = np.isfinite(x) & np.isfinite(y)
    count = np.maximum(both.sum(axis=1), 1)
    middle_x, middle_y = (np.where(both, side, 0.0).sum(axis=1) / count for side in (x, y))
    off_x = np.where(both, x - middle_x[:, None], 0.0)
    off_y = np.where(both, y - middle_y[:, None], 0.0)
    varies = _varies(x, both) & _varies(y, both) & (both.sum(axis=1) >= LEAST_POINTS)
    square_x, square_y = np.where(varies, (off_x**2).sum(axis=1), 1.0), np.where(varies, (off_y**2).sum(axis=1), 1.0)
    product = (off_x * off_y).sum(axis=1)
    slope = np.where(varies, product / square_x, math.nan)
    r = np.where(varies, np.clip(product / np.sqrt(square_x * square_y), -1.0, 1.0), math.nan)
    return slope, middle_y - slope * middle_x, r


def without_one(x: Sequence[float], y: Sequence[float]) -> tuple[float, float] | None:
    """Smallest and largest r of all points but one: how much of r rests on a single point. None where the others have
    none."""
    both = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    found = []
    for place in range(len(both)):
        others = both[:place] + both[place + 1 :]
        line = fit([a for a, _ in others], [b for _, b in others])
        found += [] if line is None else [line.r]
    return (min(found), max(found)) if found else None


def fisher(r: float, n: int) -> tuple[float, float] | None:
    """95% interval of the correlation of `n` independent, jointly normal pairs: tanh(artanh r ± z / √(n − 3)) (Fisher
    1921). None with fewer than four pairs, or where |r| is 1, about which it says nothing."""
    if n < 4 or abs(r) >= 1:
        return None
    half = Z / math.sqrt(n - 3)
    return math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def _varies(side: np.ndarray, both: np.ndarray) -> np.ndarray:
    """bool [B]: not by the sum of squares, which rounding keeps above 0 for equal numbers."""
    least = np.where(both, side, np.inf).min(axis=1, initial=np.inf)
    return np.asarray(np.where(both, side, -np.inf).max(axis=1, initial=-np.inf) > least)
