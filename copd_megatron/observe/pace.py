"""How long a run still takes, from how long its latest steps took."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from copd_megatron.observe.status import BranchStatus


@dataclass(frozen=True)
class RunPlan:
    """What a run intends: its branches, and the updates of each phase in each of `cycles` cycles.

    A `steered` run has as many updates, but phases and cycles of other lengths and number.
    """

    branches: tuple[str, ...]
    cycles: int
    explore_steps: int
    exchange_steps: int
    steered: bool = False

    @property
    def steps(self) -> int:
        """Updates of one branch over the whole run."""
        return self.cycles * (self.explore_steps + self.exchange_steps)


class Pace:
    """Time left, from the mean duration of the latest `window` steps of each phase.

    A step's duration is the time between the statuses that announce it and its predecessor, so checkpoints and probes
    count as part of it. A phase not yet seen is taken to be as slow as the other. The slowest branch decides.
    """

    def __init__(self, plan: RunPlan, window: int = 20, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan = plan
        self._clock = clock
        self._latest: dict[str, BranchStatus] = {}
        self._since: dict[str, tuple[int, float]] = {}
        self._durations: dict[tuple[str, str], deque[float]] = {
            (branch, phase): deque(maxlen=window) for branch in plan.branches for phase in ("explore", "exchange")
        }

    def observe(self, branch: str, status: BranchStatus) -> None:
        """Take note of a status that has just arrived."""
        now = self._clock()
        step, since = self._since.get(branch, (status.step, now))
        if status.step > step:
            self._durations[branch, status.phase].append((now - since) / (status.step - step))
        if status.step != step or branch not in self._since:
            self._since[branch] = (status.step, now)
        self._latest[branch] = status

    def seconds_left(self) -> float | None:
        """Seconds until the last branch has made its last update; None until every branch has made a step."""
        estimates = []
        for branch in self._plan.branches:
            estimate = self._branch_left(branch)
            if estimate is None:
                return None
            estimates.append(estimate)
        return max(estimates, default=None)

    def _branch_left(self, branch: str) -> float | None:
        status = self._latest.get(branch)
        if status is None:
            return None
        if status.state == "done" or status.step >= self._plan.steps:
            return 0.0
        explore, exchange = (self._durations[branch, phase] for phase in ("explore", "exchange"))
        known = explore or exchange
        if not known:
            return None
        if self._plan.steered:
            seconds = [*explore, *exchange]
            return (self._plan.steps - status.step) * sum(seconds) / len(seconds)
        cycles_after = self._plan.cycles - status.cycle - 1
        here = max(status.phase_steps - status.phase_step, 0)
        explore_left = cycles_after * self._plan.explore_steps + (here if status.phase == "explore" else 0)
        exchange_left = cycles_after * self._plan.exchange_steps + (
            self._plan.exchange_steps if status.phase == "explore" else here
        )
        return explore_left * _mean(explore or known) + exchange_left * _mean(exchange or known)


def _mean(values: deque[float]) -> float:
    return sum(values) / len(values)
