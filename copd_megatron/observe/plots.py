"""Curves over steps. Each figure is a row of `FIGURES`: which metrics, how they are called, what they tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from copd_megatron.observe.plot_style import (
    LINES,
    MARKERS,
    colour,
    label_steps,
    legend_above,
    literal,
    panels,
    shade_phases,
)
from copd_megatron.observe.record import PROBE, RunRecord, Series


@dataclass(frozen=True)
class Panel:
    """One metric: of each branch, or of each edge as `metric`/<teacher>. `share` values are drawn in percent."""

    metric: str
    label: str
    of: Literal["branch", "edge"] = "branch"
    smooth: bool = False
    share: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class CurveFigure:
    """A figure of the report: `name` is also the name of its PNG."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    columns: int = 1
    row_height: float = 2.9


FIGURES = (
    CurveFigure(
        "reward",
        "Reward",
        "Mean reward of each branch's own rollouts: thin, every step; thick, moving average.",
        (Panel("reward/mean", "mean reward", smooth=True),),
        row_height=3.8,
    ),
    CurveFigure(
        "drift",
        "Drift between branches",
        "Measured from the student's states, student ← teacher. Branches are expected to drift apart in Phase I and to "
        "come closer in Phase II.",
        (
            Panel("overlap", "overlap@{k}\n(share of top {k} in common)", of="edge"),
            Panel("symkl", "symmetric KL\n(nats per token)", of="edge", from_zero=True),
        ),
    ),
    CurveFigure(
        "support",
        "Support and distance to the base",
        "Low support: share of the teacher's own rollouts that the student has all but given up (log-ratio below −5); "
        "the lower, the more of the teacher can be absorbed. KL to the base predicts forgetting.",
        (
            Panel("support", "low support", of="edge", share=True, from_zero=True),
            Panel("kl_teacher", "KL(teacher ‖ student)\n(nats per token)", of="edge", from_zero=True),
            Panel("kl_to_base", "KL(base ‖ branch)\n(nats per token)", from_zero=True),
        ),
        columns=3,
        row_height=3.3,
    ),
    CurveFigure(
        "heldout",
        "Reward on held-out problems",
        "Branch ← capability of the problems: one rollout of each validation prompt. A teacher's capability is "
        "expected to rise in Phase II.",
        (Panel("heldout", "mean reward", of="edge"),),
        row_height=3.6,
    ),
    CurveFigure(
        "health",
        "Training health",
        "Collapsing entropy, spikes of the gradient, and responses that grow or are cut are the usual signs of "
        "trouble.",
        (
            Panel("entropy", "entropy (nats per token)", from_zero=True),
            Panel("grad_norm", "gradient norm before clipping", from_zero=True),
            Panel("rollout/length", "response length (tokens)", from_zero=True),
            Panel("rollout/truncated", "responses cut", share=True, from_zero=True),
        ),
        columns=2,
    ),
    CurveFigure(
        "distillation",
        "Distillation and mismatch",
        "δ is log π_teacher − log π_student of the sampled tokens. Mismatch is the KL between the sampling engine and "
        "the trainer on the same tokens; it should stay near zero.",
        (
            Panel("opd/kl", "KL to teachers\n(nats per token)"),
            Panel("opd/delta", "mean δ\n(nats per token)"),
            Panel("mismatch/kl", "engine–trainer KL\n(nats per token)"),
        ),
        columns=3,
        row_height=3.3,
    ),
    CurveFigure(
        "speed",
        "Speed and memory",
        "Tokens, prompts and responses, that a branch handled per second of wall clock.",
        (
            Panel("tokens_per_second", "tokens per second", from_zero=True),
            Panel("memory_gib", "GPU memory (GiB)", from_zero=True),
            Panel("rss_gib", "host memory (GiB)", from_zero=True),
        ),
        columns=3,
        row_height=3.1,
    ),
)


