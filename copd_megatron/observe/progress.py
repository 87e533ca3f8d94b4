"""The live display of a run: a row per branch, the whole run's bar and time left, the latest events.

On a terminal it redraws itself in place; elsewhere (a log file, a pipe, Slurm) it writes one line per branch every few
steps. Needs neither torch nor a running branch: it is fed with `BranchStatus`es, wherever they come from.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from copd_megatron.observe.pace import Pace, RunPlan
from copd_megatron.observe.status import STATES, BranchStatus
from copd_megatron.observe.status_file import StatusFile

log = logging.getLogger(__name__)

WIDE = 110
EVENTS_SHOWN = 5
SMOOTHING = 0.2
TREND_WIDTH = 12
TREND_MARKS = "▁▂▃▄▅▆▇█"
STATE_STYLES = {"train": "green", "wait": "yellow", "failed": "bold red", "done": "bold green", "starting": "dim"}
PHASE_STYLES = {"explore": "blue", "exchange": "magenta"}


class Progress:
    """Shows a run. Use as a context manager and call `update` from the process that hears from the branches.

    While it is on a terminal, other output must go through `console` (logging: rich.logging.RichHandler(console=…)).
    `note` is told all that is shown. `every`: steps between two lines of a branch where stdout is not a terminal.
    """

    def __init__(
        self,
        plan: RunPlan,
        run_dir: str | Path,
        console: Console | None = None,
        every: int = 10,
        clock: Callable[[], float] = time.monotonic,
        note: StatusFile | None = None,
    ) -> None:
        self._note = note
        self.console = console or Console()
        self._plan = plan
        self._run_dir = str(run_dir)
        self._every = every
        self._clock = clock
        self._started = clock()
        self._pace = Pace(plan, clock=clock)
        self._statuses: dict[str, BranchStatus] = {}
        self._rewards: dict[str, list[float]] = {branch: [] for branch in plan.branches}
        self._events: deque[tuple[str, tuple[str, ...], str]] = deque(maxlen=EVENTS_SHOWN)
        self._shown_events: dict[str, str] = {}
        # The display's own thread draws while the caller updates.
        self._lock = threading.Lock()
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(console=self.console, get_renderable=self.render, refresh_per_second=4)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start(refresh=True)
        else:
            self._print_plain("CoPD", f"{self._run_dir}: {len(self._plan.branches)} branches, {self._plan.steps} steps")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, branch: str, status: BranchStatus) -> None:
        """Take a branch's latest status. Raises ValueError for a branch that is not in the plan."""
        if branch not in self._rewards:
            raise ValueError(f"unknown branch {branch!r}; the plan has {', '.join(self._plan.branches)}")
        with self._lock:
            before = self._statuses.get(branch)
            self._statuses[branch] = status
            self._pace.observe(branch, status)
            if status.reward is not None and (before is None or before.step != status.step):
                smooth = self._rewards[branch]
                smooth.append(smooth[-1] + SMOOTHING * (status.reward - smooth[-1]) if smooth else status.reward)
            if self._note is not None:
                self._note.observe({branch: status}, self._pace.seconds_left())
        if self._live is None and _is_due(before, status, self._every, self._plan.steps):
            self._print_plain(branch, self._plain(branch))
        if status.event is not None and status.event != self._shown_events.get(branch):
            self._shown_events[branch] = status.event
            self.event(branch, status.event)

    def event(self, source: str, text: str) -> None:
        """Show and log what happened in a branch, or to the run as a whole; the same text from several becomes one
        line."""
        log.info("%s: %s", source, text)
        with self._lock:
            latest = self._events[-1] if self._events else None
            if latest is not None and latest[2] == text and source not in latest[1]:
                self._events[-1] = (latest[0], (*latest[1], source), text)
            else:
                self._events.append((_time_of_day(), (source,), text))
        if self._live is None:
            self._print_plain(source, text)

    def render(self) -> RenderableType:
        """The display as it stands."""
        with self._lock:
            wide = self.console.width >= WIDE
            parts: list[RenderableType] = [self._head(), self._branches(wide), self._overall()]
            if self._events:
                parts.append(self._event_lines())
            return Group(*parts)

    def _head(self) -> RenderableType:
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        head.add_column(justify="right", no_wrap=True)
        elapsed = duration(self._clock() - self._started)
        head.add_row(Text("CoPD", "bold"), Text(self._run_dir, "cyan"), Text(elapsed, "dim"))
        return head

    def _branches(self, wide: bool) -> RenderableType:
        gap = 2 if wide else 1
        table = Table(box=None, expand=True, padding=(0, gap, 0, 0), header_style="dim", pad_edge=False)
        table.add_column("branch", no_wrap=True, overflow="ellipsis", ratio=1)
        table.add_column("cycle", no_wrap=True, justify="right")
        table.add_column("phase", no_wrap=True, min_width=8)
        table.add_column("step", no_wrap=True, justify="right", min_width=5)
        table.add_column("reward", no_wrap=True, justify="right")
        if wide:
            table.add_column("trend", no_wrap=True, width=TREND_WIDTH)
        table.add_column("teacher", no_wrap=True, overflow="ellipsis", ratio=1)
        table.add_column("overlap", no_wrap=True, justify="right")
        table.add_column("sym KL", no_wrap=True, justify="right")
        table.add_column("tok/s", no_wrap=True, justify="right", min_width=5)
        table.add_column("state", no_wrap=True, width=max(map(len, STATES)))
        for branch in self._plan.branches:
            table.add_row(*self._row(branch, wide))
        return Padding(table, (1, 0))

    def _row(self, branch: str, wide: bool) -> list[RenderableType]:
        status = self._statuses.get(branch)
        name = Text(branch, "bold")
        if status is None:
            return [name, *[Text("–", "dim")] * (9 if wide else 8), Text("starting", "dim")]
        rewards = self._rewards[branch]
        trend = [Text(sparkline(rewards, TREND_WIDTH), "cyan")] if wide else []
        teachers = sorted({*status.overlap, *status.symkl})
        return [
            name,
            Text(self._cycle(status)),
            Text(status.phase, PHASE_STYLES[status.phase]),
            Text(f"{status.phase_step}/{status.phase_steps}"),
            Text(f"{rewards[-1]:.3f}" if rewards else "–"),
            *trend,
            Text("\n".join(teachers) or "–"),
            Text("\n".join(_decimal(status.overlap, teacher) for teacher in teachers) or "–"),
            Text("\n".join(_decimal(status.symkl, teacher) for teacher in teachers) or "–"),
            Text(rate(status.tokens_per_second)),
            Text(status.state, STATE_STYLES.get(status.state, "")),
        ]

    def _overall(self) -> RenderableType:
        done, total = self._steps_done(), self._plan.steps * len(self._plan.branches)
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        bar.add_column(justify="right", no_wrap=True)
        bar.add_row(
            ProgressBar(total=total, completed=done),
            Text(f"{100 * done // total if total else 100}%"),
            Text(self._time_left(), "dim"),
        )
        return bar

    def _event_lines(self) -> RenderableType:
        events = Table.grid(expand=True, padding=(0, 1))
        events.add_column(no_wrap=True)
        events.add_column(no_wrap=True, max_width=28, overflow="ellipsis")
        events.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        for clock, sources, text in self._events:
            events.add_row(Text(clock, "dim"), Text(", ".join(sources), "bold"), Text(text.replace("\n", " ")))
        return Padding(events, (1, 0, 0, 0))

    def _steps_done(self) -> int:
        return sum(min(status.step, self._plan.steps) for status in self._statuses.values())

    def _time_left(self) -> str:
        left = self._pace.seconds_left()
        if left == 0:
            return "finished"
        return "time left unknown" if left is None else f"{duration(left)} left"

    def _cycle(self, status: BranchStatus) -> str:
        return f"{status.cycle + 1}" + ("" if self._plan.steered else f"/{self._plan.cycles}")

    def _plain(self, branch: str) -> str:
        status = self._statuses[branch]
        rewards = self._rewards[branch]
        parts = [
            f"step {status.step}/{self._plan.steps}",
            f"cycle {self._cycle(status)}",
            f"{status.phase} {status.phase_step}/{status.phase_steps}",
            status.state,
            *([f"reward {rewards[-1]:.3f}"] if rewards else []),
            *(f"overlap {teacher} {value:.3f}" for teacher, value in status.overlap.items()),
            *(f"symkl {teacher} {value:.3f}" for teacher, value in status.symkl.items()),
            *([f"{rate(status.tokens_per_second)} tok/s"] if status.tokens_per_second is not None else []),
            self._time_left(),
        ]
        return ", ".join(parts)

    def _print_plain(self, source: str, text: str) -> None:
        self.console.print(Text(f"{_time_of_day()} {source}: {text}"), soft_wrap=True)


