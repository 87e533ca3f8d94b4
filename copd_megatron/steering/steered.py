"""A rhythm that follows the measured overlap: what it knows, and the updates that come of it.

All ranks of all branches hold an equal one. One of them judges, all heed the verdict (exchange.py), so they switch at
the same update. Its state is in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from copd_megatron.rhythm import Phase, Step
from copd_megatron.steering.absorption import Absorbed, Search, absorbed, moved
from copd_megatron.steering.overlap import Limits, why_leave_exchange, why_leave_explore
from copd_megatron.steering.readings import Reading, Readings


@dataclass(frozen=True)
class Lengths:
    """Updates: of the whole run, of the shortest and longest Phase I and Phase II, and those kept for the last
    Phase II, with which every run ends."""

    total: int
    explore: tuple[int, int]
    exchange: tuple[int, int]
    last: int


@dataclass(frozen=True)
class Switch:
    """The end of a phase: after which update, and why. `numbers` are metrics: the phase's length, the bounds that were
    in force, and what a Phase II has absorbed."""

    cycle: int
    phase: Phase
    version: int
    reason: str
    numbers: dict[str, float]


class SteeredRhythm:
    """Phases that end when `limits` say so, within `lengths`; with `search` the limits move after each Phase II."""

    def __init__(self, lengths: Lengths, limits: Limits, search: Search | None = None) -> None:
        self._lengths = lengths
        self._search = search
        self.limits = limits
        self._ends: list[int] = []
        self._trace: dict[str, list[Reading]] = {}
        self._history: list[Absorbed] = []

    @property
    def total(self) -> int:
        """Updates of the whole run."""
        return self._lengths.total

    # ------------------------------------------------------------------ the updates

    def __iter__(self) -> Iterator[int]:
        cycle = 0
        while cycle <= self._cycle and self._start < self.total:
            yield cycle
            cycle += 1

    def explore(self, cycle: int, done: int) -> Iterator[Step]:
        """Phase I of a cycle, without the first `done` updates of the run, until `heed` is told a reason to end it."""
        return self._updates(cycle, "explore", done)

    def exchange(self, cycle: int, done: int) -> Iterator[Step]:
        """Phase II of a cycle likewise."""
        return self._updates(cycle, "exchange", done)

    def overdue(self, version: int) -> bool:
        """Whether the phase should have been judged at `version`, and the run was cut short before it was."""
        return self._start < version and version - self._start >= self._longest()

    # ------------------------------------------------------------------ the switches

    def judge(self, version: int, readings: Readings) -> str | None:
        """Why the phase should end after `version` updates, at which `readings` were taken; None if it should go on.

        Changes nothing, and is the same on every rank.
        """
        done = version - self._start
        shortest = (self._lengths.explore if self._phase == "explore" else self._lengths.exchange)[0]
        if done >= self._longest():
            return self._reason_of_length(version)
        if done < shortest or (self._phase == "exchange" and not self._room_after(version)):
            return None
        trace = {name: [*seen, readings[name]] if name in readings else seen for name, seen in self._trace.items()}
        trace |= {name: [reading] for name, reading in readings.items() if name not in trace}
        why_leave = why_leave_explore if self._phase == "explore" else why_leave_exchange
        return why_leave(trace, self.limits)

    def heed(self, version: int, readings: Readings, reason: str | None) -> Switch | None:
        """Take note of readings and, with a `reason`, of the end of the phase.

        Before the first update all branches are the same model: where overlap falls from there says nothing about how
        fast it goes on falling, which is far slower.
        """
        if version == 0:
            return None
        for name, reading in readings.items():
            self._trace.setdefault(name, []).append(reading)
        if reason is None:
            return None
        steps = version - self._start
        numbers = {"length": float(steps), "low": self.limits.low, "high": self.limits.high}
        if self._phase == "exchange":
            numbers |= self._learn(readings, steps)
        switch = Switch(self._cycle, self._phase, version, reason, numbers)
        self._ends.append(version)
        self._trace = {name: [reading] for name, reading in readings.items()}
        return switch

    def _learn(self, after: Readings, steps: int) -> dict[str, float]:
        before = {name: readings[0] for name, readings in self._trace.items()}
        result = absorbed(before, after, steps)
        if result is None:
            return {}
        self._history.append(result)
        if self._search is not None:
            self.limits = moved(self.limits, self._history, self._search, self.limits.sureness)
        return {"gain": result.gain.mean, "gain_error": result.gain.error}

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything that was measured and decided so far and still counts, for JSON."""
        return {
            "ends": list(self._ends),
            "trace": {name: [reading.to_plain() for reading in readings] for name, readings in self._trace.items()},
            "history": [result.to_plain() for result in self._history],
            "low": self.limits.low,
            "high": self.limits.high,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._ends = list(state["ends"])
        self._trace = {name: [Reading.from_plain(plain) for plain in trace] for name, trace in state["trace"].items()}
        self._history = [Absorbed.from_plain(plain) for plain in state["history"]]
        self.limits = replace(self.limits, low=state["low"], high=state["high"])

    # ------------------------------------------------------------------ where it stands

    @property
    def _start(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def _cycle(self) -> int:
        return len(self._ends) // 2

    @property
    def _phase(self) -> Phase:
        return "exchange" if len(self._ends) % 2 else "explore"

    def _updates(self, cycle: int, phase: Phase, done: int) -> Iterator[Step]:
        while (self._cycle, self._phase) == (cycle, phase) and done < self.total:
            yield Step(done, cycle, phase, done - self._start, self._longest())
            done += 1

    def _longest(self) -> int:
        left = self.total - self._start
        if self._phase == "explore":
            return min(self._lengths.explore[1], left - self._lengths.last)
        longest = self._lengths.exchange[1]
        return longest if longest < left and self._room_after(self._start + longest) else left

    def _room_after(self, version: int) -> bool:
        """Whether another cycle fits in after `version`."""
        return self.total - version >= self._lengths.explore[0] + self._lengths.last

    def _reason_of_length(self, version: int) -> str:
        if version == self.total:
            return "the run is over"
        if self._phase == "explore" and self.total - version == self._lengths.last:
            return "what is left is the last Phase II"
        return "it has its greatest length"
