"""Runs side by side: which of them are seeds of one setting, and what they measured, with an interval over seeds."""

from __future__ import annotations

import os
import pathlib
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from rljax import plots
from rljax.errors import UserError
from rljax.failures import visible
from rljax.manifest import as_written, flat, read_object
from rljax.tracking import read_numbers, read_rows

Rows = Sequence[Mapping[str, Any]]

SAME = (
    "seed",
    "name",
    "out",
    "keep",
    "checks",
    "wandb",
    "profile",
    "accept_changes",
)  # runs that differ in these alone are one group
SEED = r"[-_. ]*(seed|s)?[-_. =]*\d+$"  # how a name may end that says a seed
INTERVALS = {
    "confidence": "95% confidence interval of the mean over runs (Student's t)",
    "range": "from the smallest run to the largest",
}


class Run(NamedTuple):
    """What a run has left on the disk so far."""

    name: str  # of its folder; longer where two are called alike
    settings: Mapping[str, str]  # experiment.json, flat
    surroundings: Mapping[str, str]  # code, versions and devices of its last start
    seed: int | None
    steps: int | None  # planned
    metrics: Rows
    timing: Rows
    samples: Rows

    @property
    def step(self) -> int:
        """The last that is recorded; 0 where nothing is."""
        return self.metrics[-1]["step"] if self.metrics else 0


class Group(NamedTuple):
    """Runs that differ in seed or name alone."""

    label: str
    runs: tuple[Run, ...]


class Curve(NamedTuple):
    """A metric over the steps that all runs of a group have. A run that does not have the metric at all is left out."""

    steps: np.ndarray  # [k]
    values: np.ndarray  # [n k], a row for each run; NaN where a value was not finite


class Band(NamedTuple):
    """[k] each; NaN where a run's value is. Of a single run, low and high are its values."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


# --- from the disk ----------------------------------------------------------------------------------------------------


def read(folders: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """What is in these folders, which may still be written to. One whose run ended before its first record is passed
    over, and said. UserError for one that is no run or is given twice.
    """
    paths = [path for path in map(pathlib.Path, folders) if not _unbegun(path)]
    if not paths:
        raise UserError(f"no run has recorded anything yet in {', '.join(map(str, folders))}")
    for index, path in enumerate(paths):
        if not (path / "metrics.jsonl").is_file():
            inside = sorted(str(file.parent) for file in path.glob("*/metrics.jsonl"))
            hint = f"; it holds runs: give {inside[0]} and so on" if inside else ""
            raise UserError(f"{path} is not the folder of a run: it has no metrics.jsonl{hint}")
        if path.resolve() in [other.resolve() for other in paths[:index]]:
            raise UserError(f"{path} is given twice: it would count as two seeds")
    found = []
    for path, name in zip(paths, _names(paths), strict=True):
        with as_written(path):
            found.append(_read(path, name))
    return found


def _unbegun(path: pathlib.Path) -> bool:
    """Whether a run was meant to be here and ended before it had recorded a step."""
    begun = ("experiment.json", ".lock", "selfcheck")
    found = path.is_dir() and not (path / "metrics.jsonl").exists() and any((path / name).exists() for name in begun)
    if found:
        print(f"rljax: {visible(str(path))} is passed over: its run ended before its first record", file=sys.stderr)
    return found


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    """The ends of the paths, as short as they are still told apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read(path: pathlib.Path, name: str) -> Run:
    experiment, manifest = read_object(path / "experiment.json") or {}, read_object(path / "manifest.json") or {}
    session = (manifest.get("sessions") or [{}])[-1]
    git = session.get("rljax_git") or session.get("git")
    found = {f"{package} version": str(version) for package, version in session.get("versions", {}).items()}
    found["devices"] = ", ".join(f"{count} × {kind}" for kind, count in session.get("devices", {}).items())
    found["code"] = f"{git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else ""
    return Run(
        name=name,
        settings=_settings(experiment, manifest),
        surroundings={key: value for key, value in found.items() if value},
        seed=manifest.get("seed"),
        steps=experiment.get("steps"),
        metrics=read_numbers(path / "metrics.jsonl"),
        timing=read_numbers(path / "timing.jsonl"),
        samples=read_rows(path / "samples.jsonl"),
    )


def _settings(experiment: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, str]:
    """What a run is, flat: where it is known what a path or a name stood for, that, and not the path. (Data that a
    function made may depend on the seed, which makes no other group; the function is there.)
    """
    made = {name for name in ("data",) if not isinstance(experiment.get(name), str)}
    contents = {name: what for name, what in experiment.get("contents", {}).items() if name not in made}
    plain = {name: value for name, value in experiment.items() if name != "contents" and name not in contents}
    changes = [text for session in manifest.get("sessions") or [] for text in session.get("accepted", [])]
    return {**flat({**plain, **contents}), **({"accepted changes": "; ".join(changes)} if changes else {})}


