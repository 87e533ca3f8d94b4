"""When a phase ends: here after a fixed number of updates; by what is measured in steering/."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Phase = Literal["explore", "exchange"]


@dataclass(frozen=True)
class Step:
    """One update: `number` counts updates from 0 over the whole run, `index` from 0 within the phase, which has
    `length` updates or, where it is steered, at most so many."""

    number: int
    cycle: int
    phase: Phase
    index: int
    length: int

    @property
    def opens_phase(self) -> bool:
        """Is this the phase's first update?"""
        return self.index == 0

    @property
    def closes_phase(self) -> bool:
        """Is this the phase's last update, whatever is measured after it?"""
        return self.index >= self.length - 1


@dataclass(frozen=True)
class FixedRhythm:
    """The same `explore_steps` and `exchange_steps` in each of `cycles` cycles (docs/method.md, "Algorithm").

    A pure function of the number of updates made, so resuming needs nothing else.
    """

    cycles: int
    explore_steps: int
    exchange_steps: int

    @property
    def total(self) -> int:
        """Updates of the whole run."""
        return self.cycles * (self.explore_steps + self.exchange_steps)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.cycles))

    def explore(self, cycle: int, done: int) -> Iterator[Step]:
        """Phase I of a cycle, without the first `done` updates of the run."""
        start = cycle * (self.explore_steps + self.exchange_steps)
        return self._phase("explore", cycle, start, self.explore_steps, done)

    def exchange(self, cycle: int, done: int) -> Iterator[Step]:
        """Phase II of a cycle, without the first `done` updates of the run."""
        start = cycle * (self.explore_steps + self.exchange_steps) + self.explore_steps
        return self._phase("exchange", cycle, start, self.exchange_steps, done)

    @staticmethod
    def _phase(phase: Phase, cycle: int, start: int, length: int, done: int) -> Iterator[Step]:
        for index in range(max(0, done - start), length):
            yield Step(start + index, cycle, phase, index, length)
