"""Several groups of runs in one picture: the mean of each with its interval, and every run thin behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rljax import plots, runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = ("-", (0, (4, 2)), (0, (1, 1.2)))  # another one where the colours begin again
INTERVAL = "interval"  # what is no run or mean
THIN: dict[str, Any] = {"linewidth": 0.7, "alpha": 0.35}


def over_steps(groups: Sequence[runs.Group], metric: str, interval: str) -> Figure:
    """A metric over the steps. The mean is drawn where all runs of a group have a value."""
    from matplotlib.ticker import MaxNLocator

    with plots.style():
        figure, axis = _figure()
        smooth = False
        for index, group in enumerate(groups):
            for run in group.runs:
                points = sorted(runs.points(run, metric).items())
                axis.plot([step for step, _ in points], [value for _, value in points], color=color(index), **THIN)
            found = runs.curve(group, metric)
            if not len(found.steps):
                continue
            long = len(found.steps) >= plots.LONG and metric != "learning_rate"
            smooth = smooth or long
            band = runs.band((runs.smoothed(found) if long else found).values, interval)
            marker = "o" if len(found.steps) == 1 else ""
            axis.plot(found.steps, band.mean, marker=marker, **_line(index, group, len(found.values)))
            if len(found.values) > 1:
                axis.fill_between(found.steps, band.low, band.high, color=color(index), alpha=0.18, linewidth=0)
        label = plots.LABELS.get(plots.group_of(metric))
        axis.set(title=_plain(metric), xlabel="step", ylabel=_plain(plots.axis_label(metric, label)))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        mean = "mean over runs, smoothed" if smooth else "mean over runs"
        _finish(figure, axis, groups, f"line: {mean}; thin: each run\nband: {runs.INTERVALS[interval]}")
    return figure


def against(groups: Sequence[runs.Group], x: str, y: str, interval: str) -> Figure:
    """Two metrics against each other: how each group moves from its first step to its last one, where a dot marks the
    mean, and a cross the intervals of both.
    """
    with plots.style():
        figure, axis = _figure()
        smooth = False
        for index, group in enumerate(groups):
            pair = runs.curves(group, (x, y))
            if not len(pair[0].steps):
                continue
            smooth = smooth or len(pair[0].steps) >= plots.LONG
            across, up = (runs.smoothed(each).values for each in pair)
            axis.plot(across.T, up.T, color=color(index), **THIN)
            ends = [runs.band(values, interval) for values in (across, up)]
            axis.plot(ends[0].mean, ends[1].mean, **_line(index, group, len(across)))
            _cross(axis, ends[0], ends[1], color(index), several=len(across) > 1)
        axis.set(xlabel=_plain(plots.axis_label(x)), ylabel=_plain(plots.axis_label(y)))
        axis.set_title(f"{_plain(y)} against {_plain(x)}")
        each = "each run, all smoothed" if smooth else "each run"
        said = f"line: mean over runs; thin: {each}\ndot: last step; cross: {runs.INTERVALS[interval]}"
        _finish(figure, axis, groups, said)
    return figure


def _cross(axis: Axes, across: runs.Band, up: runs.Band, shade: str, *, several: bool) -> None:
    """The last mean of both, and the intervals."""
    x, y = across.mean[-1], up.mean[-1]
    axis.plot(x, y, color=shade, marker="o", markersize=6, markeredgecolor="white", zorder=3)
    if several:
        axis.plot([across.low[-1], across.high[-1]], [y, y], color=shade, linewidth=1.2, gid=INTERVAL)
        axis.plot([x, x], [up.low[-1], up.high[-1]], color=shade, linewidth=1.2, gid=INTERVAL)


def color(index: int) -> str:
    return plots.COLORS[index % len(plots.COLORS)]


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.7), layout="constrained")
    return figure, figure.subplots()


def _line(index: int, group: runs.Group, n: int) -> dict[str, Any]:
    label = f"{_plain(group.label)} ({n} run{'s' if n > 1 else ''})"
    label = f" {label}" if label.startswith("_") else label  # a legend leaves out what starts so
    line = LINES[index // len(plots.COLORS) % len(LINES)]
    return {"color": color(index), "linestyle": line, "linewidth": 1.8, "label": label}


def _finish(figure: Figure, axis: Axes, groups: Sequence[runs.Group], said: str) -> None:
    """Limits, legend, and in words what is drawn."""
    said = said if any(len(group.runs) > 1 for group in groups) else "each line: one run"
    figure.supxlabel(said, fontsize=7, color="#666666", x=0.02, horizontalalignment="left")
    _limit(axis)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.16), fontsize=8)


def _limit(axis: Axes) -> None:
    """At most twice the range of the lines: the interval of two runs can be many times as wide as what they did."""
    for i, (now, to) in enumerate(((axis.get_xlim(), axis.set_xlim), (axis.get_ylim(), axis.set_ylim))):
        lines = [line.get_data()[i] for line in axis.get_lines() if line.get_gid() != INTERVAL]
        values = np.concatenate([np.ravel(np.asarray(line, float)) for line in lines] or [[]])
        values = values[np.isfinite(values)]
        if not len(values):
            continue
        middle, half = (values.max() + values.min()) / 2, np.ptp(values) / 2
        if half <= 1e-9 * abs(middle):  # a constant, but for the rounding of a smoothed one
            to(middle - (abs(middle) / 10 or 1), middle + (abs(middle) / 10 or 1))
        else:
            to(max(now[0], middle - 2 * half), min(now[1], middle + 2 * half))


def _plain(text: str) -> str:
    """No mathematics in names."""
    return text.replace("$", r"\$")
