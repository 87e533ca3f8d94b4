"""Throughput and what GPUs spend their time on, against their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from copd_megatron.observe.plot_style import MARKERS, colour, literal, panels, png, style

if TYPE_CHECKING:
    from copd_megatron.plan.scale import Knee, Point, Work

LABELS: dict[str, str] = {"grows": "prompts grow with GPUs", "fixed": "the configuration's prompts"}
PARTS = ("train", "rollout", "stragglers", "score", "communicate", "hand_over", "wait")


def scale_plot(points: Sequence[Point], knees: Mapping[Work, Knee], title: str) -> bytes:
    """A PNG: throughput on the left, shares of GPU time where prompts grow on the right."""
    with style():
        figure, (left, right) = panels(1, 2, 4.8)
        figure.suptitle(f"{literal(title)}: simulated, not measured", x=0.01, ha="left", fontsize=12)
        for index, (work, label) in enumerate(LABELS.items()):
            own = [point for point in points if point.work == work]
            if own:
                _throughput(left, own, knees[work], label, index)  # type: ignore[index]
        _number_axis(left, "response tokens per second")
        left.set_yscale("log")
        left.legend(loc="upper left", fontsize=9)
        growing = [point for point in points if point.work == "grows"]
        if growing:
            _shares(right, growing)
        return png(figure)


def _throughput(axis: Axes, points: Sequence[Point], knee: Knee, label: str, index: int) -> None:
    gpus = [point.gpus for point in points]
    values = [point.tokens_per_second for point in points]
    axis.plot(gpus, values, marker=MARKERS[index], color=colour(index), label=label)
    if index == 0:
        ideal = [points[0].tokens_per_second * count / gpus[0] for count in gpus]
        axis.plot(gpus, ideal, color="#999999", linestyle=":", label="proportional")
    for point in points:
        if point.gpus == knee.gpus:
            axis.plot(
                [point.gpus], [point.tokens_per_second], "o", markersize=12, fillstyle="none", color=colour(index)
            )
            axis.annotate(
                f"knee {point.gpus:,}",
                (point.gpus, point.tokens_per_second),
                xytext=(0, -26),
                horizontalalignment="center",
                textcoords="offset points",
                fontsize=9,
                color=colour(index),
            )


def _shares(axis: Axes, points: Sequence[Point]) -> None:
    gpus = [point.gpus for point in points]
    layers = [[point.shares.get(name, 0.0) for point in points] for name in PARTS]
    layers.append([point.undone for point in points])
    labels = [*(name.replace("_", "-") for name in PARTS), "undone, restarts, checkpoints"]
    colours = [*(colour(index) for index in range(len(PARTS))), "#111111"]
    axis.stackplot(gpus, layers, labels=labels, colors=colours, alpha=0.85)
    _number_axis(axis, "share of GPU time, prompts grow")
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    handles, texts = axis.get_legend_handles_labels()
    axis.legend(
        handles[::-1], texts[::-1], loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=9, frameon=False
    )


def _number_axis(axis: Axes, label: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xlabel("GPUs")
    axis.set_ylabel(label)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.tick_params(axis="x", labelsize=9)
