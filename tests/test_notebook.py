"""docs/new_loss.ipynb runs, and what it shows is what it gives."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jax
import pytest

from rljax import compilation, data, offline, program, progress
from rljax.manifest import write_json
from tests import compiler
from tests.notebook import code_cells, execute

ROOT = pathlib.Path(__file__).parent.parent
FILE = ROOT / "docs" / "new_loss.ipynb"
NOTEBOOK = json.loads(FILE.read_text())
CELLS = code_cells(NOTEBOOK)
TABLE = re.compile(r"^(\w+) +(loss=.+?) +(-?\d+\.\d+) +seeds \[ *(-?\d+\.\d*)", re.MULTILINE)


def printed(cell):
    return "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")


def pictures(cell):
    return [out for out in cell["outputs"] if "image/png" in out.get("data", {})]


def table(text):
    """{(metric, group): the value of the first seed}"""
    return {(metric, group): float(first) for metric, group, _, first in TABLE.findall(text)}


def numbers(text):
    return [float(x) for x in re.findall(r"\d+\.?\d*", text)]


def test_it_was_executed_from_top_to_bottom_and_nothing_failed():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [out for cell in CELLS for out in cell["outputs"]]
    assert {out["output_type"] for out in outputs} <= {"stream", "display_data", "execute_result"}
    assert {out.get("name", "stdout") for out in outputs} == {"stdout"}
    assert not [cell for cell in CELLS if "print(" in "".join(cell["source"]) and not printed(cell)]
    assert sum(len(pictures(cell)) for cell in CELLS) == 3
    assert "\x1b" not in FILE.read_text()
    assert "\\u001b" not in FILE.read_text()
    assert FILE.stat().st_size < 300_000


def test_its_words_and_its_figures_agree():
    words = "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
    shown = "".join(printed(cell) for cell in CELLS)
    for value in re.findall(r"= (\d\.\d{4})\$", words):
        assert any(abs(float(value) - float(found)) < 1e-4 for found in re.findall(r"\d\.\d{5,}", shown)), value
    for anchor in re.findall(r"\]\(#([^)]+)\)", words):
        assert f"## {anchor.replace('-', ' ')}\n" in words
    for link in re.findall(r"\]\((\.\./[^)]+)\)", words):
        assert (FILE.parent / link).exists()


def test_no_animation_where_somebody_only_says_it_is_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as Jupyter's kernels do
    line = progress.Line(2)
    line.update(1, {"loss": 1.0}, {})
    line.close()
    assert capsys.readouterr().out == "step 1/2  loss 1\n"


def pretended(experiment):
    """What `offline.run` leaves of a run for the cells that compare runs."""
    offline.check(experiment)
    folder = pathlib.Path(experiment.out) / experiment.name
    folder.mkdir()
    write_json(folder / "experiment.json", program.describe(experiment))
    value = -1.0 if "dpop" in experiment.name else -4.0
    names = ("chosen", "rejected", "margins", "accuracies")
    rows = [{"step": step, **{f"eval/rewards/{name}": value * step for name in names}} for step in (0, 20, 40, 60)]
    data.write_jsonl(folder / "metrics.jsonl", rows)
    return 0


def test_all_but_its_training_gives_what_it_shows(stories, tmp_path, monkeypatch):
    (tmp_path / "stories260K").symlink_to(stories)  # the folder beside the notebook that its first cell looks for
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(offline, "run", pretended)
    monkeypatch.setattr(compilation, "keep_programs", lambda: None)
    monkeypatch.setattr(compilation, "hide_false_alarms", lambda: None)
    with jax.numpy_rank_promotion("allow"):
        now = execute(NOTEBOOK, {"SEEDS": [0]})
    assert len(now) == len(CELLS)
    for cell, (text, last) in zip(CELLS, now, strict=True):
        assert (last == "Figure") == any(out["output_type"] == "execute_result" for out in cell["outputs"])
        if table(text):
            assert table(text).keys() == table(printed(cell)).keys()
            assert "above all of DPO: True" in text
        elif "report: " not in printed(cell):
            assert numbers(text) == pytest.approx(numbers(printed(cell)), rel=1e-4)
    assert [len(table(text)) for text, _ in now if table(text)] == [8]


@pytest.mark.long
def test_it_runs_and_shows_what_it_gives(stories, tmp_path):
    (tmp_path / "stories260K").symlink_to(stories)  # the folder beside the notebook that its first cell looks for
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "agg",
        "RLJAX_CACHE": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "XLA_FLAGS": compiler.QUICK,
    }
    command = [sys.executable, str(ROOT / "tests" / "notebook.py"), str(FILE), json.dumps({"SEEDS": [0]})]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    now = json.loads(done.stdout.splitlines()[-1])
    assert len(now) == len(CELLS)
    runs, found = [], {}
    for cell, (text, last) in zip(CELLS, now, strict=True):
        assert bool(text) == bool(printed(cell))
        assert (last == "Figure") == any(out["output_type"] == "execute_result" for out in cell["outputs"])
        if "report: " in text:
            runs.append(text)
        elif table(text):
            found = table(text)
            # Sampled texts differ with rounding, and so do the pairs: as far as seeds are apart.
            assert found == pytest.approx(table(printed(cell)), abs=2.5)
            assert "above all of DPO: True" in text
            assert "above all of DPO: True" in printed(cell)
        else:
            assert numbers(text) == pytest.approx(numbers(printed(cell)), rel=1e-4)
    assert len(runs) == 1
    assert runs[0].count("✓") == printed(next(cell for cell in CELLS if "✓" in printed(cell))).count("✓") == 6
    assert len(found) == 8
