"""Branches that drift apart in Phase I and come closer in Phase II, measured with noise, without any training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from copd_megatron.rhythm import Step
from copd_megatron.steering.overlap import Limits
from copd_megatron.steering.readings import Estimate, Reading
from copd_megatron.steering.steered import Lengths, SteeredRhythm

EDGE, BACK = "text ← image", "image ← text"
LIMITS = Limits(low=0.85, high=0.92, low_support=0.5, sureness=1.0, smoothing=0.5, patience=2)
LENGTHS = Lengths(total=120, explore=(5, 30), exchange=(5, 30), last=15)


def reading(overlap: float | None = None, error: float = 0.0, **others: float) -> Reading:
    """A probe of one edge, with the same error in everything."""
    named = {name: Estimate(value, error) for name, value in others.items()}
    return Reading(overlap=None if overlap is None else Estimate(overlap, error), **named)


def simulate(
    rhythm: SteeredRhythm,
    measure: Callable[[Step | None, int], dict[str, Reading]],
    every: int = 5,
    done: int = 0,
) -> Iterator[tuple[Step, str | None]]:
    """The updates that a run makes and, after each, the reason to end the phase; as `Branch.settle` does it.

    `measure` is told the update just made (None before the first) and the version.
    """
    if done == 0:
        rhythm.heed(0, measure(None, 0), None)
    version = done
    for cycle in rhythm:
        for phase in (rhythm.explore, rhythm.exchange):
            for step in phase(cycle, version):
                assert step.number == version
                version += 1
                reason = None
                if step.closes_phase or version % every == 0:
                    readings = measure(step, version)
                    reason = rhythm.judge(version, readings)
                    rhythm.heed(version, readings, reason)
                yield step, reason


class Drift:
    """Overlap falls by `fall` in each update of Phase I and makes up a tenth of what is missing in each of Phase II;
    each probe sees it with normal noise of `error`. A probe depends on its version alone, as real ones do."""

    def __init__(self, fall: float = 0.01, error: float = 0.0, edges: tuple[str, ...] = (EDGE, BACK)) -> None:
        self._fall, self._error, self._edges = fall, error, edges
        self.overlap = {0: 1.0}

    def __call__(self, step: Step | None, version: int) -> dict[str, Reading]:
        before = max(known for known in self.overlap if known <= version)
        value = self.overlap[before]
        for _ in range(version - before):
            explores = step is not None and step.phase == "explore"
            value = value - self._fall if explores else value + 0.1 * (0.97 - value)
        self.overlap[version] = value
        noise = random.Random(version)
        return {name: reading(value + noise.gauss(0, self._error), self._error) for name in self._edges}
