"""Training under supervision: whatever fails, all branches go on from their last common checkpoint, a few times.

All of them go back, also those that did not fail. Branches make their updates in lockstep, so the others would wait
until the failed one has caught up in any case; going back with it takes no longer, and nobody has to keep past weights
for it to learn from. The servers stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from torch.distributed import DistError

from copd_megatron.cluster.site import Site
from copd_megatron.config import RunConfig
from copd_megatron.errors import CopdError, Interrupted
from copd_megatron.exchange import Supervision
from copd_megatron.observe.events import EventLog, Kind
from copd_megatron.observe.progress import Progress
from copd_megatron.observe.status import BranchStatus
from copd_megatron.rollout.sglang.fleet import Fleet
from copd_megatron.run_checkpoints import RunCheckpoints
from copd_megatron.run_folder import RunFolder
from copd_megatron.supervision.gang import Gang
from copd_megatron.supervision.liveness import Liveness
from copd_megatron.supervision.signals import heeding
from copd_megatron.supervision.switchboard import Switchboard

_POLL_SECONDS = 0.25
_BEATS_SECONDS = 2.0
_LAST_WORDS_SECONDS = 5.0
"""How long the others may tell what they know after a branch has failed: the cause may be with one of them."""
_ENDING_SECONDS = 120.0
"""How long a branch may take to end after its last word."""
_DUMP_SECONDS = 5.0
"""How long ranks may take to notice that they are to print what they do."""


class Supervisor:
    """Trains the branches of a run to their end. `go_back` makes the run directory ready for its newest checkpoint and
    returns that checkpoint's step."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        site: Site,
        fleet: Fleet | None,
        progress: Progress,
        go_back: Callable[[], int],
    ) -> None:
        self._site = site
        self._config = config
        self._folder = folder
        self._fleet = fleet
        self._progress = progress
        self._go_back = go_back
        self._events = EventLog(folder.path)
        self._checkpoints = RunCheckpoints(folder, [branch.name for branch in config.trained])

    def train(self, start: int) -> None:
        """From the checkpoint of `start` to the end.

        Raises Interrupted when the user has asked to stop, CopdError with the reason when the run cannot go on.
        """
        try:
            self._train(start)
        except Interrupted:
            raise
        except CopdError as error:
            self._events("CoPD", "failure", f"stopped: {error}")
            raise
        self._tell("CoPD", "end", "all branches are trained")

    def _train(self, start: int) -> None:
        failures, limit = 0, self._config.supervision.max_restarts
        with _stop_on_signal() as stop:
            while True:
                self._tell("CoPD", "start", f"training from step {start}")
                attempt = _Attempt(self._config, self._folder, self._site, self._fleet, self._progress, self._tell)
                reason = attempt.run(start, stop)
                if reason is None:
                    return
                newest = self._checkpoints.newest()
                failures = 1 if newest > start else failures + 1
                if stop.requested or failures > limit:
                    again = f"Starting again did not help ({failures - 1} times). " if failures > 1 else ""
                    raise CopdError(f"{reason}\n{again}The same command continues from step {newest}.")
                start = self._go_back()
                self._tell("CoPD", "recovery", f"all branches go on from step {start} (restart {failures} of {limit})")

    def _tell(self, source: str, kind: Kind, text: str) -> None:
        self._events(source, kind, text)
        if kind not in ("start", "end"):
            self._progress.event(source, text)


