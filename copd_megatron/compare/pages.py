"""`compare.json`, `compare.md` and `compare.html` of a comparison, all from the same rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from copd_megatron.compare.child_run import is_done
from copd_megatron.compare.plots import draw_absorption, draw_drift, draw_forgetting, draw_rows, draw_sweep
from copd_megatron.compare.results import RowResult
from copd_megatron.compare.settings import Comparison
from copd_megatron.compare.statistics import OVERALL, Difference, Interval
from copd_megatron.files import write_atomic
from copd_megatron.observe.plot_style import style
from copd_megatron.observe.progress import duration
from copd_megatron.observe.record import RunRecord, read_run
from copd_megatron.observe.report import write_page
from copd_megatron.observe.report_sections import Plots, Section
from copd_megatron.observe.report_tables import ABSENT, Table

WITH_BRANCHES = ("copd", "merge_only")


def write_pages(comparison: Comparison, rows: Sequence[RowResult]) -> dict[str, Path]:
    """Write the three files and the plots beside them; their paths by kind."""
    out = Path(comparison.out)
    records = _records(comparison)
    accuracy, cost, notes = accuracy_table(comparison, rows), cost_table(rows), notes_of(comparison, rows, records)
    benchmarks = benchmark_table(rows)
    plots = Plots(out / "plots")
    with style():
        figures = {
            "accuracy": ("Accuracy of every method", draw_rows(rows, comparison.reference)),
            "drift": ("Drift between branches over training; bands are the range over seeds", draw_drift(records)),
            "sweep": ("Rhythm sweep", draw_sweep(rows)),
            "absorption": ("What Phase II gains, by the overlap at its start", draw_absorption(records)),
            "forgetting": ("Distance to the base and what was forgotten", draw_forgetting(records)),
        }
        images = {name: plots.keep(name, figure) for name, (_, figure) in figures.items()}
    sections = [
        Section("accuracy", "Accuracy", notes[0], images["accuracy"], accuracy, tuple(notes[1:])),
        *([Section("benchmarks", "Accuracy by benchmark", table=benchmarks)] if benchmarks else []),
        Section("cost", "What each model has cost", COST_NOTE, table=cost),
        *(
            Section(name, figures[name][0], image=images[name], missing="no run of this comparison shows it")
            for name in ("drift", "sweep", "absorption", "forgetting")
        ),
    ]
    files = {kind: out / f"compare.{kind}" for kind in ("json", "md", "html")}
    write_page(files["html"], f"Comparison {out.name}", [], sections)
    tables = (accuracy, benchmarks, cost)
    write_atomic(files["md"], _markdown(out.name, *tables, notes, [n for n, image in images.items() if image]))
    write_atomic(files["json"], json.dumps(as_plain(comparison, rows), indent=1) + "\n")
    return files


COST_NOTE = (
    "Mean over seeds, for the model of the row with the experts that it started from. Depth: updates that have to be "
    "made one after the other. Wall time: training on the machine of these runs, with branches at once and experts "
    "before those who learn from them."
)


def accuracy_table(comparison: Comparison, rows: Sequence[RowResult]) -> Table:
    """Accuracy in percent by capability, and the differences to the references."""
    done = [row for row in rows if row.accuracy is not None]
    names = [name for name in (done[0].accuracy.of if done and done[0].accuracy else ()) if name != OVERALL]
    lines = []
    for row in rows:
        if row.accuracy is None:
            reasons = "; ".join(sorted(set(row.missing.values())))
            absent = [ABSENT] * (len(names) + 1 + 2 * len(comparison.reference))
            lines.append((row.label, *absent, f"not run: {reasons}"))
            continue
        cells = [_percent(row.accuracy.of[name]) for name in (*names, OVERALL)]
        versus = [row.accuracy.versus.get(reference, {}).get(OVERALL) for reference in comparison.reference]
        seeds = ", ".join(map(str, row.accuracy.seeds))
        missing = "; ".join(f"seed {seed} not run: {reason}" for seed, reason in sorted(row.missing.items()))
        lines.append((row.label, *cells, *chain(*map(_versus, versus)), f"{seeds}; {missing}" if missing else seeds))
    differences = chain(*((f"overall − {reference}", "p") for reference in comparison.reference))
    header = ("method", *names, OVERALL, *differences, "seeds")
    return Table(header, tuple(lines))


def benchmark_table(rows: Sequence[RowResult]) -> Table | None:
    """Accuracy in percent by benchmark, a column per row of the comparison; None where no capability has several."""
    done = [(row.label, row.accuracy.benchmarks) for row in rows if row.accuracy is not None]
    names = dict.fromkeys(name for _, benchmarks in done for name in benchmarks)
    if not names:
        return None
    lines = [(name, *(_percent(benchmarks[name]) for _, benchmarks in done)) for name in names]
    return Table(("benchmark", *(label for label, _ in done)), tuple(lines))


def cost_table(rows: Sequence[RowResult]) -> Table:
    """Budget of every row."""
    lines = [
        (
            row.label,
            f"{row.cost['updates']:,.0f}",
            f"{row.cost['explore_updates']:,.0f} + {row.cost['exchange_updates']:,.0f}",
            f"{row.cost['rollout_tokens']:,.0f}",
            f"{row.cost['depth']:,.0f}",
            duration(row.cost["parallel_seconds"]),
            "differs" if row.budget else "",
        )
        for row in rows
        if row.cost is not None
    ]
    header = ("method", "updates", "RL + OPD", "rollout tokens", "depth", "wall time", "budget")
    return Table(header, tuple(lines))


def notes_of(
    comparison: Comparison, rows: Sequence[RowResult], records: Sequence[tuple[str, Sequence[RunRecord]]]
) -> list[str]:
    """What the numbers are, and what is wrong with them."""
    notes = [
        "Percent, mean over seeds, with 95% intervals by bootstrap over problems and seeds"
        f" ({comparison.replicates:,} replicates); differences are paired by problem and seed, p is two-sided."
    ]
    counts = {len(row.accuracy.seeds) for row in rows if row.accuracy is not None}
    if counts and min(counts) < 3:
        notes.append("With fewer than three seeds an interval says little about other seeds; with one, nothing.")
    evaluations = [record.evaluation for _, found in records for record in found if record.evaluation is not None]
    notes += dict.fromkeys(f"{one.task}; {one.size}." for one in evaluations)
    notes += [
        f"Not at equal budget (more than {comparison.tolerance:.0%} from {comparison.reference[0]}): {row.budget}"
        for row in rows
        if row.budget
    ]
    return notes


def as_plain(comparison: Comparison, rows: Sequence[RowResult]) -> dict[str, Any]:
    """For `compare.json`."""
    return {
        "reference": list(comparison.reference),
        "seeds": list(comparison.seeds),
        "replicates": comparison.replicates,
        "tolerance": comparison.tolerance,
        "rows": [row.to_plain() for row in rows],
    }


def _records(comparison: Comparison) -> list[tuple[str, list[RunRecord]]]:
    """The runs whose branches can drift apart, by arm."""
    found = []
    for arm in comparison.arms:
        runs = [comparison.run_dir(arm.name, seed) for seed in comparison.seeds]
        method = comparison.run(arm, comparison.seeds[0]).method
        done = [read_run(run) for run in runs if is_done(run)]
        if done and method in WITH_BRANCHES:
            found.append((arm.name, done))
    return found


def _markdown(
    name: str, accuracy: Table, benchmarks: Table | None, cost: Table, notes: Sequence[str], images: Sequence[str]
) -> str:
    parts = [f"# Comparison {name}", notes[0], markdown_table(accuracy), "\n".join(f"- {note}" for note in notes[1:])]
    parts += ["## Accuracy by benchmark", markdown_table(benchmarks)] if benchmarks else []
    parts += ["## What each model has cost", COST_NOTE, markdown_table(cost)]
    parts += [f"![{image}](plots/{image}.png)" for image in images]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(table: Table) -> str:
    """A table in Markdown."""
    ruler = ("---", *["---:"] * (len(table.header) - 1))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (table.header, ruler, *table.rows))


def _percent(value: Interval) -> str:
    return f"{100 * value.mean:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def _versus(value: Difference | None) -> tuple[str, str]:
    if value is None:
        return ABSENT, ABSENT
    return f"{100 * value.mean:+.1f} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]", f"{value.p:.3f}"
