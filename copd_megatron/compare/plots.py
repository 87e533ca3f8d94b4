"""The plots of a comparison; colours that colour-blind readers can tell apart, with markers of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import correlation, fmean

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from copd_megatron.compare.results import RowResult
from copd_megatron.compare.statistics import OVERALL
from copd_megatron.observe.plot_style import LINES, MARKERS, colour, label_steps, legend_above, literal, panels
from copd_megatron.observe.record import PROBE, RunRecord
from copd_megatron.observe.results import ModelResult

REFERENCE_COLOUR = "#D55E00"


def draw_rows(rows: Sequence[RowResult], references: Sequence[str]) -> Figure | None:
    """Accuracy of every row with its interval, one panel per capability and overall; None without a result. References
    stand out, the first with a line through its mean."""
    done = [(row, row.accuracy) for row in rows if row.accuracy is not None]
    if not done:
        return None
    names = [*(name for name in done[0][1].of if name != OVERALL), OVERALL]
    figure, axes = panels(1, len(names), 1.4 + 0.3 * len(done))
    for axis, name in zip(axes, names, strict=True):
        for place, (row, accuracy) in enumerate(done):
            value = accuracy.of[name]
            axis.errorbar(
                100 * value.mean,
                -place,
                xerr=([100 * (value.mean - value.low)], [100 * (value.high - value.mean)]),
                fmt="s" if row.label in references else "o",
                color=REFERENCE_COLOUR if row.label in references else colour(0),
                capsize=3,
            )
            if row.label == references[0]:
                axis.axvline(100 * value.mean, color=REFERENCE_COLOUR, linewidth=0.8, linestyle=(0, (2, 3)))
        axis.set_title(literal(name))
        axis.set_xlabel("accuracy (%), 95% interval")
        axis.set_yticks([-place for place in range(len(done))], [literal(row.label) for row, _ in done])
        axis.grid(axis="y", visible=False)
    for axis in axes[1:]:
        axis.tick_params(axis="y", labelleft=False)
    return figure


def draw_drift(arms: Sequence[tuple[str, Sequence[RunRecord]]]) -> Figure | None:
    """Overlap and symmetric KL over the updates, mean over edges and seeds with their range; None if nobody probed."""
    figure, axes = panels(1, 2, 3.9)
    drawn = False
    for number, (name, records) in enumerate(arms):
        for axis, metric in zip(axes, ("overlap", "symkl"), strict=True):
            steps = _by_step(records, metric)
            if not steps:
                continue
            drawn = True
            xs = sorted(steps)
            line, marker = LINES[number % len(LINES)], MARKERS[number % len(MARKERS)]
            middle = [fmean(steps[x]) for x in xs]
            axis.plot(xs, middle, line, marker=marker, color=colour(number), label=literal(name))
            low, high = [min(steps[x]) for x in xs], [max(steps[x]) for x in xs]
            axis.fill_between(xs, low, high, color=colour(number), alpha=0.15, linewidth=0)
    if not drawn:
        return None
    ks = {record.setting("log", "overlap_k") for _, records in arms for record in records}
    axes[0].set_ylabel(f"overlap@{'/'.join(str(k) for k in sorted(ks, key=str))} (share in common)")
    axes[1].set_ylabel("symmetric KL (nats per token)")
    axes[1].set_ylim(bottom=0)
    for axis in axes:
        label_steps(axis)
    legend_above(figure, axes)
    return figure


def draw_sweep(rows: Sequence[RowResult]) -> Figure | None:
    """Overall accuracy by S_RL : S_OPD; None with fewer than two points."""
    points = sorted(
        (row.ratio, row.accuracy.of[OVERALL]) for row in rows if row.ratio is not None and row.accuracy is not None
    )
    if len(points) < 2:
        return None
    figure, (axis,) = panels(1, 1, 3.9)
    ratios, values = [ratio for ratio, _ in points], [value for _, value in points]
    axis.errorbar(
        ratios,
        [100 * value.mean for value in values],
        yerr=(
            [100 * (value.mean - value.low) for value in values],
            [100 * (value.high - value.mean) for value in values],
        ),
        fmt="-o",
        color=colour(0),
        capsize=4,
    )
    axis.set_xscale("log")
    axis.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axis.minorticks_off()
    axis.set_xlabel("updates of Phase I per update of Phase II (S_RL : S_OPD)")
    axis.set_ylabel("overall accuracy (%), 95% interval")
    return figure


def draw_forgetting(arms: Sequence[tuple[str, Sequence[RunRecord]]]) -> Figure | None:
    """What each branch has lost on the other capabilities against its KL to the base; None without such branches."""
    figure, (axis,) = panels(1, 1, 4.2)
    drawn = False
    for number, (name, records) in enumerate(arms):
        points = [point for record in records for point in _forgetting(record)]
        if not points:
            continue
        drawn = True
        xs, ys = zip(*points, strict=True)
        axis.plot(xs, ys, MARKERS[number % len(MARKERS)], color=colour(number), label=literal(name), linestyle="none")
    if not drawn:
        return None
    axis.axhline(0, color="#888888", linewidth=0.8)
    axis.set_xlabel("KL(base ‖ branch) on the branch's own prompts (nats per token), at the end")
    axis.set_ylabel("lost on the other capabilities\n(points of accuracy)")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    legend_above(figure, [axis])
    return figure


def draw_absorption(arms: Sequence[tuple[str, Sequence[RunRecord]]]) -> Figure | None:
    """What a Phase II gained on a teacher's held-out problems against the overlap at its start, a point per edge; None
    with fewer than three points. The title has Pearson's r over all of them."""
    figure, (axis,) = panels(1, 1, 4.2)
    every: list[tuple[float, float]] = []
    for number, (name, records) in enumerate(arms):
        points = [point for record in records for point in absorption(record)]
        every += points
        if points:
            xs, ys = zip(*points, strict=True)
            marker = MARKERS[number % len(MARKERS)]
            axis.plot(xs, ys, marker, color=colour(number), label=literal(name), linestyle="none", alpha=0.8)
    if len(every) < 3:
        return None
    r = _correlation(every)
    axis.set_title(f"{len(every)} Phases II of single edges" + ("" if r is None else f", r = {r:+.2f}"))
    axis.axhline(0, color="#888888", linewidth=0.8)
    axis.set_xlabel("overlap of student and teacher at the start of Phase II")
    axis.set_ylabel("gained on the teacher's held-out problems\n(points of reward per 10 updates)")
    legend_above(figure, [axis])
    return figure


