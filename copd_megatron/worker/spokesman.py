"""The part of a branch that speaks for it: to the peers, to the conductor's display, and to the metrics file.

Only rank 0 of the gang has one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from copd_megatron.exchange import Exchange
from copd_megatron.observe.gpu import GpuTelemetry
from copd_megatron.observe.metrics import MetricsWriter
from copd_megatron.observe.status import BranchStatus, State
from copd_megatron.observe.timeline import Activity, Timeline
from copd_megatron.rhythm import Step
from copd_megatron.steering.readings import Reading, Readings
from copd_megatron.steering.steered import SteeredRhythm, Switch
from copd_megatron.worker.window import Window

log = logging.getLogger(__name__)


class Spokesman:
    """Meets peers, writes metrics and keeps the branch's status line current."""

    def __init__(self, exchange: Exchange, folder: Path, tensorboard: Path | None) -> None:
        self._exchange = exchange
        self._metrics = MetricsWriter(folder / "metrics.jsonl", exchange.me, tensorboard)
        self.timeline = Timeline(folder / "timeline.jsonl", on_change=self._activity)
        self._telemetry = GpuTelemetry()
        self._status = BranchStatus(state="starting")

    def resume(self, step: int) -> None:
        """Drop what was written after the checkpoint that the branch goes on from."""
        self._metrics.truncate_after(step if step else -1)
        self.timeline.truncate_after(step)

    def begin(self, step: Step) -> bool:
        """Announce an update; False if the run is to stop before it."""
        self.timeline.begin()
        self.say(step=step.number, cycle=step.cycle, phase=step.phase, phase_step=step.index, phase_steps=step.length)
        return self._exchange.begin(step.number)

    def meet(self, point: str) -> None:
        """Wait until all branches have reached `point`."""
        with self.timeline.span("wait"):
            self._exchange.meet(point)

    def agree(self, rhythm: SteeredRhythm, version: int, own: Readings) -> tuple[dict[str, Reading], str | None]:
        """All branches' readings after `version` updates, and why the phase ends there (None: it goes on); the same for
        every branch."""

        def decide(words: dict[str, str]) -> str:
            every = {name: plain for word in words.values() for name, plain in json.loads(word).items()}
            readings = {name: Reading.from_plain(plain) for name, plain in sorted(every.items())}
            plain = {name: reading.to_plain() for name, reading in readings.items()}
            return json.dumps({"readings": plain, "reason": rhythm.judge(version, readings)})

        word = json.dumps({name: reading.to_plain() for name, reading in own.items()})
        with self.timeline.span("wait"):
            verdict = json.loads(self._exchange.agree(f"rhythm/{version}", word, decide))
        return {name: Reading.from_plain(plain) for name, plain in verdict["readings"].items()}, verdict["reason"]

    def switched(self, switch: Switch) -> None:
        """Record that a phase has ended, and why."""
        phase = "Phase I" if switch.phase == "explore" else "Phase II"
        event = f"{phase} of cycle {switch.cycle + 1} ended after update {switch.version}: {switch.reason}"
        log.info("%s", event)
        self._metrics.write(
            switch.version, switch.cycle, "switch", ended=switch.phase, reason=switch.reason, **switch.numbers
        )
        if self._exchange.decides:
            self._exchange.announce(event)

    def window(self, point: str | None, step: int, wait_seconds: float) -> Window:
        """The window of work that asks engines, which ends at `point`."""
        return Window(self._exchange, point, step, wait_seconds)

    def hung(self, server: str) -> None:
        """Tell the conductor of a server that says nothing any more."""
        self._exchange.hung(server)

    def write(self, step: int, cycle: int, phase: str, values: dict[str, Any]) -> None:
        """One line of metrics, with what the hardware says."""
        self._metrics.write(step, cycle, phase, **values, **self._telemetry.sample())

    def updated(self, version: int, step: Step, values: dict[str, Any], seconds: float) -> None:
        """The numbers of the update that made `version`, which took `seconds`."""
        values = values | {"tokens_per_second": values.get("tokens", 0) / seconds} | self.timeline.finish(version)
        self.write(version, step.cycle, step.phase, values)
        self.say(
            step=version,
            phase_step=step.index + 1,
            reward=values.get("reward/mean"),
            tokens_per_second=values["tokens_per_second"],
        )

    def probed(self, version: int, cycle: int, values: dict[str, Any]) -> None:
        """What a probe has found at `version`."""
        self.write(version, cycle, "probe", values)
        self.say(
            overlap={name[8:]: value for name, value in values.items() if name.startswith("overlap/")},
            symkl={name[6:]: value for name, value in values.items() if name.startswith("symkl/")},
        )

    def saved(self, step: int, entry: dict[str, Any]) -> None:
        """Tell the peers that this branch's part of a checkpoint is on disk."""
        self._exchange.saved(step, json.dumps(entry))

    def commit(self, step: int, write: Callable[[dict[str, Any]], None], wait: bool) -> bool:
        """Whether the run's checkpoint of `step` counts; `write` makes it count, on one branch."""
        return self._exchange.commit(
            step, lambda entries: write({name: json.loads(entry) for name, entry in entries.items()}), wait
        )

    def say(self, **changes: Any) -> None:
        """Update the status line."""
        self._status = replace(self._status, **changes)
        self._exchange.report(self._status.to_json())

    def sync(self) -> None:
        """Make the metrics survive a power cut."""
        self._metrics.sync()

    def close(self, ending: str) -> None:
        """Show the ending and close the files."""
        self.say(state="done" if ending in ("done", "interrupted") else "failed")
        self._metrics.close()
        self.timeline.close()

    def _activity(self, activity: Activity | None) -> None:
        if activity is not None:
            state: State = activity
            self.say(state=state)
