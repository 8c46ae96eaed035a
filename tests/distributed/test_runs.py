"""Two processes find what one finds, take over from one, stop together and fail together: one pair of them for all.

Processes take long to start, so what is looked at here are calls that they make one after the other. Other programs,
other meshes and other ways to fail are in the files beside this one, with RLJAX_ALL_TESTS.
"""

import json
import re
import signal
import time

import jax
import numpy as np
import pytest

from rljax import checkpoint, tracking
from rljax.models import hf
from tests.distributed import checkpoint_files, pair, same
from tests.models.folders import contents
from tests.models.make_fixtures import FOLDER

MESHES = {  # 2 processes × 2 devices
    "ppo": {"fsdp": 2, "tensor": 2},
    "episodes": {"fsdp": 4},
}
SHORT = ["--steps", "2", "--samples", "1", "--no-checks"]  # the second step is made of a first one
BEGUN = 10  # the step at which two processes take over a run


@pytest.fixture(scope="module")
def pair_of(single, tmp_path_factory):
    """(files, folder): what two processes did in one go, and what they said."""
    folder = tmp_path_factory.mktemp("runs")
    files = same.files(single, folder, [*MESHES, "long", "ill_at_3"])
    same.alone(files["long"], folder / "one", "--save-every", str(BEGUN), "--keep", "9")
    same.begun(folder / "one" / "long", folder / "from_one", BEGUN)
    calls = [same.call(files[name], folder / "two", mesh, *SHORT) for name, mesh in MESHES.items()]
    calls += [["checkpoints", str(FOLDER / "llama"), str(folder / "checkpoints")]]
    calls += [same.call(files["long"], folder / "from_one", {"fsdp": 4}, "--save-every", str(BEGUN), "--keep", "9")]
    calls += [same.call(files["long"], folder / "two", {"fsdp": 4})]
    calls += [same.call(files["ill_at_3"], folder / "two", {"fsdp": 4})]
    statuses = [0] * (len(calls) - 2) + [143, 1]
    command = pair.several(*calls, statuses=statuses)
    running = pair.start(command, folder / "said", devices=2, RLJAX_CACHE=str(folder / "cache"))
    try:
        run, deadline = folder / "two" / "long", time.monotonic() + 1200
        while not any(row["step"] >= 3 for row in tracking.read_rows(run / "metrics.jsonl")):
            assert running[0].poll() is None, pair.said(folder / "said")
            assert time.monotonic() < deadline, pair.said(folder / "said")
            time.sleep(0.05)
        running[1].send_signal(signal.SIGTERM)
        found = pair.wait(running, 200)
    finally:
        pair.end(running)
    assert found == [1, 1], pair.said(folder / "said")  # of the last call, which failed
    return files, folder


def said(folder, process):
    return (folder / "said" / f"said.{process}").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_two_processes_find_what_one_finds(pair_of, name):
    """Tokens, rewards, metrics, held-out metrics, samples and what is kept of single tokens, step by step."""
    files, folder = pair_of
    one = same.alone(files[name], folder / "one", *SHORT)
    same.assert_same(one, folder / "two" / name, tolerance=5e-3)
    first, second = [row["loss"] for row in tracking.read_rows(one / "metrics.jsonl") if "loss" in row]
    assert first != second  # something is learned that could have come out differently


@pytest.mark.slow
def test_only_the_first_process_speaks_and_writes(pair_of):
    _, folder = pair_of
    heard = [line for line in said(folder, 1).splitlines() if line.strip() and "peer ranks" not in line]
    assert [line.split(":")[0] for line in heard] == ["SIGTERM", "rljax"]  # the signal that it got, and why it ended
    for name in MESHES:
        assert len(list((folder / "two" / name / "tensorboard").iterdir())) == 1
        assert [row["step"] for row in tracking.read_rows(folder / "two" / name / "metrics.jsonl")] == [0, 1, 2]


@pytest.mark.slow
def test_devices_are_connected_before_anything_is_loaded(pair_of):
    """Gloo says when it connects devices; it would not wait for a process that is not there yet."""
    _, folder = pair_of
    runs = re.split(r"(?m)^loading .*$", said(folder, 0))
    assert len(runs) > len(MESHES)
    assert runs[0].count("peer ranks") > 0
    for after in runs[1:]:  # up to the end of the run; then the next one makes its mesh
        assert "peer ranks" not in after.partition("\nreport: ")[0]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_one_process_goes_on(pair_of):
    files, folder = pair_of
    run = same.copied(folder / "two" / "long", folder / "stopped")
    stopped = int(max((path.name for path in (run / "checkpoints").iterdir() if path.name.isdecimal()), key=int))
    assert 3 <= stopped < 25
    same.alone(files["long"], folder / "stopped")
    same.assert_same(folder / "one" / "long", run, after=stopped)
    assert [row["step"] for row in tracking.read_rows(run / "metrics.jsonl")] == list(range(26))


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_has_begun(pair_of):
    _, folder = pair_of
    assert said(folder, 0).count(f"resumed at step {BEGUN}") == 1
    same.assert_same(folder / "one" / "long", folder / "from_one" / "long", after=BEGUN)


@pytest.mark.slow
def test_what_fails_on_one_process_ends_both_with_its_reason(pair_of):
    _, folder = pair_of
    for process in (0, 1):
        reason = r"rljax: process 1 failed: \S+/cases\.py:\d+ in at: RuntimeError: the schedule is ill"
        assert re.search(reason, said(folder, process))
        assert "Traceback" not in said(folder, process)  # the line in the user's file says more
        assert "Gloo All" not in said(folder, process)  # that the other was gone is not the reason


# --- checkpoints ------------------------------------------------------------------------------------------------------

SHARE = {"fsdp": 0.51, "both": 0.51, "tensor": 0.75}  # a half and the norms; two heads of keys are not divided by four


@pytest.fixture
def written(pair_of):
    folder = pair_of[1] / "checkpoints"
    return folder, [json.loads((folder / f"seen.{i}.json").read_text()) for i in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", checkpoint_files.MESHES)
def test_a_process_reads_what_its_devices_hold(written, name):
    """Not a byte more, and the array is the stored one all the same."""
    _, seen = written
    for one in seen:
        assert one[name]["same"]
        assert one[name]["read"] == one[name]["held"]
        assert one[name]["held"] < SHARE[name] * one["size"]


@pytest.mark.slow
@pytest.mark.parametrize("name", checkpoint_files.MESHES)
def test_a_process_has_the_rows_of_its_devices(written, name):
    """Half of them, or all where the tensor axis spans both processes; each row is judged once."""
    halves = [list(range(8)), list(range(8, 16))]
    everything = list(range(16))
    assert [one[name]["rows"] for one in written[1]] == ([everything] * 2 if name == "tensor" else halves)
    assert [one[name]["judged"] for one in written[1]] == halves


@pytest.mark.slow
@pytest.mark.parametrize("name", checkpoint_files.MESHES)
def test_what_two_processes_export_is_what_was_loaded(written, name):
    assert contents(written[0] / name) == contents(FOLDER / "llama")


@pytest.mark.slow
@pytest.mark.parametrize("name", checkpoint_files.MESHES)
def test_what_two_processes_save_is_restored_anywhere(written, name):
    folder, seen = written
    assert all(one[name]["restored"] for one in seen)
    _, expected = hf.load(FOLDER / "llama")
    with checkpoint.Checkpoints(folder / f"orbax_{name}", read_only=True) as checkpoints:
        restored, extra = checkpoints.restore(1, jax.eval_shape(lambda: expected))
    assert extra == {"mesh": checkpoint_files.MESHES[name]}
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
