"""The curves of a run: metrics that belong together in one picture, training solid and held-out data dashed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rljax.metrics import define

if TYPE_CHECKING:  # a run imports matplotlib, which takes a second, when it draws
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

# Okabe & Ito 2008: told apart with every kind of colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
# A page is one picture; its panels are groups of metrics (metrics.py). Groups that are not here go to the last page.
PAGES: dict[str, tuple[str, ...]] = {
    "Loss": ("loss", "perplexity", "token accuracy"),
    "Rewards": ("scores", "rewards", "accuracy", "reward", "each reward", "margin"),
    "Distance from the reference": ("kl", "kl_coef", "logps", "odds", "entropy"),
    "Updates": ("approxkl", "ratio", "updates"),
    "Critic": ("value", "value_mean", "explained"),
    "Completions": ("length", "share"),
    "Optimisation": ("grad_norm", "learning_rate"),
}
LABELS = {
    "accuracy": "share",
    "token accuracy": "share",
    "rewards": "reward",
    "reward": "score",
    "scores": "score",
    "each reward": "score",
    "share": "share",
    "odds": "log odds",
    "margin": "score",
    "logps": "log-probability",
}
COUNTERS = {"step", "num_tokens", "epoch"}
LONG = 40  # curves of so many points are smoothed


def draw_curves(metrics: Rows, timing: Rows = ()) -> list[tuple[str, Figure]]:
    """(title, picture) of every page for which there is something to draw."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name in sorted({name for row in metrics for name in row}):
        plain = name.removeprefix("eval/")
        points = [(row["step"], math.nan if row[name] is None else row[name]) for row in metrics if name in row]
        if plain in COUNTERS or not any(math.isfinite(value) for _, value in points):
            continue
        panels.setdefault(group_of(plain), {})[name] = points
    shown = {title: [group for group in groups if group in panels] for title, groups in PAGES.items()}
    known = {group for groups in PAGES.values() for group in groups}
    shown["More metrics"] = [group for group in panels if group not in known]
    drawn = [(title, _page({group: panels[group] for group in groups})) for title, groups in shown.items() if groups]
    speed = [(row["step"], row["tokens_per_second"]) for row in timing if "tokens_per_second" in row]
    return [*drawn, *([("Throughput", _page({"tokens/s": {"tokens/s": speed}}))] if speed else [])]


def style() -> Any:
    """In its context, figures look like those of reports."""
    import matplotlib

    return matplotlib.rc_context(STYLE)  # pyright: ignore[reportArgumentType]


def _page(panels: Mapping[str, Mapping[str, list[tuple[float, float]]]]) -> Figure:
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with style():
        figure = Figure(figsize=(4.9 * columns + 0.4 * (columns == 1), 3.1 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, (group, curves) in zip(axes, panels.items(), strict=False):
            _panel(axis, group, curves)
        for axis in axes[len(panels) :]:
            axis.remove()
    return figure


def _panel(axis: Axes, group: str, curves: Mapping[str, list[tuple[float, float]]]) -> None:
    """One colour for a metric: solid in training (long curves pale, smoothed on top), dashed on held-out data."""
    from matplotlib.ticker import MaxNLocator

    plain = list(dict.fromkeys(name.removeprefix("eval/") for name in curves))
    for name, points in sorted(curves.items(), key=lambda item: item[0].startswith("eval/")):
        steps, values = zip(*points, strict=True)
        color = COLORS[plain.index(name.removeprefix("eval/")) % len(COLORS)]
        if name.startswith("eval/"):
            marker = {"marker": "o", "markersize": 4, "markerfacecolor": "white"}
            axis.plot(steps, values, color=color, linestyle=(0, (4, 2)), linewidth=1.5, label=name, zorder=3, **marker)
        elif len(points) >= LONG and group != "learning_rate":
            axis.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
            axis.plot(steps, smooth(values), color=color, linewidth=1.8, label=f"{name} (smoothed)")
        else:
            axis.plot(steps, values, color=color, linewidth=1.8, label=name, marker="o" if len(points) == 1 else "")
    title = ", ".join(plain) if len(plain) < 3 else group
    axis.set(title=title, xlabel="step", ylabel=axis_label(plain[0], LABELS.get(group)))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if group == "accuracy":
        axis.set_ylim(-0.02, 1.02)
        axis.axhline(0.5, color="#aaaaaa", linewidth=1, zorder=1)
    if group == "tokens/s":
        axis.set_ylim(bottom=0)
    if len(curves) > 1 or (len(curves) == 1 and axis.get_legend_handles_labels()[1] != plain):
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.21), ncols=2)  # below: no curve runs behind it


def axis_label(metric: str, label: str | None = None) -> str:
    """What an axis of a metric is called (`label`, else its name), with the unit."""
    definition = define(metric)
    unit = definition.unit if definition else ""
    return f"{label or metric} [{unit}]" if unit else label or metric


def pages(metrics: Collection[str]) -> dict[str, list[str]]:
    """{title of a page: its metrics}, in the order of reports; held-out data beside training."""
    groups = {name: group_of(name) for name in sorted(metrics, key=lambda name: (name.removeprefix("eval/"), name))}
    found = {title: [m for g in wanted for m in groups if groups[m] == g] for title, wanted in PAGES.items()}
    known = {name for names in found.values() for name in names}
    found["More metrics"] = [name for name in groups if name not in known]
    return {title: names for title, names in found.items() if names}


def group_of(metric: str) -> str:
    """Metrics of one group belong together; one without a definition is its own."""
    definition = define(metric)
    return (definition.group if definition else "") or metric.removeprefix("eval/")


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a thirtieth of the curve, without bias at its start; gaps stay gaps."""
    keep = 1 - 1 / max(2.0, len(values) / 30)
    total = weight = 0.0
    out = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
            out.append(total / weight)
        else:
            out.append(math.nan)
    return out