class _Attempt:
    """One start of all gangs, until they end or one of them has failed."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        site: Site,
        fleet: Fleet | None,
        progress: Progress,
        tell: Callable[[str, Kind, str], None],
    ) -> None:
        self._folder = folder
        self._site = site
        self._fleet = fleet
        self._progress = progress
        self._tell = tell
        names = [branch.name for branch in config.trained]
        self._switchboard = Switchboard(folder.path, names, config.supervision.stall_seconds, folder.log, site.address)
        self._supervision = Supervision(self._switchboard.store, names)
        self._liveness = Liveness(names, config.supervision)
        self._worlds = {branch.name: branch.parallel.world for branch in config.trained}
        self._gangs: dict[str, Gang] = {}
        self._endings: dict[str, str] = {}
        self._said: dict[str, float] = {}
        self._beats_due = 0.0

    def run(self, start: int, stop: _StopRequest) -> str | None:
        """Why training from the checkpoint of `start` has failed; None if all branches are trained.

        Raises Interrupted if all have saved and stopped, CopdError for what another start would not change.
        """
        try:
            for name in self._worlds:
                self._start(name, start)
            self._watch(stop)
        except DistError as error:  # of the store
            self._tell("CoPD", "failure", f"the process that branches talk through is gone ({error})")
            return f"the process that branches talk through is gone ({error})"
        finally:
            for gang in self._gangs.values():
                gang.kill()
            self._switchboard.close()
        endings = {self._endings.get(name) for name in self._worlds}
        if endings == {"done"}:
            return None
        if endings <= {"done", "interrupted"}:
            step = RunCheckpoints(self._folder, [*self._worlds]).newest()
            self._tell("CoPD", "stop", f"stopped at step {step}")
            raise Interrupted(f"stopped; the same command continues from step {step}")
        return self._explain()

    def _start(self, name: str, step: int) -> None:
        arguments = ["--run-dir", str(self._folder.path), "--branch", name]
        arguments += ["--store", self._switchboard.address, "--resume", str(step)]
        self._gangs[name] = self._site.gang(name, arguments)

    def _watch(self, stop: _StopRequest) -> None:
        """Until every gang has ended, or has had time for its last words after one has failed."""
        asked, failed_at = False, float("inf")
        while self._endings.keys() != self._gangs.keys():
            self._show()
            failed = [name for name in sorted(self._gangs.keys() - self._endings.keys()) if self._has_failed(name)]
            failed += self._check_liveness() if not failed else []
            if failed:
                failed_at = min(failed_at, time.monotonic())
            if self._fleet is not None:
                for event in self._fleet.watch(self._supervision.hung()):
                    self._tell("CoPD", "recovery", event)
            if stop.requested and not asked:
                asked = True
                step = self._supervision.stop()
                self._tell("CoPD", "stop", f"stopping: all branches save step {step} and end (again to stop at once)")
            if stop.insisted or time.monotonic() > failed_at + _LAST_WORDS_SECONDS:
                break
            time.sleep(_POLL_SECONDS)
        self._show()

    def _has_failed(self, name: str) -> bool:
        """Whether a gang that ran until now has ended in another way than it should. Notes how it has ended.

        Raises CopdError if it says that the run cannot go on.
        """
        status, word = self._gangs[name].poll(), self._supervision.ending(name)
        if status is None and (word is None or not self._overdue(name)):
            return False
        self._gangs[name].kill()
        self._liveness.gone(name)
        if refusal := self._supervision.refusal(name):
            step = RunCheckpoints(self._folder, [*self._worlds]).newest()
            advice = "" if "--resume-from" in refusal else f"\nThe same command continues from step {step}."
            raise CopdError(f"branch {name}: failed: {refusal} (log: {self._gangs[name].log}){advice}")
        self._endings[name] = word or f"died without a word, exit status {status}"
        if word in ("done", "interrupted"):
            return False
        # Who has lost a peer is not to blame, unless all have: then the time to wait for each other was too short.
        self._tell(name, "warning" if self._endings[name].startswith("lost") else "failure", self._endings[name])
        self._supervision.lost(name, self._endings[name])
        return True

    def _overdue(self, name: str) -> bool:
        """Whether a gang goes on for long after its last word."""
        return time.monotonic() - self._said.setdefault(name, time.monotonic()) > _ENDING_SECONDS

    def _check_liveness(self) -> list[str]:
        """Branches that do not end, but have to be taken for failed; they are ended."""
        if time.monotonic() < self._beats_due:
            return []
        self._beats_due = time.monotonic() + _BEATS_SECONDS
        statuses = self._supervision.statuses()
        for name in self._gangs.keys() - self._endings.keys():
            if self._supervision.ending(name) is not None:  # a process that ends beats no more
                self._liveness.gone(name)
                continue
            line = statuses.get(name)
            waiting = line is not None and BranchStatus.from_json(line).state == "wait"
            self._liveness.hear(name, line, waiting, self._supervision.beats(name, self._worlds[name]))
        for notice in self._liveness.notices():
            self._tell(*notice)
        failures = self._liveness.failures()
        for name, reason in failures:
            self._tell(name, "failure", reason)
            self._endings[name] = reason
            self._supervision.ask_for_stacks(name)
        if failures:
            time.sleep(_DUMP_SECONDS)
        for name, reason in failures:
            self._gangs[name].kill()
            self._supervision.lost(name, reason)
            self._liveness.gone(name)
        return [name for name, _ in failures]

    def _show(self) -> None:
        for name, line in self._supervision.statuses().items():
            self._progress.update(name, BranchStatus.from_json(line))
        for name, event in self._supervision.events():
            self._tell(name, "turn", event)

    def _explain(self) -> str:
        lines = [f"branch {name}: {ending} (log: {self._gangs[name].log})" for name, ending in self._endings.items()]
        for name, gang in self._gangs.items():
            if self._endings.get(name, "").startswith("died"):
                lines.append(f"--- end of {gang.log}\n{gang.last_words()}")
        return "\n".join(lines) or "stopped at once, without a checkpoint"


class _StopRequest:
    """How often the user has asked to stop."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self._count += 1

    @property
    def requested(self) -> bool:
        return self._count > 0

    @property
    def insisted(self) -> bool:
        return self._count > 1


@contextmanager
def _stop_on_signal() -> Iterator[_StopRequest]:
    request = _StopRequest()
    with heeding(request):
        yield request
