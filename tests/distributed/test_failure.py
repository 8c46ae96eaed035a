"""What becomes of the other processes where one fails, is killed, or is told to stop."""

import os
import re
import signal
import time

import jax
import pytest

from rljax import distributed, tracking
from tests.distributed import cases, pair
from tests.test_programs import state_bits, wait_for_record

LOST = "10"  # seconds after which a silent process is lost
FILE = """
import jax
from rljax import offline, train

def steady(peak, steps):
    return lambda count: peak

def moody(peak, steps):
    def at(count):
        logged = not isinstance(count, jax.core.Tracer)  # outside the compiled update
        if logged and int(count) == 3 and jax.process_index() == {moody}:
            raise RuntimeError("the schedule is ill")
        return peak
    return at

experiment = offline.SFT(
    model={model!r}, data={texts!r}, schedule={schedule}, steps=400, batch=4, max_prompt=16, max_completion=16,
    learning_rate=1e-4, eval_every=200, eval_rows=4, save_every=200, samples=1, sample_tokens=2,
    checks=False, out={out!r},
)
"""

EXCHANGE = """
from rljax import hosts, sharding

def main():
    hosts.connected(sharding.make_mesh())
    for step in range(1_000_000):
        hosts.most(step)
        if step == 3:
            print("exchanged", flush=True)
"""


@pytest.fixture
def started(small, tmp_path):
    """started(…): two processes of one run, begun, and its folder. They are gone when the test is."""
    running, texts = [], cases.texts(tmp_path)

    def start(*options, schedule="steady", moody=1, after=1, **variables):
        text = FILE.format(model=str(small), texts=texts, out=str(tmp_path), schedule=schedule, moody=moody)
        file = pair.files(tmp_path, {"run": text})["run"]
        variables = {"RLJAX_TIMEOUT": LOST, "RLJAX_CACHE": str(tmp_path / "cache"), **variables}
        running[:] = pair.start(pair.rljax("run", file, *options), tmp_path / "said", devices=1, **variables)
        if after:
            wait_for_record(tmp_path / "run", after, running[0])
        return running, tmp_path / "run"

    yield start
    pair.end(running)


def said(folder, process):
    return (folder.parent / "said" / f"said.{process}").read_text()


@pytest.mark.long  # test_runs.py has the second
@pytest.mark.parametrize("ill", [0, 1])
def test_what_fails_on_one_process_ends_both_with_its_reason(started, ill):
    running, folder = started(schedule="moody", moody=ill, after=0)  # it may end before it has written a step
    assert pair.wait(running, 180) == [1, 1]
    for process in (0, 1):
        reason = rf"rljax: process {ill} failed: \S+/run\.py:\d+ in at: RuntimeError: the schedule is ill"
        assert re.search(reason, said(folder, process))
        assert "Traceback" not in said(folder, process)  # the line in the user's file says more
        assert "Gloo All" not in said(folder, process)  # that the other was gone is not the reason


def ends_in_time(running, lost):
    running[lost].send_signal(signal.SIGKILL)
    began = time.monotonic()
    found = pair.wait(running, 60)
    assert found[lost] == -signal.SIGKILL
    assert found[1 - lost] not in (None, 0)
    assert time.monotonic() - began < int(LOST) + 10


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other_in_time(tmp_path):
    """The second, between two exchanges with the first."""
    file = pair.files(tmp_path, {"exchange": EXCHANGE})["exchange"]
    running = pair.start(pair.rljax("run", file), tmp_path / "said", devices=1, RLJAX_TIMEOUT=LOST)
    try:
        deadline = time.monotonic() + 200
        while "exchanged" not in said(tmp_path / "run", 0):
            assert running[0].poll() is None, pair.said(tmp_path / "said")
            assert time.monotonic() < deadline, pair.said(tmp_path / "said")
            time.sleep(0.05)
        ends_in_time(running, 1)
    finally:
        pair.end(running)
    assert "(stopped sending heartbeats):\n1" in said(tmp_path / "run", 0)


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_of_a_run_that_is_killed_ends_the_other_in_time(started, lost):
    running, folder = started()
    ends_in_time(running, lost)
    reason = "leader task was preempted/died" if lost == 0 else "(stopped sending heartbeats):\n1"
    assert reason in said(folder, 1 - lost)


@pytest.mark.long  # test_runs.py sends one of them a signal
def test_sigterm_to_all_saves_and_the_same_command_resumes_to_the_same_bits(started):
    running, folder = started("--steps", "60", "--name", "stopped", after=0)
    wait_for_record(folder.parent / "stopped", 5, running[0])
    for process in running:
        process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert pair.wait(running, 180) == [143, 143]
    assert time.monotonic() - began < 20
    stopped = max(int(path.name) for path in (folder.parent / "stopped/checkpoints").iterdir() if path.name.isdecimal())
    assert 5 <= stopped < 60
    for name in ("stopped", "whole"):
        running, _ = started("--steps", "60", "--name", name, after=0)
        assert pair.wait(running, 240) == [0, 0], pair.said(folder.parent / "said")
        if name == "stopped":
            assert f"resumed at step {stopped}" in said(folder, 0)
    assert state_bits(folder.parent / "stopped") == state_bits(folder.parent / "whole")
    rows = [tracking.read_rows(folder.parent / name / "metrics.jsonl") for name in ("stopped", "whole")]
    assert rows[0] == rows[1]


def test_one_ordinary_process_stays_alone(monkeypatch):
    """No cluster is waited for, no network asked, and nothing set up."""
    for name in list(os.environ):
        if name.startswith(("RLJAX_", "SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("it connects"))
    began = time.monotonic()
    distributed.initialize()
    assert time.monotonic() - began < 0.2
    assert not jax.distributed.is_initialized()
    with distributed.agreement() as agreed:
        assert agreed(3, None) is None
        assert agreed(4, "SIGTERM") == "SIGTERM"
    distributed.end_all(ValueError("no"), 2)  # comes back


@pytest.mark.parametrize(
    "variables",
    [
        {"RLJAX_PROCESSES": "2"},
        {"RLJAX_PROCESSES": "2", "RLJAX_COORDINATOR": "here", "RLJAX_PROCESS_ID": "0"},
        {"RLJAX_PROCESSES": "two", "RLJAX_COORDINATOR": "here:1", "RLJAX_PROCESS_ID": "0"},
        {"RLJAX_PROCESSES": "2", "RLJAX_COORDINATOR": "here:1", "RLJAX_PROCESS_ID": "2"},
    ],
)
def test_half_said_is_refused(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="RLJAX_COORDINATOR=HOST:PORT"):
        distributed.initialize()


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "a[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        (SLURM, 2),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, 1),  # a shell in an allocation
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, 1),  # a batch script
        ({"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_SIZE": "3"}, 3),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, 1),
        (SLURM | {"RLJAX_PROCESSES": "1"}, 1),
    ],
)
def test_clusters_are_found_by_what_they_set(monkeypatch, variables, count):
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *where, **_: asked.append(where))
    monkeypatch.setattr(distributed, "_listen_for_failures", lambda: None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert asked == ([] if count == 1 else [(None, count, None)])
