"""Runs and seeds in comparison: plots as PNG files, and one HTML page that needs nothing but itself.

What a page shows is worked out here; `compare.html`, `compare.css` and `compare.js` beside this file are how it looks.
The page is closed: the texts of models are escaped, and its policy lets no script run but its own, and nothing load.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from rljax import overlays, plots, runs
from rljax.errors import UserError
from rljax.metrics import define
from rljax.progress import duration, number, quantity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = pathlib.Path(__file__).parent
PAGE = "comparison.html"
REWARDS = ("objective/scores", "demonstrations/score", "reward", "reward/mean", "rewards/margins")
DISTANCES = ("objective/kl", "kl")
LENGTHS = ("completions/mean_length",)
PROMPTS = 8  # of samples


def write(
    folders: Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str] | None = None,
    metrics: Sequence[str] = (),
    ignore: Collection[str] = (),
    interval: str = "confidence",
) -> pathlib.Path:
    """Write `<out>/comparison.html` and `<out>/plots/*.png`; the path of the first.

    folders: of runs, finished or not; one that holds nothing but an earlier comparison is passed over. out: left out,
    `comparison` beside the first run. metrics: which are drawn (all that every group has). ignore: settings that may
    differ within a group, besides seed and name. interval: of `runs.INTERVALS`.
    Errors: UserError for a folder that is no run, or is given twice; an `out` that is a run's; unknown metrics, or
    none in common; an unknown interval.
    """
    if interval not in runs.INTERVALS:
        raise UserError(f"there is no interval {interval!r}; there are {', '.join(runs.INTERVALS)}")
    paths = [path for path in map(pathlib.Path, folders) if not (path / PAGE).is_file() or _is_run(path)]
    if not paths:
        raise UserError("name the folder of a run, or of several: rljax report runs/*")
    found = runs.read(paths)
    folder = pathlib.Path(out) if out is not None else paths[0].resolve().parent / "comparison"
    if _is_run(folder):
        raise UserError(f"{folder} is the folder of a run: write the comparison elsewhere (--out FOLDER)")
    groups = runs.group(found, ignore=ignore)
    shown, left = _choose(groups, metrics)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    pictures = _draw(groups, shown, interval, folder / "plots")
    page = _render(
        title=f"{len(found)} run{'s' if len(found) > 1 else ''} in comparison",
        written=datetime.datetime.now(datetime.UTC).isoformat(" ", "minutes").replace("+00:00", " UTC"),
        interval=runs.INTERVALS[interval],
        groups=[_group(each) for each in groups],
        notes=_notes(groups),
        left=left,
        pictures=pictures,
        results=[_result(groups, metric, interval) for titled in plots.pages(shown).values() for metric in titled],
        runs=_runs(groups, shown),
        settings=runs.differing(groups),
        samples=_samples(groups),
    )
    (folder / PAGE).write_text(page, encoding="utf-8", errors="replace")
    return folder / PAGE


def _is_run(folder: pathlib.Path) -> bool:
    return any((folder / name).is_file() for name in ("experiment.json", "metrics.jsonl"))


def _choose(groups: Sequence[runs.Group], metrics: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the metrics to show, those left out because a group lacks them). Groups without records do not count."""
    each = [found for found in map(runs.metrics_of, groups) if found]
    if not each:
        raise UserError(f"nothing is recorded yet in {', '.join(run.name for group in groups for run in group.runs)}")
    anywhere, common = set.union(*each), set.intersection(*each)
    unknown = [name for name in metrics if name not in anywhere]
    if unknown:
        raise UserError(f"no run has a metric {unknown[0]!r}; there are {', '.join(sorted(anywhere))}")
    if not metrics and not common:
        have = "; ".join(f"{group.label}: {', '.join(sorted(runs.metrics_of(group)))}" for group in groups)
        raise UserError(f"these runs have no metric in common ({have}); name some with --metrics a,b")
    return (list(dict.fromkeys(metrics)), []) if metrics else (sorted(common), sorted(anywhere - common))


# --- pictures ---------------------------------------------------------------------------------------------------------