def duration(seconds: float) -> str:
    """1:02:03, 2:03 or 0:03."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rate(value: float | None) -> str:
    """A rate in at most five characters: 812, 12.3k, 1.2M."""
    if value is None:
        return "–"
    for limit, unit in ((999_500, 1e6), (999.5, 1e3)):
        if value >= limit:
            return f"{value / unit:.1f}{'M' if unit == 1e6 else 'k'}"
    return f"{value:.0f}"


def sparkline(values: list[float], width: int) -> str:
    """The course of `values` in at most `width` marks, each the mean of its share, from their minimum to maximum."""
    if not values:
        return ""
    marks = min(width, len(values))
    edges = [round(index * len(values) / marks) for index in range(marks + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    top = len(TREND_MARKS) - 1
    return "".join(TREND_MARKS[round(top * (mean - low) / span) if span else top // 2] for mean in means)


def _is_due(before: BranchStatus | None, status: BranchStatus, every: int, last: int) -> bool:
    if before is None or (status.state != before.state and status.state in ("done", "failed")):
        return True
    return status.step // every > before.step // every or (status.step != before.step and status.step == last)


def _decimal(values: Mapping[str, float], key: str) -> str:
    return f"{values[key]:.3f}" if key in values else "–"


def _time_of_day() -> str:
    return datetime.now().strftime("%H:%M:%S")
