"""A run on one page: `report.html`, which needs no other file, and its plots as PNG.

copd report RUN            one run, also while it is still training
copd report RUN RUN …      several runs side by side
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from copd_megatron import __version__
from copd_megatron.files import write_atomic
from copd_megatron.observe.metrics import METRICS_FILE, merge_metrics
from copd_megatron.observe.plot_style import png, style
from copd_megatron.observe.plots import FIGURES, draw_curves, draw_reward_overlay
from copd_megatron.observe.plots_results import draw_accuracy, draw_time_split, draw_timeline
from copd_megatron.observe.record import RunRecord, read_run
from copd_megatron.observe.report_tables import (
    ABSENT,
    Table,
    accuracy_table,
    counter_table,
    drift_table,
    summary_table,
)

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Section:
    """A part of the page. `listing` is shown as it stands. `missing` says what the run has not recorded; shown where there is nothing else."""

    slug: str
    title: str
    caption: str = ""
    image: str | None = None
    table: Table | None = None
    notes: tuple[str, ...] = ()
    listing: str | None = None
    missing: str = ""


def build_report(runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Path:
    """Write the report of a run, or of several for comparison, and return its path.

    One run: RUN/report.html and RUN/plots/*.png; its branches' metrics are merged into RUN/metrics.jsonl as well.
    Several: comparison.html and comparison_plots/ beside the first run. Raises CopdError where a folder is no run or
    a file in it is damaged; parts that are merely absent are said to be so on the page.
    """
    folders = [runs] if isinstance(runs, str | os.PathLike) else list(runs)
    if not folders:
        raise ValueError("expected at least one run")
    records = [read_run(folder) for folder in folders]
    first = records[0].folder
    if len(records) == 1:
        if records[0].lines and any(first.glob(f"branches/*/{METRICS_FILE}")):
            merge_metrics(first)
        return _write_page(first / "report.html", first / "plots", records[0].name, records, _one_run)
    names = _distinct_names(records)
    return _write_page(
        first.parent / "comparison.html",
        first.parent / "comparison_plots",
        f"Comparison of {len(records)} runs",
        records,
        lambda records, plots: _several_runs(records, names, plots),
    )


class _Plots:
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


def _write_page(
    target: Path,
    plots: Path,
    title: str,
    records: Sequence[RunRecord],
    sections: Callable[[Sequence[RunRecord], _Plots], list[Section]],
) -> Path:
    with style():
        content = sections(records, _Plots(plots))
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        title=title,
        runs=[{"name": record.name, "state": _state(record)} for record in records],
        sections=content,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )
    write_atomic(target, page)
    return target


def _one_run(records: Sequence[RunRecord], plots: _Plots) -> list[Section]:
    (record,) = records
    return [
        Section(
            "summary",
            "Summary",
            table=summary_table(records, [record.name]),
            missing="no metrics have been written yet",
        ),
        _accuracy(record, plots),
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
        Section(
            "time",
            "Where the time goes",
            "Mean of all steps of a phase; “other” is what no activity covers.",
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


def _several_runs(records: Sequence[RunRecord], names: Sequence[str], plots: _Plots) -> list[Section]:
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


def _accuracy(record: RunRecord, plots: _Plots) -> Section:
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


def _notes(record: RunRecord, prefix: str = "") -> tuple[str, ...]:
    evaluation = record.evaluation
    if evaluation is None:
        return ()
    origin = f"{evaluation.task}, {evaluation.n:,} problems per capability, seed {evaluation.seed}."
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


def _distinct_names(records: Sequence[RunRecord]) -> list[str]:
    """Folder names, preceded by as many parents as it takes to tell the runs apart."""
    depth = 1
    longest = max(len(record.folder.parts) for record in records)
    while depth < longest:
        names = ["/".join(record.folder.parts[-depth:]) for record in records]
        if len(set(names)) == len(names):
            return names
        depth += 1
    return [str(record.folder) for record in records]


def _state(record: RunRecord) -> str:
    if not record.lines:
        return "no metrics yet"
    done = min(record.steps_done(branch) for branch in record.branches)
    planned = record.steps_planned
    if planned is None:
        return f"{done} updates per branch"
    return f"{done} of {planned} updates per branch" + (", complete" if done >= planned else ", unfinished")
