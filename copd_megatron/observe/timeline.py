"""Where the wall-clock time of a step goes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

from copd_megatron.errors import CopdError
from copd_megatron.observe.jsonl import LineWriter, read_lines

Activity = Literal["rollout", "score", "train", "sync", "wait"]
ACTIVITIES: tuple[Activity, ...] = get_args(Activity)
TIMELINE_FILE = "timeline.jsonl"


@dataclass(frozen=True)
class Stretch:
    """An uninterrupted stretch of one activity; `start` and `end` in seconds since 1970."""

    activity: Activity
    start: float
    end: float


class Timeline:
    """Collects one process's activities, step by step.

        timeline.begin()
        with timeline.span("rollout"):
            ...
        metrics.write(step, cycle, phase, **timeline.finish(step))

    A span inside another one interrupts it: time belongs to the innermost, so the activities of a step never add up to
    more than the step. `path` (optional) receives one line per step, {"step": s, "spans": [[activity, start, end], …]}.
    `on_change` is told what the process is doing now (None: none of the activities), for a live display.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        on_change: Callable[[Activity | None], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._lines = None if path is None else LineWriter(path)
        self._on_change = on_change
        self._clock = clock
        # A monotonic clock measures, anchored once to the calendar, so that branches can be drawn side by side.
        self._epoch = time.time() - clock()
        self._open: list[Activity] = []
        self._since = 0.0
        self._began: float | None = None
        self._finished: float | None = None
        self._between = 0.0
        self._stretches: list[Stretch] = []

    def begin(self) -> None:
        """Start a step. The time since the last `finish` (probes, checkpoints) is none of its activities."""
        self._began = self._now()
        self._between = 0.0 if self._finished is None else self._began - self._finished
        self._stretches = []

    @contextmanager
    def span(self, activity: Activity) -> Iterator[None]:
        """Time spent in the `with` block counts as `activity`. Not for use from several threads."""
        if activity not in ACTIVITIES:
            raise ValueError(f"unknown activity {activity!r}; expected one of {', '.join(ACTIVITIES)}")
        self._close_stretch()
        self._open.append(activity)
        self._report()
        try:
            yield
        finally:
            self._close_stretch()
            self._open.pop()
            self._report()

    def finish(self, step: int) -> dict[str, float]:
        """End the step that made update number `step`.

        Returns seconds: `time/<activity>` for every activity, `time/step` since `begin` (without one, since the
        first activity), and `time/between` from the step before until `begin`. Raises ValueError inside a span.
        """
        if self._open:
            raise ValueError(f"step {step} cannot be finished inside the span {self._open[-1]!r}")
        stretches, self._stretches = self._stretches, []
        seconds = {f"time/{activity}": 0.0 for activity in ACTIVITIES}
        for stretch in stretches:
            seconds[f"time/{stretch.activity}"] += stretch.end - stretch.start
        self._finished = self._now()
        first = stretches[0].start if stretches else self._finished
        seconds["time/step"] = self._finished - (first if self._began is None else self._began)
        seconds["time/between"] = self._between
        self._began, self._between = None, 0.0
        if self._lines is not None:
            spans = [[stretch.activity, round(stretch.start, 4), round(stretch.end, 4)] for stretch in stretches]
            self._lines.append({"step": step, "spans": spans})
        return seconds

    def truncate_after(self, step: int) -> None:
        """Call on resume: lines later than the checkpoint's `step` go, whole or not at all."""
        if self._lines is not None:
            self._lines.keep(lambda line: line["step"] <= step)

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()

    def _now(self) -> float:
        return self._epoch + self._clock()

    def _close_stretch(self) -> None:
        now = self._now()
        if self._open and now > self._since:
            self._stretches.append(Stretch(self._open[-1], self._since, now))
        self._since = now

    def _report(self) -> None:
        if self._on_change is not None:
            self._on_change(self._open[-1] if self._open else None)


def read_timeline(path: str | os.PathLike[str]) -> dict[int, list[Stretch]]:
    """Stretches by step; empty where the file is absent. Raises CopdError for a malformed line."""
    steps = {}
    for number, line in enumerate(read_lines(path), start=1):
        try:
            steps[int(line["step"])] = [Stretch(name, float(start), float(end)) for name, start, end in line["spans"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CopdError(
                f'{path}, line {number}: expected {{"step": …, "spans": [[activity, start, end], …]}}, found {line}'
            ) from error
    return steps
