"""A run as events: updates that end, checkpoints that count, failures that undo what came after the last one.

Branches go through Phase I alone and through Phase II in lockstep, as `train.py` has them: an update of Phase II
begins when every peer has made as many updates. A failure takes all of them back to the last checkpoint of the whole
run (docs/reliability.md).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from copd_megatron.errors import CopdError

Activities = Mapping[str, float]
"""Seconds of one update by activity."""
Draw = Callable[[str, bool, np.random.Generator], Activities]
"""(branch, whether it is an update of Phase II, random numbers) to one update's activities."""


_IN_VAIN = 1000
"""Failures without a newer checkpoint after which a run is given up."""


class NeverEnds(CopdError):
    """Failures come faster than checkpoints."""


@dataclass(frozen=True)
class Rules:
    """A run. `gpus` per branch, engines included; `peers` by branch: those it exchanges with; `mtbf`: seconds of one
    GPU between failures (inf: none); `stall` of training at a checkpoint, which counts `write` seconds later."""

    gpus: Mapping[str, int]
    peers: Mapping[str, tuple[str, ...]]
    cycles: int
    explore_steps: int
    exchange_steps: int
    checkpoint_every: int | None
    stall: float
    write: float
    mtbf: float
    restart: float

    @property
    def total(self) -> int:
        """Updates of each branch."""
        return self.cycles * (self.explore_steps + self.exchange_steps)

    def exchanges(self, version: int) -> bool:
        """Whether the update after `version` is one of Phase II."""
        return version % (self.explore_steps + self.exchange_steps) >= self.explore_steps

    def saves(self, version: int) -> bool:
        """Whether there is a checkpoint at `version`: at the end of a phase, and every so many updates."""
        place = version % (self.explore_steps + self.exchange_steps)
        return place in (0, self.explore_steps) or bool(self.checkpoint_every and version % self.checkpoint_every == 0)


@dataclass
class Outcome:
    """GPU-seconds of a run: `spent` by activity in updates that lasted, `lost` in what was undone, `restarts` while
    processes came back, `stalls` for checkpoints, `waits` for peers; `seconds` from start to end."""

    seconds: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    lost: float = 0.0
    restarts: float = 0.0
    stalls: float = 0.0
    failures: int = 0
    gpu_seconds: float = 0.0

    @property
    def waits(self) -> float:
        """What is left."""
        return self.gpu_seconds - sum(self.spent.values()) - self.lost - self.restarts - self.stalls

    @property
    def shares(self) -> dict[str, float]:
        """Of all GPU-seconds, by what they went into."""
        parts = {**self.spent, "wait": self.waits, "checkpoint": self.stalls}
        parts |= {"lost": self.lost, "restart": self.restarts}
        return {name: value / self.gpu_seconds for name, value in parts.items()}


@dataclass
class _Branch:
    version: int = 0
    epoch: int = 0
    """Events of an earlier one are void."""
    began: float = 0.0
    """When what it does now began: an update, a restart (`restarting`), or nothing (`idle`)."""
    state: str = "idle"
    current: Activities = field(default_factory=dict)
    made: list[Activities] = field(default_factory=list)
    saved: dict[int, float] = field(default_factory=dict)
    """When the checkpoint of a version is written."""


def simulate(rules: Rules, draw: Draw, seed: int) -> Outcome:
    """One run from its start to the last update of the last branch."""
    return _Simulation(rules, draw, np.random.default_rng(seed)).run()


class _Simulation:
    def __init__(self, rules: Rules, draw: Draw, generator: np.random.Generator) -> None:
        self._rules = rules
        self._draw = draw
        self._random = generator
        self._branches = {name: _Branch(saved={0: 0.0}) for name in rules.gpus}
        self._events: list[tuple[float, int, str, int]] = []
        self._number = 0
        self._outcome = Outcome()
        self._reached, self._in_vain = 0, 0

    def run(self) -> Outcome:
        """Until every branch is done."""
        now = 0.0
        failure = self._next_failure(now)
        self._start_all(now)
        while any(branch.version < self._rules.total for branch in self._branches.values()):
            if self._events[0][0] > failure:
                now = failure
                self._fail(now)
                failure = self._next_failure(now)
            else:
                now, _, name, epoch = heapq.heappop(self._events)
                if self._branches[name].epoch == epoch:
                    self._end(name, now)
            self._start_all(now)
        self._outcome.seconds = now
        self._outcome.gpu_seconds = now * sum(self._rules.gpus.values())
        for name, branch in self._branches.items():
            for activities in branch.made:
                for activity, seconds in activities.items():
                    spent = self._outcome.spent
                    spent[activity] = spent.get(activity, 0.0) + seconds * self._rules.gpus[name]
        return self._outcome

    def _next_failure(self, now: float) -> float:
        scale = self._rules.mtbf / sum(self._rules.gpus.values())
        return now + float(self._random.exponential(scale)) if np.isfinite(scale) else np.inf

    def _start_all(self, now: float) -> None:
        for name, branch in self._branches.items():
            if branch.state != "idle" or branch.version >= self._rules.total:
                continue
            exchange = self._rules.exchanges(branch.version)
            peers = self._rules.peers.get(name, ()) if exchange else ()
            if any(self._branches[peer].version < branch.version for peer in peers):
                continue
            branch.state, branch.began = "update", now
            branch.current = self._draw(name, exchange, self._random)
            self._after(name, now + sum(branch.current.values()) + self._stall(branch.version + 1))

    def _stall(self, version: int) -> float:
        return self._rules.stall if self._rules.saves(version) else 0.0

    def _after(self, name: str, when: float) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, name, self._branches[name].epoch))

    def _end(self, name: str, now: float) -> None:
        branch, gpus = self._branches[name], self._rules.gpus[name]
        if branch.state == "restart":
            self._outcome.restarts += (now - branch.began) * gpus
        else:
            branch.version += 1
            branch.made.append(branch.current)
            if self._rules.saves(branch.version):
                self._outcome.stalls += self._rules.stall * gpus
                branch.saved[branch.version] = now + self._rules.write
        branch.state = "idle"

    def _fail(self, now: float) -> None:
        """Some GPU fails: all branches go back."""
        self._outcome.failures += 1
        target = self._common(now)
        self._in_vain = self._in_vain + 1 if target == self._reached else 0
        self._reached = target
        if self._in_vain == _IN_VAIN:
            raise NeverEnds(
                f"{_IN_VAIN} failures in a row came before the next checkpoint, one every "
                f"{self._rules.mtbf / sum(self._rules.gpus.values()):,.0f} s on average; lower checkpoint.every_steps"
            )
        for name in self._branches:
            self._undo(name, target, now)

    def _common(self, now: float) -> int:
        """The newest version of which every branch's part is written."""
        written = [
            {version for version, when in branch.saved.items() if when <= now} for branch in self._branches.values()
        ]
        return max(set.intersection(*written))

    def _undo(self, name: str, target: int, now: float) -> None:
        branch, gpus = self._branches[name], self._rules.gpus[name]
        if branch.state == "restart":
            self._outcome.restarts += (now - branch.began) * gpus
        elif branch.state == "update":
            self._outcome.lost += (now - branch.began) * gpus
        for activities in branch.made[target:]:
            self._outcome.lost += sum(activities.values()) * gpus
        del branch.made[target:]
        branch.version = target
        branch.saved = {version: when for version, when in branch.saved.items() if version <= target}
        branch.epoch += 1
        branch.state, branch.began = "restart", now
        self._after(name, now + self._rules.restart)
