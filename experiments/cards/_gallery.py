"""docs/cards.md out of the cards: python experiments/cards/_gallery.py

A card is an experiment file whose docstring has fields, a name and its text. `Plan` quotes what `rljax plan` printed:
commands, and under each the lines that matter.
"""

from __future__ import annotations

import ast
import pathlib
import re
from typing import Any

from rljax import cli

FOLDER = pathlib.Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "cards.md"
FIELDS = ("Paper", "Model", "Data", "Hardware", "Run", "Expected", "Settings", "Shape", "Plan")  # what every card says
SECONDS = {"µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
INTRODUCTION = """# Reproduction cards

Full-size runs of papers, for those who have the machines: ordinary experiment files in `experiments/cards/` with the
data sets, models and hyper-parameters of the papers. **None of them has been run at full size here.** What is checked:
that each takes two steps on a random small model of its family and rows in the format of its data set
(`tests/experiments/test_cards.py`), and what the compiler says of the slice it is planned for (`rljax plan`, see
[scaling](scaling.md)). Times are at best, memory is of a device.

Every figure has its source. *[unverified]* marks what could not be checked against a paper's text or code; *ours* what
no source states. Data are read from the Hugging Face hub (`pip install -e ".[datasets]"`), or from files in the same
format: `--data FOLDER`, or `--data.source FOLDER` where a function makes the rows. The steps of a pipeline find each
other under `runs/`, as their *Then* says: start every pipeline in a folder of its own.

`python experiments/cards/_plans.py` makes the plans again, `python experiments/cards/_gallery.py` this page of them.
"""


def cards(folder: pathlib.Path = FOLDER) -> list[pathlib.Path]:
    """The files that define an experiment."""
    return sorted(path for path in folder.glob("[a-z]*.py") if "\nexperiment = " in path.read_text())


def read(path: pathlib.Path) -> tuple[str, dict[str, str]]:
    """(title, {field: text}) of a card; lines are joined, but those of Plan. ValueError for a missing field."""
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    title, _, body = doc.partition("\n\n")
    found = {}
    for block in re.split(r"\n(?=\S)", body):
        name, text = block[:10].strip(), re.sub(r"(?m)^ {10}", "", block[10:])
        found[name] = text.strip() if name == "Plan" else " ".join(text.split())
    missing = [name for name in FIELDS if not found.get(name)]
    if missing:
        raise ValueError(f"{path.name}: the card does not say {', '.join(missing)}")
    return title, found


def shape(run: Any) -> str:
    """The settings that a plan depends on."""
    groups = f" × {run.group}" if getattr(run, "group", 1) > 1 else ""
    return (
        f"batch {run.batch}{groups}, {run.max_prompt} + {run.max_completion} tokens, microbatches {run.microbatches}, "
        f"remat {run.remat}, {run.dtype}"
    )


def planned(plan: str) -> list[tuple[str, str, str]]:
    """[(model and slice, a step at best, memory of a device)] of the plans that a card quotes.

    Of several functions it is the sum of their times, and the largest memory. What is not known is "—": all of a plan
    that is "not made yet", and the time of one that does not fit.
    """
    rows = []
    for quoted in plan.split("rljax plan ")[1:]:
        text = " ".join(quoted.split())
        if text.endswith("not made yet"):
            rows.append(("—", "—", "—"))
            continue
        head = re.search(r": ([\d.,]+(?: \w+)?) parameters on (\S+),", text)
        times = re.findall(r"at best ([\d.,]+) (µs|ms|s|min),", text)
        memory = re.findall(r": fits, ([\d.]+) GiB of ([\d.]+) GiB free", text)
        over = re.search(r"does not fit: needs ([\d.]+) GiB of ([\d.]+) GiB", text)
        if head is None or not (over or (memory and len(times) == len(memory))):
            raise ValueError(f"these are not the lines of a plan: {text[:80]!r}")
        where = f"{head[1]} on {head[2]}"
        if over:
            rows.append((where, "—", f"{float(over[1]):.1f} of {float(over[2]):.1f} GiB: does not fit"))
            continue
        step = sum(float(number.replace(",", "")) * SECONDS[unit] for number, unit in times)
        needed, limit = max((float(limit) - float(free), float(limit)) for free, limit in memory)
        rows.append((where, f"{step:.2g} s", f"{needed:.1f} of {limit:.1f} GiB"))
    return rows


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def short(text: str) -> str:
    """The first clause of a field, for the table, with the mark if anything in it is unverified."""
    clause = re.split(r"; | \(|\. |\.$", text)[0]
    return f"{clause} *[unverified]*" if "[unverified" in text and "[unverified" not in clause else clause


def page() -> str:
    """docs/cards.md."""
    columns = ["card", "paper", "model", "data", "hardware", "expected", "planned for", "a step, at best", "memory"]
    table, sections = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"], []
    for path in cards():
        title, says = read(path)
        plans = ["<br>".join(column) for column in zip(*planned(says["Plan"]), strict=True)]
        paper = ", ".join(re.findall(r"arXiv:[\d.]+", says["Paper"])[:1])
        told = [short(says[name]) for name in ("Hardware", "Expected")]
        row = [f"[{path.stem}](#{path.stem})", paper, says["Model"].split(" ")[0], f"`{says['Data']}`", *told, *plans]
        table.append(f"| {' | '.join(map(cell, row))} |")
        fields = [f"| {name} | {cell(text)} |" for name, text in says.items() if name not in ("Plan", "Run", "Then")]
        commands = "\n".join([says["Run"], *([f"# then {says['Then']}"] if "Then" in says else [])])
        sections.append(
            f"## {path.stem}\n\n{title}\n\n```bash\n{commands}\n```\n\n| | |\n|---|---|\n"
            + "\n".join(fields)
            + f"\n\n```\n{says['Plan']}\n```\n"
        )
    return "\n".join([INTRODUCTION, *table, "", *sections])


def drifted(path: pathlib.Path) -> str | None:
    """What a card says of its shape and should not; None where it says what its experiment is."""
    said, is_ = read(path)[1]["Shape"], shape(cli.import_file(path).experiment)
    return None if said == is_ else f"{path.name} says {said!r}, and its experiment is {is_!r}: plan it again"


if __name__ == "__main__":
    problems = [problem for problem in map(drifted, cards()) if problem]
    if problems:
        raise SystemExit("\n".join(problems))
    PAGE.write_text(page())
    print(PAGE)
