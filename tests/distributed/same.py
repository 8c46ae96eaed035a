"""One process's run of an experiment file, and whether another run of it found the same."""

import functools
import pathlib
import shutil

import numpy as np

from rljax import cli, tracking
from tests.distributed import cases, pair

# What is not continuous: at step 0 all pairs tie but for rounding, and a ratio may lie on the edge of the clip range.
TIES = {"rewards/accuracies", "eval/rewards/accuracies", "policy/clipfrac_avg"}


def files(model, folder: pathlib.Path, names) -> dict[str, str]:
    """The experiment file of each case, with its data and the reward model of some beside it."""
    cases.judge(model, folder)
    cases.pairs(folder)
    cases.prompts(folder)
    cases.texts(folder)
    text = functools.partial(cases.FILE.format, model=str(model), folder=str(folder))
    return pair.files(folder / "files", {name: text(name=name) for name in names})


def call(file: str, out: pathlib.Path, mesh: dict[str, int], *options: str) -> list[str]:
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | mesh
    given = [word for axis, size in sizes.items() for word in (f"--mesh.{axis}", str(size))]
    return ["run", file, "--out", str(out), *given, *options]


def alone(file: str, out: pathlib.Path, *options: str) -> pathlib.Path:
    """The same file in this process, on one device; the run's folder."""
    assert cli.main(call(file, out, {}, *options)) == 0
    return out / pathlib.Path(file).stem


def copied(run: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(run, out / run.name))


def begun(run: pathlib.Path, out: pathlib.Path, step: int = 2) -> pathlib.Path:
    """A copy of a run as it was when only its checkpoint of `step` had been written."""
    copy = copied(run, out)
    later = [
        folder for folder in (copy / "checkpoints").iterdir() if folder.name.isdecimal() and int(folder.name) > step
    ]
    assert later
    for folder in later:
        shutil.rmtree(folder)
    return copy


def assert_same(one: pathlib.Path, other: pathlib.Path, *, tolerance: float = 2e-3, after: int = -1) -> None:
    """The same metrics to rounding, the same samples to the letter, of the steps after this one."""
    records = [_after(run / "metrics.jsonl", after) for run in (one, other)]
    assert len(records[0]) == len(records[1]) > 0
    for mine, theirs in zip(*records, strict=True):
        assert mine.keys() == theirs.keys()
        names = sorted(mine.keys() - TIES)
        values = [[float("nan") if record[k] is None else record[k] for k in names] for record in (mine, theirs)]
        message = f"{other.name}, step {mine['step']}: {names}"
        np.testing.assert_allclose(values[1], values[0], rtol=tolerance, atol=tolerance, err_msg=message)
    said = [
        [(r["step"], r["prompt"], r["completion"]) for r in _after(run / "samples.jsonl", after)]
        for run in (one, other)
    ]
    assert said[0] == said[1]
    looked = [
        [(r["step"], r["row"], r["tokens"]) for r in _after(run / "evidence.jsonl", after)] for run in (one, other)
    ]
    assert looked[0] == looked[1]


def _after(path: pathlib.Path, step: int) -> list[dict]:
    return [row for row in tracking.read_rows(path) if row["step"] > step]