def draw_curves(record: RunRecord, figure: CurveFigure) -> Figure | None:
    """Draw those panels of a figure that the run has numbers for; None if it has none at all."""
    drawn = [(panel, curves) for panel in figure.panels if (curves := _curves(record, panel))]
    if not drawn:
        return None
    columns = min(figure.columns, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    canvas, axes = panels(rows, columns, rows * figure.row_height + 0.5)
    for axis, (panel, curves) in zip(axes, drawn, strict=False):
        _draw_panel(axis, record, panel, curves)
    for axis in axes[len(drawn) :]:
        axis.remove()
    axes = axes[: len(drawn)]
    legend_above(canvas, axes, shade_phases(axes, record))
    return canvas


def draw_reward_overlay(records: Sequence[RunRecord], names: Sequence[str]) -> Figure | None:
    """Smoothed reward of several runs, one panel per branch; None if no run has rewards."""
    branches = list(dict.fromkeys(branch for record in records for branch in record.branches))
    branches = [name for name in branches if any(record.series(name, "reward/mean") for record in records)]
    if not branches:
        return None
    columns = min(2, len(branches))
    rows = math.ceil(len(branches) / columns)
    canvas, axes = panels(rows, columns, rows * 3.0 + 0.5)
    for axis, branch in zip(axes, branches, strict=False):
        for index, (record, name) in enumerate(zip(records, names, strict=True)):
            series = record.series(branch, "reward/mean")
            if series:
                line = LINES[index // 7 % len(LINES)]
                smoothed = moving_average(series.values, window_of(series))
                axis.plot(series.steps, smoothed, line, color=colour(index), label=literal(name))
        axis.set_title(f"branch {literal(branch)}")
        label_steps(axis)
        axis.set_ylabel("mean reward, moving average")
    for axis in axes[len(branches) :]:
        axis.remove()
    legend_above(canvas, axes[: len(branches)])
    return canvas


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean over up to `window` values around each one, fewer at the ends; values that are not finite do not count."""
    half = window // 2
    smoothed = []
    for index in range(len(values)):
        near = [value for value in values[max(0, index - half) : index + half + 1] if math.isfinite(value)]
        smoothed.append(sum(near) / len(near) if near else math.nan)
    return smoothed


def window_of(series: Series) -> int:
    """Odd width of the moving average: a twelfth of the run, at most 25 steps."""
    return min(25, len(series.values) // 12 // 2 * 2 + 1)


@dataclass(frozen=True)
class _Curve:
    label: str
    series: Series
    colour: str
    line: str
    marker: str | None


def _curves(record: RunRecord, panel: Panel) -> list[_Curve]:
    branches = record.branches
    curves = []
    if panel.of == "branch":
        for index, branch in enumerate(branches):
            curves.append(_Curve(literal(branch), record.series(branch, panel.metric), colour(index), "-", None))
    else:
        teachers: dict[str, int] = {}
        for student, teacher in record.edges(panel.metric):
            # Colour and marker say who learns, the line who teaches.
            rank = teachers[student] = teachers.get(student, -1) + 1
            curves.append(
                _Curve(
                    f"{literal(student)} ← {literal(teacher)}",
                    # A training step may note the same metric, of other prompts: not to be mixed in.
                    record.series(student, f"{panel.metric}/{teacher}", PROBE),
                    colour(branches.index(student)),
                    LINES[rank % len(LINES)],
                    MARKERS[branches.index(student) % len(MARKERS)],
                )
            )
    return [curve for curve in curves if curve.series]


def _draw_panel(axis: Axes, record: RunRecord, panel: Panel, curves: Sequence[_Curve]) -> None:
    for curve in curves:
        series = curve.series
        if panel.smooth:
            axis.plot(*_with_gaps(series), color=curve.colour, linewidth=0.8, alpha=0.4)
            series = Series(series.steps, moving_average(series.values, window_of(series)))
        # A run's very first point would be invisible as a line.
        marker = curve.marker or ("o" if len(series.steps) == 1 else None)
        axis.plot(*_with_gaps(series), curve.line, color=curve.colour, marker=marker, label=curve.label)
    axis.set_ylabel(panel.label.replace("{k}", str(record.setting("log", "overlap_k") or "k")))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if panel.share:
        axis.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
    if panel.from_zero:
        axis.set_ylim(bottom=min(0.0, *(value for curve in curves for value in curve.series.finite)))
        if axis.get_ylim()[1] <= 0:
            axis.set_ylim(top=1)


def _with_gaps(series: Series) -> tuple[list[float], list[float]]:
    """Interrupt a line where nothing was measured, such as distillation during Phase I."""
    distances = sorted(b - a for a, b in pairwise(series.steps))
    longest = 2.5 * distances[len(distances) // 2] if distances else math.inf
    xs: list[float] = []
    ys: list[float] = []
    for step, value in zip(series.steps, series.values, strict=True):
        if xs and step - xs[-1] > longest:
            xs.append(step)
            ys.append(math.nan)
        xs.append(step)
        ys.append(value)
    return xs, ys
