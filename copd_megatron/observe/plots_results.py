"""Accuracy with its intervals, and where the time went."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from copd_megatron.observe.plot_style import colour, legend_above, literal, panels
from copd_megatron.observe.record import TRAINING_PHASES, Period, RunRecord
from copd_megatron.observe.results import ModelResult, Score
from copd_megatron.observe.timeline import ACTIVITIES, Stretch

ACTIVITY_COLOURS = {
    "rollout": "#0072B2",
    "score": "#56B4E9",
    "train": "#009E73",
    "sync": "#E69F00",
    "wait": "#B8BDC4",
    "other": "#E9EBEE",
    "between steps": "#CC79A7",
}
HATCHES = ("", "///", "...", "xxx")


def draw_accuracy(models: Sequence[ModelResult]) -> Figure | None:
    """Bars of every model in every capability and overall, with 95% intervals; None without models."""
    groups = list(dict.fromkeys(name for model in models for name in model.capabilities))
    scores: list[dict[str, Score]] = [dict(model.capabilities) for model in models]
    if any(model.overall is not None for model in models):
        groups.append("overall")
        scores = [
            row | ({"overall": model.overall} if model.overall else {})
            for row, model in zip(scores, models, strict=True)
        ]
    if not groups or not models:
        return None
    figure, (axis,) = panels(1, 1, 4.2)
    width = 0.82 / len(models)
    for index, (model, row) in enumerate(zip(models, scores, strict=True)):
        present = [group for group in groups if group in row]
        places = [groups.index(group) + (index - (len(models) - 1) / 2) * width for group in present]
        values = [100 * row[group].accuracy for group in present]
        below = [value - 100 * row[group].low for value, group in zip(values, present, strict=True)]
        above = [100 * row[group].high - value for value, group in zip(values, present, strict=True)]
        axis.bar(
            places,
            values,
            width * 0.94,
            yerr=(below, above),
            color=colour(index),
            edgecolor="white",
            linewidth=0,
            hatch=HATCHES[index // 7 % len(HATCHES)],
            error_kw={"elinewidth": 1.2, "capsize": min(4.0, 60 * width / len(groups)), "ecolor": "#222222"},
            label=literal(model.name),
        )
        if len(models) * len(groups) <= 24:
            for place, value, top in zip(places, values, above, strict=True):
                axis.annotate(
                    f"{value:.1f}",
                    (place, value + top),
                    xytext=(0, 3),
                    textcoords="offset points",
                    horizontalalignment="center",
                    fontsize=8.5,
                )
    axis.set_xticks(range(len(groups)), [literal(group) for group in groups])
    axis.set_ylabel("accuracy (%), 95% interval")
    axis.set_ylim(bottom=0)
    axis.grid(axis="x", visible=False)
    axis.tick_params(axis="x", length=0)
    legend_above(figure, [axis])
    return figure


def draw_time_split(record: RunRecord) -> Figure | None:
    """Mean seconds per step by activity, a bar per branch and phase; None where no times were recorded."""
    bars = [
        (branch, phase, split)
        for branch in record.branches
        for phase in TRAINING_PHASES
        if (split := time_split(record, branch, phase))
    ]
    if not bars:
        return None
    figure, (axis,) = panels(1, 1, 1.5 + 0.42 * len(bars))
    for row, (_, _, split) in enumerate(bars):
        left = 0.0
        for activity, seconds in split.items():
            axis.barh(row, seconds, left=left, height=0.7, color=ACTIVITY_COLOURS[activity], label=activity)
            left += seconds
        axis.annotate(
            f"{left:.3g} s",
            (left, row),
            xytext=(4, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=9.5,
        )
    axis.set_yticks(range(len(bars)), [f"{literal(branch)}, {phase}" for branch, phase, _ in bars])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.09 * max(sum(split.values()) for _, _, split in bars))
    axis.set_xlabel("mean wall-clock time of a step (s)")
    axis.grid(axis="y", visible=False)
    legend_above(figure, [axis])
    return figure


def time_split(record: RunRecord, branch: str, phase: str) -> dict[str, float]:
    """Mean seconds per step of each activity, of what none of them covers ("other"), and of what came before the step
    ("between steps"); empty if not recorded."""
    keys = (*ACTIVITIES, "step", "between")
    found = {key: record.series(branch, f"time/{key}", phase).finite for key in keys}
    means = {activity: sum(values) / len(values) for activity, values in found.items() if values}
    whole, between = means.pop("step", 0.0), means.pop("between", 0.0)
    covered = sum(means.values())
    if means and whole > 1.005 * covered:
        means["other"] = whole - covered
    if between > 0.005 * whole:
        means["between steps"] = between
    return means


def draw_timeline(record: RunRecord) -> Figure | None:
    """What every branch did during a few consecutive steps; None where no timeline was recorded."""
    steps = timeline_steps(record)
    rows = {
        branch: [(step, record.timelines[branch][step]) for step in steps if record.timelines[branch].get(step)]
        for branch in record.branches
        if branch in record.timelines
    }
    rows = {branch: stretches for branch, stretches in rows.items() if stretches}
    if not rows:
        return None
    origin = min(stretch.start for row in rows.values() for _, stretches in row for stretch in stretches)
    figure, (axis,) = panels(1, 1, 1.5 + 0.75 * len(rows))
    used = set()
    for place, row in enumerate(rows.values()):
        for step, stretches in row:
            begin = stretches[0].start - origin
            axis.plot([begin, begin], [place - 0.42, place + 0.32], color="#222222", linewidth=1)
            axis.annotate(
                f"step {step}", (begin, place - 0.36), xytext=(3, 0), textcoords="offset points", fontsize=8.5
            )
            for stretch in stretches:
                used.add(stretch.activity)
                axis.barh(
                    place,
                    stretch.end - stretch.start,
                    left=stretch.start - origin,
                    height=0.6,
                    color=ACTIVITY_COLOURS[stretch.activity],
                    linewidth=0,
                )
    axis.set_yticks(range(len(rows)), [literal(branch) for branch in rows])
    axis.invert_yaxis()
    axis.set_xlabel("wall-clock time (s)")
    axis.grid(axis="y", visible=False)
    patches = [Patch(color=ACTIVITY_COLOURS[name], label=name) for name in ACTIVITIES if name in used]
    legend_above(figure, [], patches)
    return figure


def timeline_steps(record: RunRecord) -> list[int]:
    """Steps worth drawing: two on either side of a Phase I's end, of the cycle where they took the median time;
    the last four where no Phase II was reached."""
    recorded = sorted({step for steps in record.timelines.values() for step in steps})
    windows = []
    for before, after in _boundaries(record.periods()):
        steps = [
            *range(max(before.end - 1, before.start + 1), before.end + 1),
            *range(after.start + 1, after.end + 1)[:2],
        ]
        stretches = [stretch for step in steps for row in record.timelines.values() for stretch in row.get(step, [])]
        if stretches and set(steps) <= set(recorded):
            windows.append((_duration(stretches), steps))
    if not windows:
        return recorded[-4:]
    return sorted(windows)[len(windows) // 2][1]


def _boundaries(periods: Sequence[Period]) -> list[tuple[Period, Period]]:
    return [(before, after) for before, after in pairwise(periods) if (before.phase, after.phase) == TRAINING_PHASES]


def _duration(stretches: Sequence[Stretch]) -> float:
    return max(stretch.end for stretch in stretches) - min(stretch.start for stretch in stretches)
