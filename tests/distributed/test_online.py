"""Programs whose data the policy writes: two processes sample, judge and learn what one does."""

import pytest

from tests.distributed import pair, same

MESHES = {  # 2 processes × 2 devices; tensor=4 gives both of them all rows, of which each judges a half
    "ppo": {"fsdp": 2, "tensor": 2},
    "grpo_device": {"data": 2, "fsdp": 2},
    "both": {"tensor": 4},
    "episodes": {"fsdp": 4},
}
pytestmark = pytest.mark.long  # test_runs.py has a part of it


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    files = same.files(small, folder, MESHES)
    calls = [same.call(files[name], folder / "two", mesh) for name, mesh in MESHES.items()]
    pair.run(pair.several(*calls), folder / "said", seconds=540, devices=2, RLJAX_CACHE=str(folder / "cache"))
    return files, folder


@pytest.mark.parametrize("name", MESHES)
def test_two_processes_find_what_one_finds(runs, name):
    """Tokens, rewards, metrics, held-out completions and what is kept of single tokens, step by step."""
    files, folder = runs
    same.assert_same(same.alone(files[name], folder / "one"), folder / "two" / name, tolerance=5e-3)
