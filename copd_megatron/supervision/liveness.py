"""Who has failed: told from what the conductor hears and from its own clock alone, whatever other clocks say."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from copd_megatron.config.supervision import SupervisionConfig
from copd_megatron.observe.events import Kind


@dataclass
class _Heard:
    """What was heard last, and when it changed."""

    value: object = None
    since: float = 0.0

    def update(self, value: object, now: float) -> None:
        if value != self.value:
            self.value, self.since = value, now


@dataclass
class _Branch:
    status: _Heard
    waiting: bool = False
    beats: dict[int, _Heard] = field(default_factory=dict)
    late: set[int] = field(default_factory=set)


class Liveness:
    """Follows the branches of one attempt, which begins now.

    A slow rank beats, a rank that is cut off for a while beats again later; a stopped or lost one does not. A branch
    that beats but does not move is stuck, unless it waits for another.
    """

    def __init__(
        self, branches: list[str], settings: SupervisionConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._clock = clock
        now = clock()
        self._branches = {name: _Branch(_Heard(since=now)) for name in branches}

    def hear(self, branch: str, status: str | None, waiting: bool, beats: Mapping[int, int]) -> None:
        """Take the branch's newest status line (None: none yet), whether it says that the branch waits for others, and
        the newest beat of each rank that has beaten."""
        now, heard = self._clock(), self._branches[branch]
        heard.status.update(status, now)
        heard.waiting = waiting
        for rank, count in beats.items():
            heard.beats.setdefault(rank, _Heard()).update(count, now)

    def gone(self, branch: str) -> None:
        """Expect nothing more of a branch that has ended."""
        self._branches.pop(branch, None)

    def notices(self) -> list[tuple[str, Kind, str]]:
        """(branch, kind of event, text) of ranks that have become late, and of late ones that are back."""
        now = self._clock()
        found: list[tuple[str, Kind, str]] = []
        for name, branch in self._branches.items():
            for rank, heard in branch.beats.items():
                silence = now - heard.since
                if silence > self._settings.heartbeat_seconds / 2 and rank not in branch.late:
                    branch.late.add(rank)
                    found.append((name, "warning", f"no sign of life from rank {rank} for {silence:.0f} s"))
                elif rank in branch.late and silence < self._settings.heartbeat_seconds / 4:
                    branch.late.remove(rank)
                    found.append((name, "recovery", f"rank {rank} is back"))
        return found

    def failures(self) -> list[tuple[str, str]]:
        """(branch, reason) of branches that have to be taken for failed."""
        return self._silent() or self._stuck()

    def _silent(self) -> list[tuple[str, str]]:
        now, limit = self._clock(), self._settings.heartbeat_seconds
        found = []
        for name, branch in self._branches.items():
            silent = [str(rank) for rank, heard in branch.beats.items() if now - heard.since > limit]
            if silent:
                found.append(
                    (
                        name,
                        f"no sign of life from rank {', '.join(silent)} for {limit:g} s: stopped, or its node is gone "
                        "or cut off (supervision.heartbeat_seconds)",
                    )
                )
        return found

    def _stuck(self) -> list[tuple[str, str]]:
        now, limit = self._clock(), self._settings.stall_seconds
        still = {name for name, branch in self._branches.items() if now - branch.status.since > limit}
        busy = {name for name in still if not self._branches[name].waiting}
        # Whoever waits is not to blame, unless there is nobody left to wait for.
        accused = busy or (still if still == self._branches.keys() else set())
        return [
            (name, f"alive, but without progress for {limit:g} s (supervision.stall_seconds)")
            for name in sorted(accused)
        ]
