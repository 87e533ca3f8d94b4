"""How much a Phase II absorbed per update, and bounds that follow what was absorbed best. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from copd_megatron.steering.overlap import Limits
from copd_megatron.steering.readings import Estimate, Reading, Readings

NARROWEST = 0.01
"""Least distance between `low` and `high`."""


@dataclass(frozen=True)
class Absorbed:
    """One Phase II: the least overlap of any edge at its start and end, and what an update gained."""

    start: float
    end: float
    gain: Estimate

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Absorbed:
        """What `to_plain` gave."""
        return cls(plain["start"], plain["end"], Estimate(**plain["gain"]))


@dataclass(frozen=True)
class Search:
    """How bounds move: a share `rate` of the way each time, towards the best of the last `memory` Phases II, within
    `least` and `most`."""

    rate: float
    memory: int
    least: float
    most: float


def absorbed(before: Readings, after: Readings, steps: int) -> Absorbed | None:
    """What a Phase II of `steps` updates did, from the probes at its ends; None if too little was measured.

    An edge's gain is the share of the held-out KL(teacher ‖ student) that is gone plus the rise of the student's
    held-out reward on the teacher's capability, both in [−1, 1] where nothing goes wrong; the result is the mean over
    edges per update.
    """
    gains = [gain for name in before if name in after and (gain := _gain(before[name], after[name])) is not None]
    starts = [reading.overlap.mean for reading in before.values() if reading.overlap is not None]
    ends = [reading.overlap.mean for reading in after.values() if reading.overlap is not None]
    if not gains or not starts or not ends or steps < 1:
        return None
    count = len(gains) * steps
    gain = Estimate(
        math.fsum(part.mean for part in gains) / count,
        math.sqrt(math.fsum(part.error**2 for part in gains)) / count,
    )
    return Absorbed(min(starts), min(ends), gain)


def moved(limits: Limits, history: Sequence[Absorbed], search: Search, sureness: float) -> Limits:
    """`limits` with `low` and `high` moved towards where the best Phase II began and ended.

    The last Phase II is followed unless an earlier one was better by `sureness` standard errors of the difference.
    """
    recent = history[-search.memory :]
    if not recent:
        return limits
    best = recent[-1]
    for other in recent[:-1]:
        surely = sureness * math.hypot(other.gain.error, best.gain.error)
        if other.gain.mean > best.gain.mean + surely:
            best = other
    low = limits.low + search.rate * (best.start - limits.low)
    high = limits.high + search.rate * (best.end - limits.high)
    low = min(max(low, search.least), search.most - NARROWEST)
    return replace(limits, low=low, high=min(max(high, low + NARROWEST), search.most))


def _gain(before: Reading, after: Reading) -> Estimate | None:
    parts = []
    if before.kl_teacher is not None and after.kl_teacher is not None:
        parts.append(_share_gone(before.kl_teacher, after.kl_teacher))
    if before.reward is not None and after.reward is not None:
        errors = math.hypot(before.reward.error, after.reward.error)
        parts.append(Estimate(after.reward.mean - before.reward.mean, errors))
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return Estimate(math.fsum(part.mean for part in known), math.hypot(*(part.error for part in known)))


def _share_gone(before: Estimate, after: Estimate) -> Estimate | None:
    """(before − after) / before; None where there was nothing to absorb that could be told from noise."""
    if before.mean <= 2 * before.error or before.mean <= 0:
        return None
    ratio = after.mean / before.mean
    return Estimate(1 - ratio, math.hypot(after.error, ratio * before.error) / before.mean)