def absorption(record: RunRecord) -> list[tuple[float, float]]:
    """(overlap at the start, points of held-out reward gained per 10 updates) of every edge and finished Phase II."""
    points = []
    for student, teacher in record.edges("overlap"):
        overlap, reward = (
            dict(zip(series.steps, series.values, strict=True))
            for series in (
                record.series(student, f"overlap/{teacher}", PROBE),
                record.series(student, f"heldout/{teacher}", PROBE),
            )
        )
        for period in record.finished_periods():
            if period.phase == "exchange" and {period.start, period.end} <= reward.keys() and period.start in overlap:
                rise = 1000 * (reward[period.end] - reward[period.start]) / (period.end - period.start)
                points.append((overlap[period.start], rise))
    return [point for point in points if all(map(math.isfinite, point))]


def _correlation(points: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's r; None where one side does not vary."""
    xs, ys = zip(*points, strict=True)
    return correlation(xs, ys) if len(set(xs)) > 1 and len(set(ys)) > 1 else None


def _by_step(records: Sequence[RunRecord], metric: str) -> dict[int, list[float]]:
    """By step, one value per seed: the mean over edges. Only steps at which every seed was measured: a mean over other
    seeds than at the step before would be no course of anything."""
    found: dict[int, list[float]] = {}
    seeds = 0
    for record in records:
        values: dict[int, list[float]] = {}
        for student, teacher in record.edges(metric):
            series = record.series(student, f"{metric}/{teacher}", PROBE)
            for step, value in zip(series.steps, series.values, strict=True):
                if math.isfinite(value):
                    values.setdefault(step, []).append(value)
        seeds += bool(values)
        for step, edges in values.items():
            found.setdefault(step, []).append(fmean(edges))
    return {step: values for step, values in found.items() if len(values) == seeds}


def _forgetting(record: RunRecord) -> list[tuple[float, float]]:
    if record.evaluation is None:
        return []
    models = {model.name: model for model in record.evaluation.models}
    points = []
    for branch in record.branches:
        kls = record.series(branch, "kl_to_base", PROBE).finite
        model = models.get(f"{branch} branch")
        if kls and model is not None and "base" in models and branch in model.capabilities:
            points.append((kls[-1], _lost(models["base"], model, branch)))
    return [point for point in points if math.isfinite(point[1])]


def _lost(base: ModelResult, model: ModelResult, own: str) -> float:
    others = [name for name in model.capabilities if name != own]
    if not others:
        return math.nan
    return 100 * fmean(base.capabilities[name].accuracy - model.capabilities[name].accuracy for name in others)
