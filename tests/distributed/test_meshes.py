"""The same experiment on one device and on eight, whatever the mesh: losses, metrics, samples, single tokens."""

import os

import pytest

from rljax import cli
from tests.distributed import same

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "three": {"data": 2, "fsdp": 2, "tensor": 2},
    "context": {"fsdp": 2, "tensor": 2, "context": 2},
    "wide": {"tensor": 4, "context": 2},
    "long": {"data": 2, "context": 4},
}
PROGRAMS = ("packed", "reward", "dpo_fresh", "kto", "ppo", "grpo_device", "both", "dapo", "online_dpo", "raft")
SHORT = ("--steps", "2", "--no-checks", "--samples", "2", "--max-completion", "6")


FEW = {"packed": "context"}  # which no run of two processes in test_runs.py has


def meshes(program: str) -> list[str]:
    """One; with RLJAX_ALL_TESTS all for all programs (ten minutes)."""
    return list(MESHES) if os.environ.get("RLJAX_ALL_TESTS") else [FEW[program]]


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name in FEW else pytest.mark.long) for name in PROGRAMS]
)
def alone(request, small, tmp_path_factory):
    """(the file of an experiment, its run on one device)."""
    folder = tmp_path_factory.mktemp(request.param)
    (file,) = same.files(small, folder, [request.param]).values()
    return file, same.alone(file, folder / "one", *SHORT)


@pytest.mark.slow
def test_a_mesh_changes_nothing(alone, tmp_path):
    file, one = alone
    for mesh in meshes(one.name):
        assert cli.main(same.call(file, tmp_path / mesh, MESHES[mesh], *SHORT)) == 0
        same.assert_same(one, tmp_path / mesh / one.name, tolerance=5e-3)
