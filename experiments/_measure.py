"""Measure experiments again and write what came out into their docstrings.

    python experiments/_measure.py                                   # the tables of the docstrings, from the records
    python experiments/_measure.py ppo_tiny rloo --model path/to/stories260K
    python experiments/_measure.py dpo_sentiment --seeds 0 1 2 3 4

Each seed is a run of the file from the command line. The record, `experiments/measured/NAME.json`, holds the command,
the commit, versions, machine, seconds and values; the table in the docstring is made of it, so that nothing there is
older than the record says.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

FOLDER = pathlib.Path(__file__).parent
RECORDS = FOLDER / "measured"
BEGIN = "    --seed "  # of a table; it ends at the next empty line


class Column(NamedTuple):
    title: str
    metric: str
    last: int  # the mean of so many last records; 0: the first one
    digits: int = 2


STORY = (
    Column("before", "eval/reward", 0),
    Column("after", "eval/reward", 1),
    Column("KL (nats)", "objective/kl", 5, 0),
)
COLUMNS: dict[str, tuple[Column, ...]] = {
    "dpo_sentiment": (
        Column("reward before", "eval/reward/mean", 0, 3),
        Column("reward after", "eval/reward/mean", 1, 3),
        Column("KL (nats)", "eval/kl", 1, 1),
        Column("accuracy on held-out pairs", "eval/rewards/accuracies", 1),
    ),
    "ppo_sentiment": (
        Column("reward before", "eval/reward", 0, 3),
        Column("reward after", "eval/reward", 1, 3),
        Column("KL (nats)", "objective/kl", 1, 1),
    ),
    "grpo_arithmetic": tuple(
        Column(f"{kind} sums {when}", f"eval/accuracy/{kind}", last)
        for kind in ("training", "held-out")
        for when, last in (("before", 0), ("after", 1))
    ),
    "calculator": (Column("before", "eval/reward", 0), Column("after", "eval/reward", 1), STORY[2]._replace(digits=1)),
    "number_guessing": STORY[:2],
    **dict.fromkeys(
        ["cispo", "dapo", "dr_grpo", "gspo", "online_dpo", "ppo_tiny", "raft", "reinforce_plus_plus", "remax", "rloo"],
        STORY,
    ),
}


def values(metrics: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> list[float]:
    """One number a column, of the records of a run."""
    found = []
    for column in columns:
        points = [row[column.metric] for row in metrics if row.get(column.metric) is not None]
        if not points:
            raise SystemExit(
                f"no {column.metric} was recorded, only {sorted({name for row in metrics for name in row})}"
            )
        found.append(points[0] if column.last == 0 else statistics.fmean(points[-column.last :]))
    return found


def run(name: str, seed: int, options: Sequence[str], out: str) -> tuple[list[float], float, dict[str, Any]]:
    """(values, seconds, the start as its manifest has it) of one seed."""
    command = [sys.executable, "-m", "rljax", "run", str(FOLDER / f"{name}.py"), "--seed", str(seed), "--out", out]
    start = time.monotonic()
    subprocess.run([*command, "--name", f"{name}-{seed}", *options], check=True)
    seconds, folder = time.monotonic() - start, pathlib.Path(out) / f"{name}-{seed}"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    session = json.loads((folder / "manifest.json").read_text())["sessions"][-1]
    return values(metrics, COLUMNS[name]), seconds, session


def measure(name: str, seeds: Sequence[int], options: Sequence[str], shown: Sequence[str]) -> dict[str, Any]:
    """The record. shown: the options as the record has them, without paths of this machine."""
    with tempfile.TemporaryDirectory() as out:
        found = [run(name, seed, options, out) for seed in seeds]
    session = found[0][2]
    return {
        "command": shlex.join(["rljax", "run", f"experiments/{name}.py", *shown, "--seed", "SEED"]),
        "commit": (session.get("git") or {}).get("commit", "")[:12],
        "date": time.strftime("%Y-%m-%d"),
        "versions": session["versions"],
        "devices": session["devices"],
        "processor": processor(),
        "seconds": round(statistics.median(seconds for _, seconds, _ in found)),
        "columns": [column.title for column in COLUMNS[name]],
        "seeds": {str(seed): numbers for seed, (numbers, _, _) in zip(seeds, found, strict=True)},
    }


def processor() -> str:
    """The name of this machine's processor, as far as it is known."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "a CPU")


def table(name: str, record: Mapping[str, Any]) -> str:
    """Rows of seeds, their mean with its standard error, and where it was measured."""
    columns = COLUMNS[name]
    rows = [[seed, *map(_shown, columns, numbers)] for seed, numbers in record["seeds"].items()]
    if len(rows) > 1:
        by_column = zip(*record["seeds"].values(), strict=True)
        rows.append(["mean", *map(_mean, columns, by_column)])
    head = ["--seed", *record["columns"]]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "    ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
    jax = record["versions"]["jax"]
    lines.append(
        f"({record['date']}, commit {record['commit']}, jax {jax}, {record['processor']}, {record['seconds']} s a seed)"
    )
    return "\n".join("    " + line for line in lines)


def _shown(column: Column, value: float) -> str:
    return f"{value:.{column.digits}f}"


def _mean(column: Column, numbers: Sequence[float]) -> str:
    error = statistics.stdev(numbers) / len(numbers) ** 0.5
    return f"{_shown(column, statistics.fmean(numbers))} ± {_shown(column, error)}"


def told(source: str, text: str) -> str:
    """A file's source with this table in the place of the one in its docstring."""
    _, doc, _ = source.split('"""', 2)
    before, begin, rest = doc.partition(BEGIN)
    if not begin:
        raise SystemExit(f"there is no table in the docstring: a line that begins with {BEGIN!r}")
    _, _, after = rest.partition("\n\n")
    new = f"{before}{text}\n" + (f"\n{after}" if after else "")
    return source.replace(doc, new, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *COLUMNS], help="of experiments; all records without one")
    parser.add_argument("--model", help="a folder, for experiments of stories260K")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    for name in asked.names:
        given = ["--model", asked.model] if asked.model else []
        shown = ["--model", pathlib.Path(asked.model).name] if asked.model else []
        record = measure(name, asked.seeds, given, shown)
        RECORDS.mkdir(exist_ok=True)
        (RECORDS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    for path in sorted(RECORDS.glob("*.json")):
        file = FOLDER / f"{path.stem}.py"
        file.write_text(told(file.read_text(), table(path.stem, json.loads(path.read_text()))))


if __name__ == "__main__":
    main()
