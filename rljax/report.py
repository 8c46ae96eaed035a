"""report.md of a run, with plots: written at the end, or at any time from whatever is in the run's directory.

`write_report(folder)` reads experiment.json, manifest.json, metrics.jsonl, timing.jsonl and samples.jsonl, of which any
may be missing. Texts of users and models are escaped: they cannot change the page.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rljax import notes, plots
from rljax.errors import UserError
from rljax.manifest import as_written, moved, read_object
from rljax.metrics import define
from rljax.progress import duration, number, plain, quantity
from rljax.tracking import read_numbers, read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


def write_report(
    folder: str | os.PathLike[str],
    *,
    sections: Sequence[tuple[str, str]] = (),
    figures: Sequence[tuple[str, Figure | str | os.PathLike[str]]] = (),
) -> pathlib.Path:
    """Write `<folder>/report.md` and `<folder>/plots/*.png`; the path of the first.

    sections: (title, Markdown) of the experiment, after the results. figures: (title, a matplotlib Figure or the path
    of an image), after the curves. In a multi-host run, call it on process 0.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no run at {folder}; give the directory of a run, such as runs/NAME")
    path = folder / "report.md"
    with as_written(folder):
        text = _page(folder, sections, figures)
    path.write_text(text, encoding="utf-8")
    return path


