"""Whether overlap, or support, is a reason to leave a phase (docs/method.md, "Rhythm"). Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from copd_megatron.steering.readings import Edge, Estimate, Reading, Trace, latest, smoothed


@dataclass(frozen=True)
class Limits:
    """Between which a run is kept.

    Phase I lasts until the overlap of an edge is below `low`, or would be `ahead` probes later if it went on falling as
    since the last one; Phase II until every edge is above `high` or has stopped rising; all by `sureness` standard
    errors of the moving average, in which the newest probe counts `smoothing`. An edge has stopped rising if none of
    its last `patience` averages exceeds all before them. `low_support` is the largest share of a teacher's rollouts
    that a student may have lost (None: any).
    """

    low: float
    high: float
    low_support: float | None
    sureness: float
    smoothing: float
    patience: int
    ahead: float = 0.0


def why_leave_explore(trace: Trace, limits: Limits) -> str | None:
    """Why Phase I should end; None if nothing that was measured says so."""
    for name, readings in sorted(trace.items()):
        averages = list(smoothed([reading.overlap for reading in readings], limits.smoothing))
        if averages and _below(averages[-1], limits):
            return f"overlap of {name} fell to {averages[-1]}, below {limits.low:.3f}"
        if len(averages) > 1 and _below(coming := _ahead(averages[-2], averages[-1], limits.ahead), limits):
            return f"overlap of {name} fell to {averages[-1]}, and would fall to {coming}, below {limits.low:.3f}"
        lost = _lost_support(readings, limits)
        if lost is not None:
            return f"{name} lost support: {lost} of the teacher's rollouts, above {limits.low_support:.3f}"
    return None


def _below(overlap: Estimate, limits: Limits) -> bool:
    return overlap.mean + limits.sureness * overlap.error < limits.low


def _ahead(before: Estimate, now: Estimate, probes: float) -> Estimate:
    """Where a falling overlap will be, on a straight line through the last two averages; a rising one stays."""
    if now.mean >= before.mean:
        return now
    return Estimate(
        now.mean + probes * (now.mean - before.mean), math.hypot((1 + probes) * now.error, probes * before.error)
    )


def why_leave_exchange(trace: Trace, limits: Limits) -> str | None:
    """Why Phase II should end; None if nothing that was measured says so.

    An edge whose support is lost has not recovered, however high its overlap; but it can have stopped rising.
    """
    verdicts = [_settled(name, readings, limits) for name, readings in sorted(trace.items())]
    if not verdicts or any(verdict is None for verdict in verdicts):
        return None
    return "; ".join(verdict for verdict in verdicts if verdict is not None)


def _settled(name: Edge, readings: Sequence[Reading], limits: Limits) -> str | None:
    averages = list(smoothed([reading.overlap for reading in readings], limits.smoothing))
    if not averages:
        return None
    now = averages[-1]
    if now.mean - limits.sureness * now.error > limits.high and _lost_support(readings, limits) is None:
        return f"overlap of {name} rose to {now}, above {limits.high:.3f}"
    if _stopped_rising(averages, limits):
        return f"overlap of {name} stopped rising at {now}"
    return None


def _stopped_rising(averages: Sequence[Estimate], limits: Limits) -> bool:
    before, recent = averages[: -limits.patience], averages[-limits.patience :]
    if not before:
        return False
    best = max(before, key=lambda average: average.mean)
    return not any(
        average.mean > best.mean + limits.sureness * math.hypot(average.error, best.error) for average in recent
    )


def _lost_support(readings: Sequence[Reading], limits: Limits) -> Estimate | None:
    """The share that is lost, if it is above its bound."""
    if limits.low_support is None:
        return None
    lost = latest([reading.low_support for reading in readings], limits.smoothing)
    return lost if lost is not None and lost.mean - limits.sureness * lost.error > limits.low_support else None
