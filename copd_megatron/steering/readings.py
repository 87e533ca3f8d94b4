"""What the probes tell about one edge, with standard errors; and smoothing that carries them along."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Edge = str
"""`student ← teacher`, as people read it."""


@dataclass(frozen=True)
class Estimate:
    """A measured mean and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


@dataclass(frozen=True)
class Reading:
    """One probe of one edge; what was not measured, or is not finite, is None.

    `overlap` of student and teacher on the student's states; `low_support`, the share of the teacher's rollouts that
    the student can hardly say any more; `kl_teacher`, KL(teacher ‖ student) in nats per token; `reward` of the student
    on held-out problems of the teacher's capability (docs/method.md, "Overlap").
    """

    overlap: Estimate | None = None
    low_support: Estimate | None = None
    kl_teacher: Estimate | None = None
    reward: Estimate | None = None

    def to_plain(self) -> dict[str, Any]:
        """For JSON, which keeps every bit of a float."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Reading:
        """What `to_plain` gave."""
        return cls(**{name: None if value is None else Estimate(**value) for name, value in plain.items()})


Readings = Mapping[Edge, Reading]
"""One probe of every edge."""
Trace = Mapping[Edge, Sequence[Reading]]
"""The probes of a phase, its starting point among them, in order."""


def edge(student: str, teacher: str) -> Edge:
    """The edge's name."""
    return f"{student} ← {teacher}"


def estimate(mean: float | None, variance: float | None, count: int) -> Estimate | None:
    """The mean of `count` independent values of that variance; None if anything about it is missing or not finite."""
    if mean is None or variance is None or count < 1 or not (math.isfinite(mean) and math.isfinite(variance)):
        return None
    return Estimate(mean, math.sqrt(max(variance, 0.0) / count))


def smoothed(estimates: Sequence[Estimate | None], weight: float) -> Iterator[Estimate]:
    """The exponential moving average after each value that is there, with its own standard error.

    The newest value counts `weight`, what came before it the rest. Errors of different probes are independent.
    """
    mean: float | None = None
    variance = 0.0
    for value in estimates:
        if value is None:
            continue
        share = 1.0 if mean is None else weight
        mean = share * value.mean + (1 - share) * (mean or 0.0)
        variance = (share * value.error) ** 2 + (1 - share) ** 2 * variance
        yield Estimate(mean, math.sqrt(variance))


def latest(estimates: Sequence[Estimate | None], weight: float) -> Estimate | None:
    """The moving average after the last value; None of nothing."""
    averages = list(smoothed(estimates, weight))
    return averages[-1] if averages else None