def _draw(
    groups: Sequence[runs.Group], shown: Sequence[str], interval: str, folder: pathlib.Path
) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """[(title, its pictures)], written to the folder too."""
    pairs = [
        pair
        for prefix in ("", "eval/")
        for pair in (_pair(groups, prefix, DISTANCES, REWARDS), _pair(groups, prefix, REWARDS, LENGTHS))
        if pair is not None
    ]
    names: set[str] = set()
    first = [
        _picture(overlays.against(groups, x, y, interval), f"{y} against {x}", (x, y), names, folder) for x, y in pairs
    ]
    found = [("Trade-offs", first)] if first else []
    for title, metrics in plots.pages(shown).items():
        pictures = [_picture(overlays.over_steps(groups, m, interval), m, (m,), names, folder) for m in metrics]
        found.append((title, pictures))
    return found


def _pair(groups: Sequence[runs.Group], prefix: str, xs: Sequence[str], ys: Sequence[str]) -> tuple[str, str] | None:
    """The x and y that most groups have steps with both of; the first of several, None where no group has any."""
    pairs = [(prefix + x, prefix + y) for x in xs for y in ys]
    having = [sum(len(runs.curves(group, pair)[0].steps) > 0 for group in groups) for pair in pairs]
    return pairs[having.index(max(having))] if max(having) else None


def _picture(
    figure: Figure, title: str, metrics: Sequence[str], names: set[str], folder: pathlib.Path
) -> Mapping[str, Any]:
    stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "metric"
    name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, 10_000))) if n not in names)
    names.add(name)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130, metadata={"Software": None})
    (folder / f"{name}.png").write_bytes(png.getvalue())
    width, height = (round(inches * 130) for inches in figure.get_size_inches())
    source = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return {"title": title, "metrics": " ".join(metrics), "source": source, "width": width, "height": height}


# --- tables -----------------------------------------------------------------------------------------------------------


def _group(group: runs.Group) -> Mapping[str, Any]:
    return {"label": group.label, "runs": [run.name for run in group.runs]}


def _notes(groups: Sequence[runs.Group]) -> list[str]:
    """What one should know before believing the page."""
    notes = []
    every = [run for group in groups for run in group.runs]
    short = [f"{run.name} ({run.step} of {run.steps})" for run in every if run.steps and run.step < run.steps]
    if short:
        notes.append(f"Not at their last step: {', '.join(short)}. The mean of a group ends where its first run does.")
    for group in groups:
        for seed in {run.seed for run in group.runs if run.seed is not None}:
            same = [run.name for run in group.runs if run.seed == seed]
            if len(same) > 1:
                notes.append(f"{', '.join(same)} have the same seed, {seed}: the interval takes them for several.")
    return notes


def _result(groups: Sequence[runs.Group], metric: str, interval: str) -> Mapping[str, Any]:
    """A metric's row: its mean at the end, and its best on the way, in every group."""
    definition, better = define(metric), _better(metric)
    meaning = definition.text + (f" [{definition.unit}]" if definition.unit else "") if definition else ""
    cells = []
    for group in groups:
        found = runs.curve(group, metric)
        if not len(found.steps):
            cells.append({"value": None})
            continue
        band, n = runs.band(found.values, interval), len(found.values)
        end = runs.band(_settled(metric, found.values), interval)
        cells.append(
            {
                "value": _finite(end.mean[-1]),
                "text": _with_interval(end, n, interval),
                "step": int(found.steps[-1]),
                "n": n,
                "best": _best(found.steps, band.mean, better),
            }
        )
    return {"metric": metric, "better": better, "meaning": meaning, "cells": cells}