def _page(folder: pathlib.Path, sections: Sequence[tuple[str, str]], figures: Sequence[tuple[str, Any]]) -> str:
    metrics, timing = read_numbers(folder / "metrics.jsonl"), read_numbers(folder / "timing.jsonl")
    samples = read_rows(folder / "samples.jsonl")
    pages = plots.draw_curves(metrics, timing) + [(title, figure) for title, figure in figures]
    parts = [
        f"# {escape(folder.resolve().name)}",
        *(f"**Step {row['step']}.** {escape(row.get('note', ''))}" for row in read_rows(folder / "failures.jsonl")),
        "" if sections and not metrics else _summary(metrics, timing, read_object(folder / "experiment.json")),
        _results(metrics, read_object(folder / "experiment.json")),
        _notes(notes.read(folder)),
        *(f"## {escape(title)}\n\n{text.strip()}" for title, text in sections),
        _curves(folder, pages),
        _samples(samples),
        _experiment(read_object(folder / "experiment.json")),
        _environment(read_object(folder / "manifest.json")),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_MEANING = {ord(character): f"&#{ord(character)};" for character in "&<>\\`*_[]|~$#"}
_MEANING |= dict.fromkeys((*range(9), *range(11, 32), 127)) | {ord("\t"): " ", ord("\n"): "<br>"}


def escape(text: Any, limit: int | None = None) -> str:
    """Text as it is, in a Markdown paragraph or table cell: nothing in it is markup; line breaks become <br>."""
    text = plain(text).replace("\r\n", "\n").strip("\n")
    if limit is not None and len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-(limit // 2) :]}"
    return re.sub(r"(?<=\w)&#95;(?=\w)", "_", text.translate(_MEANING))  # between letters it marks nothing up


def _name(metric: str) -> str:
    return f"`{metric}`" if re.fullmatch(r"[\w/.\-]+", metric) else escape(metric)


def _value(value: float) -> str:
    return quantity(value) if value >= 1e4 else number(value)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that are escaped already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _summary(metrics: Rows, timing: Rows, experiment: Mapping[str, Any] | None) -> str:
    if not metrics:
        return "No metrics were recorded."
    facts = [f"{len(metrics)} records up to step {metrics[-1]['step']}"]
    kind, model = (experiment or {}).get("kind"), (experiment or {}).get("model")
    facts = ([f"{escape(kind)} of {escape(model)}"] if kind and model else []) + facts
    speeds = [row["tokens_per_second"] for row in timing if "tokens_per_second" in row]
    seconds = [row["seconds"] for row in timing if "seconds" in row]
    if seconds:
        facts.append(f"{duration(statistics.median(seconds))} a step")
    if speeds:
        facts.append(f"{quantity(statistics.median(speeds))} tokens/s (medians)")
    lines = [", ".join(facts) + "."]
    for name, content in ((experiment or {}).get("contents") or {}).items():
        if isinstance(content, Mapping) and content.get("origin"):
            lines.append(f"**{escape(name)}**: {escape(content['origin'])} (weights {escape(content.get('weights'))}).")
    skipped = [row["step"] for row in metrics if row.get("updates/skipped")]
    if skipped:
        listed = ", ".join(map(str, skipped[:10])) + (" …" if len(skipped) > 10 else "")
        lines.append(f"**Updates were left out** at {len(skipped)} steps ({listed}), since they were not finite.")
    for name in sorted({name for row in metrics for name in row}):
        steps = [row["step"] for row in metrics if name in row and row[name] is None]
        if steps:
            listed = ", ".join(map(str, steps[:10])) + (" …" if len(steps) > 10 else "")
            lines.append(
                f"**{_name(name)} was not finite** at {len(steps)} of {len(metrics)} records (steps {listed})."
            )
    return "\n\n".join(lines)


def _results(metrics: Rows, experiment: Mapping[str, Any] | None) -> str:
    """First, last and best value of every metric, held-out ones first."""
    names = sorted({name for row in metrics for name in row} - {"step"}, key=lambda name: (name[:5] != "eval/", name))
    lines = []
    for name in names:
        points = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
        if not points:
            continue
        definition = define(name, experiment)
        better = definition.better if definition else ""
        best = min(points, key=lambda point: (-point[1] if better == "higher" else point[1], point[0]))
        arrow = {"higher": "↑", "lower": "↓"}.get(better, "")
        text = definition.text + (f" [{definition.unit}]" if definition.unit else "") if definition else ""
        lines.append(
            [
                f"{_name(name)} {arrow}".strip(),
                f"{_value(points[0][1])} ({points[0][0]})",
                f"{_value(points[-1][1])} ({points[-1][0]})",
                f"{_value(best[1])} ({best[0]})" if better else "",
                escape(text),
            ]
        )
    if not lines:
        return ""
    head = ["metric", "first (step)", "last (step)", "best (step)", "what it is"]
    return "## Results\n\nArrows: which way is better.\n\n" + table(head, lines)


def _curves(folder: pathlib.Path, pages: Sequence[tuple[str, Any]]) -> str:
    if not pages:
        return ""
    lines = ["## Curves"]
    for title, figure in pages:
        if not isinstance(figure, (str, os.PathLike)):
            path = folder / "plots" / (re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") + ".png")
            path.parent.mkdir(exist_ok=True)
            figure.savefig(path, dpi=110, metadata={"Software": None})
        else:
            path = pathlib.Path(figure)
        link = pathlib.PurePath(os.path.relpath(path, folder)).as_posix()
        lines.append(f"### {escape(title)}\n\n![{escape(title)}](<{link}>)")
    return "\n\n".join(lines)


def _samples(rows: Rows, limit: int = 8) -> str:
    """What the model wrote before and after, side by side: by the rows' `phase`, or else at the first and last step."""
    if not rows:
        return ""
    if any("phase" in row for row in rows):
        before = [row for row in rows if row.get("phase") == "before"]
        after = [row for row in rows if row.get("phase") == "after"]
        after = [row for row in after if row["step"] == after[-1]["step"]]  # it may have ended before, and gone on
    else:
        first, last = rows[0]["step"], rows[-1]["step"]
        before, after = [[row for row in rows if row["step"] == step] for step in (first, last)]
        before = before if first < last else []
    if not after:
        before, after = [], before or list(rows)
    pairs, left = [], list(before)
    for row in after:
        match = next((other for other in left if other.get("prompt") == row.get("prompt")), None)
        if match is not None:
            left.remove(match)
        if match is not None or not before:
            pairs.append((match, row))
    if not pairs:
        return _samples(after, limit)
    return "## Samples\n\n" + _sample_table(pairs[:limit], rewarded=any("reward" in row for row in after))


def _sample_table(pairs: Sequence[tuple[Mapping[str, Any] | None, Mapping[str, Any]]], rewarded: bool) -> str:
    first, last = pairs[0]
    stages = ([f"before (step {first['step']})"] if first else []) + [
        f"after (step {last['step']})" if first else "completion"
    ]
    lines = []
    for pair in pairs:
        shown = [row for row in pair if row is not None]
        cells = [escape(row.get("completion", ""), 600) for row in shown]
        if rewarded:
            cells.append(" → ".join(_reward(row.get("reward")) for row in shown))
        lines.append([escape(shown[-1].get("prompt", ""), 400), *cells])
    return table(["prompt", *stages, *(["reward"] if rewarded else [])], lines)


def _reward(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else escape("–" if value is None else value)


def _notes(kept: Mapping[str, Sequence[str]]) -> str:
    lines = [f"- {escape(line)}" for found in kept.values() for line in found]
    return "## What to know\n\n" + "\n".join(lines) if lines else ""


def _experiment(experiment: Any) -> str:
    if experiment is None:
        return ""
    text = json.dumps(experiment, indent=2, ensure_ascii=False)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"## Experiment\n\n{fence}json\n{text}\n{fence}"


def _environment(manifest: Mapping[str, Any] | None) -> str:
    """The last start of the run, and when the others were."""
    sessions = (manifest or {}).get("sessions", [])
    if not sessions:
        return ""
    last = sessions[-1]
    steps = [session.get("step") for session in sessions]
    moves = [
        f"step {step}: {other}"
        for step, before, now in zip(steps[1:], sessions, sessions[1:], strict=False)
        if step is not None and (other := moved(before, now))
    ]
    accepted = [f"step {session.get('step')}: {text}" for session in sessions for text in session.get("accepted", [])]
    facts = {
        "seed": (manifest or {}).get("seed"),
        "started": ", ".join(str(session.get("started")) for session in sessions),
        "command": last.get("command"),
        "code": _commit(last.get("git")),
        "devices": ", ".join(f"{count} × {kind}" for kind, count in last.get("devices", {}).items()),
        "processes": last.get("processes"),
        "platform": last.get("platform"),
        "versions": ", ".join(f"{name} {version}" for name, version in last.get("versions", {}).items()),
        "resumed on another system": "; ".join(moves) or None,
        "settings that changed on the way": "; ".join(accepted) or None,
    }
    return "## Environment\n\n" + table(
        ["", ""], [[name, escape(value)] for name, value in facts.items() if value is not None]
    )


def _commit(git: Mapping[str, Any] | None) -> str | None:
    return None if git is None else f"{git['commit'][:12]}{' with changes' if git['dirty'] else ''}"
