"""The plots of a pilot study; colours that colour-blind readers can tell apart, with markers of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from copd_megatron.compare.statistics import Interval
from copd_megatron.observe.plot_style import LINES, MARKERS, colour, label_steps, legend_above, literal, panels
from copd_megatron.pilot.analysis import Relation
from copd_megatron.pilot.results import Key, PilotResult

LINE_COLOUR = "#666666"
LABEL = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
COLUMNS = 4
UNITS = {"symkl": "nats per token", "low_support": "share of the teacher's rollouts"}


def draw_gain(result: PilotResult, name: str, label: str) -> Figure | None:
    """The paper's pilot figure: share absorbed against one predictor, with line, band and r; None without a point."""
    figure, (axis,) = panels(1, 1, 4.8)
    if not _points(axis, result, name, labelled=True):
        return None
    relation = result.analysis.relations[name]
    _line(axis, relation)
    axis.set_title(_statement(relation))
    axis.set_xlabel(
        f"{label} of student and teacher before distillation, 95% interval\n"
        "(numbers at the points: the student's updates of reinforcement learning)"
    )
    axis.set_ylabel("share of the teacher's advantage absorbed,\n95% interval")
    return figure


def draw_rivals(result: PilotResult, names: Mapping[str, str]) -> Figure | None:
    """Share absorbed against every predictor, a panel each; None without a point."""
    rows = -(-len(names) // COLUMNS)
    figure, axes = panels(rows, COLUMNS, 0.4 + 2.9 * rows)
    drawn = [_points(axis, result, name) for axis, name in zip(axes, names, strict=False)]
    if not any(drawn):
        return None
    for number, (axis, (name, label)) in enumerate(zip(axes, names.items(), strict=False)):
        relation = result.analysis.relations[name]
        _line(axis, relation)
        axis.set_title("r not defined" if relation.line is None else _signed(f"r = {relation.line.r:+.2f}"))
        axis.set_xlabel(f"{_folded(label)}\n({unit(name)})")
        if number % COLUMNS == 0:
            axis.set_ylabel("share absorbed,\n95% intervals")
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    return figure


def draw_correlations(result: PilotResult, names: Mapping[str, str]) -> Figure | None:
    """r of every predictor, strongest first, with both its intervals; None where none is defined."""
    defined = ranked(result, names)
    if not defined:
        return None
    figure, (axis,) = panels(1, 1, 1.6 + 0.42 * len(defined))
    for place, (_, relation) in enumerate(defined):
        assert relation.line is not None
        if relation.over_students is not None:
            axis.plot(relation.over_students, (-place, -place), color=colour(1), linewidth=1.2, linestyle="--",
                      marker="|", markersize=9, label="for other students (Fisher)")  # fmt: skip
        if (bounds := relation.over_problems) is not None:
            axis.plot((bounds.low, bounds.high), (-place, -place), color=colour(0), linewidth=5, alpha=0.45,
                      solid_capstyle="butt", label="for other problems (bootstrap)")  # fmt: skip
        axis.plot(relation.line.r, -place, "o", color=colour(0), markersize=6, label="r")
    axis.axvline(0, color="#888888", linewidth=0.8)
    axis.set_xlim(-1.03, 1.03)
    axis.set_ylim(-len(defined) + 0.4, 0.6)
    axis.set_yticks([-place for place in range(len(defined))], [literal(label) for label, _ in defined])
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("correlation with the share absorbed (Pearson's r), 95% intervals")
    legend_above(figure, [axis])
    return figure


def draw_rlvr(result: PilotResult, overlaps: Sequence[int]) -> Figure | None:
    """Overlap and symmetric KL with the base over independent reinforcement learning; None if nobody measured."""
    if not result.curves:
        return None
    figure, axes = panels(1, 2, 4.8)
    for number, capability in enumerate(dict.fromkeys(capability for capability, _ in result.curves)):
        seeds = [curve for (name, _), curve in result.curves.items() if name == capability]
        for style, k in enumerate(overlaps):
            for curve in seeds:
                _curve(axes[0], curve, f"overlap@{k}", number, style, f"{capability}, overlap@{k}")
        for curve in seeds:
            _curve(axes[1], curve, "symkl", number, 0, f"{capability}, symmetric KL")
    axes[0].set_ylabel("overlap with the base\n(share in common), 95% band")
    axes[1].set_ylabel("symmetric KL with the base\n(nats per token), 95% band")
    axes[1].set_ylim(bottom=0)
    for axis in axes:
        label_steps(axis)
    legend_above(figure, axes)
    return figure


def ranked(result: PilotResult, names: Mapping[str, str]) -> list[tuple[str, Relation]]:
    """(label, relation) of the predictors whose r is defined, strongest first."""
    found = [(label, result.analysis.relations[name]) for name, label in names.items()]
    return sorted((one for one in found if one[1].line is not None), key=lambda one: -abs(one[1].line.r))  # type: ignore[union-attr]


def unit(name: str) -> str:
    """What a predictor is counted in."""
    return "share in common" if name.startswith("overlap@") else UNITS.get(name, "nats per token")


def _points(axis: Axes, result: PilotResult, name: str, labelled: bool = False) -> bool:
    seeds = list(dict.fromkeys(seed for seed, _ in result.analysis.gains))
    drawn = False
    for key, gain in result.analysis.gains.items():
        value = result.analysis.values[key].get(name)
        if gain is None or value is None:
            continue
        drawn = True
        number = seeds.index(key[0])
        axis.errorbar(
            value.mean,
            gain.mean,
            xerr=_around(value),
            yerr=_around(gain),
            fmt=MARKERS[number % len(MARKERS)],
            color=colour(number),
            capsize=3 if labelled else 0,
            elinewidth=1,
            markersize=7 if labelled else 5,
        )
        if labelled:
            axis.annotate(_name(key, len(seeds)), (value.mean, gain.mean), xytext=(7, 6), textcoords="offset points",
                          fontsize=9.5, zorder=5, bbox=LABEL)  # fmt: skip
    axis.axhline(0, color="#888888", linewidth=0.8)
    return drawn


def _name(key: Key, seeds: int) -> str:
    return f"{key[1]}" + (f", seed {key[0]}" if seeds > 1 else "")


def _line(axis: Axes, relation: Relation) -> None:
    if relation.line is None:
        return
    xs = [x for x, _, _ in relation.band] or list(axis.get_xlim())
    ys = [relation.line.intercept + relation.line.slope * x for x in xs]
    axis.plot(xs, ys, color=LINE_COLOUR, linewidth=1.4, zorder=1)
    if relation.band:
        _, low, high = zip(*relation.band, strict=True)
        axis.fill_between(xs, low, high, color=LINE_COLOUR, alpha=0.15, linewidth=0, zorder=0)


def _statement(relation: Relation) -> str:
    line = relation.line
    if line is None:
        return "r is not defined: fewer than three students, or all alike"
    parts = [f"{line.n} students, r = {line.r:+.2f}"]
    if relation.over_problems is not None:
        parts[0] += f" [{relation.over_problems.low:+.2f}, {relation.over_problems.high:+.2f}] over problems"
    if relation.over_students is not None:
        parts.append(f"[{relation.over_students[0]:+.2f}, {relation.over_students[1]:+.2f}] over students")
    parts.append(f"R² = {line.r2:.2f}" + (f" [{bounds.low:.2f}, {bounds.high:.2f}]" if (bounds := relation.r2) else ""))
    return _signed(", ".join(parts))


def _curve(
    axis: Axes, curve: Mapping[int, Mapping[str, Interval]], name: str, number: int, style: int, label: str
) -> None:
    steps = sorted(step for step in curve if name in curve[step])
    values = [curve[step][name] for step in steps]
    axis.plot(steps, [value.mean for value in values], LINES[style % len(LINES)], color=colour(number),
              marker=MARKERS[number % len(MARKERS)], label=literal(label))  # fmt: skip
    low, high = [value.low for value in values], [value.high for value in values]
    axis.fill_between(steps, low, high, color=colour(number), alpha=0.15, linewidth=0)


def _around(value: Interval) -> tuple[list[float], list[float]]:
    return [value.mean - value.low], [value.high - value.mean]


def _signed(text: str) -> str:
    return text.replace("-", "−")


def _folded(label: str) -> str:
    return label.replace(", ", ",\n")