def _with_interval(band: runs.Band, n: int, interval: str) -> str:
    """5.1 ± 1.7: the interval to two digits, and the mean as far."""
    mean, low, high = (values[-1] for values in band)
    if n == 1 or not np.isfinite(mean):
        return show(mean)
    if interval == "range":
        return f"{show(mean)} ({show(low)} to {show(high)})"
    spread = high - mean
    digits = max(0, 1 - int(np.floor(np.log10(spread)))) if spread > 0 else 9
    if digits > 5 or max(abs(mean), spread) >= 1e5:
        return f"{show(mean)} ± {show(spread)}"
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def _settled(metric: str, values: np.ndarray) -> np.ndarray:
    """The end of each curve, [n 1] of [n steps]: its last point if that is a whole evaluation, else the mean of its
    last tenth, since a point of training is one minibatch.
    """
    points = 1 if metric.startswith("eval/") else max(1, values.shape[1] // 10)
    return values[:, -points:].mean(axis=1, keepdims=True)


def _best(steps: np.ndarray, mean: np.ndarray, better: str) -> Mapping[str, Any] | None:
    if not better or not np.isfinite(mean).any():
        return None
    index = int(np.nanargmax(mean) if better == "higher" else np.nanargmin(mean))
    return {"value": float(mean[index]), "text": f"{show(mean[index])} at {steps[index]}"}


def _better(metric: str) -> str:
    definition = define(metric)
    return definition.better if definition else ""


def _runs(groups: Sequence[runs.Group], shown: Sequence[str]) -> Mapping[str, Any]:
    """A row for each run: where it is, and the last value of what is drawn."""
    wanted = [name for names in plots.pages(shown).values() for name in names if _better(name)]
    rows = []
    for index, group in enumerate(groups):
        for run in group.runs:
            last = {name: _last(run, name) for name in wanted}
            speeds = [row["seconds"] for row in run.timing if "seconds" in row]
            rows.append(
                {
                    "group": index,
                    "label": group.label,
                    "name": run.name,
                    "seed": run.seed,
                    "step": run.step,
                    "steps": run.steps,
                    "seconds": float(np.median(speeds)) if speeds else None,
                    "values": list(last.values()),
                }
            )
    return {"metrics": wanted, "rows": rows}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _last(run: runs.Run, name: str) -> float | None:
    """As `_settled`, of one run; None where it has no such value."""
    values = [row[name] for row in run.metrics if row.get(name) is not None]
    return float(_settled(name, np.asarray([values]))[0, 0]) if values else None


def show(value: float | None) -> str:
    if value is None or not np.isfinite(value):
        return "–"
    return quantity(value) if value >= 1e4 else number(value)


# --- samples ----------------------------------------------------------------------------------------------------------


def _samples(groups: Sequence[runs.Group]) -> list[Mapping[str, Any]]:
    """Prompts, those of most groups and runs first: [{prompt, columns: [[{run, step, text, facts, before}, …], …]}]"""
    found: dict[str, list[list[Mapping[str, Any]]]] = {}
    for index, group in enumerate(groups):
        for run in group.runs:
            for row, before in _of_run(run):
                columns = found.setdefault(_text(row.get("prompt", "")), [[] for _ in groups])
                columns[index].append(
                    {
                        "run": run.name,
                        "step": row["step"],
                        "text": _text(row.get("completion", "")),
                        "facts": _facts(row),
                        "before": before and _text(before.get("completion", "")),
                    }
                )
    order = sorted(found, key=lambda prompt: -sum(bool(column) for column in found[prompt]))
    return [{"prompt": prompt, "columns": found[prompt]} for prompt in order[:PROMPTS]]


def _of_run(run: runs.Run) -> list[tuple[Mapping[str, Any], Mapping[str, Any] | None]]:
    """(the sample of a prompt at the last step that has one, that at the first or None), one for each prompt."""
    last = {row.get("prompt"): row for row in run.samples if row["step"] == run.samples[-1]["step"]}
    first = {row.get("prompt"): row for row in run.samples if row["step"] == run.samples[0]["step"]}
    apart = bool(run.samples) and run.samples[0]["step"] < run.samples[-1]["step"]
    return [(row, first.get(prompt) if apart else None) for prompt, row in last.items()]


_CONTROL = dict.fromkeys((*range(9), *range(11, 32), 127, *range(0x202A, 0x202F), *range(0x2066, 0x206A)))


def _text(value: Any) -> str:
    """Without control characters, those of the writing direction included: they would reach beyond their text."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.translate(_CONTROL)


def _facts(row: Mapping[str, Any]) -> list[str]:
    """What else the row says, its reward first."""
    plain = {k: v for k, v in row.items() if k not in ("step", "phase", "prompt", "completion")}
    names = sorted(plain, key=lambda name: (name != "reward", name))
    return [f"{name} {show(v) if type(v := plain[name]) in (int, float) else _text(v)}" for name in names]


# --- the page ---------------------------------------------------------------------------------------------------------


def _render(**content: Any) -> str:
    style, script, template = ((HERE / f"compare.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html"))
    for i in range(len(content["groups"])):
        dashed = f" .swatch.g{i} {{ background: var(--dashes); }}" if i >= len(plots.COLORS) else ""
        style += f".g{i} {{ --group: {overlays.color(i)}; }}{dashed}\n"
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"show": show, "duration": duration}
    return environment.from_string(template).render(style=style, script=script, policy=policy, **content)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
