"""A run on one page: `report.html`, which needs no other file, and its plots as PNG.

copd report RUN            one run, also while it is still training
copd report RUN RUN …      several runs side by side
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from copd_megatron import __version__
from copd_megatron.files import write_atomic
from copd_megatron.observe.metrics import METRICS_FILE, merge_metrics
from copd_megatron.observe.plot_style import style
from copd_megatron.observe.record import RunRecord, read_run
from copd_megatron.observe.report_sections import Plots, Section, one_run, several_runs

TEMPLATES = Path(__file__).parent / "templates"


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
        if any(first.glob(f"branches/*/{METRICS_FILE}")):
            merge_metrics(first)
        with style():
            sections = one_run(records[0], Plots(first / "plots"))
        return write_page(first / "report.html", records[0].name, records, sections)
    names = distinct_names(records)
    with style():
        sections = several_runs(records, names, Plots(first.parent / "comparison_plots"))
    return write_page(first.parent / "comparison.html", f"Comparison of {len(records)} runs", records, sections, names)


def distinct_names(records: Sequence[RunRecord]) -> list[str]:
    """Folder names, preceded by as many parents as it takes to tell the runs apart."""
    for depth in range(1, max(len(record.folder.parts) for record in records)):
        names = ["/".join(record.folder.parts[-depth:]) for record in records]
        if len(set(names)) == len(names):
            return names
    return [str(record.folder) for record in records]


def write_page(
    target: Path,
    title: str,
    records: Sequence[RunRecord],
    sections: Sequence[Section],
    names: Sequence[str] | None = None,
) -> Path:
    """Write a page of `sections` to `target`, with the state of each of `records` under its title; return its path."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    states = [_state(record) for record in records]
    page = environment.get_template("report.html.j2").render(
        title=title,
        states=[f"{name}: {state}" for name, state in zip(names, states, strict=True)] if names else states,
        sections=sections,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )
    write_atomic(target, page)
    return target


def _state(record: RunRecord) -> str:
    if not record.lines:
        return "no metrics yet"
    done = min(record.steps_done(branch) for branch in record.branches)
    planned = record.steps_planned
    if planned is None:
        return f"{done} updates per branch"
    return f"{done} of {planned} updates per branch" + (", complete" if done >= planned else ", unfinished")
