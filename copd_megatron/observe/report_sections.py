"""What the report says: of one run, or of several side by side."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from copd_megatron.files import write_atomic
from copd_megatron.observe.plot_style import png
from copd_megatron.observe.plots import FIGURES, draw_curves, draw_reward_overlay
from copd_megatron.observe.plots_results import draw_accuracy, draw_time_split, draw_timeline
from copd_megatron.observe.record import RunRecord
from copd_megatron.observe.report_tables import (
    ABSENT,
    Table,
    accuracy_table,
    benchmark_table,
    counter_table,
    drift_table,
    failure_table,
    summary_table,
    switch_table,
)
from copd_megatron.observe.results import ModelResult


@dataclass(frozen=True)
class Section:
    """A part of the page. `listing` is shown as it stands, `missing` where there is nothing else to show."""

    slug: str
    title: str
    caption: str = ""
    image: str | None = None
    table: Table | None = None
    notes: tuple[str, ...] = ()
    listing: str | None = None
    missing: str = ""


class Plots:
    """Turns figures into files and into page content."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, name: str, figure: Figure | None) -> str | None:
        """Save as PNG; the picture as a data URI, or None for no figure."""
        if figure is None:
            return None
        content = png(figure)
        write_atomic(self._folder / f"{name}.png", content)
        return f"data:image/png;base64,{b64encode(content).decode()}"


def one_run(record: RunRecord, plots: Plots) -> list[Section]:
    """All there is to say about one run."""
    return [
        Section(
            "summary",
            "Summary",
            table=summary_table([record], [record.name]),
            missing="no metrics have been written yet",
        ),
        _accuracy(record, plots),
        *_benchmarks(record.evaluation.models if record.evaluation is not None else ()),
        *(
            Section(
                figure.name,
                figure.title,
                figure.caption,
                plots.keep(figure.name, draw_curves(record, figure)),
                drift_table(record) if figure.name == "drift" else None,
                missing="not recorded: " + ", ".join(panel.metric for panel in figure.panels),
            )
            for figure in FIGURES
        ),
        *_switches(record),
        Section(
            "time",
            "Where the time goes",
            "Mean of all steps of a phase. “Other” is the rest of the step; between steps lie probes and checkpoints.",
            plots.keep("time", draw_time_split(record)),
            missing="not recorded: time/*",
        ),
        Section(
            "timeline",
            "A few steps in detail",
            "Steps around the end of a Phase I. Clocks of different machines may disagree.",
            plots.keep("timeline", draw_timeline(record)),
            missing="not recorded: timelines of the branches",
        ),
        Section(
            "events",
            "Events",
            "Sums over all steps. A dash means that it was not counted.",
            table=counter_table(record),
            missing="not recorded: count/*",
        ),
        *_failures(record),
        Section(
            "environment",
            "Environment",
            "One column per start or resume in a changed environment.",
            table=_environment_table(record),
            missing="not recorded: environment.json",
        ),
        Section(
            "configuration",
            "Configuration",
            listing=record.config_text,
            missing="not recorded: config.yaml",
        ),
    ]


def several_runs(records: Sequence[RunRecord], names: Sequence[str], plots: Plots) -> list[Section]:
    """Several runs under their `names`: how they did and where their settings differ."""
    named = list(zip(names, records, strict=True))
    models = [
        model.model_copy(update={"name": f"{name}: {model.name}"})
        for name, record in named
        if record.evaluation is not None
        for model in record.evaluation.models
    ]
    return [
        Section("summary", "Summary", table=summary_table(records, names), missing="no metrics have been written yet"),
        Section(
            "accuracy",
            "Accuracy",
            "Percent, with 95% interval. Compare only where task and problems are the same.",
            plots.keep("accuracy", draw_accuracy(models)),
            accuracy_table(models),
            tuple(note for name, record in named for note in _notes(record, f"{name}: ")),
            missing="no run has been evaluated yet",
        ),
        *_benchmarks(models),
        Section(
            "reward",
            "Reward",
            image=plots.keep("reward", draw_reward_overlay(records, names)),
            missing="not recorded: reward/mean",
        ),
        Section(
            "differences",
            "Settings that differ",
            table=_differences(records, names),
            missing="the recorded configurations do not differ",
        ),
    ]


def _switches(record: RunRecord) -> list[Section]:
    if record.setting("rhythm", "kind") in (None, "fixed"):
        return []
    return [
        Section(
            "switches",
            "Ends of phases",
            "Overlap, as a moving average ± its standard error, decides; all branches switch together.",
            table=switch_table(record),
            missing="no phase has ended yet",
        )
    ]


def _failures(record: RunRecord) -> list[Section]:
    table = failure_table(record)
    return [Section("failures", "Failures and recoveries", "From events.jsonl.", table=table)] if table else []


def _accuracy(record: RunRecord, plots: Plots) -> Section:
    models = record.evaluation.models if record.evaluation is not None else ()
    return Section(
        "accuracy",
        "Accuracy",
        "Percent, with 95% interval.",
        plots.keep("accuracy", draw_accuracy(models)),
        accuracy_table(models),
        _notes(record),
        missing="not evaluated yet: no evaluation.json",
    )


def _benchmarks(models: Sequence[ModelResult]) -> list[Section]:
    table = benchmark_table(models)
    return [Section("benchmarks", "Accuracy by benchmark", "Percent, with 95% interval.", table=table)] if table else []


def _notes(record: RunRecord, prefix: str = "") -> tuple[str, ...]:
    evaluation = record.evaluation
    if evaluation is None:
        return ()
    origin = f"{evaluation.task}, {evaluation.size}, seed {evaluation.seed}."
    return tuple(prefix + note for note in (origin, *evaluation.notes))


def _environment_table(record: RunRecord) -> Table | None:
    entries = [entry["machine"] | entry["packages"] for entry in record.environments]
    if not entries:
        return None
    keys = dict.fromkeys(key for entry in entries for key in entry)
    times = (
        datetime.fromtimestamp(entry.get("time", 0), UTC).strftime("%Y-%m-%d %H:%M UTC")
        for entry in record.environments
    )
    return Table(("", *times), tuple((key, *(str(entry.get(key, ABSENT)) for entry in entries)) for key in keys))


def _differences(records: Sequence[RunRecord], names: Sequence[str]) -> Table | None:
    flat = [_flattened(record.config) for record in records]
    keys = [key for key in dict.fromkeys(key for config in flat for key in config) if key != "run_dir"]
    rows = [(key, *(str(config.get(key, ABSENT)) for config in flat)) for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return Table(("setting", *names), tuple(rows)) if rows else None


def _flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list):
        items = [(str(index), inner) for index, inner in enumerate(value)]
    else:
        return {prefix: value}
    nested = [_flattened(inner, f"{prefix}.{key}" if prefix else key) for key, inner in items]
    return {key: inner for part in nested for key, inner in part.items()}