# --- groups -----------------------------------------------------------------------------------------------------------


def group(runs: Sequence[Run], *, ignore: Collection[str] = ()) -> list[Group]:
    """Runs whose settings, models and data are the same but for `SAME` and the fields in `ignore`, in the order of
    their first ones. One that went on with changes is none that had them from the beginning.
    """
    found: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        left_out = {*SAME, *ignore}
        key = {name: value for name, value in run.settings.items() if name.split(".")[0] not in left_out}
        found.setdefault(tuple(sorted(key.items())), []).append(run)
    labels = _labels(list(map(dict, found)), list(found.values()))
    return [Group(label, tuple(members)) for label, members in zip(labels, found.values(), strict=True)]


def _labels(settings: Sequence[Mapping[str, str]], members: Sequence[Sequence[Run]]) -> list[str]:
    """What tells groups apart where that is short, else the names of their runs, without a seed."""
    differing = [name for name, values in table(settings) if len(set(values)) > 1]
    told = [name for name in differing if name.rpartition(".")[2] != "code"]  # a hash, of what has a name beside it
    labels = [", ".join(_short(name, each[name]) for name in told if name in each) for each in settings]
    if not all(labels) or max(map(len, labels)) > 40 or len(set(labels)) < len(labels):
        bare = [{re.sub(SEED, "", run.name) for run in runs} for runs in members]
        labels = [names.pop() if len(names) == 1 else runs[0].name for names, runs in zip(bare, members, strict=True)]
    return labels if len(set(labels)) == len(labels) else [runs[0].name for runs in members]


def _short(name: str, value: str) -> str:
    """loss=dpo_loss for what experiment.json calls loss.function = "rljax.losses.preference.dpo_loss"."""
    text = value.strip('"')
    if name.endswith("function"):
        name, text = name.removesuffix(".function"), text.rpartition(".")[2]
    return f"{name}={text}"


def table(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """[(name, its value in each column; "" where it has none), …]"""
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "") for column in columns]) for name in names]


def differing(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """The settings, and then the versions and devices, that are not the same in all groups (or within one)."""
    columns = []
    for each in groups:
        named: dict[str, dict[str, None]] = {}
        for run in each.runs:
            chosen = {name: value for name, value in run.settings.items() if name.split(".")[0] not in SAME}
            for name, value in {**chosen, **run.surroundings}.items():
                named.setdefault(name, {})[value] = None
        columns.append({name: " / ".join(values) for name, values in named.items()})
    return [(name, values) for name, values in table(columns) if len(set(values)) > 1 or " / " in values[0]]


# --- numbers ----------------------------------------------------------------------------------------------------------


def metrics_of(each: Group) -> set[str]:
    """The metrics that a run of the group has a finite value of."""
    rows = (row for run in each.runs for row in run.metrics)
    return {name for row in rows for name, value in row.items() if value is not None} - plots.COUNTERS


def points(run: Run, metric: str) -> dict[int, float]:
    """{step: value}; NaN where it was not finite."""
    return {row["step"]: np.nan if row[metric] is None else float(row[metric]) for row in run.metrics if metric in row}


def curve(each: Group, metric: str) -> Curve:
    """A metric of a group; no steps where no run has it."""
    return curves(each, (metric,))[0]


def curves(each: Group, metrics: Sequence[str]) -> list[Curve]:
    """Several metrics over the steps, and of the runs, that have all of them."""
    found = [[points(run, metric) for metric in metrics] for run in each.runs]
    found = [of_run for of_run in found if all(of_run)]
    steps = sorted(set.intersection(*(set(one) for of_run in found for one in of_run))) if found else []
    return [
        Curve(np.asarray(steps, int), np.asarray([[of_run[i][step] for step in steps] for of_run in found], float))
        for i in range(len(metrics))
    ]


def smoothed(each: Curve) -> Curve:
    """Every run of a long curve smoothed, as plots do; a short one as it is."""
    if len(each.steps) < plots.LONG:
        return each
    return each._replace(values=np.asarray([plots.smooth(values) for values in each.values]))


def band(values: np.ndarray, interval: str) -> Band:
    """The mean over runs, values [n k], and its interval: a kind of `INTERVALS`."""
    mean, n = values.mean(0), len(values)
    if interval == "range":
        return Band(mean, values.min(0), values.max(0))
    half = stdtrit(n - 1, 0.975) * values.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.zeros_like(mean)
    return Band(mean, mean - half, mean + half)
