"""Programs that learn from data sets: two processes find what one finds, on meshes that share rows and that do not."""

import numpy as np
import pytest

from rljax import tracking
from tests.distributed import pair, same

MESHES = {  # 2 processes × 4 devices; context=8 gives both of them all rows
    "sft": {"fsdp": 8},
    "reward": {"fsdp": 4, "context": 2},
    "dpo_fresh": {"data": 2, "fsdp": 2, "tensor": 2},
    "kto": {"context": 8},
}
pytestmark = pytest.mark.long  # test_runs.py has a part of it


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """(the experiment files, the folder of the runs of two processes, what they said)"""
    folder = tmp_path_factory.mktemp("runs")
    files = same.files(small, folder, MESHES)
    calls = [same.call(files[name], folder / "two", mesh) for name, mesh in MESHES.items()]
    said = pair.run(pair.several(*calls), folder / "said", seconds=540, RLJAX_CACHE=str(folder / "cache"))
    return files, folder, said


@pytest.mark.parametrize("name", MESHES)
def test_two_processes_find_what_one_finds(runs, name):
    """Losses, metrics, held-out metrics and samples, step by step."""
    files, folder, _ = runs
    one = same.alone(files[name], folder / "one")
    same.assert_same(one, folder / "two" / name)
    losses = [row["loss"] for row in tracking.read_rows(one / "metrics.jsonl") if "loss" in row]
    assert max(np.diff(losses)) != 0  # something is learned that could have come out differently


def test_only_the_first_process_speaks_and_writes(runs):
    _, folder, _ = runs
    second = (folder / "said" / "said.1").read_text().splitlines()
    assert [line for line in second if line.strip() and "Gloo" not in line and "peer ranks" not in line] == []
    for name in MESHES:
        assert len(list((folder / "two" / name / "tensorboard").iterdir())) == 1
        steps = [row["step"] for row in tracking.read_rows(folder / "two" / name / "metrics.jsonl")]
        assert steps == [0, 1, 2, 3, 4]
