"""The tables in docstrings are those of the records, and how both are made."""

import json
import pathlib

import pytest

from rljax import cli

FOLDER = pathlib.Path(__file__).parents[2] / "experiments"
RECORDS = sorted((FOLDER / "measured").glob("*.json"))


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield cli.import_file(FOLDER / "_measure.py")


RECORD = {
    "command": "rljax run experiments/ppo_tiny.py --model stories260K --seed SEED",
    "commit": "abcdef012345",
    "date": "2026-01-01",
    "versions": {"jax": "1.2"},
    "processor": "a CPU",
    "seconds": 77,
    "columns": ["before", "after", "KL (nats)"],
    "seeds": {"0": [0.5, 5.0, 19.0], "1": [0.75, 6.0, 21.0]},
}


def test_a_table_by_hand(tool):
    """Standard error of two numbers: half their distance."""
    assert tool.table("ppo_tiny", RECORD).splitlines() == [
        "    --seed    before         after          KL (nats)",
        "    0         0.50           5.00           19",
        "    1         0.75           6.00           21",
        "    mean      0.62 ± 0.12    5.50 ± 0.50    20 ± 1",
        "    (2026-01-01, commit abcdef012345, jax 1.2, a CPU, 77 s a seed)",
    ]


def test_the_first_the_last_and_the_mean_of_the_last(tool):
    rows = [{"step": k, "objective/kl": float(k), **({"eval/reward": k / 10} if k % 5 == 0 else {})} for k in range(11)]
    rows[10]["objective/kl"] = None
    assert tool.values(rows, tool.STORY) == pytest.approx([0.0, 1.0, (5 + 6 + 7 + 8 + 9) / 5])


@pytest.mark.parametrize("after", ["", "\n\nMore is said.\n"])
def test_only_the_table_of_a_docstring_changes(tool, after):
    source = (
        f'"""Words.\n\n    --seed    before\n    0         0.1\n{after.removeprefix(chr(10))}"""\n\nx = "    --seed "\n'
    )
    made = tool.told(source, "    --seed    new\n    0         0.2")
    assert made == source.replace("    --seed    before\n    0         0.1", "    --seed    new\n    0         0.2")


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_docstring_holds_its_record(tool, path):
    record, source = json.loads(path.read_text()), (FOLDER / f"{path.stem}.py").read_text()
    assert tool.told(source, tool.table(path.stem, record)) == source, "run python experiments/_measure.py"
    assert all(len(numbers) == len(record["columns"]) for numbers in record["seeds"].values())
    assert record["columns"] == [column.title for column in tool.COLUMNS[path.stem]]


def test_every_experiment_of_the_table_exists(tool):
    for name in tool.COLUMNS:
        assert tool.BEGIN in (FOLDER / f"{name}.py").read_text().split('"""')[1], name
