"""A run that was begun by so many processes on this mesh goes on with another number of them on another mesh."""

import signal

import pytest

from rljax import cli, tracking
from tests.distributed import pair, same
from tests.test_online import same_run
from tests.test_programs import wait_for_record

BEGUN = {"dpo": {"tensor": 4}, "dapo": {"fsdp": 2, "context": 2}}  # by 2 processes × 2 devices
TAKEN_OVER = {"dpo": {"fsdp": 2, "tensor": 4}, "dapo": {"fsdp": 8}}  # by 1 process × 8
pytestmark = pytest.mark.long  # test_runs.py does it with one program


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """Runs of one process, of two, and of two that went on with what one had begun."""
    folder = tmp_path_factory.mktemp("runs")
    files = same.files(small, folder, BEGUN)
    for name in BEGUN:
        same.begun(same.alone(files[name], folder / "one"), folder / "from_one")
    calls = [same.call(files[name], folder / "two", mesh) for name, mesh in BEGUN.items()]
    calls += [same.call(files[name], folder / "from_one", mesh) for name, mesh in BEGUN.items()]
    said = pair.run(pair.several(*calls), folder / "said", seconds=500, devices=2, RLJAX_CACHE=str(folder / "cache"))
    assert said.count("resumed at step 2") == len(BEGUN)
    return files, folder


@pytest.mark.parametrize("name", BEGUN)
def test_two_processes_find_what_one_finds(runs, name):
    _, folder = runs
    same.assert_same(folder / "one" / name, folder / "two" / name, tolerance=5e-3)


@pytest.mark.parametrize("name", BEGUN)
def test_two_processes_go_on_with_what_one_has_begun(runs, name):
    _, folder = runs
    same.assert_same(folder / "one" / name, folder / "from_one" / name, tolerance=5e-3, after=2)


@pytest.mark.parametrize("name", BEGUN)
def test_one_process_goes_on_with_what_two_have_begun(runs, name, capsys):
    files, folder = runs
    run = same.begun(folder / "two" / name, folder / "from_two")
    assert cli.main(same.call(files[name], folder / "from_two", TAKEN_OVER[name])) == 0
    assert "resumed at step 2" in capsys.readouterr().out
    same.assert_same(folder / "one" / name, run, tolerance=5e-3, after=2)


def test_a_reward_that_fails_on_one_host_ends_all_with_its_reason(small, tmp_path):
    """All save, say why and leave at once; the same command goes on to the bits of a run that had no such trouble."""
    files = same.files(small, tmp_path, ["moody"])
    ill, well = (same.call(files["moody"], tmp_path / out, {"data": 2, "fsdp": 2}) for out in ("ill", "well"))
    pair.run(pair.several(ill), tmp_path / "said", seconds=300, status=[2, 2], devices=2)
    for number in (0, 1):
        said = (tmp_path / "said" / f"said.{number}").read_text()
        assert "process 1 of 2: the reward ill failed: it raised KeyError: 'the judge is ill'" in said
        assert "Traceback" not in said
    said = pair.run(pair.several(ill, well), tmp_path / "said", seconds=300, devices=2)
    assert said.count("resumed at step 1") == 1
    same_run(tmp_path / "ill" / "moody", tmp_path / "well" / "moody")
    same.assert_same(same.alone(files["moody"], tmp_path / "one"), tmp_path / "well" / "moody", tolerance=5e-3)


def test_a_signal_to_one_process_stops_both_and_one_process_goes_on(small, tmp_path):
    files = same.files(small, tmp_path, ["long"])
    command = pair.several(same.call(files["long"], tmp_path / "two", {"fsdp": 4}))
    run = tmp_path / "two" / "long"
    running = pair.start(command, tmp_path / "said", devices=2)
    try:
        wait_for_record(run, 3, running[0])
        running[1].send_signal(signal.SIGTERM)
        found = pair.wait(running, 200)
    finally:
        pair.end(running)
    assert found == [143, 143], pair.said(tmp_path / "said")
    stopped = int(max((path.name for path in (run / "checkpoints").iterdir() if path.name.isdecimal()), key=int))
    assert 3 < stopped < 25
    same.alone(files["long"], tmp_path / "two")
    same.assert_same(same.alone(files["long"], tmp_path / "one"), run, after=stopped)
    assert [row["step"] for row in tracking.read_rows(run / "metrics.jsonl")] == list(range(26))
