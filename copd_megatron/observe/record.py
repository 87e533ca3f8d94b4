"""Everything a finished or unfinished run has left on disk, read once for its report."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from copd_megatron.errors import CopdError
from copd_megatron.observe.environment import read_environments
from copd_megatron.observe.events import read_events
from copd_megatron.observe.jsonl import Line
from copd_megatron.observe.metrics import read_metrics
from copd_megatron.observe.results import Evaluation, read_evaluation
from copd_megatron.observe.timeline import TIMELINE_FILE, Stretch, read_timeline

TRAINING_PHASES = ("explore", "exchange")
PROBE = "probe"
SWITCH = "switch"


@dataclass(frozen=True)
class Period:
    """A stretch of one phase: the updates after `start` up to and including `end`. `cycle` counts from 0."""

    cycle: int
    phase: str
    start: int
    end: int


@dataclass(frozen=True)
class Series:
    """One metric's course; a value that was not finite is NaN."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(math.isfinite(value) for value in self.values)

    @property
    def finite(self) -> list[float]:
        """The values that are numbers."""
        return [value for value in self.values if math.isfinite(value)]


@dataclass(frozen=True)
class RunRecord:
    """A run as it stands on disk. Missing parts are empty or None."""

    folder: Path
    lines: list[Line]
    timelines: dict[str, dict[int, list[Stretch]]]
    evaluation: Evaluation | None
    environments: list[dict[str, Any]]
    config_text: str | None
    config: dict[str, Any]
    events: list[dict[str, str]]

    @property
    def name(self) -> str:
        """The run folder's name."""
        return self.folder.name

    @property
    def branches(self) -> list[str]:
        """The branches, in the configuration's order."""
        written = sorted({line["branch"] for line in self.lines})
        listed = self.config.get("branches")
        planned = [branch.get("name") for branch in listed if isinstance(branch, dict)] if listed else []
        return [name for name in planned if name in written] + [name for name in written if name not in planned]

    def setting(self, *keys: str) -> Any:
        """A value of the configuration; None where it or the configuration is absent."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def series(self, branch: str, key: str, phase: str | None = None) -> Series:
        """A branch's metric over steps, from lines of `phase` only if given."""
        found = Series()
        for line in self.lines:
            if line["branch"] == branch and key in line and phase in (None, line["phase"]):
                value = line[key]
                found.steps.append(line["step"])
                found.values.append(math.nan if value is None else float(value))
        return found

    def edges(self, metric: str) -> list[tuple[str, str]]:
        """(student, teacher) pairs for which `metric`/<teacher> was probed."""
        return [
            (student, key.removeprefix(f"{metric}/"))
            for student in self.branches
            for key in dict.fromkeys(
                key for line in self.lines if line["branch"] == student and line["phase"] == PROBE for key in line
            )
            if key.startswith(f"{metric}/")
        ]

    def periods(self) -> list[Period]:
        """The phases in order, as the branch that is furthest went through them."""
        if not self.branches:
            return []
        furthest = max(self.branches, key=self.steps_done)
        lines = [line for line in self.lines if line["branch"] == furthest and line["phase"] in TRAINING_PHASES]
        periods = []
        for (cycle, phase), group in groupby(lines, key=lambda line: (line["cycle"], line["phase"])):
            steps = [line["step"] for line in group]
            periods.append(Period(cycle, phase, steps[0] - 1, steps[-1]))
        return periods

    def finished_periods(self) -> list[Period]:
        """The phases that are over: all but the last, and the last if it was ended or is as long as the configuration
        says."""
        periods = self.periods()
        if periods and not self._is_over(periods[-1]):
            periods.pop()
        return periods

    def _is_over(self, period: Period) -> bool:
        if self.setting("rhythm", "kind") in (None, "fixed"):
            return bool(self.setting("rhythm", f"{period.phase}_steps") == period.end - period.start)
        return any(line["phase"] == SWITCH and line["step"] == period.end for line in self.lines)

    def steps_done(self, branch: str) -> int:
        """Updates the branch has finished."""
        return max((line["step"] for line in self.lines if line["branch"] == branch), default=0)

    @property
    def steps_planned(self) -> int | None:
        """Updates per branch that the configuration asks for; None where it does not say."""
        numbers = [self.setting("rhythm", key) for key in ("cycles", "explore_steps", "exchange_steps")]
        if not all(isinstance(number, int) for number in numbers):
            return None
        cycles, explore, exchange = numbers
        return int(cycles * (explore + exchange))


def read_run(run_dir: str | os.PathLike[str]) -> RunRecord:
    """Read a run folder. Raises CopdError if it is none, or a file in it is damaged."""
    folder = Path(run_dir).resolve()
    if not folder.is_dir():
        raise CopdError(f"{run_dir}: expected a run folder, found none; give the `run_dir` of a run")
    lines = read_metrics(folder)
    config_path = folder / "config.yaml"
    if not lines and not config_path.exists():
        raise CopdError(f"{run_dir}: expected config.yaml or metrics, found neither; is this the `run_dir` of a run?")
    config_text = config_path.read_text() if config_path.exists() else None
    return RunRecord(
        folder=folder,
        lines=lines,
        timelines={
            path.parent.name: read_timeline(path) for path in sorted(folder.glob(f"branches/*/{TIMELINE_FILE}"))
        },
        evaluation=read_evaluation(folder),
        environments=read_environments(folder),
        config_text=config_text,
        config=_parsed(config_path, config_text),
        events=read_events(folder),
    )


def _parsed(path: Path, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CopdError(f"{path}: expected YAML ({error}); restore the file, or remove it to report without") from error
    if not isinstance(config, dict):
        raise CopdError(f"{path}: expected a mapping of settings, found {type(config).__name__}")
    return config
