"""What a step's rollouts were like, in sums that data-parallel replicas can add."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from copd_megatron.rollout.types import Rollout


@dataclass(frozen=True)
class Tally:
    """Rewards of the branch's own rollouts; tokens and cut responses of all; `events` counts by metric name."""

    rewards: tuple[float, ...] = ()
    tokens: int = 0
    responses: int = 0
    events: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, native: Sequence[Rollout], cross: Mapping[str, Sequence[Rollout]], **events: int) -> Tally:
        """The tally of one replica's rollouts, with further `events`."""
        everything = [*native, *(rollout for scored in cross.values() for rollout in scored)]
        return cls(
            rewards=tuple(rollout.reward or 0.0 for rollout in native),
            tokens=sum(len(rollout.token_ids) for rollout in everything),
            responses=len(everything),
            events={"truncated": sum(rollout.finish == "length" for rollout in everything), **events},
        )

    @classmethod
    def total(cls, tallies: Iterable[Tally]) -> Tally:
        """All replicas together."""
        parts = list(tallies)
        events: Counter[str] = Counter()
        for part in parts:
            events.update(part.events)
        return cls(
            rewards=tuple(reward for part in parts for reward in part.rewards),
            tokens=sum(part.tokens for part in parts),
            responses=sum(part.responses for part in parts),
            events=events,
        )

    def metrics(self) -> dict[str, float]:
        """`reward/*`, `rollout/*` and `count/*` (docs of observe/metrics.py)."""
        values: dict[str, float] = {f"count/{name}": count for name, count in self.events.items()}
        if self.rewards:
            mean = math.fsum(self.rewards) / len(self.rewards)
            variance = math.fsum((reward - mean) ** 2 for reward in self.rewards) / len(self.rewards)
            values |= {"reward/mean": mean, "reward/std": math.sqrt(variance)}
        values |= {"count/rollouts": self.responses, "count/rollout_tokens": self.tokens}
        if self.responses:
            values["rollout/length"] = self.tokens / self.responses
            values["rollout/truncated"] = self.events.get("truncated", 0) / self.responses
        return values
