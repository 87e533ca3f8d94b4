"""How plots look: colours that colour-blind readers can tell apart, phases as shaded bands, names drawn as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from copd_megatron.observe.record import Period, RunRecord

# Okabe and Ito's palette, without its yellow, too pale for lines on white, and with grey for black, which hides the
# whiskers of a bar.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
EXCHANGE_BAND = "#ECEFF3"
WIDTH_INCHES = 11.0
DOTS_PER_INCH = 150
STYLE: dict[str, Any] = {
    "font.size": 11,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#D8DCE1",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "figure.facecolor": "white",
}


def panels(rows: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of report width with `rows` × `columns` axes; `height` in inches."""
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def style() -> Any:
    """Context in which figures are both built and saved."""
    return mpl.rc_context(STYLE)


def colour(index: int) -> str:
    """Colour number `index`."""
    return COLOURS[index % len(COLOURS)]


def literal(name: str) -> str:
    """A name that is drawn as it is: no mathematics between dollar signs, no hiding of a leading underscore."""
    return ("\N{NO-BREAK SPACE}" if name.startswith("_") else "") + name.replace("$", r"\$")


def shade_phases(axes: Sequence[Axes], record: RunRecord) -> list[Patch]:
    """Shade Phase II and mark where cycles begin; returns what the legend needs."""
    periods = record.periods()
    for axis in axes:
        for period in periods:
            if period.phase == "exchange":
                axis.axvspan(period.start, period.end, color=EXCHANGE_BAND, zorder=0, linewidth=0)
        _mark_cycles(axis, periods)
        label_steps(axis)
        axis.grid(axis="x", visible=False)
        if periods:
            axis.set_xlim(0, max(period.end for period in periods))
    exchanged = any(period.phase == "exchange" for period in periods)
    return [Patch(color=EXCHANGE_BAND, label="Phase II (exchange)")] if exchanged else []


def label_steps(axis: Axes) -> None:
    """Name the x axis; as many ticks as fit beside the other columns of the figure."""
    axis.set_xlabel("step (optimizer updates)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=max(4, 11 // _columns(axis))))


def _columns(axis: Axes) -> int:
    place = axis.get_subplotspec()
    return place.get_gridspec().ncols if place is not None else 1


def _mark_cycles(axis: Axes, periods: list[Period]) -> None:
    starts: dict[int, int] = {}
    for period in periods:
        starts.setdefault(period.cycle, period.start)
    end = periods[-1].end if periods else 0
    room = 12 // _columns(axis)
    every = math.ceil(len(starts) / room)
    # Labels are drawn where an axis has its title, whose height keeps them clear of what is above.
    axis.set_title(" ", fontsize=9)
    for count, (cycle, start) in enumerate(starts.items()):
        axis.axvline(start, color="#888888", linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
        # A cycle that has only just begun has no room for its name.
        if count % every == 0 and (end - start) * 12 > end:
            word = "cycle " if count == 0 or len(starts) <= room // 2 else ""
            label = axis.annotate(
                f"{word}{cycle + 1}",
                (start, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(1, 4),
                textcoords="offset points",
                fontsize=8.5,
                color="#666666",
                verticalalignment="bottom",
            )
            label.set_in_layout(False)


def legend_above(figure: Figure, axes: Sequence[Axes], extra: Sequence[Patch] = ()) -> None:
    """One legend for all axes, above them, with each label once, so that it hides nothing."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    entries |= {str(patch.get_label()): patch for patch in extra}
    if entries:
        # A column holds the longest label (about 0.085 inches a letter) and its key.
        column_inches = 0.7 + 0.085 * max(map(len, entries))
        columns = min(len(entries), max(1, int(WIDTH_INCHES / column_inches)))
        figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=columns)
