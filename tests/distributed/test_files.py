"""Checkpoints of Hugging Face and Orbax, read and written by two processes."""

import json

import jax
import numpy as np
import pytest

from rljax import checkpoint
from rljax.models import hf
from tests.distributed import checkpoint_files, pair
from tests.models.folders import contents
from tests.models.make_fixtures import FOLDER

SHARE = {"fsdp": 0.51, "both": 0.51, "tensor": 0.75}  # a half and the norms; four heads are not divided by eight


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    pair.run(pair.module("checkpoint_files", str(FOLDER / "llama"), str(folder)), folder / "said", seconds=300)
    return folder, [json.loads((folder / f"seen.{i}.json").read_text()) for i in (0, 1)]


@pytest.mark.parametrize("name", checkpoint_files.MESHES)
def test_a_process_reads_what_its_devices_hold(written, name):
    """Not a byte more, and the array is the stored one all the same."""
    _, seen = written
    for one in seen:
        assert one[name]["same"]
        assert one[name]["read"] == one[name]["held"]
        assert one[name]["held"] < SHARE[name] * one["size"]


@pytest.mark.parametrize("name", checkpoint_files.MESHES)
def test_a_process_has_the_rows_of_its_devices(written, name):
    """Half of them, or all where the tensor axis spans both processes; each row is judged once."""
    halves = [list(range(8)), list(range(8, 16))]
    everything = list(range(16))
    assert [one[name]["rows"] for one in written[1]] == ([everything] * 2 if name == "tensor" else halves)
    assert [one[name]["judged"] for one in written[1]] == halves


@pytest.mark.parametrize("name", checkpoint_files.MESHES)
def test_what_two_processes_export_is_what_was_loaded(written, name):
    assert contents(written[0] / name) == contents(FOLDER / "llama")


@pytest.mark.parametrize("name", checkpoint_files.MESHES)
def test_what_two_processes_save_is_restored_anywhere(written, name):
    folder, seen = written
    assert all(one[name]["restored"] for one in seen)
    _, expected = hf.load(FOLDER / "llama")
    with checkpoint.Checkpoints(folder / f"orbax_{name}", read_only=True) as checkpoints:
        restored, extra = checkpoints.restore(1, jax.eval_shape(lambda: expected))
    assert extra == {"mesh": checkpoint_files.MESHES[name]}
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
