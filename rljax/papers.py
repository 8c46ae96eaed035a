"""Reproductions of papers: criteria, what was measured against them, verdicts, and pages that show it.

A reproduction is a file with a docstring (paper, claim, set-up, what it can show, criterion, figures of a run) and

    def reproduce(*, seeds: int, quick: bool) -> Result

`rljax reproduce` runs them and writes a page for each, and a gallery.
"""

from __future__ import annotations

import datetime
import inspect
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from rljax import plots, report
from rljax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Check(NamedTuple):
    """A claim, when it holds, what was measured, and whether it does."""

    claim: str
    criterion: str
    measured: str
    holds: bool


class Result(NamedTuple):
    checks: Sequence[Check]
    plots: Mapping[str, Figure] = {}  # caption -> figure


class Reproduced(NamedTuple):
    """A reproduction that has run."""

    name: str
    title: str
    text: str  # the rest of its docstring
    result: Result
    seconds: float

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.result.checks)


def at_most(claim: str, what: str, values: Any, bound: float) -> Check:
    """Whether the mean over seeds is at most `bound`. values: one number, or one per seed."""
    return Check(claim, f"{what} ≤ {_number(bound)}", _measured(values), bool(np.mean(values) <= bound))


def at_least(claim: str, what: str, values: Any, bound: float) -> Check:
    """Whether the mean over seeds is at least `bound`."""
    return Check(claim, f"{what} ≥ {_number(bound)}", _measured(values), bool(np.mean(values) >= bound))


def near(claim: str, what: str, values: Any, target: float, tolerance: float) -> Check:
    """Whether the mean over seeds is within `tolerance` of `target`."""
    holds = bool(abs(np.mean(values) - target) <= tolerance)
    return Check(claim, f"{what} = {_number(target)} ± {_number(tolerance)}", _measured(values), holds)


def _measured(values: Any) -> str:
    """The mean, and in brackets the seeds."""
    values = np.atleast_1d(np.asarray(values, float))
    mean = _number(float(values.mean()))
    return mean if len(values) == 1 else f"{mean} ({', '.join(_number(float(value)) for value in values)})"


def _number(value: float) -> str:
    return f"{value:.4g}"


def figure(rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (4.4, 3.2), **shared: Any) -> Any:
    """(figure, its axes [rows columns]) in the style of all plots; size: inches of a panel."""
    from matplotlib.figure import Figure

    with plots.style():
        made = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        axes = made.subplots(rows, columns, squeeze=False, **shared)
    return made, axes


def band(axis: Any, x: Any, values: Any, label: str, color: str, **how: Any) -> None:
    """The mean over seeds, values [seeds x], in a band from the smallest to the largest."""
    values = np.atleast_2d(values)
    axis.plot(x, values.mean(0), color=color, label=label, **how)
    if len(values) > 1:
        axis.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)


# --- running ----------------------------------------------------------------------------------------------------------


def find(names: Sequence[str], folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of these reproductions, all for none. UserError for a name that is none, with those that are."""
    files = {file.stem: file for file in sorted(folder.glob("[!_]*.py"))}
    if not files:
        raise UserError(f"there are no reproductions in {folder}: give the folder with --folder, experiments/papers")
    unknown = [name for name in names if name not in files]
    if unknown:
        raise UserError(f"there is no reproduction {unknown[0]!r}; there are {', '.join(files)}")
    return [files[name] for name in names] if names else list(files.values())


def run(file: pathlib.Path, load: Callable[[pathlib.Path], ModuleType], *, seeds: int, quick: bool) -> Reproduced:
    """Run a reproduction."""
    module = load(file)
    if not hasattr(module, "reproduce"):
        raise UserError(f"{file} is no reproduction: it defines no function reproduce(*, seeds, quick)")
    start = time.perf_counter()
    result = module.reproduce(seeds=seeds, quick=quick)
    title, _, text = (inspect.getdoc(module) or file.stem).partition("\n")
    return Reproduced(file.stem, title.rstrip("."), text.strip("\n"), result, time.perf_counter() - start)


def text_table(checks: Sequence[Check]) -> str:
    """A row for each check, in columns."""
    rows = [("claim", "criterion", "measured", "verdict")]
    rows += [(check.claim, check.criterion, check.measured, _verdict(check.holds)) for check in checks]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _verdict(holds: bool) -> str:
    return "pass" if holds else "FAIL"


# --- pages ------------------------------------------------------------------------------------------------------------


def write_page(done: Reproduced, folder: pathlib.Path, *, how: str) -> pathlib.Path:
    """FOLDER/name.md with its plots beside it. how: the command."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [[*map(report.escape, check[:3]), f"**{_verdict(check.holds)}**"] for check in done.result.checks]
    parts = [f"# {done.title}", f"```text\n{done.text}\n```", "## Verdict"]
    parts.append(report.table(("claim", "criterion", "measured", ""), rows))
    for i, (caption, drawn) in enumerate(done.result.plots.items()):
        name = f"{done.name}-{i + 1}.png" if len(done.result.plots) > 1 else f"{done.name}.png"
        drawn.savefig(folder / name, dpi=130)
        parts.append(f"![{report.escape(caption)}]({name})\n\n{report.escape(caption)}")
    parts.append(f"{done.seconds:.0f} s for `{how}`, {_machine()}.")
    page = folder / f"{done.name}.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page


def write_gallery(folder: pathlib.Path) -> pathlib.Path:
    """FOLDER/README.md: all pages that are there, with their verdicts and a picture of each."""
    rows = []
    for page in sorted(folder.glob("*.md")):
        if page.name == "README.md":
            continue
        text = page.read_text()
        passed, failed = text.count("| **pass** |"), text.count("| **FAIL** |")
        verdict = f"{passed} of {passed + failed} pass" if failed else f"all {passed} pass"
        pictures = sorted(folder.glob(f"{page.stem}*.png"))
        shown = f"[![]({pictures[0].name})]({page.name})" if pictures else ""
        rows.append([f"[{text.partition(chr(10))[0].lstrip('# ')}]({page.name})", verdict, shown])
    head = "# Reproduced papers\n\n`rljax reproduce` runs them, judges them and writes these pages.\n\n"
    gallery = folder / "README.md"
    gallery.write_text(head + report.table(("claim", "criteria", ""), rows) + "\n")
    return gallery


def _machine() -> str:
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"{date}, {os.cpu_count()} × {platform.machine()}, {jax.default_backend()}, jax {jax.__version__}"
