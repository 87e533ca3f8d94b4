"""How long a branch samples when lengths are random: until the slowest of its servers has its last response."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from copd_megatron.plan.plan import BranchPlan
from copd_megatron.plan.timing import prompt_seconds, server_share
from copd_megatron.plan.workload import Portion

_SEQUENCES = 15_000
"""Responses drawn for a pool of servers' times."""
_LARGEST, _SMALLEST = 512, 48
"""Servers in such a pool."""


@dataclass
class Servers:
    """Times of servers, ascending, drawn once per number of rollouts and used again by whoever has as many."""

    seed: int
    _pools: dict[tuple[object, ...], list[float]] = field(default_factory=dict)

    def rollout_seconds(
        self, branch: BranchPlan, portions: tuple[Portion, ...], random: np.random.Generator
    ) -> tuple[float, float]:
        """One draw of the time that the branch's servers take on average to sample all portions, one after another, and
        of what the slowest server takes beyond that."""
        servers = branch.fleet.servers
        average = beyond = 0.0
        for portion in portions:
            pool = self._pool(branch, portion, server_share(portion, servers))
            # The largest of n independent draws lies at the quantile u^(1/n).
            place = random.random() ** (1 / servers) * (len(pool) - 1)
            below = int(place)
            slowest = pool[below] + (place - below) * (pool[min(below + 1, len(pool) - 1)] - pool[below])
            mean = sum(pool) / len(pool)
            average += mean + prompt_seconds(portion, branch.speed, servers)
            beyond += slowest - mean
        return average, beyond

    def _pool(self, branch: BranchPlan, portion: Portion, count: int) -> list[float]:
        key = (branch.speed.cache, branch.fleet.gpus, portion.capability, portion.lengths, count)
        if key not in self._pools:
            size = min(_LARGEST, max(_SMALLEST, _SEQUENCES // count))
            random = np.random.default_rng(self.seed)
            lengths = portion.lengths.draw(random, (size, count))
            prompt, group = portion.capability.prompt, portion.group
            times = [branch.speed.decode_seconds(row.tolist(), prompt, group) for row in lengths]
            self._pools[key] = sorted(times)
        return self._pools[key]
